"""The graph that ONNX Runtime executes: which precision each node has, and why not int8."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekd.backends import Coverage, Layer
from edgekd.backends.macs import Executed, assign, compute_nodes, kind_of, plain_name, weight_name

# Integer kernels beside those named QLinear*.
_INTEGER_OPS = {"QGemm", "MatMulInteger", "ConvInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
_COMPUTE = re.compile(
    r"(QLinear|Fused|N[Hh]wc)?Conv(Transpose|Integer)?|(Fused|Q)?Gemm|(QLinear|Fused|DynamicQuantize)?MatMul"
    r"(Integer|IntegerToFloat|NBits)?"
)
_WEIGHT_INPUT = {"QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3}  # of every other operator: 1
# Operators that only move or select values: they run in the type of their input.
_MOVERS = {
    "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "MaxPool", "Concat", "Slice", "Gather",
    "Split", "Identity", "Pad", "Expand", "ReorderInput", "ReorderOutput", "DequantizeLinear",
}  # fmt: skip
_ABSORBED = {"Relu", "Clip"}  # an integer kernel's saturation can do these


def coverage_of(model: Path, optimised: Path, times: Sequence[float | None] = ()) -> Coverage:
    """What `optimised`, which this or another machine's runtime made of `model`, executes in which precision.

    Args:
        times: of each node in milliseconds; empty: not measured.

    Raises:
        BackendError: one of them is not an ONNX file.
        MissingExtraError: the package onnx is not installed.
    """
    originals = compute_nodes(model)
    import onnx

    graph = _Graph(onnx.load(optimised).graph)
    compute = [node for node in graph.nodes if _COMPUTE.fullmatch(node.op_type)]
    counted = assign(originals, [graph.key(node) for node in compute])
    macs = dict(zip(map(id, compute), counted, strict=True))
    layers = (
        Layer(
            name=plain_name(node.name or node.output[0]),
            op=node.op_type,
            precision=graph.precision(node),
            macs=macs.get(id(node), 0),
            ms=ms,
            reason=graph.reason(node) if macs.get(id(node)) else "",
        )
        for node, ms in zip(graph.nodes, times or [None] * len(graph.nodes), strict=True)
    )
    return Coverage(tuple(layers))


class _Graph:
    """The optimised graph, ready for questions about precision."""

    def __init__(self, graph: Any) -> None:
        self.nodes = list(graph.node)
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.producers = {name: node for node in self.nodes for name in node.output}
        self.consumers: dict[str, list[Any]] = {}
        self.integer_tensors: set[str] = set()
        for node in self.nodes:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
            makes_integers = node.op_type == "QuantizeLinear" or self.precision(node) == "int8"
            if makes_integers and node.op_type not in {"DequantizeLinear", "MatMulIntegerToFloat"}:
                self.integer_tensors.update(node.output)
        self.quantized = any("Linear" in node.op_type for node in self.nodes)

    def precision(self, node: Any) -> str:
        """ "int8" for an integer kernel and for a node that moves integers; else "f32"."""
        if node.op_type.startswith("QLinear") or node.op_type in _INTEGER_OPS:
            return "int8"
        source = node.input[0] if node.input else ""
        moves_integers = node.op_type in _MOVERS and (
            source in self.integer_tensors or self._holds_int8(source)
        )
        return "int8" if moves_integers else "f32"

    def _holds_int8(self, tensor: str) -> bool:
        return tensor in self.initializers and self.initializers[tensor].data_type in {2, 3}  # UINT8, INT8

    def key(self, node: Any) -> Executed:
        """What `assign` needs to find the node's original."""
        weight = node.input[_WEIGHT_INPUT.get(node.op_type, 1)]
        return Executed(
            kind=kind_of(node.op_type),
            weight=weight_name(weight, self.producers, set(self.initializers)),
            names=(node.name, *node.output),
        )

    def reason(self, node: Any) -> str:
        """Why a convolution or matrix product of a quantized graph stayed in float; "" when not known."""
        if self.precision(node) == "int8" or not self.quantized:
            return ""
        source, weight = (self.producers.get(name) for name in node.input[:2])
        if weight is None or weight.op_type != "DequantizeLinear":
            return "weight not quantized"
        if source is None or source.op_type != "DequantizeLinear":
            return "input not quantized"
        if self._zero_point(source)[0] == "s8":
            quantizer = self.producers.get(source.input[0])
            before = self.producers.get(quantizer.input[0]) if quantizer is not None else None
            after = " after Relu" if before is not None and _has_relu(before) else ""
            return f"signed s8 activation{after} (input)"
        return self._output_reason(node)

    def _output_reason(self, node: Any) -> str:
        if node.op_type == "FusedConv" and len(node.input) > 3:
            return "output not quantized (before the Add that is fused into it)"
        relu = _has_relu(node)
        readers = self.consumers.get(node.output[0], [])
        while len(readers) == 1 and readers[0].op_type in _ABSORBED:
            relu = True
            readers = self.consumers.get(readers[0].output[0], [])
        others = sorted({reader.op_type for reader in readers} - {"QuantizeLinear"})
        if others or not readers:
            return f"output not quantized (read by {', '.join(others) or 'the graph output'})"
        kind, zero_point = self._zero_point(readers[0])
        if kind == "s8":
            return f"signed s8 activation{' after Relu' if relu else ''} (output)"
        if relu and zero_point:
            return f"zero point {zero_point} after Relu, which the integer kernel cannot absorb"
        return ""

    def _zero_point(self, node: Any) -> tuple[str, int]:
        """Type ("u8", "s8") and value of a quantizer's or dequantizer's zero point."""
        import onnx

        tensor = self.initializers.get(node.input[2]) if len(node.input) > 2 else None
        if tensor is None:
            return "u8", 0
        kind = "s8" if tensor.data_type == onnx.TensorProto.INT8 else "u8"
        return kind, int(onnx.numpy_helper.to_array(tensor).flat[0])


def _has_relu(node: Any) -> bool:
    """Whether the node is, or has fused, a Relu."""
    return node.op_type == "Relu" or any(
        attribute.name == "activation" and attribute.s == b"Relu" for attribute in node.attribute
    )
