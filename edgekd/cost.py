"""Predicted latency and size of a candidate on a target; a prediction never enters the gate."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from edgekd.backends import backend
from edgekd.calibrated import Header, StoredTable, Subject, nearest_table
from edgekd.errors import MissingExtraError, StorageError
from edgekd.files import cache_folder, read_json, sha256_json, write_json
from edgekd.layer_files import codes_of, input_of, one_layer
from edgekd.spec import LayerShape
from edgekd.target import Compute, Quantity, Target, is_this_machine
from edgekd.worker import in_turns

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
    """Predicts; `kind`, `device`, `table` and `note` say how, for whom and how well."""

    kind: str
    device: str
    error_percent: float | None

    @property
    def table(self) -> StoredTable | None:
        """What was calibrated on the device, if that predicts."""

    @property
    def note(self) -> str:
        """How it predicts, in words."""

    @property
    def unverified(self) -> tuple[str, ...]:
        """Keys of the card's numbers that were used and nobody verified."""

    def predict(self, layers: tuple[LayerShape, ...]) -> Cost: ...

    def close(self) -> None:
        """Keep what was measured."""


def cost_model(target: Target, precision: str, subject: Subject | None = None) -> CostModel:
    """Of the calibrated tables the nearest to the subject, or a table measured here where this is the
    target, or its roofline.

    Raises:
        StorageError: a calibrated table cannot be read.
    """
    if (table := nearest_table(target, precision, subject)) is not None:
        return CalibratedTable(table, target, precision, subject)
    return _local_table(target, precision) or Roofline(target, precision)


def _local_table(target: Target, precision: str) -> LayerTable | None:
    """Where this machine is the target and has its runtime."""
    if not is_this_machine(target) or target.primary.runtime not in ("openvino", "onnxruntime"):
        return None
    try:
        return LayerTable(target, precision)
    except MissingExtraError:
        return None


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
    table: StoredTable | None = None

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
        self.error_percent = 50.0 if self.known else None
        self.note = (
            "from the card's figures; it orders candidates and proves nothing"
            if self.known
            else f"the card '{target.id}' has no figure of {precision} compute or of bandwidth: latency is "
            "unknown, a limit on it is not checked, MACs order the candidates"
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

    Each different layer becomes a one-layer model, whose calls take turns with those of the other new ones;
    their median minus that of an empty call is its entry. Entries are kept per host, runtime version and
    precision, so that a second search measures nothing and finds the same costs.
    """

    kind = "layer-table"
    unverified: tuple[str, ...] = ()
    error_percent: float | None = None
    table: StoredTable | None = None

    def __init__(self, target: Target, precision: str) -> None:
        engine = backend(target.primary.runtime)
        self._engine, self._precision = engine, precision
        self._codes = codes_of(target) if precision == "int8" else None
        self.device, runtime = engine.device(), f"{engine.name} {engine.version()}"
        self.times_of = {"device": self.device, "runtime": runtime, "clock": "cpu"}
        header = {
            "format": 2,
            "target": target.id,
            "device": self.device,
            "runtime": runtime,
            "threads": 1,
            "precision": precision,
        }
        self._path = cache_folder() / f"layers-{sha256_json(header)[:16]}.json"
        stored = _read_table(self._path, header)
        self._header, self._entries, self._added = header, stored, 0
        self.note = f"sum of layers measured one by one on {self.device} with {runtime}; CPU time, one thread"

    def predict(self, layers: tuple[LayerShape, ...]) -> Cost:
        total = sum_of_layers(self.entries_of(layers), layers)
        return Cost(total, size_mib(layers, self._precision), memory_mib(layers, self._precision))

    def entries_of(self, layers: Iterable[LayerShape]) -> Mapping[str, float]:
        """The table, with all of `layers` in it: those that it lacks are measured."""
        executed = {layer_key(layer): layer for layer in layers if layer.op != "add"}
        new = {key: layer for key, layer in executed.items() if key not in self._entries}
        if new:
            times = self._measure([None, *new.values()])
            self._entries.setdefault("empty", times[0])
            entries = {key: max(1e-4, ms - times[0]) for key, ms in zip(new, times[1:], strict=True)}
            self._entries |= entries
            self._added += len(new)
        return self._entries

    def _measure(self, layers: Sequence[LayerShape | None]) -> list[float]:
        """CPU milliseconds of a call of each one-layer model; for None of one that only copies a value."""
        loaded = []
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "layer.onnx"
            for layer in layers:
                path.write_bytes(one_layer(layer, self._codes))
                dtype, shape = input_of(layer, self._codes)
                loaded.append((self._engine.open(path, threads=1), np.zeros(shape, dtype)))
        return [times["cpu"] for times in in_turns(loaded)]

    def close(self) -> None:
        """Store the table; a cache that cannot be written costs time, not results."""
        if self._added:
            try:
                write_json(self._path, {"header": self._header, "entries_ms": self._entries})
            except StorageError:
                return


def sum_of_layers(entries: Mapping[str, float], layers: Iterable[LayerShape]) -> float:
    """Milliseconds of an empty call and all layers; additions are fused into the convolution before them."""
    return entries["empty"] + sum(entries[layer_key(layer)] for layer in layers if layer.op != "add")


@dataclass(frozen=True)
class Line:
    """From layers measured alone to a network:
    ``t = offset + slope * sum - border V + weight W + attention * sum of attention``.

    V: values that its layers read and write, whose change of layout a layer alone pays for and a network does
    not; W: its parameters, which a layer alone finds in the nearest cache and a network does not; attention
    costs more between convolutions than alone. All coefficients are at least 0; by default it is the sum.
    """

    offset_ms: float = 0.0
    slope: float = 1.0
    border_ms: float = 0.0  # a value
    weight_ms: float = 0.0  # a parameter
    attention: float = 0.0

    @staticmethod
    def features(
        entries: Mapping[str, float], layers: Sequence[LayerShape]
    ) -> tuple[float, float, float, float, float]:
        """What `slope`, `offset_ms`, `weight_ms`, `border_ms` and `attention` are multiplied with, in this
        order."""
        executed = [layer for layer in layers if layer.op != "add"]
        weights = sum(layer.parameters for layer in executed)
        moved = sum(layer.values_moved for layer in executed)
        attention_ms = sum(entries[layer_key(layer)] for layer in executed if layer.op == "attention")
        return sum_of_layers(entries, layers), 1.0, weights, weights - moved, attention_ms

    def predict(self, entries: Mapping[str, float], layers: Sequence[LayerShape]) -> float:
        """Milliseconds of a network; a tenth of the sum at least, far from what the line was fitted on."""
        features = self.features(entries, layers)
        found = sum(a * b for a, b in zip(self.coefficients, features, strict=True))
        return max(found, 0.1 * features[0])

    @property
    def coefficients(self) -> tuple[float, float, float, float, float]:
        """In the order of `features`."""
        return self.slope, self.offset_ms, self.weight_ms, self.border_ms, self.attention


def layer_key(layer: LayerShape) -> str:
    """What a layer's time depends on."""
    return json.dumps([getattr(layer, name) for name in _KEY])


class CalibratedTable:
    """Sum of layers that were measured on the device, in a `Line` fitted on whole networks.

    A layer that is not in the table is measured where this machine is the device and has its runtime, and
    elsewhere has the roofline's time, times the median of measured over roofline.
    """

    kind = "layer-table"

    def __init__(
        self, table: StoredTable, target: Target, precision: str, subject: Subject | None = None
    ) -> None:
        """`subject`: what it is to predict; the table's error holds for students of its own kind alone."""
        header = table.header
        self.table, self._precision, self._entries = table, precision, table.entries_ms
        self._line = Line(**table.line)
        self._roofline = Roofline(target, precision)
        own = subject is None or table.serves(subject)
        self.device = header.device
        self.error_percent = table.validation.get("median_error_percent") if own else None
        where = header.layers_of or f"{self.device} with {header.runtime}"
        self._note = f"sum of layers measured one by one on {where}, of students of {table.subject.words}"
        if header.layers_of:
            self._note += f", moved to {self.device} with {header.runtime} by whole students measured there"
        ratios = [
            entry / estimate
            for key, entry in self._entries.items()
            if key != "empty"
            and (estimate := self._rough(LayerShape(**dict(zip(_KEY, json.loads(key), strict=True)))))
        ]
        self._correction = float(np.median(ratios)) if ratios else None
        self._here = self._table_here(target, header)
        self.missing: set[str] = set()

    def _table_here(self, target: Target, header: Header) -> LayerTable | None:
        """What measures missing layers, where this machine and its runtime are those of the table."""
        here = _local_table(target, self._precision)
        told = {key: getattr(header, key) for key in ("device", "runtime", "clock")}
        if here is None or header.layers_of or here.times_of != told:
            return None
        return here

    @property
    def note(self) -> str:
        """How it predicts, and how many layers it met that the table lacks."""
        if not self.missing:
            return self._note
        how = "are estimates from the card" if self._here is None else "were measured at the search"
        return f"{self._note}; {len(self.missing)} layers that the table lacks {how}"

    @property
    def unverified(self) -> tuple[str, ...]:
        """Keys of the card that stood in for missing layers."""
        return self._roofline.unverified if self.missing and self._here is None else ()

    def _rough(self, layer: LayerShape) -> float | None:
        return self._roofline.predict((layer,)).latency_ms

    def predict(self, layers: tuple[LayerShape, ...]) -> Cost:
        lacking = {layer_key(layer): layer for layer in layers if layer.op != "add"}
        lacking = {key: layer for key, layer in lacking.items() if key not in self._entries}
        self.missing |= lacking.keys()
        entries = dict(self._entries)
        if self._here is not None:
            measured = self._here.entries_of(lacking.values())
            entries |= {key: measured[key] for key in lacking}
        elif self._correction is not None:
            rough = {key: self._rough(layer) for key, layer in lacking.items()}
            entries |= {key: ms * self._correction for key, ms in rough.items() if ms is not None}
        size, memory = size_mib(layers, self._precision), memory_mib(layers, self._precision)
        if any(layer_key(layer) not in entries for layer in layers if layer.op != "add"):
            return Cost(None, size, memory)
        return Cost(self._line.predict(entries, layers), size, memory)

    def close(self) -> None:
        """Keep what was measured beside the table."""
        if self._here is not None:
            self._here.close()


_KEY = ("op", "channels_in", "channels_out", "kernel", "stride", "groups", "size_in", "relu")


def _read_table(path: Path, header: dict[str, Any]) -> dict[str, float]:
    """Stored entries; a table of another machine, runtime or precision is not used."""
    if not path.exists():
        return {}
    stored = read_json(path)
    return dict(stored["entries_ms"]) if stored.get("header") == header else {}
