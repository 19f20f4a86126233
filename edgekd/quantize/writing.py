"""From a float ONNX graph, grids and weight codes to the QDQ graph that a runtime executes in integers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from edgekd.quantize.means import mean_in_one_node
from edgekd.quantize.places import Operation, Places
from edgekd.quantize.qdq import add_pair, add_weight, assert_counts, count_kinds, sort_nodes
from edgekd.quantize.scheme import Grid

_BEFORE_TYPES = 20  # the last opset without `output_dtype`


@dataclass(frozen=True)
class Codes:
    """Integers of one weight in its own layout, and a scale for each output channel."""

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]


@dataclass
class Numbers:
    """What is written: grids of activations, codes of weights by tensor name, and changed float tensors."""

    grids: dict[str, Grid]
    weights: dict[str, Codes]
    floats: dict[str, NDArray[np.float32]] = field(default_factory=dict)


def write_quantized(
    model: onnx.ModelProto,
    places: Places,
    numbers: Numbers,
    *,
    signed: bool,
    only: Iterable[str] | None = None,
    activations: bool = True,
) -> onnx.ModelProto:
    """The QDQ graph with the operations `only` (all by default) in integers; the others compute in float.

    Args:
        signed: store activations as int8; real values are the same as in uint8. A grid with negative codes
            always is.
        activations: False quantizes weights alone.

    Raises:
        ParityError: the numbers of Q and DQ nodes are not those that were written.
    """
    names = list(places.operations) if only is None else list(only)
    chosen = [places.operations[name] for name in names]
    tensors = places.pairs(names) if activations else []
    layers = [one for one in chosen if one.weight]
    return write_pairs(model, tensors, layers, numbers, signed=signed, carried=places.carried)


def write_pairs(
    model: onnx.ModelProto,
    tensors: Sequence[str],
    layers: Sequence[Operation],
    numbers: Numbers,
    *,
    signed: bool,
    carried: bool,
) -> onnx.ModelProto:
    """The graph with a pair of Q and DQ behind each of `tensors`, and the weights of `layers` in integers.

    Args:
        carried: for a runtime that carries integers through movers by itself: means become one node.

    Raises:
        ParityError: the numbers of Q and DQ nodes are not those that were written.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    del graph.value_info[:]
    _set_floats(graph, numbers.floats)
    before = count_kinds(graph)
    moved = mean_in_one_node(made) if carried else {}
    for name in tensors:
        grid = numbers.grids[name]
        held = signed or grid.qmin < 0
        _quantize_activation(graph, moved.get(name, name), grid.shifted(held), held)
    written = sum(_quantize_weight(graph, layer, numbers) for layer in layers)
    _lower_opset(made)
    sort_nodes(graph)
    assert_counts(
        graph,
        {
            "QuantizeLinear": before.get("QuantizeLinear", 0) + len(tensors),
            "DequantizeLinear": before.get("DequantizeLinear", 0) + len(tensors) + written,
        },
    )
    return made


def _lower_opset(model: onnx.ModelProto) -> None:
    """To 20, where Q has no attribute for its type: ONNX Runtime 1.31 refuses graphs of 21 in which it has to
    write one itself, for int8 that goes through a Reshape. What 21 and 22 added are types of operators, and
    another GroupNormalization."""
    if any(node.op_type == "GroupNormalization" for node in model.graph.node):
        return
    for entry in model.opset_import:
        if not entry.domain:
            entry.version = min(entry.version, _BEFORE_TYPES)


def _set_floats(graph: onnx.GraphProto, floats: dict[str, NDArray[np.float32]]) -> None:
    for tensor in graph.initializer:
        if tensor.name in floats:
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(floats[tensor.name]), tensor.name))


def _quantize_activation(graph: onnx.GraphProto, tensor: str, grid: Grid, signed: bool) -> None:
    source, dequantized = tensor, f"{tensor}_dequantized"
    if any(value.name == tensor for value in graph.output):  # an output keeps its name
        source, dequantized = f"{tensor}_float", tensor
        for node in graph.node:
            for position, name in enumerate(node.output):
                if name == tensor:
                    node.output[position] = source
    else:
        for node in graph.node:
            for position, name in enumerate(node.input):
                if name == tensor:
                    node.input[position] = dequantized
    # What TensorRT reads, int8 around zero, has the clip of a narrow grid in front.
    add_pair(graph, source, dequantized, grid, signed, not (signed and grid.zero_point == 0))


def _quantize_weight(graph: onnx.GraphProto, layer: Operation, numbers: Numbers) -> int:
    """Returns how many DequantizeLinear nodes were added: one, or none where another layer added it."""
    weight, node = layer.weight, next(node for node in graph.node if node.name == layer.name)
    real = f"{weight}_dequantized"
    position = list(node.input).index(weight)
    node.input[position] = real
    if any(real in other.output for other in graph.node):
        return 0
    held = numbers.weights[weight]
    add_weight(graph, weight, held.codes, held.scales, layer.axis)
    if not any(weight in other.input for other in graph.node):
        stored = next(tensor for tensor in graph.initializer if tensor.name == weight)
        graph.initializer.remove(stored)
    return 1
