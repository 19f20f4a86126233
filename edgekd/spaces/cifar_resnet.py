"""S0, the CIFAR ResNets on which DisWOT was published: 1, 3, 5 or 7 basic blocks in each of three stages
(Dong et al. 2023, arXiv:2303.15678; blocks of He et al. 2016, arXiv:1512.03385, Fig. 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgekd.blocks import conv_norm, head_layers, to_multiple, with_weights
from edgekd.spaces import Genome, Restrictions
from edgekd.spec import LayerShape, ModelSpec

DEPTHS, WIDTHS = (1, 3, 5, 7), (16, 32, 64)


class _Basic(nn.Module):
    """Two 3x3 convolutions; the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *conv_norm(width_in, width_out, 3, stride), nn.ReLU(), *conv_norm(width_out, width_out, 3)
        )
        same = stride == 1 and width_in == width_out
        self.shortcut = nn.Identity() if same else nn.Sequential(*conv_norm(width_in, width_out, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class CifarResNet:
    """Genome: depth of each stage. Larger images enter a stem of stride 2, and of 4 above 96 px."""

    needs = ("3x3",)

    def __init__(self, spec: ModelSpec, card: Restrictions) -> None:
        self._channels, height, width = spec.input_shape
        self._size, self._classes = max(height, width), len(spec.classes)
        self._stem_stride = 1 if self._size <= 40 else 2 if self._size <= 96 else 4
        self._widths = [to_multiple(width, card.channel_multiple) for width in WIDTHS]

    @property
    def choices(self) -> tuple[int, ...]:
        return (len(DEPTHS),) * len(WIDTHS)

    def _plan(self, genome: Genome) -> list[tuple[int, int, int, int]]:
        """(channels in, channels out, stride, size of the map) of each block."""
        width, size, made = self._widths[0], -(-self._size // self._stem_stride), []
        for stage, (gene, wider) in enumerate(zip(genome, self._widths, strict=True)):
            for index in range(DEPTHS[gene]):
                stride = 2 if stage and not index else 1
                made.append((width, wider, stride, size))
                width, size = wider, -(-size // stride)
        return made

    def _stem(self) -> LayerShape:
        stem = (self._channels, self._widths[0], 3, self._stem_stride, 1, self._size)
        return LayerShape("conv", *stem, relu=True)

    def layers(self, genome: Genome) -> tuple[LayerShape, ...]:
        made = [self._stem()]
        for width, wider, stride, size in self._plan(genome):
            first = LayerShape("conv", width, wider, 3, stride, 1, size, relu=True)
            made += [first, LayerShape("conv", wider, wider, 3, size_in=first.size_out)]
            if stride > 1 or width != wider:
                made.append(LayerShape("conv", width, wider, 1, stride, 1, size))
            made.append(LayerShape("add", wider, wider, size_in=first.size_out, relu=True))
        return (*made, *head_layers(self._widths[-1], made[-1].size_in, self._classes))

    def describe(self, genome: Genome) -> tuple[str, ...]:
        depths = zip(genome, self._widths, strict=True)
        return (
            f"stem 3x3, {self._widths[0]} channels, stride {self._stem_stride}",
            *(f"{DEPTHS[gene]} basic blocks 3x3, {width} channels" for gene, width in depths),
            f"linear to {self._classes} classes",
        )

    def build(self, genome: Genome, rng: torch.Generator) -> nn.Module:
        stem = [*conv_norm(self._channels, self._widths[0], 3, self._stem_stride), nn.ReLU()]
        body = [*stem, *(_Basic(*block[:3]) for block in self._plan(genome))]
        return with_weights(body, self._widths[-1], self._classes, rng)
