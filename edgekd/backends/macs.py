"""Multiply-accumulates of an ONNX file at batch 1, and which executed node does them.

A runtime renames, fuses and re-blocks nodes, so that counting on its own graph would be guesswork. The
count is made on the file as written; `assign` then finds the executed node of each convolution and matrix
product by weight, name, output and, last, by order.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from edgekd.errors import BackendError, missing_extra

# Where the data and the weight are among the inputs of each operator of a file.
_OPERANDS = {
    "Conv": (0, 1), "ConvTranspose": (0, 1), "Gemm": (0, 1), "MatMul": (0, 1), "MatMulInteger": (0, 1),
    "ConvInteger": (0, 1), "QLinearConv": (0, 3), "QLinearMatMul": (0, 3),
}  # fmt: skip
# Operators through which a weight is followed back to its initializer.
_WEIGHT_PATH = {"DequantizeLinear", "QuantizeLinear", "Transpose", "Reshape", "Identity", "Cast"}
_CHAIN_LENGTH = 8  # operators that a runtime may fuse behind a convolution
_SUFFIX = re.compile(r"(?:/WithoutBiases|/Dequantization\w*|/\w+Fusion/?|_nchwc|_token_\d+)+$")  # of runtimes


@dataclass(frozen=True)
class Compute:
    """A convolution or matrix product of the file as written."""

    name: str
    kind: str  # "conv" or "matmul"
    macs: int
    weight: str  # initializer that holds the weight; "" for a product of two activations
    outputs: tuple[str, ...]  # its output, then those of the nodes behind it, nearest first


@dataclass(frozen=True)
class Executed:
    """What is known of an executed convolution or matrix product; names are those of nodes and tensors."""

    kind: str  # "conv", "matmul", or "fused" for a node that may hold any operators, found by name only
    weight: str
    names: tuple[str, ...]


def load_graph(model: Path) -> Any:
    """The checked ONNX model with local functions inlined and the batch axis set to 1.

    Raises:
        BackendError: not an ONNX file.
        MissingExtraError: the package onnx is not installed.
    """
    try:
        import onnx
        from onnx import inliner, shape_inference
    except ImportError as error:
        raise missing_extra("onnx", "train", "reading an ONNX graph") from error
    undecodable = importlib.import_module("google.protobuf.message").DecodeError
    try:
        loaded = onnx.load(model)
        if loaded.functions:
            loaded = inliner.inline_local_functions(loaded)
        stored = {tensor.name for tensor in loaded.graph.initializer}
        fed = [value.type.tensor_type.shape.dim for value in loaded.graph.input if value.name not in stored]
        for dims in fed:  # a fixed first axis of one among several inputs need not be the batch
            if dims and (len(fed) == 1 or not dims[0].dim_value):
                dims[0].dim_value = 1
        for value in loaded.graph.output:
            value.type.tensor_type.ClearField("shape")
        del loaded.graph.value_info[:]
        return shape_inference.infer_shapes(loaded, data_prop=True)
    except (OSError, undecodable, onnx.checker.ValidationError, shape_inference.InferenceError) as error:
        raise BackendError(
            f"cannot read {model} as an ONNX model: {error}", "export the model again"
        ) from error


def compute_nodes(model: Path) -> tuple[Compute, ...]:
    """Every convolution and matrix product of the file, in its order, with multiply-accumulates at batch 1.

    Where shape inference finds no output shape the count is the size of the weight, a lower bound.

    Raises:
        BackendError: not an ONNX file.
    """
    graph = load_graph(model).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape"):
            shapes[value.name] = tuple(dim.dim_value for dim in dims)
    producers = {name: node for node in graph.node for name in node.output}
    consumers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    initializers = {tensor.name for tensor in graph.initializer}
    return tuple(
        Compute(
            name=node.name,
            kind=kind_of(node.op_type),
            macs=_macs(node, shapes),
            weight=weight_name(node.input[_OPERANDS[node.op_type][1]], producers, initializers),
            outputs=_chain(node.output[0], consumers),
        )
        for node in graph.node
        if node.op_type in _OPERANDS
    )


def kind_of(op: str) -> str:
    """ "conv" or "matmul" of an operator's or layer's name."""
    return "conv" if "conv" in op.lower() else "matmul"


def weight_name(tensor: str, producers: dict[str, Any], initializers: set[str]) -> str:
    """The initializer behind a tensor, through dequantization and re-ordering; "" for an activation."""
    while tensor not in initializers:
        node = producers.get(tensor)
        if node is None:
            return ""
        if node.op_type == "Constant":
            return tensor
        if node.op_type not in _WEIGHT_PATH:
            return ""
        tensor = node.input[0]
    return tensor


def _macs(node: Any, shapes: dict[str, tuple[int, ...]]) -> int:
    """Products of one operator at batch 1; at least 1, so that the node always counts."""
    data_index, weight_index = _OPERANDS[node.op_type]
    data = shapes.get(node.input[data_index], ())
    weight = shapes.get(node.input[weight_index], ())
    output = shapes.get(node.output[0], ())
    if node.op_type == "ConvTranspose":
        total = prod(data) * prod(weight[1:])
    elif kind_of(node.op_type) == "conv":
        total = prod(output) * prod(weight[1:])
    elif node.op_type == "Gemm":
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        total = prod(output) * (weight[1 if transposed else 0] if len(weight) == 2 else 0)
    else:
        total = prod(output) * (data[-1] if data else 0)
    known = bool(output) and 0 not in output
    return max(total if known else 0, prod(weight) if weight else 0, 1)


def _chain(tensor: str, consumers: dict[str, list[Any]]) -> tuple[str, ...]:
    """A tensor and what follows it without a branch, up to the next convolution or matrix product."""
    names = [tensor]
    for _ in range(_CHAIN_LENGTH):
        readers = consumers.get(names[-1], [])
        if len(readers) != 1 or readers[0].op_type in _OPERANDS or not readers[0].output:
            break
        names.append(readers[0].output[0])
    return tuple(names)


def assign(originals: Sequence[Compute], executed: Sequence[Executed]) -> list[int]:
    """Multiply-accumulates of each executed node, in the order of `executed`.

    A node that fuses several originals (attention) gets their sum; originals that nothing executes were
    folded into constants and count nowhere.
    """
    rules: tuple[Callable[[Compute, Executed], bool], ...] = (
        lambda original, node: _same_weight(original, node) and _same_name(original, node),
        _same_weight,
        _same_name,
        lambda original, node: original.kind == node.kind and bool(set(original.outputs) & set(_bare(node))),
        lambda original, node: original.kind == node.kind,
    )
    free = list(range(len(originals)))
    found: list[list[int]] = [[] for _ in executed]
    for rule in rules:
        for position, node in enumerate(executed):
            hit = next((index for index in free if rule(originals[index], node)), None)
            if not found[position] and hit is not None:
                found[position].append(hit)
                free.remove(hit)
    for position, node in enumerate(executed):
        found[position] += [index for index in free if _same_name(originals[index], node)]
    return [sum(originals[index].macs for index in indices) for indices in found]


def plain_name(name: str) -> str:
    """A node's name without the suffixes that runtimes add."""
    return _SUFFIX.sub("", name)


def _bare(node: Executed) -> tuple[str, ...]:
    return (*node.names, *map(plain_name, node.names))


def _same_weight(original: Compute, node: Executed) -> bool:
    return bool(original.weight) and original.weight == node.weight


def _same_name(original: Compute, node: Executed) -> bool:
    return bool(original.name) and original.name in _bare(node)
