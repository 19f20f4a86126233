"""Writing Q and DQ nodes into an ONNX graph: what every lowering shares.

Weights become integer initialisers behind a DequantizeLinear; biases stay float (TensorRT's parser refuses
int32 ones).
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgekd.errors import ParityError
from edgekd.quantize.scheme import Grid


def add_pair(
    graph: onnx.GraphProto, source: str, dequantized: str, grid: Grid, signed: bool, clip_codes: bool = True
) -> None:
    """``source`` -> Q -> DQ -> ``dequantized`` on one grid. Q clips to its 8-bit type; a narrower grid needs
    a Clip: of the codes behind Q, which leaves integer kernels around it, or of the values in front, which
    TensorRT reads."""
    scale, zero, code = f"{source}_scale", f"{source}_zero_point", f"{source}_quantized"
    kind = TensorProto.INT8 if signed else TensorProto.UINT8
    graph.initializer.append(numpy_helper.from_array(np.array(grid.scale, np.float32), scale))
    graph.initializer.append(helper.make_tensor(zero, kind, [], [grid.zero_point]))
    given, read = source, code
    if grid.narrow:
        ends, low, high = [f"{source}_least", f"{source}_most"], grid.qmin, grid.qmax
        if clip_codes:
            read = f"{source}_clipped"
            bounds = [
                helper.make_tensor(end, kind, [], [value])
                for end, value in zip(ends, (low, high), strict=True)
            ]
        else:
            given = f"{source}_clipped"
            real = [np.float32(grid.scale) * np.float32(value - grid.zero_point) for value in (low, high)]
            bounds = [
                numpy_helper.from_array(np.array(value), end) for end, value in zip(ends, real, strict=True)
            ]
        graph.initializer.extend(bounds)
        clipped = (code, read) if clip_codes else (source, given)
        graph.node.append(helper.make_node("Clip", [clipped[0], *ends], [clipped[1]], f"{source}_Clip"))
    graph.node.append(
        helper.make_node("QuantizeLinear", [given, scale, zero], [code], f"{source}_QuantizeLinear")
    )
    graph.node.append(
        helper.make_node("DequantizeLinear", [read, scale, zero], [dequantized], f"{source}_DequantizeLinear")
    )


def add_weight(
    graph: onnx.GraphProto, name: str, codes: NDArray[np.int8], scales: NDArray[np.float32], axis: int
) -> str:
    """Store `codes`, a scale for each entry of `axis`, behind a DequantizeLinear; returns the real tensor."""
    code, scale, zero, real = (f"{name}_{part}" for part in ("int8", "scale", "zero_point", "dequantized"))
    graph.initializer.append(numpy_helper.from_array(codes, code))
    graph.initializer.append(numpy_helper.from_array(scales.astype(np.float32), scale))
    graph.initializer.append(numpy_helper.from_array(np.zeros(len(scales), np.int8), zero))
    graph.node.append(
        helper.make_node(
            "DequantizeLinear", [code, scale, zero], [real], f"{name}_DequantizeLinear", axis=axis
        )
    )
    return real


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Topological order, which appended nodes broke.

    Raises:
        ParityError: the graph has a cycle.
    """
    ready = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer} | {""}
    waiting, ordered = list(graph.node), []
    while waiting:
        now = [node for node in waiting if all(name in ready for name in reads(node))]
        if not now:
            raise ParityError(f"the lowered graph has a cycle near {waiting[0].name}")
        ordered += now
        ready |= {name for node in now for name in node.output}
        done = {id(node) for node in now}
        waiting = [node for node in waiting if id(node) not in done]
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
    del graph.node[:]
    graph.node.extend(copies)


def reads(node: onnx.NodeProto) -> list[str]:
    """The tensors of the enclosing graph that a node reads, those of its branches and loop bodies too."""
    names = list(node.input)
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            made = {value.name for value in inner.input} | {tensor.name for tensor in inner.initializer}
            made |= {name for child in inner.node for name in child.output}
            names += [name for child in inner.node for name in reads(child) if name not in made]
            names += [value.name for value in inner.output if value.name not in made]
    return names


def count_kinds(graph: onnx.GraphProto) -> dict[str, int]:
    """How many nodes of each operator."""
    kinds = [node.op_type for node in graph.node]
    return {kind: kinds.count(kind) for kind in kinds}


def assert_counts(graph: onnx.GraphProto, expected: dict[str, int]) -> None:
    """Exporters and rewrites drop or double Q/DQ nodes silently; this notices.

    Raises:
        ParityError: another number of nodes than expected.
    """
    count = count_kinds(graph)
    for kind, number in expected.items():
        if count.get(kind, 0) != number:
            raise ParityError(f"the lowered graph has {count.get(kind, 0)} {kind} nodes, expected {number}")
