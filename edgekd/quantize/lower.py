"""From a float ONNX graph and learnt scales to the QDQ graph one runtime executes in integers.

Where Q and DQ go was decided in torch, before training; they are written as those of any ONNX file are.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx
from onnx import helper

from edgekd.errors import ParityError
from edgekd.quantize.fakequant import QuantizedParameters, Sites
from edgekd.quantize.places import Operation
from edgekd.quantize.qdq import assert_counts, count_kinds, sort_nodes
from edgekd.quantize.scheme import Grid
from edgekd.quantize.writing import Codes, Numbers, write_pairs

Form = Literal["int8", "uint8", "openvino"]
FORMS: tuple[Form, ...] = ("uint8", "int8", "openvino")
_POOLS = ("ReduceMean", "GlobalAveragePool", "AveragePool", "MaxPool")
_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_OPERATORS = {
    "relu": ("Relu",),
    "hardtanh": ("Clip",),
    "clamp": ("Clip",),
    "hardswish": ("HardSwish", "Mul"),
    "hardsigmoid": ("HardSigmoid",),
    "silu": ("Mul",),  # x sigmoid(x)
    "sigmoid": ("Sigmoid",),
    "tanh": ("Tanh",),
    "gelu": ("Gelu",),
    "elu": ("Elu",),
    "leaky_relu": ("LeakyRelu",),
    "mish": ("Mish",),
    "softplus": ("Softplus",),
    "add": ("Add",),
    "mul": ("Mul",),
    "cat": ("Concat",),
    "matmul": ("MatMul",),
    "softmax": ("Softmax",),
    "transpose": ("Transpose",),
    "adaptive_avg_pool2d": _POOLS,
    "avg_pool2d": _POOLS,
    "max_pool2d": _POOLS,
    "mean": _POOLS,
    **dict.fromkeys(("view", "reshape", "flatten", "squeeze", "unsqueeze"), _VIEWS),
}


def lower(
    float_model: onnx.ModelProto,
    parameters: QuantizedParameters,
    sites: Sites,
    form: Form,
    *,
    split_relu: bool = False,
) -> onnx.ModelProto:
    """The quantized graph, all activations in int8 or in uint8, or in the form that OpenVINO runs fastest: no
    second pair behind views, means in one node, zero points of 0 where a grid lies evenly around zero. Moving
    a grid between int8 and uint8 shifts zero point and bounds alike, so every real value stays the same.

    `split_relu` puts a second Q/DQ pair of the same grid in front of each quantized ReLU. On a grid that is
    symmetric around zero, rounding and ReLU commute, so values stay the same; ONNX Runtime, which cannot
    absorb a ReLU into a grid centred on 128, can then run the convolution before it in integers.

    Raises:
        ParityError: the ONNX graph lacks a tensor or weight of the torch graph, or a node count is off.
    """
    carried = form == "openvino"
    names = {name: _onnx_name(name, sites, float_model.graph) for name in sites.activations}
    tensors = [tensor for name, tensor in names.items() if not (carried and name in sites.same_as)]
    numbers = Numbers(
        {tensor: _held(parameters.activations[name], form) for name, tensor in names.items()},
        _codes(parameters),
        _trained_floats(float_model.graph, parameters),
    )
    layers = [
        Operation(node.name, node.op_type, (), (), name)
        for name in parameters.weight_scales
        for node in float_model.graph.node
        if name in node.input
    ]
    made = write_pairs(float_model, tensors, layers, numbers, signed=form == "int8", carried=carried)
    pairs = len(tensors) + (_quantize_before_relu(made.graph) if split_relu else 0)
    sort_nodes(made.graph)
    _assert_counts(made.graph, pairs, len(parameters.weight_scales))
    onnx.checker.check_model(made, full_check=True)
    return made


def _held(grid: Grid, form: Form) -> Grid:
    return grid.centred if form == "openvino" else grid.shifted(form == "int8")


def _trained_floats(graph: onnx.GraphProto, parameters: QuantizedParameters) -> dict[str, np.ndarray]:
    """The values after quantization-aware training, each of which the graph stores in float."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    missing = sorted(parameters.tensors.keys() - stored.keys())
    if missing:
        raise ParityError(f"the ONNX graph lacks the parameters {', '.join(missing)}")
    for name, value in parameters.tensors.items():
        shape = tuple(stored[name].dims)
        if shape != value.shape:
            raise ParityError(f"parameter {name}: shape {value.shape} in torch, {shape} in ONNX")
    return parameters.tensors


def _codes(parameters: QuantizedParameters) -> dict[str, Codes]:
    """Each weight as int8 codes with a scale for each output channel, which is the first axis in torch."""
    found = {}
    for name, scales in parameters.weight_scales.items():
        weight = parameters.tensors[name]
        shaped = scales.reshape(-1, *[1] * (weight.ndim - 1))
        low, high = parameters.weight_bounds[name]
        found[name] = Codes(np.clip(np.round(weight / shaped), low, high).astype(np.int8), scales)
    return found


def _quantize_before_relu(graph: onnx.GraphProto) -> int:
    """A pair in front of each ReLU whose output is quantized, on the output's grid; returns how many."""
    reading = {node.input[0]: node for node in graph.node if node.op_type == "QuantizeLinear"}
    pairs = [
        (relu, reading[relu.output[0]])
        for relu in graph.node
        if relu.op_type == "Relu" and relu.output[0] in reading
    ]
    for relu, quantize in pairs:
        source = relu.input[0]
        code, real = f"{source}_before_relu_quantized", f"{source}_before_relu"
        grid = list(quantize.input[1:])
        graph.node.append(
            helper.make_node("QuantizeLinear", [source, *grid], [code], f"{real}_QuantizeLinear")
        )
        graph.node.append(
            helper.make_node("DequantizeLinear", [code, *grid], [real], f"{real}_DequantizeLinear")
        )
        relu.input[0] = real
    return len(pairs)


def _onnx_name(name: str, sites: Sites, graph: onnx.GraphProto) -> str:
    """The ONNX tensor of a torch node. Exporters rename and rewrite, so it is found by what made it: a layer
    by its parameters, anything else by its operator and the tensors it reads."""
    origin = sites.origins[name]
    if origin.operator == "input":
        return str(graph.input[0].name)
    if origin.is_output:
        return str(graph.output[0].name)
    if origin.parameters:
        wanted = set(origin.parameters)
        makers = [node for node in graph.node if wanted <= set(node.input)]
    else:
        read = {_onnx_name(tensor, sites, graph) for tensor in origin.inputs}
        kinds = _OPERATORS.get(origin.operator, ())
        makers = [node for node in graph.node if node.op_type in kinds and read <= set(node.input)]
    if len(makers) != 1:
        raise ParityError(
            f"the ONNX graph has {len(makers)} nodes for the tensor '{name}' ({origin.operator}) "
            "of the torch graph"
        )
    return str(makers[0].output[0])


def _assert_counts(graph: onnx.GraphProto, activations: int, weights: int) -> None:
    assert_counts(
        graph,
        {
            "QuantizeLinear": activations,
            "DequantizeLinear": activations + weights,
            "BatchNormalization": 0,
        },
    )
    count = count_kinds(graph)
    compute = sum(count.get(kind, 0) for kind in ("Conv", "Gemm", "MatMul"))
    if compute < weights:
        raise ParityError(
            f"the lowered graph has {compute} Conv, Gemm and MatMul nodes for {weights} weights"
        )
