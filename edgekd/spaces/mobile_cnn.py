"""Mobile convolutional students: stages of inverted residual or plain residual blocks.

All activations are ReLU, which every int8 runtime folds into the convolution.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn

from edgekd.blocks import Block, conv_norm, head_layers, stage_strides, to_multiple, with_weights
from edgekd.spaces import Genome, Restrictions
from edgekd.spec import LayerShape, ModelSpec

_STEM_FACTORS = (0.5, 0.75, 1.0, 1.5)
_WIDTH_FACTORS = (0.75, 1.0, 1.5, 2.0)
_EXPANSIONS = (2, 3, 4, 6)
_HEAD_FACTORS = (0, 2)
_GENES_PER_STAGE = 5  # block kind, width, depth, kernel, expansion


class MobileCnn:
    """The space for one input size. Genome: stem width, stem stride; per stage block kind, width, depth,
    kernel and expansion; head width. Where the card forbids depthwise convolutions all blocks are plain."""

    kinds: ClassVar[tuple[str, ...]] = ("inverted", "residual")
    needs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, spec: ModelSpec, card: Restrictions) -> None:
        self._channels, height, width = spec.input_shape
        self._size = max(height, width)
        self._classes = len(spec.classes)
        self._multiple, self._kernels = card.channel_multiple, card.kernels
        self._kinds = ("residual",) if "depthwise" in card.forbidden_ops else self.kinds
        self._expansions = _EXPANSIONS if "inverted" in self._kinds else _EXPANSIONS[:1]
        self._stem_stride, self._strides = stage_strides(self._size)

    @property
    def choices(self) -> tuple[int, ...]:
        stage = (len(self._kinds), len(_WIDTH_FACTORS), 3, len(self._kernels), len(self._expansions))
        return (len(_STEM_FACTORS), 1, *(stage * len(self._strides)), len(_HEAD_FACTORS))

    def _plan(self, genome: Genome) -> tuple[LayerShape, list[Block], int]:
        """Stem convolution, blocks, and width of the 1x1 head convolution (0: none)."""
        width, stride = to_multiple(16 * _STEM_FACTORS[genome[0]], self._multiple), self._stem_stride
        stem = LayerShape("conv", self._channels, width, 3, stride, 1, self._size, relu=True)
        width_in, size, blocks = width, stem.size_out, []
        for stage, stride in enumerate(self._strides):
            start = 2 + stage * _GENES_PER_STAGE
            kind, width, depth, kernel, expansion = genome[start : start + _GENES_PER_STAGE]
            width_out = to_multiple(16 * 2**stage * _WIDTH_FACTORS[width], self._multiple)
            for index in range(depth + 1):
                blocks.append(
                    Block(
                        self._kinds[kind],
                        width_in,
                        width_out,
                        self._kernels[kernel],
                        stride if index == 0 else 1,
                        self._expansions[expansion],
                        size,
                    )
                )
                width_in, size = width_out, blocks[-1].size_out
        return stem, blocks, width_in * _HEAD_FACTORS[genome[-1]]

    def layers(self, genome: Genome) -> tuple[LayerShape, ...]:
        stem, blocks, head = self._plan(genome)
        made = [stem]
        for block in blocks:
            made += block.layers()
        width, size = blocks[-1].width_out, blocks[-1].size_out
        if head:
            made.append(LayerShape("conv", width, head, size_in=size, relu=True))
        return (*made, *head_layers(head or width, size, self._classes))

    def describe(self, genome: Genome) -> tuple[str, ...]:
        stem, blocks, head = self._plan(genome)
        return (
            f"stem 3x3, {stem.channels_out} channels, stride {stem.stride}",
            *(block.describe() for block in blocks),
            *([f"head 1x1, {head} channels"] if head else []),
            f"linear to {self._classes} classes",
        )

    def build(self, genome: Genome, rng: torch.Generator) -> nn.Module:
        stem, blocks, head = self._plan(genome)
        body: list[nn.Module] = [*conv_norm(self._channels, stem.channels_out, 3, stem.stride), nn.ReLU()]
        body += [block.build() for block in blocks]
        if head:
            body += [*conv_norm(blocks[-1].width_out, head), nn.ReLU()]
        return with_weights(body, head or blocks[-1].width_out, self._classes, rng)


class ResidualCnn(MobileCnn):
    """Plain residual blocks alone, for runtimes on which depthwise convolutions are slow."""

    kinds = ("residual",)


class InvertedCnn(MobileCnn):
    """Inverted residual blocks alone."""

    kinds = ("inverted",)
    needs = ("depthwise",)
