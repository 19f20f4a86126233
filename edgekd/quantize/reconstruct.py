"""Weights rounded so that the errors of one make up for those of others on real inputs, layer by layer.

Nearest rounding minimises the error of each weight; what counts is that of the layer's output. With
H = sum of x x^T over the layer's quantized inputs, GPTQ (Frantar et al. 2023, arXiv:2210.17323, algorithm 1;
after OBS) rounds one column of the weight matrix after the other and moves the error to those not rounded
yet. It answers the question of AdaRound (Nagel et al. 2020, arXiv:2004.10568, eq. 21) in closed form. Biases
then take up the mean error that is left (Nagel et al. 2019, arXiv:1906.04721, section 4.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
from numpy.typing import NDArray

from edgekd.backends.onnxruntime import OnnxRuntimeBackend
from edgekd.quantize.observe import Batches, with_outputs
from edgekd.quantize.onnx_file import FloatModel
from edgekd.quantize.places import Operation, Places, weight_matrix
from edgekd.quantize.scheme import Grid
from edgekd.quantize.writing import Codes, Numbers

_COLUMNS = 2304  # a larger matrix is rounded to the nearest: its H does not fit into a small machine
_MEMORY = 256 * 2**20  # bytes of H held at a time
_ROWS = 4096  # of input patches that a batch contributes to one layer at most
_PRODUCTS = 4e10  # multiply-accumulates of one layer's H: a second of one core
_ENOUGH = 4  # patches for each column, whatever they cost
_BLOCK = 128  # columns whose errors go to those behind the block in one product
_DAMPING = 0.01  # of the mean diagonal of H, added to it
Step = Callable[[str, int, int], None]


@dataclass
class _Sums:
    """Of the patches x a layer reads, by group: sum of x x^T (G, K, K), sum of x (G, K), their number."""

    squares: NDArray[np.float32]
    means: NDArray[np.float64]
    count: int = 0


def reconstruct(
    model: FloatModel,
    places: Places,
    numbers: Numbers,
    batches: Batches,
    largest: int,
    calls: int,
    step: Step,
) -> Numbers:
    """New weight codes and biases for all layers; grids and scales stay. `calls`: how many batches there are,
    over which the patches that a layer needs are spread."""
    values, nodes = model.values, {node.name: node for node in model.model.graph.node}
    weights, floats = dict(numbers.weights), dict(numbers.floats)
    held: list[Operation] = []
    for layer in places.layers:
        if _groups_of(values[layer.weight], layer, nodes[layer.name]) is not None:
            held.append(layer)
    shared = [layer.weight for layer in places.layers]
    rounded = 0
    for part in _parts(held, values, nodes):
        sums = _collect(model, part, numbers, batches, calls)
        for layer in part:
            step("round weights", rounded, len(held))
            rounded += 1
            node, weight = nodes[layer.name], values[layer.weight]
            old = numbers.weights[layer.weight]
            matrix = weight_matrix(weight, layer).astype(np.float64)
            found = sums[layer.name]
            codes = _rounded(matrix, old.scales, found, largest)
            moved = np.moveaxis(weight, layer.axis, 0).shape
            back = np.moveaxis(codes.reshape(moved), 0, layer.axis)
            weights[layer.weight] = Codes(np.ascontiguousarray(back, np.int8), old.scales)
            bias = node.input[2] if len(node.input) > 2 else ""
            if bias in values and shared.count(layer.weight) == 1:
                lost = matrix - codes * old.scales[:, None].astype(np.float64)
                shift = _per_group(lost, found.means / max(found.count, 1))
                floats[bias] = (values[bias] + shift.reshape(values[bias].shape)).astype(np.float32)
    step("round weights", len(held), len(held))
    return Numbers(numbers.grids, weights, floats)


def _groups_of(weight: NDArray[np.float32], layer: Operation, node: onnx.NodeProto) -> int | None:
    """Groups of a layer; None where its patches are not gathered here."""
    if layer.kind == "ConvTranspose" or (layer.kind == "Conv" and weight.ndim not in (3, 4)):
        return None
    groups = next((a.i for a in node.attribute if a.name == "group"), 1)
    columns = weight_matrix(weight, layer).shape[1]
    return groups if columns <= _COLUMNS else None


def _parts(
    layers: list[Operation], values: dict[str, NDArray[np.float32]], nodes: dict[str, onnx.NodeProto]
) -> list[list[Operation]]:
    """Layers whose sums fit into memory together."""
    parts: list[list[Operation]] = [[]]
    used = 0
    for layer in layers:
        groups = _groups_of(values[layer.weight], layer, nodes[layer.name]) or 1
        columns = weight_matrix(values[layer.weight], layer).shape[1]
        size = 4 * groups * columns**2
        if used + size > _MEMORY and parts[-1]:
            parts.append([])
            used = 0
        parts[-1].append(layer)
        used += size
    return parts if parts[0] else []


def _collect(
    model: FloatModel, layers: list[Operation], numbers: Numbers, batches: Batches, calls: int
) -> dict[str, _Sums]:
    nodes, values = {node.name: node for node in model.model.graph.node}, model.values
    tensors = sorted({layer.reads[0] for layer in layers})
    session = OnnxRuntimeBackend().open_graph(with_outputs(model.model, tensors).SerializeToString())
    sums = {}
    for layer in layers:
        groups = _groups_of(values[layer.weight], layer, nodes[layer.name]) or 1
        columns = weight_matrix(values[layer.weight], layer).shape[1]
        sums[layer.name] = _Sums(
            np.zeros((groups, columns, columns), np.float32), np.zeros((groups, columns))
        )
    draw = np.random.default_rng(0)
    for feeds in batches():
        seen = feeds | session.run(feeds)
        for layer in layers:
            found = sums[layer.name]
            groups, columns = found.means.shape
            wanted = max(_ENOUGH * columns, _PRODUCTS / (groups * columns**2))
            pick = partial(_some, min(_ROWS, math.ceil(wanted / calls)), draw)
            patches = _patches(seen[layer.reads[0]], values[layer.weight], nodes[layer.name], groups, pick)
            patches = _on_grid(patches, numbers.grids[layer.reads[0]])
            found.squares += np.matmul(patches.transpose(0, 2, 1), patches)
            found.means += patches.sum(1, dtype=np.float64)
            found.count += patches.shape[1]
        del seen, patches  # before the next batch is made
    return sums


def _on_grid(values: NDArray[np.float32], grid: Grid) -> NDArray[np.float32]:
    codes = np.clip(np.round(values / grid.scale) + grid.zero_point, grid.qmin, grid.qmax)
    real: NDArray[np.float32] = ((codes - grid.zero_point) * grid.scale).astype(np.float32)
    return real


def _patches(
    inputs: NDArray[np.float32],
    weight: NDArray[np.float32],
    node: onnx.NodeProto,
    groups: int,
    pick: Callable[[int], NDArray[np.int64]],
) -> NDArray[np.float32]:
    """(G, patches, K): what each output value of the layer is a product with, those that `pick` takes."""
    if node.op_type != "Conv":
        rows = inputs.reshape(-1, inputs.shape[-1])
        return rows[pick(len(rows))][None]
    spatial = weight.ndim - 2
    stated = {a.name: list(a.ints) for a in node.attribute}
    same = any(a.name == "auto_pad" and a.s.startswith(b"SAME") for a in node.attribute)
    strides, dilations = stated.get("strides", [1] * spatial), stated.get("dilations", [1] * spatial)
    reach = [dilations[i] * (weight.shape[2 + i] - 1) + 1 for i in range(spatial)]
    pads = stated.get("pads", [(r - 1) // 2 if same else 0 for r in reach] * 2)
    wide = [(0, 0), (0, 0), *((pads[i], pads[i + spatial]) for i in range(spatial))]
    padded = np.pad(inputs, wide) if any(pads) else inputs
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, tuple(range(2, 2 + spatial)))
    steps = tuple(slice(None, None, size) for size in (1, 1, *strides, *dilations))
    stepped = windows[steps]
    outs = (stepped.shape[0], *stepped.shape[2 : 2 + spatial])
    places = np.unravel_index(pick(int(np.prod(outs))), outs)
    taken = np.moveaxis(stepped, 1, spatial + 1)[tuple(places)]  # (patches, C, k...)
    return taken.reshape(len(taken), groups, -1).transpose(1, 0, 2)


def _some(most: int, draw: np.random.Generator, count: int) -> NDArray[np.int64]:
    return np.arange(count) if count <= most else np.sort(draw.choice(count, most, replace=False))


def _per_group(matrix: NDArray[np.float64], vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    """(channels,) products of each row with the vector of its group."""
    groups, columns = vectors.shape
    made: NDArray[np.float64] = np.einsum("grk,gk->gr", matrix.reshape(groups, -1, columns), vectors).ravel()
    return made


def _rounded(
    matrix: NDArray[np.float64], scales: NDArray[np.float32], sums: _Sums, largest: int
) -> NDArray[np.float64]:
    """Codes of (channels, columns), group by group."""
    groups, columns = sums.means.shape
    wide = scales.astype(np.float64).reshape(groups, -1)
    weights = matrix.reshape(groups, -1, columns)
    made = [
        _round_columns(weights[g], wide[g], sums.squares[g] / max(sums.count, 1), largest)
        for g in range(groups)
    ]
    return np.stack(made).reshape(matrix.shape)


def _round_columns(
    weights: NDArray[np.float64], scales: NDArray[np.float64], squares: NDArray[np.float32], largest: int
) -> NDArray[np.float64]:
    """GPTQ: column q of `weights` is rounded, and its error e goes to the columns after it by
    ``w_j -= e * U[q, j] / U[q, q]``, U the upper Cholesky factor of the inverse of H. The columns behind a
    block of them get its errors in one product (step 2 there, lazy batch-updates)."""
    damped = squares.astype(np.float64)
    diagonal = np.diag(damped).copy()
    damped[np.diag_indices_from(damped)] += np.where(
        diagonal == 0, 1.0, _DAMPING * max(float(diagonal.mean()), 1e-12)
    )
    order = np.argsort(-diagonal, kind="stable")  # the loudest inputs first
    upper = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T
    left = np.ascontiguousarray(weights[:, order].T)  # a row for each column
    codes = np.empty_like(left)
    for start in range(0, len(left), _BLOCK):
        end = min(start + _BLOCK, len(left))
        errors = np.empty((end - start, left.shape[1]))
        for q in range(start, end):
            codes[q] = np.clip(np.round(left[q] / scales), -largest - 1, largest)
            errors[q - start] = (left[q] - codes[q] * scales) / upper[q, q]
            left[q + 1 : end] -= upper[q, q + 1 : end, None] * errors[q - start]
        left[end:] -= upper[start:end, end:].T @ errors
    back = np.empty_like(codes)
    back[order] = codes
    return back.T
