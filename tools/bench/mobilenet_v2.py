"""MobileNetV2 by hand, for small images: what a search has to beat."""

from __future__ import annotations

import torch
from torch import nn

from edgekd.blocks import Block, conv_norm, head_layers, to_multiple, with_weights
from edgekd.spec import LayerShape, ModelSpec

# Expansion, width, repetitions, stride of the first block: Sandler et al. 2018 (arXiv:1801.04381), table 2,
# with the stride of the first two strided stages taken out, as usual for images of 32 pixels.
_STAGES = (
    (1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
)  # fmt: skip
_STEM, _HEAD, _MULTIPLE = 32, 1280, 8


class MobileNetV2:
    """One network for each width: a genome is the width multiplier in percent. All widths are scaled, the
    head's too, activations are ReLU, and the stem halves images of more than 40 pixels."""

    def __init__(self, spec: ModelSpec) -> None:
        self._channels, height, width = spec.input_shape
        self._size, self._classes = max(height, width), len(spec.classes)

    def _plan(self, genome: tuple[int, ...]) -> tuple[LayerShape, list[Block], int]:
        def scaled(width: int) -> int:
            return to_multiple(width * genome[0] / 100, _MULTIPLE)

        stride = 1 if self._size <= 40 else 2
        stem = LayerShape("conv", self._channels, scaled(_STEM), 3, stride, 1, self._size, relu=True)
        width, size, blocks = scaled(_STEM), stem.size_out, []
        for expansion, width_out, repetitions, stride in _STAGES:
            for index in range(repetitions):
                step = 1 if index else stride
                blocks.append(Block("inverted", width, scaled(width_out), 3, step, expansion, size))
                width, size = scaled(width_out), blocks[-1].size_out
        return stem, blocks, scaled(_HEAD)

    def layers(self, genome: tuple[int, ...]) -> tuple[LayerShape, ...]:
        """Of the deployed network, batch norm folded."""
        stem, blocks, head = self._plan(genome)
        made = [stem]
        for block in blocks:
            made += block.layers()[1 if block.expansion == 1 else 0 :]
        size = blocks[-1].size_out
        made.append(LayerShape("conv", blocks[-1].width_out, head, size_in=size, relu=True))
        return (*made, *head_layers(head, size, self._classes))

    def build(self, genome: tuple[int, ...], rng: torch.Generator) -> nn.Module:
        """With fresh weights."""
        stem, blocks, head = self._plan(genome)
        body: list[nn.Module] = [*conv_norm(self._channels, stem.channels_out, 3, stem.stride), nn.ReLU()]
        for block in blocks:
            if block.expansion == 1:  # nothing to expand: depthwise and pointwise alone
                body += [
                    *conv_norm(block.width_in, block.width_in, 3, block.stride, block.width_in),
                    nn.ReLU(),
                ]
                body += conv_norm(block.width_in, block.width_out)
            else:
                body.append(block.build())
        body += [*conv_norm(blocks[-1].width_out, head), nn.ReLU()]
        return with_weights(body, head, self._classes, rng)
