"""Biases that make up for what rounding does to the mean of each channel.

In a graph whose batch norm is folded this is what re-estimating the statistics of batch norm is elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from edgekd.quantize.capture import attribute

_ATEN = torch.ops.aten
_LAYERS = (_ATEN.conv2d.default, _ATEN.conv1d.default, _ATEN.linear.default)


def correct_biases(quantized: fx.GraphModule, exact: fx.GraphModule, inputs: Tensor) -> None:
    """Move each bias of `quantized`, in place and in the order of the graph, by the difference of its
    channels' means to those of the same layer in `exact`, over the normalised (N, C, H, W) `inputs` (Nagel et
    al. 2019, arXiv:1906.04721, eq. 16, with the means measured). A layer without a bias stays as it is."""
    with torch.no_grad():
        means = _Walk(exact, None)
        means.run(inputs)
        _Walk(quantized.eval(), means.found).run(inputs)


class _Walk(fx.Interpreter):
    """Finds the means of all layers with a bias, by its name; with `wanted` means, moves the biases there."""

    def __init__(self, graph: fx.GraphModule, wanted: dict[str, Tensor] | None) -> None:
        super().__init__(graph)
        self._graph, self._wanted = graph, wanted
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        bias = n.args[2] if n.target in _LAYERS and len(n.args) > 2 else None
        if not isinstance(bias, fx.Node) or not isinstance(value, Tensor):
            return value
        name, channels = str(bias.target), (1 if value.dim() > 2 and "linear" not in str(n.target) else -1)
        others = [axis for axis in range(value.dim()) if axis != channels % value.dim()]
        mean = value.mean(others)
        if self._wanted is None:
            self.found[name] = mean
            return value
        moved = self._wanted[name] - mean
        attribute(self._graph, name).data.add_(moved)
        shape = [1] * value.dim()
        shape[channels] = -1
        return value + moved.reshape(shape)
