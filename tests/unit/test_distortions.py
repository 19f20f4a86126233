"""Distortions of batches against Pillow's of single images, and the draw of them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from edgekd.distortions import DISTORTIONS, Distortions

HEIGHT, WIDTH = 24, 32


def scene() -> Tensor:
    """Smooth uint8 (3, H, W), so that interpolation by either side differs little."""
    down, across = torch.meshgrid(torch.linspace(0, 1, HEIGHT), torch.linspace(0, 1, WIDTH), indexing="ij")
    waves = [torch.sin(4 * down + 2 * across), torch.cos(5 * across), torch.sin(6 * down * across)]
    return (127 + 120 * torch.stack(waves)).to(torch.uint8)


def ours(name: str, strength: float, image: Tensor) -> Tensor:
    made = Distortions(2, (HEIGHT, WIDTH), "cpu")
    made.set(torch.tensor([0, DISTORTIONS.index(name)]), torch.tensor([1.0, strength]))
    return made.apply(image[None].float(), torch.tensor([1]))[0]


def affine(
    across: tuple[float, float, float], down: tuple[float, float, float]
) -> Callable[..., Image.Image]:
    """What Pillow makes of the same pixels to read, about the centre."""
    centre = (WIDTH / 2, HEIGHT / 2)
    rows = []
    for n, (a, b, c) in enumerate((across, down)):
        rows += [a, b, c + centre[n] - a * centre[0] - b * centre[1]]
    return lambda image: image.transform(image.size, Image.Transform.AFFINE, rows, Image.Resampling.BILINEAR)


COS, SIN = math.cos(math.radians(15)), math.sin(math.radians(15))
PILLOW: dict[str, tuple[float, Callable[..., Image.Image]]] = {
    "none": (1.0, lambda image: image),
    "shear-x": (0.5, affine((1, 0.15, 0), (0, 1, 0))),
    "shear-y": (-1.0, affine((1, 0, 0), (-0.3, 1, 0))),
    "translate-x": (0.4, affine((1, 0, 4), (0, 1, 0))),
    "translate-y": (-0.4, affine((1, 0, 0), (0, 1, -3))),
    "rotate": (0.5, affine((COS, -SIN, 0), (SIN, COS, 0))),
    "brightness": (0.5, lambda image: ImageEnhance.Brightness(image).enhance(1.45)),
    "color": (-0.5, lambda image: ImageEnhance.Color(image).enhance(0.55)),
    "contrast": (1.0, lambda image: ImageEnhance.Contrast(image).enhance(1.9)),
    "solarize": (0.0, lambda image: ImageOps.solarize(image, 128)),
    "posterize": (-1.0, lambda image: ImageOps.posterize(image, 4)),
}


@pytest.mark.parametrize("name", DISTORTIONS)
def test_it_does_what_pillow_does(name: str) -> None:
    strength, theirs = PILLOW[name]
    image = scene()

    def pillow(pixels: Tensor) -> Tensor:
        made = theirs(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
        return torch.from_numpy(np.array(made)).permute(2, 0, 1).float()

    found = ours(name, strength, image)
    if name in DISTORTIONS[1:6]:  # which pixels at the border of the moved image are black is a convention
        white = torch.full_like(image, 255)
        whole = (ours(name, strength, white) > 254) & (pillow(white) > 254)
        assert 0.6 < float(whole.float().mean()) < 1
        off = (found - pillow(image)).abs()[whole]
    else:
        off = (found - pillow(image)).abs()
    assert float(off.quantile(0.99)) <= 2
    assert name == "none" or float((found - image).abs().mean()) > 3


def test_a_grey_image_has_no_colour_to_lose() -> None:
    grey = scene()[:1]
    torch.testing.assert_close(ours("color", -1.0, grey), grey.float())


def test_all_kinds_are_drawn_for_their_share_and_come_again() -> None:
    images = scene()[None].float().repeat(400, 1, 1, 1)
    made = [Distortions(400, (HEIGHT, WIDTH), "cpu") for _ in range(2)]
    for each in made:
        each.draw(torch.Generator().manual_seed(0), 0.5)
    first, again = (each.apply(images, torch.arange(400)) for each in made)
    assert torch.equal(first, again)
    changed = float(((first - images).abs().amax((1, 2, 3)) > 0.5).float().mean())
    assert 0.35 < changed < 0.5  # a half, less those whose distortion is none or too weak to see
    assert float(first.min()) >= 0
    assert float(first.max()) <= 255
