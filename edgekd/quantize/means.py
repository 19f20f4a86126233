"""The mean over height and width: the form that each runtime has the best integer kernel for."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from edgekd.quantize.qdq import reads

_FLAT = "batch_and_rest"  # the shape [0, -1]
_AXES_AS_INPUT = 18  # opset from which on ReduceMean reads them
Shapes = dict[str, list[int]]
Values = dict[str, TensorProto]


def pool_in_one_node(model: onnx.ModelProto) -> None:
    """Write it as GlobalAveragePool, and what makes (N, C) of its (N, C, 1, 1) as Reshape to ``[0, -1]``."""
    graph = model.graph
    inferred = shape_inference.infer_shapes(model).graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*inferred.input, *inferred.value_info, *inferred.output)
    }
    values = {tensor.name: tensor for tensor in graph.initializer}
    for node in list(graph.node):
        _replace(graph, node, _pooled(node, shapes, values))
    pooled = {node.output[0] for node in graph.node if node.op_type == "GlobalAveragePool"}
    for node in list(graph.node):
        if node.input and node.input[0] in pooled and _flattens(node, shapes, values):
            _replace(graph, node, [_flat(node.input[0], node.output[0], node.name)])
    if _FLAT not in values and any(_FLAT in node.input for node in graph.node):
        graph.initializer.append(numpy_helper.from_array(np.array([0, -1], np.int64), _FLAT))
    read = {name for node in graph.node for name in reads(node)} | {value.name for value in graph.output}
    for tensor in values.values():  # shapes and axes that nothing reads any more
        if tensor.name not in read:
            graph.initializer.remove(tensor)


def mean_in_one_node(model: onnx.ModelProto) -> dict[str, str]:
    """A GlobalAveragePool that only such a Reshape reads, and the Reshape, become one ReduceMean, which
    leaves OpenVINO nothing to put into another memory layout. Returns what stands for each pooled tensor."""
    graph = model.graph
    opset = next((entry.version for entry in model.opset_import if not entry.domain), 0)
    results = {value.name for value in graph.output}
    moved: dict[str, str] = {}
    for node in list(graph.node):
        if node.op_type != "GlobalAveragePool" or node.output[0] in results:
            continue
        after = [other for other in graph.node if node.output[0] in other.input]
        if len(after) != 1 or list(after[0].input[1:]) != [_FLAT]:
            continue
        result = moved[node.output[0]] = after[0].output[0]
        graph.node.remove(after[0])
        if opset < _AXES_AS_INPUT:
            mean = helper.make_node(
                "ReduceMean", [node.input[0]], [result], node.name, axes=[2, 3], keepdims=0
            )
        else:
            axes = numpy_helper.from_array(np.array([2, 3], np.int64), f"{result}_axes")
            graph.initializer.append(axes)
            mean = helper.make_node("ReduceMean", [node.input[0], axes.name], [result], node.name, keepdims=0)
        _replace(graph, node, [mean])
    return moved


def _replace(graph: onnx.GraphProto, node: onnx.NodeProto, made: list[onnx.NodeProto]) -> None:
    """Put `made`, if anything, where `node` is."""
    if made:
        index = list(graph.node).index(node)
        del graph.node[index]
        for new in reversed(made):
            graph.node.insert(index, new)


def _flat(source: str, result: str, name: str) -> onnx.NodeProto:
    return helper.make_node("Reshape", [source, _FLAT], [result], name)


def _pooled(node: onnx.NodeProto, shapes: Shapes, values: Values) -> list[onnx.NodeProto]:
    """What a ReduceMean over the last two of four axes becomes; nothing for another node."""
    if node.op_type != "ReduceMean" or len(shapes.get(node.input[0], ())) != 4:
        return []
    if sorted(axis % 4 for axis in _axes(node, values)) != [2, 3]:
        return []
    keeps = [attribute.i for attribute in node.attribute if attribute.name == "keepdims"] or [1]
    result = node.output[0]
    if keeps == [1]:
        return [helper.make_node("GlobalAveragePool", [node.input[0]], [result], node.name)]
    pool = helper.make_node("GlobalAveragePool", [node.input[0]], [f"{result}_pooled"], node.name)
    return [pool, _flat(f"{result}_pooled", result, f"{node.name}_flat")]


def _axes(node: onnx.NodeProto, values: Values) -> list[int]:
    """Of a reduction or a Squeeze; none where they are not stored."""
    if len(node.input) > 1:
        known = values.get(node.input[1])
        return [] if known is None else [int(axis) for axis in numpy_helper.to_array(known).ravel()]
    return [int(axis) for attribute in node.attribute if attribute.name == "axes" for axis in attribute.ints]


def _flattens(node: onnx.NodeProto, shapes: Shapes, values: Values) -> bool:
    """Whether it makes (N, C) of (N, C, 1, 1)."""
    batch, channels = (shapes.get(node.input[0]) or [0, 0])[:2]
    if node.op_type == "Flatten":
        return all(attribute.i == 1 for attribute in node.attribute)
    if node.op_type == "Squeeze":
        return sorted(axis % 4 for axis in _axes(node, values)) == [2, 3]
    if node.op_type != "Reshape" or node.input[1] not in values:
        return False
    shape = numpy_helper.to_array(values[node.input[1]]).ravel().tolist()
    if len(shape) != 2:
        return False
    by_channels = channels > 0 and shape[1] == channels and shape[0] in (-1, 0, batch or -1)
    return by_channels or (shape[1] == -1 and (shape[0] == 0 or (batch > 0 and shape[0] == batch)))
