"""Convolutions first, attention where maps are small: after LeViT, Graham et al. 2021 (arXiv:2104.01136).

Projections are 1x1 convolutions with batch norm and activations are ReLU, so everything but the products of
queries, keys and values runs in integers. Positions come from a depthwise convolution in front (Chu et al.
2021, arXiv:2102.10882, Fig. 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgekd.blocks import Block, conv_norm, head_layers, stage_strides, to_multiple, with_weights
from edgekd.nets import Attend
from edgekd.spaces import Genome, Restrictions
from edgekd.spec import LayerShape, ModelSpec

_STEM_FACTORS = (0.5, 1.0, 1.5)
_WIDTH_FACTORS = (0.75, 1.0, 1.5, 2.0)
_EXPANSIONS = (2, 3, 4)
_HEADS = (1, 2, 4)
_LARGEST_MAP = 16  # pixels of a side beyond which a stage has no attention
_GENES_PER_STAGE = 6  # attention blocks, width, depth, kernel, expansion, heads


@dataclass(frozen=True)
class _Mixer:
    """A block of attention and a two-layer perceptron at one width."""

    width: int
    heads: int
    expansion: int
    size: int

    def layers(self) -> list[LayerShape]:
        width, size, hidden = self.width, self.size, self.width * self.expansion
        add = LayerShape("add", width, width, size_in=size)
        point = LayerShape("conv", width, width, size_in=size)
        position = LayerShape("conv", width, width, 3, groups=width, size_in=size)
        attend = LayerShape("attention", width, width, groups=self.heads, size_in=size)
        wider = LayerShape("conv", width, hidden, size_in=size, relu=True)
        back = LayerShape("conv", hidden, width, size_in=size)
        return [position, add, point, point, point, attend, point, add, wider, back, add]


class _Attention(nn.Module):
    def __init__(self, block: _Mixer) -> None:
        super().__init__()
        width, hidden = block.width, block.width * block.expansion
        self.position = nn.Sequential(*conv_norm(width, width, 3, groups=width))
        self.queries, self.keys, self.values, self.project = (
            nn.Sequential(*conv_norm(width, width)) for _ in range(4)
        )
        self.attend = Attend(block.heads)
        self.perceptron = nn.Sequential(*conv_norm(width, hidden), nn.ReLU(), *conv_norm(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position(x)
        x = x + self.project(self.attend(self.queries(x), self.keys(x), self.values(x)))
        made: Tensor = x + self.perceptron(x)
        return made


class Hybrid:
    """Genome: stem width; per stage how many of its blocks attend, width, depth, kernel, expansion, heads;
    no block attends on maps above 16 x 16. The first block of a stage is an inverted residual."""

    needs = ("3x3", "depthwise")

    def __init__(self, spec: ModelSpec, card: Restrictions) -> None:
        self._channels, height, width = spec.input_shape
        self._size, self._classes = max(height, width), len(spec.classes)
        self._multiple, self._kernels = card.channel_multiple, card.kernels
        self._stem_stride, self._strides = stage_strides(self._size)
        self._sizes = [-(-self._size // self._stem_stride)]
        for stride in self._strides:
            self._sizes.append(-(-self._sizes[-1] // stride))

    @property
    def choices(self) -> tuple[int, ...]:
        genes = [len(_STEM_FACTORS)]
        for size in self._sizes[1:]:
            small = size <= _LARGEST_MAP
            attending, heads = (3, len(_HEADS)) if small else (1, 1)
            genes += [attending, len(_WIDTH_FACTORS), 3, len(self._kernels), len(_EXPANSIONS), heads]
        return tuple(genes)

    def _plan(self, genome: Genome) -> tuple[LayerShape, list[Block | _Mixer]]:
        width = to_multiple(16 * _STEM_FACTORS[genome[0]], self._multiple)
        stem = LayerShape("conv", self._channels, width, 3, self._stem_stride, 1, self._size, relu=True)
        blocks: list[Block | _Mixer] = []
        for stage, stride in enumerate(self._strides):
            start = 1 + stage * _GENES_PER_STAGE
            attending, factor, depth, kernel, gene, heads = genome[start : start + _GENES_PER_STAGE]
            wider = to_multiple(16 * 2**stage * _WIDTH_FACTORS[factor], self._multiple)
            size, expansion, side = self._sizes[stage + 1], _EXPANSIONS[gene], self._kernels[kernel]
            first = Block("inverted", width, wider, side, stride, expansion, self._sizes[stage])
            plain = Block("inverted", wider, wider, side, 1, expansion, size)
            mixer = _Mixer(wider, _HEADS[heads], expansion, size)
            blocks += [first, *[plain] * max(0, depth - attending), *[mixer] * min(depth, attending)]
            width = wider
        return stem, blocks

    def layers(self, genome: Genome) -> tuple[LayerShape, ...]:
        stem, blocks = self._plan(genome)
        made = [stem, *(layer for block in blocks for layer in block.layers())]
        return (*made, *head_layers(_width(blocks[-1]), self._sizes[-1], self._classes))

    def describe(self, genome: Genome) -> tuple[str, ...]:
        stem, blocks = self._plan(genome)
        lines = [f"stem 3x3, {stem.channels_out} channels, stride {stem.stride}"]
        for block in blocks:
            if isinstance(block, Block):
                lines.append(block.describe())
            else:
                lines.append(
                    f"attention over {block.size}x{block.size}, {block.width} channels, {block.heads} heads, "
                    f"expansion {block.expansion}"
                )
        return (*lines, f"linear to {self._classes} classes")

    def build(self, genome: Genome, rng: torch.Generator) -> nn.Module:
        stem, blocks = self._plan(genome)
        body = [*conv_norm(self._channels, stem.channels_out, 3, stem.stride), nn.ReLU()]
        body += [block.build() if isinstance(block, Block) else _Attention(block) for block in blocks]
        return with_weights(body, _width(blocks[-1]), self._classes, rng)


def _width(block: Block | _Mixer) -> int:
    return block.width_out if isinstance(block, Block) else block.width
