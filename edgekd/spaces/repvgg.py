"""Students that are trained with branches and deployed as plain 3x3 convolutions: RepVGG, Ding et al. 2021
(arXiv:2101.03697, Fig. 2 and 4). Plain convolutions are what GPUs and accelerators run best."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.blocks import Reparameterised, conv_norm, head_layers, stage_strides, to_multiple, with_weights
from edgekd.probing import weights_of
from edgekd.spaces import Genome, Restrictions
from edgekd.spec import LayerShape, ModelSpec

_STEM_FACTORS = (0.5, 0.75, 1.0, 1.5)
_WIDTH_FACTORS = (0.5, 0.75, 1.0, 1.5, 2.0)
_DEPTHS = (1, 2, 3, 4)


class _RepConv(Reparameterised):
    """``relu(BN(conv3x3(x)) + BN(conv1x1(x)) + BN(x))``, the last term where the shape stays."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.dense = nn.Sequential(*conv_norm(width_in, width_out, 3, stride))
        self.point = nn.Sequential(*conv_norm(width_in, width_out, 1, stride))
        same = stride == 1 and width_in == width_out
        self.identity = nn.BatchNorm2d(width_in) if same else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dense(x) + self.point(x)
        return torch.relu(y if self.identity is None else y + self.identity(x))

    @torch.no_grad()
    def folded(self) -> nn.Module:
        parts = [_folded(weights_of(branch)[0], branch[1]) for branch in (self.dense, self.point)]
        if self.identity is not None:
            width = self.identity.num_features
            parts.append(_folded(torch.eye(width)[:, :, None, None], self.identity))
        kernel, bias = (torch.stack(each).sum(0) for each in zip(*parts, strict=True))
        conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], 3, self.stride, 1)
        conv.weight.copy_(kernel)
        assert conv.bias is not None
        conv.bias.copy_(bias)
        return nn.Sequential(conv, nn.ReLU()).train(self.training)


def _folded(weight: Tensor, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """3x3 kernel and bias of a convolution and the batch norm behind it (arXiv:2101.03697, eq. 3)."""
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    margin = (3 - weight.shape[-1]) // 2
    kernel = F.pad(weight.to(factor), (margin,) * 4) * factor[:, None, None, None]
    return kernel, norm.bias - norm.running_mean * factor


class RepVgg:
    """Genome: stem width; per stage width and depth."""

    needs = ("3x3",)

    def __init__(self, spec: ModelSpec, card: Restrictions) -> None:
        self._channels, height, width = spec.input_shape
        self._size, self._classes = max(height, width), len(spec.classes)
        self._multiple = card.channel_multiple
        self._stem_stride, self._strides = stage_strides(self._size)

    @property
    def choices(self) -> tuple[int, ...]:
        return (len(_STEM_FACTORS), *((len(_WIDTH_FACTORS), len(_DEPTHS)) * len(self._strides)))

    def _plan(self, genome: Genome) -> list[LayerShape]:
        """Every convolution, the stem first."""
        width = to_multiple(16 * _STEM_FACTORS[genome[0]], self._multiple)
        made = [LayerShape("conv", self._channels, width, 3, self._stem_stride, 1, self._size, relu=True)]
        for stage, stride in enumerate(self._strides):
            factor, depth = genome[1 + 2 * stage : 3 + 2 * stage]
            wider = to_multiple(16 * 2**stage * _WIDTH_FACTORS[factor], self._multiple)
            for index in range(_DEPTHS[depth]):
                size, step = made[-1].size_out, stride if index == 0 else 1
                made.append(LayerShape("conv", width, wider, 3, step, 1, size, relu=True))
                width = wider
        return made

    def layers(self, genome: Genome) -> tuple[LayerShape, ...]:
        body = self._plan(genome)
        return (*body, *head_layers(body[-1].channels_out, body[-1].size_out, self._classes))

    def describe(self, genome: Genome) -> tuple[str, ...]:
        stem, *body = self._plan(genome)
        return (
            f"stem 3x3, {stem.channels_out} channels, stride {stem.stride}",
            *(f"3x3, {x.channels_in} to {x.channels_out} channels, stride {x.stride}" for x in body),
            f"linear to {self._classes} classes",
        )

    def build(self, genome: Genome, rng: torch.Generator) -> nn.Module:
        body = self._plan(genome)
        blocks = [_RepConv(x.channels_in, x.channels_out, x.stride) for x in body]
        return with_weights(blocks, body[-1].channels_out, self._classes, rng)
