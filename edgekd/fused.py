"""A forward pass of a network in training mode, without gradients, in fewer trips through memory.

Batch norm in training mode waits for the moments of the whole batch, so each layer writes and reads maps
that no cache holds. Here a run of convolutions, batch norms and ReLUs takes the images a few at a time: only
what a convolution gives is kept of all of them, with its moments, and its norm is applied when the next
convolution reads it. The moments behind a 1x1 convolution that widens a map follow from those in front of it,
``E[Wx] = W E[x]`` and ``Cov[Wx] = W Cov[x] W^T``, so its norm becomes part of its weight. On a GPU, where
launches take longer than small maps, a run is what it was with the fewest launches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CHUNK_BYTES = 2 << 20  # of the widest map of a few images: what the second cache of a core holds
Then = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Link:
    """A convolution that keeps the size or divides it by its stride; the batch norm behind it, which makes a
    bias of the convolution void; and perhaps a ReLU."""

    conv: nn.Conv2d
    norm: nn.BatchNorm2d
    rectified: bool

    @property
    def point(self) -> bool:
        return self.conv.kernel_size == (1, 1) and self.conv.stride == (1, 1) and self.conv.groups == 1

    @property
    def foretold(self) -> bool:
        """Whether the moments in front cost less than those behind."""
        return self.point and 2 * self.conv.in_channels <= self.conv.out_channels

    def convolve(self, maps: Tensor) -> Tensor:
        if self.point:
            return _point(self.conv.weight, maps)
        conv = self.conv
        return F.conv2d(maps, conv.weight, None, conv.stride, conv.padding, groups=conv.groups)

    def affine(self, mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
        """What the norm multiplies with and what it adds, (C,) each."""
        scale = torch.rsqrt(variance.clamp_min(0) + self.norm.eps) * self.norm.weight
        return scale, self.norm.bias - mean * scale


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Within the block, runs of convolution, batch norm and ReLU in the network's sequences compute so.

    Every module is still called: the last of a run gives what the run gives, the others what they are given.
    So hooks see what leaves a run, not what is within; code that calls a layer of a run by itself must not
    be there. A run with a layer that has several places stays as it is. Running statistics do not move.
    """
    changed: list[nn.Module] = []
    places = Counter(child for parent in model.modules() for child in parent.children())
    for sequence in model.modules():
        if not isinstance(sequence, nn.Sequential) or type(sequence).forward is not nn.Sequential.forward:
            continue
        for modules, links in _runs(list(sequence)):
            if len(set(modules)) < len(modules) or any(places[module] > 1 for module in modules):
                continue
            for module in modules:
                module.forward = _same
            modules[-1].forward = partial(_run, modules, links)
            changed += modules
    try:
        yield
    finally:
        for module in changed:
            vars(module).pop("forward", None)


def _same(maps: Tensor) -> Tensor:
    return maps


def _runs(modules: Sequence[nn.Module]) -> Iterator[tuple[Sequence[nn.Module], list[_Link]]]:
    """The runs of a sequence: their modules, and the same as links."""
    links: list[_Link] = []
    first = at = 0
    while at < len(modules):
        link = _link(modules[at : at + 3])
        if link is not None:
            links.append(link)
            at += 2 + link.rectified
            continue
        if links:
            yield modules[first:at], links
        links, first, at = [], at + 1, at + 1
    if links:
        yield modules[first:], links


def _link(modules: Sequence[nn.Module]) -> _Link | None:
    """What a sequence goes on with, if it is one."""
    if len(modules) < 2:
        return None
    conv, norm = modules[:2]
    if not isinstance(conv, nn.Conv2d) or type(norm) is not nn.BatchNorm2d or norm.weight is None:
        return None
    same = all(
        side % 2 == 1 and pad == side // 2 for side, pad in zip(conv.kernel_size, conv.padding, strict=False)
    )
    plain = (
        type(conv).forward is nn.Conv2d.forward and conv.padding_mode == "zeros" and conv.dilation == (1, 1)
    )
    if not same or not plain:
        return None
    return _Link(conv, norm, len(modules) > 2 and type(modules[2]) is nn.ReLU)


def _run(modules: Sequence[nn.Module], links: Sequence[_Link], maps: Tensor) -> Tensor:
    strides = 1
    for link in links:
        strides *= max(link.conv.stride)
    if not all(link.norm.training for link in links) or maps.dim() != 4 or min(maps.shape[2:]) <= strides:
        for module in modules:  # as it is written: a hook may look for the last map larger than a pixel
            del module.forward
            maps = module(maps)
        return maps
    whole = maps.is_cuda or not any(link.foretold for link in links)
    return _launched(links, maps) if whole else _chunked(links, maps)


def _launched(links: Sequence[_Link], maps: Tensor) -> Tensor:
    """Three launches a link."""
    for link in links:
        norm = link.norm
        made = link.convolve(maps)
        maps = F.batch_norm(made, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
        maps = maps.relu_() if link.rectified else maps
    return maps


def _chunked(links: Sequence[_Link], maps: Tensor) -> Tensor:
    """A few images at a time."""
    widest = max(max(link.conv.in_channels, link.conv.out_channels) for link in links)
    images = max(1, _CHUNK_BYTES // (4 * widest * maps.shape[2] * maps.shape[3]))
    parts: Sequence[Tensor] = maps.split(1 << images.bit_length() - 1)  # few sizes: kernels are made for each
    then: Then = _same
    for link in links:
        if link.foretold:
            parts = [then(part) for part in parts]
            weight, shift = _with_norm(link, parts)
            then = partial(_pointed, weight, shift, link.rectified)
            continue
        parts = [link.convolve(then(part)) for part in parts]
        then = partial(_scaled, *link.affine(*_moments(parts)), link.rectified)
    return torch.cat([then(part) for part in parts])


def _point(weight: Tensor, maps: Tensor) -> Tensor:
    """A 1x1 convolution as a product of matrices, (N, C, H, W) to (N, D, H, W)."""
    made = torch.matmul(weight.flatten(1), maps.flatten(2))
    return made.view(len(maps), -1, *maps.shape[2:])


def _pointed(weight: Tensor, shift: Tensor, rectified: bool, maps: Tensor) -> Tensor:
    kernels = weight.expand(len(maps), -1, -1)
    made = torch.baddbmm(shift[:, None], kernels, maps.flatten(2)).view(len(maps), -1, *maps.shape[2:])
    return made.relu_() if rectified else made


def _scaled(scale: Tensor, shift: Tensor, rectified: bool, maps: Tensor) -> Tensor:
    """In place."""
    torch.addcmul(shift[:, None, None], maps, scale[:, None, None], out=maps)
    return maps.relu_() if rectified else maps


def _moments(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel over all parts."""
    count = sum(part[:, 0].numel() for part in parts)
    mean = torch.stack([part.sum((0, 2, 3)) for part in parts]).sum(0) / count
    squares = torch.stack([torch.linalg.vector_norm(part, dim=(0, 2, 3)).square() for part in parts])
    return mean, squares.sum(0) / count - mean.square()


def _with_norm(link: _Link, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Weight (D, C) and shift (D,) of a 1x1 convolution with the norm behind it."""
    rows = [part.transpose(0, 1).flatten(1) for part in parts]
    count = sum(row.shape[1] for row in rows)
    mean = torch.stack([row.sum(1) for row in rows]).sum(0) / count
    covariance = torch.stack([row @ row.T for row in rows]).sum(0) / count - torch.outer(mean, mean)
    weight = link.conv.weight.flatten(1)
    scale, shift = link.affine(weight @ mean, (weight @ covariance * weight).sum(1))
    return weight * scale[:, None], shift
