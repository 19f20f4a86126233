"""Ranges moved from where they hurt to where they do not: the float function stays, its grids get finer.

For two operators in a row of which the second is linear, ``y = W diag(s) diag(1/s) x``. Between a LayerNorm
and the matrix products that read it, s takes outlier channels out of the activations (SmoothQuant, Xiao et
al. 2023, arXiv:2211.10438, eq. 4): ``s_j = max|x_j|^a / max|W_j|^(1-a)``, a = 0.5. Between two convolutions
with at most a ReLU in between, it equalises the ranges of the first's output channels and the second's input
channels (Nagel et al. 2019, arXiv:1906.04721, eq. 11): ``s_i = r_i / sqrt(r_i r'_i)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgekd.backends.onnxruntime import OnnxRuntimeBackend
from edgekd.quantize.observe import Batches, with_outputs
from edgekd.quantize.qdq import reads

_ALPHA = 0.5
_LEAST, _MOST = 1e-2, 1e2  # a factor beyond is an accident of a dead channel
Values = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class _Link:
    """`first` makes what all of `readers` read, and nothing else does."""

    first: onnx.NodeProto
    readers: tuple[onnx.NodeProto, ...]
    tensor: str


def smoothed(model: onnx.ModelProto, batches: Batches) -> onnx.ModelProto | None:
    """The same function with ranges moved; None where the graph has no place for it."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    values = {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in made.graph.initializer}
    norms, chains = _links(made.graph, values)
    if not norms and not chains:
        return None
    if norms:
        peaks = _peaks(model, [link.tensor for link in norms], batches)
        for link in norms:
            _scale_norm(link, peaks[link.tensor], values)
    for link in chains:
        _equalise(link, values)
    for tensor in made.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(values[tensor.name], tensor.name))
    return made


def _links(graph: onnx.GraphProto, values: Values) -> tuple[list[_Link], list[_Link]]:
    """LayerNorms before matrix products, and pairs of convolutions."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in reads(node):
            readers.setdefault(name, []).append(node)
    results = {value.name for value in graph.output}

    def alone(name: str) -> bool:
        return len(readers.get(name, [])) == 1

    def after(node: onnx.NodeProto, known: Callable[[onnx.NodeProto], bool]) -> tuple[onnx.NodeProto, ...]:
        found = tuple(readers.get(node.output[0], []))
        whole = node.output[0] not in results and found and all(map(known, found))
        return found if whole else ()

    def product(node: onnx.NodeProto) -> bool:
        weight = node.input[1] if len(node.input) > 1 else ""
        known = node.op_type == "MatMul" and weight in values and values[weight].ndim == 2
        return known and alone(weight)

    norms, chains = [], []
    for node in graph.node:
        stored = all(name in values and alone(name) for name in node.input[1:])
        if not stored or len(node.input) < 2:
            continue
        if node.op_type == "LayerNormalization":
            if found := after(node, product):
                norms.append(_Link(node, found, node.output[0]))
        elif node.op_type == "Conv":
            last = node
            while (then := after(last, lambda one: one.op_type == "Relu")) and len(then) == 1:
                last = then[0]
            found = after(last, lambda one: one.op_type == "Conv" and one.input[1] in values)
            if len(found) == 1 and alone(found[0].input[1]):
                chains.append(_Link(node, found, last.output[0]))
    return norms, chains


def _peaks(model: onnx.ModelProto, tensors: list[str], batches: Batches) -> Values:
    """The largest magnitude of each channel (last axis)."""
    session = OnnxRuntimeBackend().open_graph(with_outputs(model, tensors).SerializeToString())
    peaks: Values = {}
    for feeds in batches():
        seen = session.run(feeds)
        for name in tensors:
            reach = np.abs(seen[name]).reshape(-1, seen[name].shape[-1]).max(0)
            peaks[name] = np.maximum(peaks[name], reach) if name in peaks else reach
    return peaks


def _scale_norm(link: _Link, peak: NDArray[np.float32], values: Values) -> None:
    weight = np.max([np.abs(values[node.input[1]]).max(1) for node in link.readers], axis=0)
    factor = np.maximum(peak, 1e-5) ** _ALPHA / np.maximum(weight, 1e-5) ** (1 - _ALPHA)
    factor = np.clip(factor / np.exp(np.log(factor).mean()), _LEAST, _MOST).astype(np.float32)
    for name in link.first.input[1:]:
        values[name] = values[name] / factor
    for node in link.readers:
        values[node.input[1]] = values[node.input[1]] * factor[:, None]


def _equalise(link: _Link, values: Values) -> None:
    first, second = link.first, link.readers[0]
    before, behind = values[first.input[1]], values[second.input[1]]
    groups = next((a.i for a in second.attribute if a.name == "group"), 1)
    out = np.abs(before).reshape(len(before), -1).max(1)
    # (groups, channels out of a group, channels into a group, rest) -> one range for each input channel
    apart = np.abs(behind).reshape(groups, len(behind) // groups, behind.shape[1], -1)
    into = apart.max((1, 3)).reshape(-1)
    known = (out > 0) & (into > 0)
    factor = np.where(known, np.sqrt(np.where(known, out, 1) / np.where(known, into, 1)), 1.0)
    factor = np.clip(factor / np.exp(np.log(factor).mean()), _LEAST, _MOST).astype(np.float32)
    values[first.input[1]] = before / factor.reshape(-1, *[1] * (before.ndim - 1))
    for name in first.input[2:]:
        values[name] = values[name] / factor
    shaped = factor.reshape(groups, 1, behind.shape[1], *[1] * (behind.ndim - 2))
    wide = behind.reshape(groups, -1, *behind.shape[1:])
    values[second.input[1]] = np.ascontiguousarray((wide * shaped).reshape(behind.shape))
