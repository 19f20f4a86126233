"""Mobile convolutional students: stages of inverted residual or plain residual blocks.

Inverted residual: Sandler et al. 2018 (arXiv:1801.04381, Fig. 3d); plain residual: He et al. 2016
(arXiv:1512.03385, Fig. 2). All activations are ReLU, which every int8 runtime folds into the convolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgekd.spaces import Genome
from edgekd.spec import LayerShape, ModelSpec

_STEM_FACTORS = (0.5, 0.75, 1.0, 1.5)
_WIDTH_FACTORS = (0.75, 1.0, 1.5, 2.0)
_EXPANSIONS = (2, 3, 4, 6)
_HEAD_FACTORS = (0, 2)
_GENES_PER_STAGE = 5  # block kind, width, depth, kernel, expansion


@dataclass(frozen=True)
class _Block:
    kind: str  # "inverted" | "residual"
    width_in: int
    width_out: int
    kernel: int
    stride: int
    expansion: int
    size_in: int

    @property
    def shortcut(self) -> bool:
        return self.stride == 1 and self.width_in == self.width_out

    def layers(self) -> list[LayerShape]:
        size_out = -(-self.size_in // self.stride)
        if self.kind == "inverted":
            hidden = self.width_in * self.expansion
            made = [
                LayerShape("conv", self.width_in, hidden, size_in=self.size_in, relu=True),
                LayerShape("conv", hidden, hidden, self.kernel, self.stride, hidden, self.size_in, relu=True),
                LayerShape("conv", hidden, self.width_out, size_in=size_out),
            ]
        else:
            made = [
                LayerShape(
                    "conv",
                    self.width_in,
                    self.width_out,
                    self.kernel,
                    self.stride,
                    1,
                    self.size_in,
                    relu=True,
                ),
                LayerShape(
                    "conv",
                    self.width_out,
                    self.width_out,
                    self.kernel,
                    1,
                    1,
                    size_out,
                    relu=not self.shortcut,
                ),
            ]
        if self.shortcut:
            made.append(
                LayerShape(
                    "add", self.width_out, self.width_out, size_in=size_out, relu=self.kind == "residual"
                )
            )
        return made


def _conv(
    width_in: int, width_out: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    conv = nn.Conv2d(width_in, width_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(width_out)]


class _InvertedResidual(nn.Module):
    def __init__(self, block: _Block) -> None:
        super().__init__()
        hidden = block.width_in * block.expansion
        self.body = nn.Sequential(
            *_conv(block.width_in, hidden), nn.ReLU(),
            *_conv(hidden, hidden, block.kernel, block.stride, hidden), nn.ReLU(),
            *_conv(hidden, block.width_out),
        )  # fmt: skip
        self.shortcut = block.shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.shortcut else y


class _Residual(nn.Module):
    def __init__(self, block: _Block) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_conv(block.width_in, block.width_out, block.kernel, block.stride), nn.ReLU(),
            *_conv(block.width_out, block.width_out, block.kernel),
        )  # fmt: skip
        self.shortcut = block.shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return torch.relu(x + y if self.shortcut else y)


class _Classifier(nn.Module):
    def __init__(self, features: nn.Sequential, width: int, classes: int) -> None:
        super().__init__()
        self.features = features
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.pool(self.features(x)), 1))
        return logits


class MobileCnn:
    """The space for one input size. Genome: stem width, stem stride; per stage block kind, width, depth,
    kernel and expansion; head width. Widths are multiples of `channel_multiple`, kernels those the card
    allows."""

    def __init__(self, spec: ModelSpec, channel_multiple: int, kernels: tuple[int, ...]) -> None:
        self._channels, height, width = spec.input_shape
        self._size = max(height, width)
        self._classes = len(spec.classes)
        self._multiple = channel_multiple
        self._kernels = kernels
        # Small images keep their resolution in the stem: at equal MACs that was worth 0.4 points at 28 px.
        self._stem_strides = (1,) if self._size <= 40 else (2,)
        self._stages = 3 if self._size <= 96 else 4
        halvings = max(2, math.floor(math.log2(self._size / self._stem_strides[0] / 4)))
        self._strides = tuple(2 if stage < halvings else 1 for stage in range(self._stages))

    @property
    def choices(self) -> tuple[int, ...]:
        stage = (2, len(_WIDTH_FACTORS), 3, len(self._kernels), len(_EXPANSIONS))
        return (len(_STEM_FACTORS), len(self._stem_strides), *(stage * self._stages), len(_HEAD_FACTORS))

    def _width(self, base: float) -> int:
        return max(self._multiple, round(base / self._multiple) * self._multiple)

    def _plan(self, genome: Genome) -> tuple[LayerShape, list[_Block], int]:
        """Stem convolution, blocks, and width of the 1x1 head convolution (0: none)."""
        width, stride = self._width(16 * _STEM_FACTORS[genome[0]]), self._stem_strides[genome[1]]
        stem = LayerShape("conv", self._channels, width, 3, stride, 1, self._size, relu=True)
        width_in, size, blocks = width, stem.size_out, []
        for stage, stride in enumerate(self._strides):
            start = 2 + stage * _GENES_PER_STAGE
            kind, width, depth, kernel, expansion = genome[start : start + _GENES_PER_STAGE]
            width_out = self._width(16 * 2**stage * _WIDTH_FACTORS[width])
            for index in range(depth + 1):
                blocks.append(
                    _Block(
                        "residual" if kind else "inverted",
                        width_in,
                        width_out,
                        self._kernels[kernel],
                        stride if index == 0 else 1,
                        _EXPANSIONS[expansion],
                        size,
                    )
                )
                width_in, size = width_out, -(-size // blocks[-1].stride)
        return stem, blocks, width_in * _HEAD_FACTORS[genome[-1]]

    def layers(self, genome: Genome) -> tuple[LayerShape, ...]:
        stem, blocks, head = self._plan(genome)
        made = [stem]
        for block in blocks:
            made += block.layers()
        width = blocks[-1].width_out
        size = made[-1].size_out
        if head:
            made.append(LayerShape("conv", width, head, size_in=size, relu=True))
            width = head
        made.append(LayerShape("pool", width, width, size_in=size))
        made.append(LayerShape("linear", width, self._classes))
        return tuple(made)

    def describe(self, genome: Genome) -> tuple[str, ...]:
        stem, blocks, head = self._plan(genome)
        lines = [f"stem 3x3, {stem.channels_out} channels, stride {stem.stride}"]
        for block in blocks:
            expansion = f", expansion {block.expansion}" if block.kind == "inverted" else ""
            lines.append(
                f"{block.kind} {block.kernel}x{block.kernel}, {block.width_in} to {block.width_out} "
                f"channels, stride {block.stride}{expansion}"
            )
        return (
            *lines,
            *([f"head 1x1, {head} channels"] if head else []),
            f"linear to {self._classes} classes",
        )

    def build(self, genome: Genome, rng: torch.Generator) -> nn.Module:
        stem, blocks, head = self._plan(genome)
        body: list[nn.Module] = [*_conv(self._channels, stem.channels_out, 3, stem.stride), nn.ReLU()]
        body += [_InvertedResidual(b) if b.kind == "inverted" else _Residual(b) for b in blocks]
        width = blocks[-1].width_out
        if head:
            body += [*_conv(width, head), nn.ReLU()]
            width = head
        with torch.device("meta"):
            model = _Classifier(nn.Sequential(*body), width, self._classes)
        model.to_empty(device="cpu")
        _initialise(model, rng)
        return model


def _initialise(model: nn.Module, rng: torch.Generator) -> None:
    """Convolutions: Kaiming normal, fan out (He et al. 2015, arXiv:1502.01852); 0.01 for the classifier."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight.shape[0] * module.kernel_size[0] * module.kernel_size[1] / module.groups
            nn.init.normal_(module.weight, 0.0, math.sqrt(2 / fan_out), generator=rng)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
            module.reset_running_stats()
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01, generator=rng)
            nn.init.zeros_(module.bias)
