"""A forward pass of a student in training mode, without gradients, in fewer trips through memory.

Batch norm in training mode reads a map twice and writes it anew, and small students wait for memory, not for
arithmetic. So maps keep the channels of a pixel together, which is what convolutions work on; rectifiers work
in place; and the moments behind a 1x1 convolution that widens a map follow from those in front of it,
``E[Wx] = W E[x]`` and ``Cov[Wx] = W Cov[x] W^T``: its norm becomes part of its weight, and the widest maps of
a student are written once. So do those behind the first convolution, from the moments of the images' patches,
which all students share. On a GPU, where launches cost more than small maps, each layer is one launch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_COLOURS = 4  # channels at most that tell an image from a map


@dataclass(frozen=True)
class _Link:
    """A convolution, the batch norm behind it, which makes a bias of the convolution void, and perhaps a
    ReLU."""

    conv: nn.Conv2d
    norm: nn.BatchNorm2d
    rectified: bool

    def __call__(self, maps: Tensor) -> Tensor:
        if maps.is_cuda:
            return self.launched(maps)
        moments = self._foretold(maps)
        maps = maps.contiguous(memory_format=torch.channels_last)  # those of grey images may not be
        made = self._then_norm(maps) if moments is None else self._with_norm(maps, *moments)
        return made.relu_() if self.rectified else made

    def _foretold(self, maps: Tensor) -> tuple[Tensor, Tensor] | None:
        """The moments of what the convolution multiplies, where they cost less than those behind it."""
        conv = self.conv
        if conv.groups > 1 or conv.dilation != (1, 1) or isinstance(conv.padding, str):
            return None
        if conv.in_channels <= _COLOURS:
            return _patch_moments(maps, conv.kernel_size, conv.stride, conv.padding)
        point = conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0)
        if not point or 2 * conv.in_channels > conv.out_channels:
            return None
        return _moments(maps.permute(0, 2, 3, 1).flatten(0, 2))

    def launched(self, maps: Tensor) -> Tensor:
        """With the fewest launches."""
        made = self._then_norm(maps)
        return made.relu_() if self.rectified else made

    def _then_norm(self, maps: Tensor) -> Tensor:
        conv, norm = self.conv, self.norm
        made = F.conv2d(maps, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
        return F.batch_norm(made, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)

    def _with_norm(self, maps: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
        conv, norm, weight = self.conv, self.norm, self.conv.weight.flatten(1)
        variance = (weight @ covariance * weight).sum(1).clamp_min(0)
        scale = torch.rsqrt(variance + norm.eps) * norm.weight
        shift = norm.bias - weight @ mean * scale
        return F.conv2d(maps, conv.weight * scale[:, None, None, None], shift, conv.stride, conv.padding)


def _moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and covariance (D, D) of (M, D)."""
    mean = rows.sum(0) / len(rows)
    return mean, rows.T @ rows / len(rows) - torch.outer(mean, mean)


@lru_cache(4)
def _patch_moments(images: Tensor, *how: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Those of the patches of a batch of images, which is known again by being the same object."""
    kernel, stride, padding = how
    patches = F.unfold(images.double(), kernel, padding=padding, stride=stride)
    mean, covariance = _moments(patches.transpose(1, 2).flatten(0, 1))
    return mean.float(), covariance.float()


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Within the block, which is for networks in training mode, convolutions in the network's sequences
    compute so with the batch norm and the ReLU behind them. Those modules are not called, so their hooks do
    not run, and no running statistics move."""
    every = list(model.modules())
    norms = [module for module in every if isinstance(module, _BatchNorm) and module.track_running_stats]
    sequences = [module for module in every if isinstance(module, nn.Sequential)]
    sequences = [one for one in sequences if type(one).forward is nn.Sequential.forward]
    try:
        for norm in norms:
            norm.track_running_stats = False
        for sequence in sequences:
            vars(sequence)["forward"] = partial(_through, _steps(list(sequence)))
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True
        for sequence in sequences:
            vars(sequence).pop("forward", None)


def _through(steps: Sequence[_Link | nn.Module], maps: Tensor) -> Tensor:
    for step in steps:
        maps = step(maps)
    return maps


def _steps(modules: Sequence[nn.Module]) -> list[_Link | nn.Module]:
    """The modules of a sequence, those that a link stands for replaced by it."""
    steps: list[_Link | nn.Module] = []
    at = 0
    while at < len(modules):
        link = _link(modules[at : at + 3])
        steps.append(link or modules[at])
        at += 1 if link is None else 2 + link.rectified
    return steps


def _link(modules: Sequence[nn.Module]) -> _Link | None:
    """What a sequence begins with, if it is one."""
    conv, norm = modules[0], modules[1] if len(modules) > 1 else None
    if not isinstance(conv, nn.Conv2d) or type(norm) is not nn.BatchNorm2d or not norm.affine:
        return None
    if type(conv).forward is not nn.Conv2d.forward or conv.padding_mode != "zeros":
        return None
    return _Link(conv, norm, len(modules) > 2 and type(modules[2]) is nn.ReLU)
