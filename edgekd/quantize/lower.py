"""From a float ONNX graph and learnt scales to the QDQ graph one runtime executes in integers.

Q and DQ nodes are written here, never by an exporter, and their number is asserted.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgekd.errors import ParityError
from edgekd.quantize.fakequant import QuantizedParameters, Sites
from edgekd.quantize.qdq import add_pair, add_weight, assert_counts, count_kinds, sort_nodes

ActivationType = Literal["int8", "uint8"]
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
    activation_type: ActivationType,
    *,
    split_relu: bool = False,
) -> onnx.ModelProto:
    """The quantized graph. Moving a grid between int8 and uint8 shifts zero point and bounds alike, so every
    real value stays the same.

    `split_relu` puts a second Q/DQ pair of the same grid in front of each quantized ReLU. On a grid that is
    symmetric around zero, rounding and ReLU commute, so values stay the same; ONNX Runtime, which cannot
    absorb a ReLU into a grid centred on 128, can then run the convolution before it in integers.

    Raises:
        ParityError: the ONNX graph lacks a tensor or weight of the torch graph, or a node count is off.
    """
    model = onnx.ModelProto()
    model.CopyFrom(float_model)
    graph = model.graph
    del graph.value_info[:]
    _set_trained_values(graph, parameters)
    quantized = _quantize_activations(graph, parameters, sites, activation_type == "int8")
    if split_relu:
        quantized += _quantize_before_relu(graph)
    weights = _quantize_weights(graph, parameters)
    sort_nodes(graph)
    _assert_counts(graph, quantized, weights)
    onnx.checker.check_model(model, full_check=True)
    return model


def _set_trained_values(graph: onnx.GraphProto, parameters: QuantizedParameters) -> None:
    """Replace the float initialisers by the values after quantization-aware training."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    missing = sorted(parameters.tensors.keys() - stored.keys())
    if missing:
        raise ParityError(f"the ONNX graph lacks the parameters {', '.join(missing)}")
    for name, value in parameters.tensors.items():
        old = numpy_helper.to_array(stored[name])
        if old.shape != value.shape:
            raise ParityError(f"parameter {name}: shape {value.shape} in torch, {old.shape} in ONNX")
        stored[name].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(value), name))


def _quantize_activations(
    graph: onnx.GraphProto, parameters: QuantizedParameters, sites: Sites, signed: bool
) -> int:
    """Insert Q and DQ after each site; returns how many pairs. Consumers that compute read the DQ."""
    made_by = {name: node for node in graph.node for name in node.output}
    results = {value.name for value in graph.output}
    tensors = {name: _onnx_name(name, sites, graph) for name in sites.activations}
    for name, tensor in tensors.items():
        grid = parameters.activations[name].shifted(signed)
        source, dequantized = tensor, f"{tensor}_dequantized"
        if tensor in results:  # the graph's output keeps its name: the float result is renamed instead
            source, dequantized = f"{tensor}_float", tensor
            made_by[tensor].output[list(made_by[tensor].output).index(tensor)] = source
        for reader in graph.node:
            for position, read in enumerate(reader.input):
                if read == tensor and not reader.name.startswith(f"{tensor}_"):
                    reader.input[position] = dequantized
        # What TensorRT reads, int8 around zero, has its clip in front.
        add_pair(graph, source, dequantized, grid, signed, not (signed and grid.zero_point == 0))
    return len(sites.activations)


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


def _quantize_weights(graph: onnx.GraphProto, parameters: QuantizedParameters) -> int:
    """Store each weight as int8 codes behind a per-channel DequantizeLinear; returns how many."""
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for name, scales in parameters.weight_scales.items():
        weight = parameters.tensors[name]
        shaped = scales.reshape(-1, *[1] * (weight.ndim - 1))
        low, high = parameters.weight_bounds[name]
        codes = np.clip(np.round(weight / shaped), low, high).astype(np.int8)
        graph.initializer.remove(stored[name])
        real = add_weight(graph, name, codes, scales, axis=0)
        for node in graph.node:
            for position, read in enumerate(node.input):
                if read == name:
                    node.input[position] = real
    return len(parameters.weight_scales)


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
