"""Weights of matrix products in 8 or 4 bits, the rest in float: a tool for size, not for speed on a CPU."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, version_converter

from edgekd.errors import UnsupportedModelError
from edgekd.quantize.onnx_file import FloatModel
from edgekd.quantize.qdq import add_weight, sort_nodes

BLOCK = 32  # weights along the input that share a 4-bit scale
_OPSET_INT4 = 21


def write_weight_only(model: FloatModel, bits: int) -> onnx.ModelProto:
    """DequantizeLinear in front of each stored weight of a Gemm or MatMul: int8 per output channel, or int4
    in blocks of 32 along the input (opset 21).

    Raises:
        UnsupportedModelError: there is no such weight; convolutions have no 4-bit kernels on any runtime.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model.model)
    if bits == 4 and made.opset_import[0].version < _OPSET_INT4:
        made = version_converter.convert_version(made, _OPSET_INT4)
    graph = made.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    done: dict[str, str] = {}
    for node in list(graph.node):
        if node.op_type not in ("MatMul", "Gemm") or node.input[1] not in stored:
            continue
        name = node.input[1]
        values = numpy_helper.to_array(stored[name])
        if values.ndim != 2 or values.dtype != np.float32:
            continue
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        inputs_axis = 1 if transposed else 0
        if bits == 4 and values.shape[inputs_axis] % BLOCK:
            continue
        if name not in done:
            done[name] = (
                _add_blocks(graph, name, values, inputs_axis)
                if bits == 4
                else _add_channels(graph, name, values, 1 - inputs_axis)
            )
        node.input[1] = done[name]
    if not done:
        raise UnsupportedModelError(
            f"weight-only {bits} bits: the graph has no matrix product with a stored weight"
            + (f" whose input is a multiple of {BLOCK}" if bits == 4 else ""),
            "convolutions have no kernels for this on any runtime here: quantize them to int8",
        )
    for name in done:
        if not any(name in node.input for node in graph.node):
            graph.initializer.remove(stored[name])
    sort_nodes(graph)
    return made


def _add_channels(graph: onnx.GraphProto, name: str, values: NDArray[np.float32], axis: int) -> str:
    reach = np.abs(values).max(1 - axis)
    scales = np.maximum(reach, 1e-8).astype(np.float32) / 127
    codes = np.round(values / (scales[:, None] if axis == 0 else scales[None]))
    return add_weight(graph, name, np.clip(codes, -128, 127).astype(np.int8), scales, axis)


def _add_blocks(graph: onnx.GraphProto, name: str, values: NDArray[np.float32], axis: int) -> str:
    """Symmetric int4 with a scale for each block of `BLOCK` along `axis`."""
    count = values.shape[axis] // BLOCK
    split = (count, BLOCK, -1) if axis == 0 else (values.shape[0], count, BLOCK)
    blocks = values.reshape(split)
    within = 1 if axis == 0 else 2
    scales = np.maximum(np.abs(blocks).max(within), 1e-8).astype(np.float32) / 7
    codes = np.clip(np.round(blocks / np.expand_dims(scales, within)), -8, 7).astype(np.int8)
    code, scale, real = (f"{name}_{part}" for part in ("int4", "scale", "dequantized"))
    graph.initializer.append(
        helper.make_tensor(code, TensorProto.INT4, values.shape, codes.reshape(values.shape).ravel())
    )
    graph.initializer.append(numpy_helper.from_array(scales, scale))
    graph.node.append(
        helper.make_node(
            "DequantizeLinear", [code, scale], [real], f"{name}_DequantizeLinear", axis=axis, block_size=BLOCK
        )
    )
    return real
