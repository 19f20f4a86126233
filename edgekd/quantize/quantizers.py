"""The modules that round in a fake-quantized graph, and what they learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.quantize.scheme import Grid

_LEAST_FULL = 63  # the largest code of 7 bits: from there on the largest weight sets the scale


class ActivationQuantizer(nn.Module):
    """Rounds to a grid whose scale is learnt, straight-through inside the range (LSQ, Esser et al. 2020,
    arXiv:1902.08153, eq. 1 to 3). The parameter is the logarithm of the scale, so one step changes it by a
    share of itself whatever its size. With `learn_offset` the zero point is learnt too (LSQ+, Bhalgat et al.
    2020, arXiv:2004.09576, eq. 6), as a share of the grid's length, and rounded as integer kernels need it.
    """

    def __init__(self, grid: Grid, learn_offset: bool = False) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([grid.scale]).log())
        self.qmin, self.qmax = grid.qmin, grid.qmax
        self._length = float(grid.qmax - grid.qmin)
        share = torch.tensor([(grid.zero_point - grid.qmin) / self._length])
        self.offset = nn.Parameter(share, requires_grad=learn_offset)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            zero_point = (self.qmin + self.offset * self._length).clamp(self.qmin, self.qmax)
            return torch._fake_quantize_learnable_per_tensor_affine(
                x.float(), self.log_scale.exp(), zero_point, self.qmin, self.qmax, 1.0
            )
        grid = self.grid()
        return torch.fake_quantize_per_tensor_affine(x, grid.scale, grid.zero_point, grid.qmin, grid.qmax)

    def grid(self) -> Grid:
        """What it rounds to now."""
        zero_point = round(self.qmin + float(self.offset.detach()) * self._length)
        zero_point = min(max(zero_point, self.qmin), self.qmax)
        return Grid(float(self.log_scale.detach().exp()), zero_point, self.qmin, self.qmax)


class _Damp(torch.autograd.Function):
    """Nothing forward; backward the gradient of ``strength * sum (w - q)^2`` reaches w."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rounded: Tensor, strength: float) -> Tensor:
        ctx.save_for_backward(2 * strength * (weight - rounded))
        return torch.zeros_like(weight)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0], None, None


class WeightQuantizer(nn.Module):
    """Symmetric per output channel, codes of 8 bits or fewer; they reach `weight_max` at the start.

    Of fewer bits, the scale starts where the squared rounding and clipping error is least, not at the
    largest weight. With `damping`, weights are drawn to the middle of their step, so that those of depthwise
    layers do not swing between two codes for ever (Nagel et al. 2022, arXiv:2203.11086, eq. 7; there as a
    loss).
    """

    def __init__(self, weight: Tensor, weight_max: int, damping: float = 0.0) -> None:
        super().__init__()
        reach = weight.detach().abs().flatten(1).amax(1).clamp(min=1e-8)
        start = reach / weight_max if weight_max >= _LEAST_FULL else _least_error(weight, reach, weight_max)
        self.log_scale = nn.Parameter(start.log())
        self._damping = damping
        self.register_buffer("zero_point", torch.zeros(len(weight)))
        self.zero_point: Tensor
        self.weight_max = weight_max

    @property
    def qmin(self) -> int:
        return -128 if self.weight_max == 127 else -self.weight_max - 1

    @property
    def qmax(self) -> int:
        return self.weight_max

    def forward(self, weight: Tensor) -> Tensor:
        if self.training:
            rounded: Tensor = torch._fake_quantize_learnable_per_channel_affine(
                weight, self.log_scale.exp(), self.zero_point, 0, self.qmin, self.qmax, 1.0
            )
            if self._damping:
                rounded = rounded + _Damp.apply(weight, rounded.detach(), self._damping)  # type: ignore[no-untyped-call]
            return rounded
        return torch.fake_quantize_per_channel_affine(
            weight, self.log_scale.exp(), self.zero_point.int(), 0, self.qmin, self.qmax
        )


def _least_error(weight: Tensor, reach: Tensor, weight_max: int) -> Tensor:
    """(channels,) of the scales ``share * reach / weight_max``, those with the least squared error."""
    flat = weight.detach().flatten(1)
    scales = torch.linspace(0.4, 1.0, 25)[:, None] * reach / weight_max
    codes = (flat / scales[..., None]).round().clamp(-weight_max - 1, weight_max)
    errors = (codes * scales[..., None] - flat).square().sum(2)
    return scales.gather(0, errors.argmin(0)[None])[0]


def freeze_after(share: float) -> Callable[[nn.Module, float], None]:
    """For `edgekd.loop.Stage.before_step`: from `share` of the training on, scales and offsets stay as they
    are and the weights settle on them."""

    def freeze(model: nn.Module, done: float) -> None:
        if done >= share:
            for module in model.modules():
                if isinstance(module, ActivationQuantizer | WeightQuantizer):
                    module.requires_grad_(requires_grad=False)

    return freeze
