"""One random distortion of an image, drawn as TrivialAugment draws them and applied to whole batches."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DISTORTIONS = (
    "none", "shear-x", "shear-y", "translate-x", "translate-y", "rotate",
    "brightness", "color", "contrast", "solarize", "posterize",
)  # fmt: skip
_SHEAR, _TRANSLATE, _ROTATE = 0.3, 10 / 32, math.radians(30)  # at most; translation as a share of the size
_FACTOR = 0.9  # brightness, color and contrast: 1 - 0.9 to 1 + 0.9
_BITS = 4  # that posterizing leaves at least
_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601


class Distortions:
    """A distortion for each sample of a training set: one of `DISTORTIONS`, uniformly, with a strength drawn
    uniformly from its range (TrivialAugment, Müller and Hutter 2021, arXiv:2103.10158, algorithm 1, with the
    narrower ranges that it takes from RandAugment, without auto-contrast, equalize and sharpness).

    All are fixed tensors that `draw` overwrites, so a captured CUDA graph that reads them goes on with the
    distortions drawn last. What a sample does not undergo has the strength that changes nothing.
    """

    def __init__(self, samples: int, size: tuple[int, int], device: torch.device | str) -> None:
        """`size`: height and width in pixels."""
        self._aspect = size[0] / size[1]
        self._grey = torch.tensor(_GREY, device=device).view(1, 3, 1, 1)
        rest = {"move": (2, 3), "brightness": (), "color": (), "contrast": (), "threshold": (), "step": ()}
        self._of = {name: torch.zeros(samples, *shape, device=device) for name, shape in rest.items()}
        self.set(torch.zeros(samples, dtype=torch.int64), torch.zeros(samples))

    def draw(self, generator: torch.Generator, share: float) -> None:
        """A distortion for that share of the samples, none for the others."""
        samples = len(self._of["step"])
        kind = torch.randint(0, len(DISTORTIONS), (samples,), generator=generator)
        strength = 2 * torch.rand(samples, generator=generator) - 1
        spared = torch.rand(samples, generator=generator) >= share
        self.set(kind.masked_fill(spared, 0), strength)

    def set(self, kind: Tensor, strength: Tensor) -> None:
        """Both (samples,). `kind`: int64 index into `DISTORTIONS`; `strength`: -1 to 1, of the greatest."""

        def amount(name: str) -> Tensor:
            return torch.where(kind == DISTORTIONS.index(name), strength, 0.0)

        # A pixel of the result is read from `move` times its place; places run from -1 to 1 on both axes.
        angle = _ROTATE * amount("rotate")
        cos, sin = torch.cos(angle), torch.sin(angle)
        across = (cos, _SHEAR * amount("shear-x") - sin, 2 * _TRANSLATE * amount("translate-x"))
        down = (_SHEAR * amount("shear-y") + sin, cos, 2 * _TRANSLATE * amount("translate-y"))
        scale = torch.tensor([[1, self._aspect, 1], [1 / self._aspect, 1, 1]])
        self._of["move"].copy_(torch.stack([torch.stack(across, 1), torch.stack(down, 1)], 1) * scale)
        for name in ("brightness", "color", "contrast"):
            self._of[name].copy_(1 + _FACTOR * amount(name))
        solarized, posterized = kind == DISTORTIONS.index("solarize"), kind == DISTORTIONS.index("posterize")
        self._of["threshold"].copy_(torch.where(solarized, 128 * (1 - strength), math.inf))
        bits = _BITS + ((8 - _BITS + 0.999) * (strength + 1) / 2).floor()
        self._of["step"].copy_(torch.where(posterized, 2 ** (8 - bits), 0.0))

    def apply(self, pixels: Tensor, index: Tensor) -> Tensor:
        """`pixels`: float (N, C, H, W), 0 to 255, of the samples `index`. What moves into view is black."""
        grid = F.affine_grid(self._of["move"][index], list(pixels.shape), align_corners=False)
        pixels = F.grid_sample(pixels, grid, align_corners=False)
        for name in ("brightness", "contrast", "color"):
            factor = self._of[name][index][:, None, None, None]
            pixels = (factor * pixels + (1 - factor) * self._faded(name, pixels)).clamp(0, 255)
        threshold = self._of["threshold"][index][:, None, None, None]
        pixels = torch.where(pixels >= threshold, 255 - pixels, pixels)
        step = self._of["step"][index][:, None, None, None]
        return torch.where(step > 0, (pixels / step.clamp(min=1)).floor() * step, pixels)

    def _faded(self, name: str, pixels: Tensor) -> Tensor:
        """The image without any brightness, contrast or color."""
        if name == "brightness":
            return torch.zeros_like(pixels)
        grey = pixels
        if pixels.shape[1] == 3:
            grey = (self._grey * pixels).sum(1, keepdim=True)
        return grey.mean((2, 3), keepdim=True) if name == "contrast" else grey
