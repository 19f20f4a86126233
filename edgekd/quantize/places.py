"""Where quantization goes in an ONNX graph: operators that can run in integers, and the tensors they read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from edgekd.errors import UnsupportedModelError
from edgekd.quantize.onnx_file import FloatModel, element_types
from edgekd.quantize.qdq import reads
from edgekd.quantize.scheme import Grid, QuantScheme

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_ACTIVATIONS = ("Relu", "Clip")  # saturation of an integer kernel does these
_POOLS = ("GlobalAveragePool", "AveragePool")
_NOT_A_MAP = ("MatMul", "Gemm", "Softmax", "LayerNormalization", "Transpose", "Constant")
# Values move and do not change: input and output share one grid.
_MOVERS = ("MaxPool", "Flatten", "Reshape", "Squeeze", "Unsqueeze", "Resize", "Split", "Slice", "Pad")
# What each dialect's runtime runs in integers beside the layers; the first asks for quantized outputs too.
JOINS = {
    "x86-u8-relu0": ("Add", "Mul", "Concat", "Sigmoid", "LeakyRelu", *_POOLS),
    "arm-s8": ("Add", "Mul", "Concat", "Sigmoid", "LeakyRelu", *_POOLS),
    "openvino-u8": ("Add", "Concat", *_POOLS),
    "trt-s8sym": ("Add", *_POOLS),
}
_UNEVEN = 8.0  # times the smallest range among the inputs of a concatenation
_OUTPUTS_TOO = ("x86-u8-relu0", "arm-s8")
# OpenVINO carries integers through movers by itself; a second pair behind one is a conversion there and back.
_CARRIED = ("openvino-u8",)
_EVEN = 0.5  # of a range that may be centred: least share of the longer side of zero that the shorter one has


@dataclass(frozen=True)
class Operation:
    """An operator that runs in integers when `reads` and `writes` are quantized. `weight` names the stored
    tensor of a layer, `axis` its output channels."""

    name: str
    kind: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    weight: str = ""
    axis: int = 0


@dataclass(frozen=True)
class Places:
    """`operations` by name, in the order of the graph; a tensor in `same_as` has the grid of another, and
    where the runtime has `carried` it there, no pair of its own."""

    operations: dict[str, Operation]
    same_as: dict[str, str] = field(default_factory=dict)
    carried: bool = False

    @property
    def layers(self) -> tuple[Operation, ...]:
        return tuple(operation for operation in self.operations.values() if operation.weight)

    def tensors(self, names: Iterable[str] | None = None) -> list[str]:
        """Activations that are quantized when these operations (all by default) run in integers."""
        chosen = self.operations.values() if names is None else [self.operations[name] for name in names]
        found: dict[str, None] = {}
        for operation in chosen:
            for tensor in (*operation.reads, *operation.writes):
                name = tensor
                while name not in found:
                    found[name] = None
                    name = self.same_as.get(name, name)
        return list(found)

    def pairs(self, names: Iterable[str] | None = None) -> list[str]:
        """Those of `tensors` that get a pair of Q and DQ."""
        found = self.tensors(names)
        return [name for name in found if name not in self.same_as] if self.carried else found

    def root(self, tensor: str) -> str:
        """The tensor whose grid this one has."""
        while tensor in self.same_as:
            tensor = self.same_as[tensor]
        return tensor


def asymmetric_grid(scheme: QuantScheme, low: float, high: float, *, centred: bool = False) -> Grid:
    """The grid of a dialect with 8-bit zero points: 0 is exact, and the range may lie anywhere around it. One
    that may be `centred` has the zero point 0 where its two sides are about as long."""
    if scheme.symmetric:
        return scheme.grid(low, high)
    low, high = min(low, 0.0), max(high, 0.0)
    if centred and min(-low, high) >= _EVEN * max(-low, high):
        return Grid(max(-low, high, 1e-8) / 127, 0, -128, 127)
    scale = max((high - low) / 255, 1e-8)
    return Grid(scale, int(np.clip(np.round(-low / scale), 0, 255)), 0, 255)


def find_places(model: FloatModel, scheme: QuantScheme) -> Places:
    """All operators of a graph that the dialect's runtime can run in integers.

    Raises:
        UnsupportedModelError: the graph has no convolution and no matrix product with stored weights.
    """
    return _Finder(model, scheme).find()


class _Finder:
    def __init__(self, model: FloatModel, scheme: QuantScheme) -> None:
        graph = model.model.graph
        self._graph = graph
        self._types = element_types(model.model)
        self._stored = {t.name: t for t in graph.initializer}
        self._maker = {name: node for node in graph.node for name in node.output}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in dict.fromkeys(reads(node)):
                self._readers.setdefault(name, []).append(node)
        self._results = {value.name for value in graph.output}
        self._joins = JOINS.get(scheme.dialect, ())
        self._outputs_too = scheme.dialect in _OUTPUTS_TOO
        self._carried = scheme.dialect in _CARRIED
        kinds = [node.op_type for node in graph.node]
        self._attention = "LayerNormalization" in kinds or {"Softmax", "ReduceMean", "Sqrt"} <= set(kinds)
        self._same_as: dict[str, str] = {}
        self._maps: dict[str, bool] = {}

    def find(self) -> Places:
        operations = {}
        for node in self._graph.node:
            made = self._layer(node) if node.op_type in LAYERS else self._join(node)
            if made is not None:
                operations[made.name] = made
                for tensor in (*made.reads, *made.writes):
                    self._follow(tensor)
        if not any(operation.weight for operation in operations.values()):
            held = sorted({node.op_type for node in self._graph.node})
            raise UnsupportedModelError(
                "the graph has no convolution and no matrix product with stored weights; it holds "
                + ", ".join(held),
                "layers inside If and Loop, and recurrent cells, stay float; there is nothing to quantize",
            )
        return Places(operations, self._same_as, self._carried)

    def _layer(self, node: onnx.NodeProto) -> Operation | None:
        weight = self._stored.get(node.input[1])
        if weight is None or not self._computed(node.input[0]) or len(weight.dims) < 2:
            return None
        if node.op_type == "MatMul" and len(weight.dims) != 2:
            return None
        axis = {"Conv": 0, "ConvTranspose": 1, "MatMul": 1}.get(node.op_type, 0)
        if node.op_type == "Gemm":
            attributes = {a.name: (a.f if a.name in ("alpha", "beta") else a.i) for a in node.attribute}
            if attributes.get("transA") or attributes.get("alpha", 1.0) != 1.0:
                return None
            axis = 0 if attributes.get("transB") else 1
        if node.op_type == "ConvTranspose" and any(a.name == "group" and a.i != 1 for a in node.attribute):
            return None  # its output channels lie on two axes
        after: tuple[str, ...] = ()
        if self._outputs_too and node.op_type == "MatMul":
            after = (node.output[0],) if self._before_bias(node) else ()
        elif self._outputs_too:
            after = (self._after_activation(node.output[0]),)
        return Operation(node.name, node.op_type, (node.input[0],), after, node.input[1], axis)

    def _before_bias(self, node: onnx.NodeProto) -> bool:
        """Whether a stored bias is added to the product, which ONNX Runtime makes one float Gemm unless a
        quantized tensor lies between."""
        readers = self._readers.get(node.output[0], [])
        return any(
            reader.op_type == "Add" and any(name in self._stored for name in reader.input)
            for reader in readers
        )

    def _join(self, node: onnx.NodeProto) -> Operation | None:
        if node.op_type not in self._joins:
            return None
        data = [name for name in node.input if name]
        if not all(self._computed(name) and self._is_map(name) for name in data):
            return None
        if node.op_type in ("Add", "Mul") and len(set(data)) < 2:
            return None
        writes = (self._after_activation(node.output[0]),) if self._outputs_too else ()
        if node.op_type in _POOLS:
            writes = (node.output[0],)
        return Operation(node.name, node.op_type, tuple(dict.fromkeys(data)), writes)

    def _computed(self, tensor: str) -> bool:
        """A float tensor that depends on the input."""
        kind, _ = self._types.get(tensor, (TensorProto.FLOAT, None))
        return tensor not in self._stored and kind == TensorProto.FLOAT

    def _is_map(self, tensor: str) -> bool:
        """A feature map: made from the input by convolutions and what leaves maps as they are. Scores and
        residual sums of a transformer are none and stay float: a mask or outliers of a few channels would
        take their whole grid."""
        if not self._attention:
            return True
        if tensor not in self._maps:
            node = self._maker.get(tensor)
            _, rank = self._types.get(tensor, (0, None))
            if node is None or node.op_type in _NOT_A_MAP:
                self._maps[tensor] = node is None and rank == 4
            else:
                self._maps[tensor] = node.op_type in ("Conv", "ConvTranspose") or all(
                    self._is_map(name) for name in node.input if name and self._computed(name)
                )
        return self._maps[tensor]

    def _after_activation(self, tensor: str) -> str:
        readers = self._readers.get(tensor, [])
        while len(readers) == 1 and readers[0].op_type in _ACTIVATIONS and tensor not in self._results:
            tensor = readers[0].output[0]
            readers = self._readers.get(tensor, [])
        return tensor

    def _pads_with_zeros(self, node: onnx.NodeProto) -> bool:
        """Zero is a code of every grid."""
        if any(a.name == "mode" and a.s != b"constant" for a in node.attribute):
            return False
        value = self._stored.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if value is None:
            return len(node.input) < 3 or not node.input[2]
        return not numpy_helper.to_array(value).any()

    def _follow(self, tensor: str) -> None:
        """Tie the tensor to the one that an operator which only moves values reads."""
        node = self._maker.get(tensor)
        if node is None or node.op_type not in _MOVERS or tensor in self._same_as:
            return
        if node.op_type == "Resize" and not any(
            a.name == "mode" and a.s == b"nearest" for a in node.attribute
        ):
            return
        before = self._maker.get(node.input[0])
        if self._carried and self._attention and before is not None and before.op_type == "Transpose":
            return  # heads of attention put together: one conversion behind it, none within
        if node.op_type == "Pad" and not self._pads_with_zeros(node):
            return
        source = node.input[0]
        _, rank = self._types.get(source, (0, None))
        if self._computed(source) and rank is not None and rank >= (4 if self._attention else 3):
            self._same_as[tensor] = source
            self._follow(source)


def without_uneven_joins(places: Places, reach: Mapping[str, float]) -> Places:
    """Leave concatenations in float whose inputs have very different ranges, such as boxes beside scores: one
    grid for all would swallow the small ones, and OpenVINO puts them on one even where each has its own.

    Args:
        reach: the largest magnitude of each tensor, by its `root`.
    """

    def even(operation: Operation) -> bool:
        found = [reach[places.root(tensor)] for tensor in operation.reads]
        return operation.kind != "Concat" or max(found) <= _UNEVEN * min(found)

    return replace(places, operations={name: one for name, one in places.operations.items() if even(one)})


def with_float_sums(model: onnx.ModelProto, places: Places) -> Places | None:
    """The same, but a term of an addition that a layer makes for it alone has no grid; of two such terms the
    second keeps its own. None where there is no such term."""
    maker = {name: node.op_type for node in model.graph.node for name in node.output}
    readers = Counter(name for node in model.graph.node for name in dict.fromkeys(reads(node)))
    results = {value.name for value in model.graph.output}

    def for_it_alone(tensor: str) -> bool:
        return maker.get(tensor) in LAYERS and readers[tensor] == 1 and tensor not in results

    changed = {}
    for name, one in places.operations.items():
        kept = tuple(tensor for tensor in one.reads if not for_it_alone(tensor)) or one.reads[1:]
        if one.kind == "Add" and kept != one.reads:
            changed[name] = replace(one, reads=kept)
    return replace(places, operations=places.operations | changed) if changed else None


def weight_matrix(weight: NDArray[np.float32], operation: Operation) -> NDArray[np.float32]:
    """The weight with output channels first: (channels, rest)."""
    return np.moveaxis(weight, operation.axis, 0).reshape(weight.shape[operation.axis], -1)


def weight_scales(weight: NDArray[np.float32], operation: Operation, largest: int) -> NDArray[np.float32]:
    """A scale for each output channel, never 0: a dead channel gets the smallest of the others'."""
    reach = np.abs(weight_matrix(weight, operation)).max(1)
    alive = reach[reach > 0]
    floor = float(alive.min()) if len(alive) else 1.0
    return (np.where(reach > 0, reach, floor) / largest).astype(np.float32)


def weight_codes(
    weight: NDArray[np.float32], scales: NDArray[np.float32], operation: Operation, largest: int
) -> NDArray[np.int8]:
    """Nearest codes, in the weight's own layout."""
    shape = [1] * weight.ndim
    shape[operation.axis] = -1
    codes = np.round(weight / scales.reshape(shape))
    return np.clip(codes, -largest - 1, largest).astype(np.int8)
