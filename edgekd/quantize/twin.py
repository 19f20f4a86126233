"""An ONNX graph as a torch module that keeps the graph's own tensor names, so that it can be trained and what
was learnt written back.

Converters to torch rename and fuse; the names are what quantization is written by, so the graph is walked
node by node here. Operators are those of small vision, audio and transformer networks; shapes are computed
as the graph computes them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from edgekd.errors import UnsupportedModelError
from edgekd.quantize.places import Places
from edgekd.quantize.quantizers import ActivationQuantizer, WeightQuantizer
from edgekd.quantize.twin_operators import DIRECTED, OPERATORS, Attributes
from edgekd.quantize.writing import Codes, Numbers

_TRAINED = ("Conv", "ConvTranspose", "Gemm", "MatMul", "LayerNormalization")


class Twin(nn.Module):
    """What the graph of `model` computes from its first input, as its first output.

    Raises:
        UnsupportedModelError: several inputs, or operators that have no torch form here; names them.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        graph = model.graph
        stored = {tensor.name: tensor for tensor in graph.initializer}
        fed = [value.name for value in graph.input if value.name not in stored]
        unknown = sorted({node.op_type for node in graph.node} - OPERATORS.keys())
        if unknown or len(fed) != 1:
            reason = f"operators without a torch form: {', '.join(unknown)}" if unknown else (
                f"{len(fed)} inputs ({', '.join(fed)}), and only networks of one have one"
            )  # fmt: skip
            raise UnsupportedModelError(
                f"the graph has no torch form: {reason}", "leave --qat out: post-training works"
            )
        self._input, self._output = fed[0], graph.output[0].name
        self.nodes = list(graph.node)
        self._attributes = [attributes_of(node) for node in graph.node]
        self._numbers: dict[str, int] = {}
        self.trained = nn.ParameterList()
        self._constants: dict[str, Tensor] = {}
        learnt = _learnt(graph, stored)
        for name, tensor in stored.items():
            value = torch.from_numpy(np.array(numpy_helper.to_array(tensor)))
            if name in learnt:
                self._numbers[name] = len(self.trained)
                self.trained.append(nn.Parameter(value))
            else:
                self._constants[name] = value
        self._lists = {name: value.tolist() for name, value in self._constants.items() if value.dim() < 2}
        self.activations, self.weights = nn.ModuleDict(), nn.ModuleDict()
        self._grid_of: dict[str, str] = {}
        self._weight_of: dict[str, tuple[str, int]] = {}

    def quantize(self, places: Places, numbers: Numbers, weight_max: int) -> None:
        """Insert quantizers where `places` has them, starting from `numbers`."""
        keys: dict[str, str] = {}  # names of modules, which hold no dots, by the tensor that owns the grid
        for name in places.tensors():
            root = places.root(name)
            key = keys.setdefault(root, f"t{len(keys)}")
            if key not in self.activations:
                self.activations[key] = ActivationQuantizer(numbers.grids[root])
            self._grid_of[name] = key
        for layer in places.layers:
            key = f"w{self._numbers[layer.weight]}"
            if key in self.weights:
                continue
            weight = self.trained[self._numbers[layer.weight]].detach()
            quantizer = WeightQuantizer(weight.transpose(0, layer.axis), weight_max)
            scales = torch.from_numpy(np.array(numbers.weights[layer.weight].scales))
            quantizer.log_scale.data.copy_(scales.log())
            self.weights[key] = quantizer
            self._weight_of[layer.weight] = (key, layer.axis)

    def forward(self, inputs: Tensor) -> Tensor:
        values: dict[str, Tensor | None] = {"": None, **self._constants}
        for name, number in self._numbers.items():
            values[name] = self._rounded(name, self.trained[number])
        values[self._input] = self._read(self._input, inputs)
        for node, attributes in zip(self.nodes, self._attributes, strict=True):
            given: list[Any] = [values[name] for name in node.input]
            if node.op_type in DIRECTED:
                given[1:] = [self._lists.get(name, values[name]) for name in node.input[1:]]
            made = self.run(node, attributes, given)
            for name, value in zip(node.output, made if isinstance(made, tuple) else (made,), strict=False):
                values[name] = self._read(name, value)
        result = values[self._output]
        assert result is not None
        return result

    def run(self, node: onnx.NodeProto, attributes: Attributes, given: list[Any]) -> Any:
        """One node: a tensor, or a tuple of them."""
        return OPERATORS[node.op_type](attributes, given)

    def _read(self, name: str, value: Tensor) -> Tensor:
        if name not in self._grid_of:
            return value
        rounded: Tensor = self.activations[self._grid_of[name]](value)
        return rounded

    def _rounded(self, name: str, weight: Tensor) -> Tensor:
        if name not in self._weight_of:
            return weight
        key, axis = self._weight_of[name]
        rounded: Tensor = self.weights[key](weight.transpose(0, axis))
        return rounded.transpose(0, axis)

    def numbers(self) -> Numbers:
        """What was learnt, as it is written into a QDQ graph."""
        grids = {}
        for name, key in self._grid_of.items():
            quantizer = self.activations[key]
            assert isinstance(quantizer, ActivationQuantizer)
            grids[name] = quantizer.grid()
        weights, floats = {}, {}
        for name, number in self._numbers.items():
            value = self.trained[number].detach()
            floats[name] = value.numpy().copy()  # of a weight too: its layer may be left in float
            if name not in self._weight_of:
                continue
            key, axis = self._weight_of[name]
            quantizer = self.weights[key]
            assert isinstance(quantizer, WeightQuantizer)
            scale = quantizer.log_scale.detach().exp()
            shape = [1] * value.dim()
            shape[axis] = -1
            codes = (value / scale.reshape(shape)).round().clamp(quantizer.qmin, quantizer.qmax)
            weights[name] = Codes(codes.to(torch.int8).numpy(), scale.numpy().copy())
        return Numbers(grids, weights, floats)


def _learnt(graph: onnx.GraphProto, stored: dict[str, onnx.TensorProto]) -> set[str]:
    """Weights and biases of layers and norms, and vectors that are added."""
    found = set()
    for node in graph.node:
        for name in node.input:
            tensor = stored.get(name)
            if tensor is None or tensor.data_type != onnx.TensorProto.FLOAT:
                continue
            if node.op_type in _TRAINED or (node.op_type == "Add" and len(tensor.dims) == 1):
                found.add(name)
    return found


def attributes_of(node: onnx.NodeProto) -> Attributes:
    """Attributes by name, tensors as torch has them; and the number of outputs, which Split needs."""
    found: dict[str, Any] = {}
    for attribute in node.attribute:
        value = onnx.helper.get_attribute_value(attribute)
        if isinstance(value, bytes):
            value = value.decode()
        if isinstance(value, onnx.TensorProto):
            value = torch.from_numpy(np.array(numpy_helper.to_array(value)))
        found[attribute.name] = value
    return found | {"outputs": len(node.output)}
