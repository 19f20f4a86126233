"""ONNX files of single layers, for a table of layer times."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgekd.spec import LayerShape
from edgekd.target import Target


def codes_of(target: Target) -> np.generic:
    """Zero point, of the codes' type, that the target's activations have after a ReLU."""
    scheme = target.quant.activations
    zero = scheme.relu_zero_point if scheme.relu_zero_point is not None else scheme.zero_point or 0
    return np.dtype(scheme.dtype).type(zero)


def input_of(layer: LayerShape | None, codes: np.generic | None) -> tuple[str, tuple[int, ...]]:
    """Type and shape of what the file of `one_layer` takes."""
    if layer is None:
        return "float32", (1, 1, 1, 1)
    shape = (1, layer.channels_in, layer.size_in, layer.size_in)
    return "float32" if codes is None else codes.dtype.name, shape


def one_layer(layer: LayerShape | None, codes: np.generic | None) -> bytes:
    """An ONNX file with one layer and its fused ReLU; one that copies a value for None.

    Args:
        codes: a quantized layer takes and gives codes of this type, whose zero point this is; None: float.
            The products of attention run in float always, between conversions.
    """
    from onnx import TensorProto, helper, numpy_helper

    if layer is None:
        io = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 1, 1]) for name in ("x", "y")]
        graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "empty", io[:1], io[1:])
        return _model(graph)
    window = () if layer.op == "linear" else (layer.kernel, layer.kernel)
    weight = np.ones((layer.channels_out, layer.channels_in // layer.groups, *window), np.float32)
    constants = [numpy_helper.from_array(np.zeros(layer.channels_out, np.float32), "bias")]
    nodes: list[Any] = []
    if codes is not None:
        constants += [
            numpy_helper.from_array(np.array(0.01, np.float32), "scale"),
            numpy_helper.from_array(np.asarray(codes), "zero"),
            numpy_helper.from_array(np.full(layer.channels_out, 0.01, np.float32), "weight_scale"),
            numpy_helper.from_array(np.zeros(layer.channels_out, np.int8), "weight_zero"),
            numpy_helper.from_array(weight.astype(np.int8), "codes"),
        ]
        nodes.append(helper.make_node("DequantizeLinear", ["x", "scale", "zero"], ["input"]))
        nodes.append(
            helper.make_node("DequantizeLinear", ["codes", "weight_scale", "weight_zero"], ["weight"], axis=0)
        )
    else:
        constants.append(numpy_helper.from_array(weight, "weight"))
    source = "x" if codes is None else "input"
    if layer.op == "pool":
        nodes.append(helper.make_node("GlobalAveragePool", [source], ["made"]))
    elif layer.op == "avgpool":
        sides, margin = [layer.kernel] * 2, [(layer.kernel - 1) // 2] * 4
        pool = {"kernel_shape": sides, "strides": [layer.stride] * 2, "pads": margin, "ceil_mode": 1}
        nodes.append(helper.make_node("AveragePool", [source], ["made"], **pool))
    elif layer.op == "attention":
        nodes += _attention(layer, "x", codes is not None, constants)
    elif layer.op == "linear":
        nodes.append(helper.make_node("Flatten", [source], ["flat"]))
        nodes.append(helper.make_node("Gemm", ["flat", "weight", "bias"], ["made"], transB=1))
    else:
        attributes = {"strides": [layer.stride] * 2, "group": layer.groups, "pads": [layer.kernel // 2] * 4}
        nodes.append(helper.make_node("Conv", [source, "weight", "bias"], ["made"], **attributes))
    last = "made"
    if layer.relu:
        nodes.append(helper.make_node("Relu", [last], ["positive"]))
        last = "positive"
    final = ("Identity", [last]) if codes is None else ("QuantizeLinear", [last, "scale", "zero"])
    nodes.append(helper.make_node(*final, ["y"]))
    used = {name for node in nodes for name in node.input}
    dtype, shape = input_of(layer, codes)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    ends = [helper.make_tensor_value_info("x", kind, shape), helper.make_tensor_value_info("y", kind, None)]
    graph = helper.make_graph(nodes, "layer", ends[:1], ends[1:], [c for c in constants if c.name in used])
    return _model(graph)


def _attention(layer: LayerShape, source: str, quantized: bool, constants: list[Any]) -> list[Any]:
    """The products of `edgekd.nets.Attend`, in float, with one map as queries, keys and values; each is
    converted by a scale of its own, or runtimes would convert once. Codes are moved before that: ONNX Runtime
    1.31 on x86 refuses moved values of int8, whose conversion it copies with the wrong type."""
    from onnx import helper, numpy_helper

    side, depth = layer.size_in, layer.channels_in // layer.groups
    for name, shape in (("heads", (1, layer.groups, depth, side**2)), ("map", (1, -1, side, side))):
        constants.append(numpy_helper.from_array(np.array(shape, np.int64), name))
    constants.append(numpy_helper.from_array(np.array(depth**-0.5, np.float32), "depth"))
    maps, nodes = {"q": "heads_of_x", "k": "turned", "v": "heads_of_x"}, []
    if quantized:
        for number, name in enumerate(maps):
            scale = numpy_helper.from_array(np.array(0.01 + 0.001 * number, np.float32), f"{name}_scale")
            constants.append(scale)
            nodes.append(helper.make_node("DequantizeLinear", [maps[name], scale.name, "zero"], [name]))
            maps[name] = name
    return [
        helper.make_node("Reshape", [source, "heads"], ["heads_of_x"]),
        helper.make_node("Transpose", ["heads_of_x"], ["turned"], perm=[0, 1, 3, 2]),
        *nodes,
        helper.make_node("Mul", [maps["q"], "depth"], ["queries"]),
        helper.make_node("MatMul", [maps["k"], "queries"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["shares"], axis=2),
        helper.make_node("MatMul", [maps["v"], "shares"], ["mixed"]),
        helper.make_node("Reshape", ["mixed", "map"], ["made"]),
    ]


def _model(graph: Any) -> bytes:
    from onnx import helper

    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    data: bytes = model.SerializeToString()
    return data
