"""Inference runtimes behind one small door; one file each. Nothing here or below imports torch."""

from __future__ import annotations

import importlib
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgekd.backends.feeds import Feed
from edgekd.errors import UsageError, unknown_name

Array = NDArray[np.float32]
Feeds = Mapping[str, NDArray[Any]]  # the inputs of one call by name, for graphs that are no image classifier

Shapes = Mapping[str, tuple[int, ...]]  # of inputs by name, or in the file's order
_T = TypeVar("_T")

_TABLE = {
    "onnxruntime": "edgekd.backends.onnxruntime:OnnxRuntimeBackend",
    "openvino": "edgekd.backends.openvino:OpenVinoBackend",
    "tensorrt": "edgekd.backends.tensorrt:TensorRtBackend",
}


@dataclass(frozen=True)
class Layer:
    """One node of the graph a runtime really executes."""

    name: str
    op: str  # the runtime's own name of the kernel or layer type
    precision: str  # "int8", "f32", "bf16", "f16"
    macs: int = 0  # multiply-accumulates at batch 1; 0 for a node that is not a convolution or matrix product
    ms: float | None = None  # measured time of the layer at batch 1, wall clock; None when not measured
    reason: str = ""  # why it stayed in float, when known


@dataclass(frozen=True)
class Coverage:
    """Which precision each executed node has; shares are over convolutions and matrix products only."""

    layers: tuple[Layer, ...]

    @property
    def shares(self) -> dict[str, float]:
        """The share of the multiply-accumulates that each precision executes; empty without any."""
        macs: Counter[str] = Counter()
        for layer in self.layers:
            macs[layer.precision] += layer.macs
        total = macs.total()
        return {name: count / total for name, count in macs.items() if count}

    @property
    def int8_nodes(self) -> float:
        compute = [layer for layer in self.layers if layer.macs]
        return sum(layer.precision == "int8" for layer in compute) / len(compute) if compute else 0.0

    @property
    def int8_macs(self) -> float:
        total = sum(layer.macs for layer in self.layers)
        return sum(layer.macs for layer in self.layers if layer.precision == "int8") / total if total else 0.0


class Session(Protocol):
    """A loaded model: float32 (N, C, H, W) in, float32 (N, classes) out; or named inputs in, its first
    output out. `names` are those of its inputs, in the file's order."""

    names: tuple[str, ...]

    def run(self, images: Array | Feeds) -> Array: ...


class Backend(Protocol):
    """A runtime. Every method raises MissingExtraError when its package is not installed."""

    name: str

    def version(self) -> str:
        """Version of the installed runtime."""

    def precisions(self) -> tuple[str, ...]:
        """What this machine's runtime executes natively: of "f32", "bf16", "f16", "int8"."""

    def device(self) -> str:
        """The processor the sessions of this backend run on, in words."""

    def open(
        self,
        model: Path,
        *,
        threads: int = 1,
        precision: str = "f32",
        batch: int | None = None,
        shapes: Shapes | None = None,
    ) -> Session:
        """Load an ONNX file.

        Args:
            model: the file; float32 (N, C, H, W) in, float32 (N, classes) out.
            threads: threads inside one call.
            precision: that of the operators not quantized in the graph, "int8" is not one.
            batch: compile for exactly this N; None keeps the batch axis as the file has it.
            shapes: compile for exactly these shapes of all inputs.

        Raises:
            BackendError: the runtime refuses the graph; the message is the runtime's own.
        """

    def coverage(
        self,
        model: Path,
        *,
        precision: str = "f32",
        time_layers: bool = False,
        feeds: Sequence[Feed] | None = None,
    ) -> Coverage:
        """The graph executed at batch 1 on one thread, with layer times when asked for.

        Args:
            feeds: the inputs with every size; None is a float32 image at batch 1.

        Raises:
            BackendError: as `open`, or the runtime does not tell what it executes.
        """


def in_order(names: Sequence[str], given: Mapping[str, _T]) -> list[_T]:
    """What belongs to each input: by its name where the names are the same, else as it comes."""
    return [given[name] for name in names] if set(names) == set(given) else list(given.values())


def backend(name: str) -> Backend:
    """The backend of this name; its engine is imported on first use.

    Raises:
        UsageError: no such backend.
    """
    if name not in _TABLE:
        raise UsageError(*unknown_name("backend", name, _TABLE))
    module, _, attribute = _TABLE[name].partition(":")
    made: Backend = getattr(importlib.import_module(module), attribute)()
    return made


def backend_names() -> tuple[str, ...]:
    """Names of all backends, in the order of reports."""
    return tuple(_TABLE)


def processor_name() -> str:
    """The CPU of this machine in words, from /proc/cpuinfo or the device tree."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    if named:
        return named[0]
    tree = Path("/proc/device-tree/model")
    return tree.read_text(encoding="utf-8").strip("\0 \n") if tree.is_file() else platform.machine()
