"""Predicted latency and size of a candidate on a target; a prediction never enters the gate."""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgekd.backends import Session, backend
from edgekd.errors import MissingExtraError, StorageError
from edgekd.files import read_json, sha256_json, write_json
from edgekd.spec import LayerShape
from edgekd.target import Compute, Quantity, Target, is_this_machine

# Bytes per value and the multiple of fp32 throughput where a card names no peak of its own.
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
_LAYER_OVERHEAD_MS = 3e-3  # a launch costs about 3 microseconds on CPUs and GPUs alike


@dataclass(frozen=True)
class Cost:
    """`latency_ms` at batch 1; `size_mib` of the weights at the executed precision; `memory_mib` at run time:
    weights and the largest input and output of one layer, which is the least that a runtime can do with."""

    latency_ms: float | None
    size_mib: float
    memory_mib: float = 0.0


class CostModel(Protocol):
    """Predicts; `kind`, `device` and `note` say how, for whom and how well."""

    kind: str
    device: str
    note: str
    error_percent: float | None

    @property
    def unverified(self) -> tuple[str, ...]:
        """Keys of the card's numbers that were used and nobody verified."""

    def predict(self, layers: tuple[LayerShape, ...]) -> Cost: ...

    def close(self) -> None:
        """Keep what was measured."""


def cost_model(target: Target, precision: str) -> CostModel:
    """A calibrated table of the target, or one measured here where this is the target, or its roofline."""
    if (path := calibrated_path(target.id, precision)).is_file():
        return CalibratedTable(path, target, precision)
    if is_this_machine(target) and target.primary.runtime in ("openvino", "onnxruntime"):
        try:
            return LayerTable(target, precision)
        except MissingExtraError:
            pass  # no runtime here to measure with: the card is all there is
    return Roofline(target, precision)


def size_mib(layers: tuple[LayerShape, ...], precision: str) -> float:
    """Weights at `precision`, MiB; biases counted alike."""
    return sum(layer.parameters for layer in layers) * _BYTES[precision] / 2**20


def memory_mib(layers: tuple[LayerShape, ...], precision: str) -> float:
    """Weights, and the maps of the layer that needs most, MiB."""
    maps = max(layer.values_moved - layer.parameters for layer in layers)
    return size_mib(layers, precision) + maps * _BYTES[precision] / 2**20


class Roofline:
    """Per layer the larger of compute time and memory time, plus a fixed launch cost.

    ``t = sum max(2 MACs / P, bytes / W) + n t0`` (Williams, Waterman & Patterson 2009). P is the card's
    achieved rate for the layer's class when it has one, else its peak; W its bandwidth. Accuracy: about
    50 % median error, so it orders candidates and filters hopeless ones, no more.
    """

    kind = "roofline"
    error_percent: float | None = 50.0

    def __init__(self, target: Target, precision: str) -> None:
        self.device = target.description
        self._unit = target.primary
        self._precision = precision
        self._used: dict[str, Quantity] = {}
        self._bandwidth = self._first("bandwidth", ("dram_gbs", "copy_gbs"))
        self._achieved = {
            kind: self._first("achieved", (name,))
            for kind, name in (
                ("pointwise", "pointwise_conv_gflops"),
                ("dense", "conv3x3_gflops"),
                ("depthwise", "depthwise3x3_gflops"),
            )
        }
        self._peak = self._peak_gflops(target.primary)
        self.known = self._bandwidth is not None and self._peak is not None
        self.note = (
            "card roofline, about ±50 %; orders candidates, proves nothing"
            if self.known
            else "the card has no compute or bandwidth figure: latency unknown, MACs order the candidates"
        )

    @property
    def unverified(self) -> tuple[str, ...]:
        """Keys of the card's numbers that were used and nobody verified."""
        return tuple(sorted(k for k, q in self._used.items() if q.confidence == "unverified"))

    def _first(self, table: str, names: tuple[str, ...]) -> float | None:
        values: dict[str, Quantity] = getattr(self._unit, table)
        for name in names:
            if name in values:
                self._used[f"compute[0].{table}.{name}"] = values[name]
                return float(values[name].value)
        return None

    def _peak_gflops(self, unit: Compute) -> float | None:
        if self._precision == "int8" and "int8_tops" in unit.peak:
            tops = self._first("peak", ("int8_tops",))
            return None if tops is None else tops * 1e3
        return self._first(
            "peak", ("fp16_gflops", "fp32_gflops") if self._precision == "fp16" else ("fp32_gflops",)
        )

    def predict(self, layers: tuple[LayerShape, ...]) -> Cost:
        held = (size_mib(layers, self._precision), memory_mib(layers, self._precision))
        if self._bandwidth is None or self._peak is None:
            return Cost(None, *held)
        total_ms = 0.0
        for layer in layers:
            if layer.op == "add":
                continue  # every runtime here fuses an addition into the convolution before it
            kind = "depthwise" if layer.groups > 1 else "pointwise" if layer.kernel == 1 else "dense"
            gflops = self._achieved[kind] or self._peak
            compute_ms = 2 * layer.macs / gflops / 1e6
            memory_ms = layer.values_moved * _BYTES[self._precision] / self._bandwidth / 1e6
            total_ms += max(compute_ms, memory_ms) + _LAYER_OVERHEAD_MS
        return Cost(total_ms, *held)

    def close(self) -> None:
        """Nothing to keep."""


class LayerTable:
    """Sum of layers measured one by one on this machine, in the executed precision, CPU time of one thread.

    Each different layer becomes a one-layer model; the 25th percentile of 25 calls minus the cost of an empty
    call is its entry. Entries are kept per host, runtime version and precision, so that a second search
    measures nothing and finds the same costs.
    """

    kind = "layer-table"
    unverified: tuple[str, ...] = ()
    error_percent: float | None = None

    def __init__(self, target: Target, precision: str) -> None:
        engine = backend(target.primary.runtime)
        self._engine, self._int8, self._precision = engine, precision == "int8", precision
        self.device = engine.device()
        header = {
            "format": 1,
            "target": target.id,
            "device": self.device,
            "runtime": f"{engine.name} {engine.version()}",
            "threads": 1,
            "precision": precision,
        }
        self._path = _cache_folder() / f"layers-{sha256_json(header)[:16]}.json"
        stored = _read_table(self._path, header)
        self._header, self._entries, self._added = header, stored, 0
        if "empty" not in self._entries:
            self._entries["empty"] = self._measure(None)
        self.note = (
            f"sum of layers measured one by one on {self.device} with {header['runtime']}; "
            "CPU time, one thread"
        )

    def predict(self, layers: tuple[LayerShape, ...]) -> Cost:
        empty = self._entries["empty"]
        total = empty
        for layer in layers:
            key = layer_key(layer)
            if key not in self._entries:
                self._entries[key] = max(1e-4, self._measure(layer) - empty)
                self._added += 1
            total += self._entries[key]
        return Cost(total, size_mib(layers, self._precision), memory_mib(layers, self._precision))

    def _measure(self, layer: LayerShape | None) -> float:
        """CPU milliseconds of a call of a one-layer model; of a model that only copies one value for None."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "layer.onnx"
            path.write_bytes(one_layer(layer, self._int8))
            session = self._engine.open(path, threads=1)
        shape = (1, 1, 1, 1) if layer is None else (1, layer.channels_in, layer.size_in, layer.size_in)
        kind = np.uint8 if self._int8 and layer is not None else np.float32
        return _quartile_ms(session, np.zeros(shape, kind))

    def close(self) -> None:
        """Store the table; a cache that cannot be written costs time, not results."""
        if self._added:
            try:
                write_json(self._path, {"header": self._header, "entries_ms": self._entries})
            except StorageError:
                return


def calibrated_path(target: str, precision: str) -> Path:
    """Where `edgekd targets calibrate` leaves the table of a target."""
    return _cache_folder() / f"calibrated-{target}-{precision}.json"


def layer_key(layer: LayerShape) -> str:
    """What a layer's time depends on."""
    return json.dumps([getattr(layer, name) for name in _KEY])


class CalibratedTable:
    """Sum of layers that were measured on the device, in a line fitted on whole networks.

    A layer that is not in the table has the roofline's time, times the median of measured over roofline.
    """

    kind = "layer-table"

    def __init__(self, path: Path, target: Target, precision: str) -> None:
        """Raises StorageError when the file is not a table of this target, runtime and precision."""
        stored = read_json(path)
        header = stored.get("header", {}) if isinstance(stored, dict) else {}
        wanted = {"format": 2, "target": target.id, "precision": precision}
        runtime = str(header.get("runtime", "")).partition(" ")[0]
        got = {key: header.get(key) for key in wanted} | {"runtime": runtime}
        if got != wanted | {"runtime": target.primary.runtime}:
            raise StorageError(
                f"{path}: its header says {got}, expected {wanted} on {target.primary.runtime}",
                f"edgekd targets calibrate {target.id} writes it anew",
            )
        self._precision, self._entries = precision, stored["entries_ms"]
        self._scale, self._offset = stored["scale"], stored["offset_ms"]
        self._roofline = Roofline(target, precision)
        self.device, self.error_percent = header["device"], stored["validation"].get("median_error_percent")
        self.note = f"sum of layers measured one by one on {self.device} with {header['runtime']}"
        ratios = [
            entry / estimate
            for key, entry in self._entries.items()
            if key != "empty"
            and (estimate := self._rough(LayerShape(**dict(zip(_KEY, json.loads(key), strict=True)))))
        ]
        self._correction = float(np.median(ratios)) if ratios else None
        self.missing: set[str] = set()

    @property
    def unverified(self) -> tuple[str, ...]:
        """Keys of the card that stood in for missing layers."""
        return self._roofline.unverified if self.missing else ()

    def _rough(self, layer: LayerShape) -> float | None:
        return self._roofline.predict((layer,)).latency_ms

    def predict(self, layers: tuple[LayerShape, ...]) -> Cost:
        total: float | None = self._entries["empty"]
        for layer in layers:
            entry = self._entries.get(key := layer_key(layer))
            if entry is None:
                self.missing.add(key)
                rough = self._rough(layer)
                entry = None if rough is None or self._correction is None else rough * self._correction
            total = None if total is None or entry is None else total + entry
        size, memory = size_mib(layers, self._precision), memory_mib(layers, self._precision)
        return Cost(None if total is None else total * self._scale + self._offset, size, memory)

    def close(self) -> None:
        """Nothing to keep."""


_KEY = ("op", "channels_in", "channels_out", "kernel", "stride", "groups", "size_in", "relu")


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgekd"


def _read_table(path: Path, header: dict[str, Any]) -> dict[str, float]:
    """Stored entries; a table of another machine, runtime or precision is not used."""
    if not path.exists():
        return {}
    stored = read_json(path)
    return dict(stored["entries_ms"]) if stored.get("header") == header else {}


def _quartile_ms(session: Session, images: Any) -> float:
    times = []
    for _ in range(28):
        begin = time.process_time_ns()
        session.run(images)
        times.append((time.process_time_ns() - begin) / 1e6)
    return float(np.percentile(times[3:], 25))


def one_layer(layer: LayerShape | None, int8: bool) -> bytes:
    """An ONNX file with one layer and its fused ReLU; quantized layers take and give uint8 codes."""
    from onnx import TensorProto, helper, numpy_helper

    if layer is None:
        io = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 1, 1, 1]) for name in ("x", "y")]
        graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "empty", io[:1], io[1:])
        return _model(graph)
    weight = np.ones(
        (layer.channels_out, layer.channels_in // layer.groups, layer.kernel, layer.kernel), np.float32
    )
    constants = [numpy_helper.from_array(np.zeros(layer.channels_out, np.float32), "bias")]
    nodes: list[Any] = []
    if int8:
        constants += [
            numpy_helper.from_array(np.array(0.01, np.float32), "scale"),
            numpy_helper.from_array(np.array(0, np.uint8), "zero"),
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
    source = "input" if int8 else "x"
    if layer.op == "add":
        nodes.append(helper.make_node("Add", [source, source], ["made"]))
    elif layer.op == "pool":
        nodes.append(helper.make_node("GlobalAveragePool", [source], ["made"]))
    elif layer.op == "avgpool":
        shape, margin = [layer.kernel] * 2, [(layer.kernel - 1) // 2] * 4
        pool = {"kernel_shape": shape, "strides": [layer.stride] * 2, "pads": margin, "ceil_mode": 1}
        nodes.append(helper.make_node("AveragePool", [source], ["made"], **pool))
    elif layer.op == "attention":
        nodes += _attention(layer, source, constants)
    else:
        attributes = {"strides": [layer.stride] * 2, "group": layer.groups, "pads": [layer.kernel // 2] * 4}
        nodes.append(helper.make_node("Conv", [source, "weight", "bias"], ["made"], **attributes))
    last = "made"
    if layer.relu:
        nodes.append(helper.make_node("Relu", [last], ["positive"]))
        last = "positive"
    final = ("QuantizeLinear", [last, "scale", "zero"]) if int8 else ("Identity", [last])
    nodes.append(helper.make_node(*final, ["y"]))
    used = {name for node in nodes for name in node.input}
    kind = TensorProto.UINT8 if int8 else TensorProto.FLOAT
    ends = [
        helper.make_tensor_value_info("x", kind, [1, layer.channels_in, layer.size_in, layer.size_in]),
        helper.make_tensor_value_info("y", kind, None),
    ]
    graph = helper.make_graph(nodes, "layer", ends[:1], ends[1:], [c for c in constants if c.name in used])
    return _model(graph)


def _attention(layer: LayerShape, source: str, constants: list[Any]) -> list[Any]:
    """The products of `edgekd.nets.Attend`, in float, with one map as queries, keys and values."""
    from onnx import helper, numpy_helper

    side, depth = layer.size_in, layer.channels_in // layer.groups
    for name, shape in (("heads", (1, layer.groups, depth, side**2)), ("map", (1, -1, side, side))):
        constants.append(numpy_helper.from_array(np.array(shape, np.int64), name))
    return [
        helper.make_node("Reshape", [source, "heads"], ["values"]),
        helper.make_node("Transpose", ["values"], ["keys"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["keys", "values"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["shares"], axis=2),
        helper.make_node("MatMul", ["values", "shares"], ["mixed"]),
        helper.make_node("Reshape", ["mixed", "map"], ["made"]),
    ]


def _model(graph: Any) -> bytes:
    from onnx import helper

    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    data: bytes = model.SerializeToString()
    return data
