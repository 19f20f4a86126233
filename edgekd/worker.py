"""The process that measures: loads every variant, warms up, takes turns. Also what runs on a remote device.

An order in JSON on stdin, one answer in JSON on stdout. It needs the standard library, numpy and an engine;
with the modules that it imports it is all that is sent to a device, so it keeps to Python 3.10.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.backends import Array, Feeds, Session, backend, in_order, processor_name
from edgekd.backends.feeds import Feed, random_feeds
from edgekd.backends.onnxruntime import OnnxRuntimeBackend
from edgekd.errors import BackendError, EdgekdError, MissingExtraError
from edgekd.memory import peak_growth_mib
from edgekd.runtime import BundleError, engine_for, load

_ISA = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
_PACKAGES = (
    "edgekd", "numpy", "msgspec", "torch", "onnx", "onnxruntime", "openvino", "optuna", "tensorrt",
    "tensorrt-rtx", "tensorrt-rtx-cu13",
)  # fmt: skip
_WINDOW = 5  # calls in a warm-up window
_WINDOWS = 10  # at most
_AGREEMENT = 0.03  # two consecutive window medians this close end the warm-up
_TURNS, _TURN_CALLS, _TURN_WARM_UP = 9, 5, 2  # of small models; the first calls of a turn do not count
_ENERGY = "/sys/class/powercap/*:[0-9]/energy_uj"  # one counter a processor package
_TEMPERATURES = "/sys/class/thermal/thermal_zone*/temp"
# Events of Intel cores; of a Jetson Orin, whose input voltage or current left its limits.
_THROTTLES = ("/sys/devices/system/cpu/cpu*/thermal_throttle/core_throttle_count",
              "/sys/class/hwmon/hwmon*/oc[1-3]_event_cnt")  # fmt: skip
_LAYERS_OF = 10  # calls with a profiler that tells the layers


def environment() -> dict[str, Any]:
    """The machine and the software, for the record; ``packages`` holds versions of those installed."""
    flags = _cpu_flags()
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cpu": processor_name(),
        "device_tree": _first_line("/proc/device-tree/model").strip("\0"),
        "isa": [name for name in _ISA if name in flags],
        "cores": len(os.sched_getaffinity(0)),
        "governor": _first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "load_average": list(os.getloadavg()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
    }


def _cpu_flags() -> set[str]:
    """Instruction-set flags of the first core: "flags" on x86, "Features" on Arm."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    told = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return set(next(told, "").split())


def _first_line(path: str | Path) -> str:
    """First line of a system file; "" when it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8").partition("\n")[0].strip()
    except OSError:
        return ""


def _state() -> dict[str, Any]:
    """What may disturb a measurement: load, ticks that the hypervisor gave to others, heat, throttling."""
    ticks = _first_line("/proc/stat").split()
    temperatures = _numbers(_TEMPERATURES)
    throttles = [count for pattern in _THROTTLES for count in _numbers(pattern)]
    return {
        "load_average": list(os.getloadavg()),
        "steal_ticks": int(ticks[8]) if len(ticks) > 8 else None,
        "temp_c": max(temperatures) / 1000 if temperatures else None,
        "throttle_count": int(sum(throttles)) if throttles else None,
    }


def _numbers(pattern: str) -> list[float]:
    lines = (_first_line(path) for path in Path("/").glob(pattern[1:]))
    return [float(line) for line in lines if re.fullmatch(r"-?\d+", line)]


def energy_uj() -> float | None:
    """Energy that the processor packages have used, microjoules; None where no counter can be read."""
    counters = _numbers(_ENERGY)
    return sum(counters) if counters else None


class _Calls:
    """One loaded variant, fed, and what was measured of it."""

    def __init__(self, variant: dict[str, str], threads: int, feeds: Feeds) -> None:
        started = time.perf_counter_ns()
        self._session = open_session(variant, threads, feeds)
        loaded = time.perf_counter_ns()
        self._fed = arranged(self._session, feeds)
        self._session.run(self._fed)
        called = time.perf_counter_ns()
        self._device_ms: list[float] = []  # of the last turn
        self.times: dict[str, Any] = {
            "load_ms": (loaded - started) / 1e6,
            "first_call_ms": (called - loaded) / 1e6,
            "memory_mib": None,
            "wall_ms": [],
            "cpu_ms": [],
            "energy_uj": None,
            "device_ms": None,
            "layers_ms": None,
        }

    def warm_up(self) -> None:
        """Windows of calls until two consecutive medians agree."""
        before = 0.0
        for _ in range(_WINDOWS):
            now = statistics.median(self.turn(_WINDOW)[0])
            if abs(now - before) < _AGREEMENT * now:
                return
            before = now

    def turn(self, calls: int) -> tuple[list[float], list[float]]:
        """Wall and process milliseconds of consecutive calls."""
        wall_ms, cpu_ms = [], []
        self._device_ms = []
        for _ in range(calls):
            cpu, wall = time.process_time_ns(), time.perf_counter_ns()
            self._session.run(self._fed)
            wall_ms.append((time.perf_counter_ns() - wall) / 1e6)
            cpu_ms.append((time.process_time_ns() - cpu) / 1e6)
            if (device_ms := getattr(self._session, "device_ms", None)) is not None:
                self._device_ms.append(device_ms)
        return wall_ms, cpu_ms

    def layers(self) -> None:
        """The times of the layers, of a session whose engine tells them."""
        if hasattr(self._session, "layers_ms"):
            self.times["layers_ms"] = self._session.layers_ms(self._fed, _LAYERS_OF)

    def record(self, calls: int) -> None:
        """A turn that counts."""
        before = energy_uj()
        wall_ms, cpu_ms = self.turn(calls)
        after = energy_uj()
        if before is not None and after is not None and after >= before:  # else the counter went round
            self.times["energy_uj"] = (self.times["energy_uj"] or 0.0) + after - before
        self.times["wall_ms"].append(wall_ms)
        self.times["cpu_ms"].append(cpu_ms)
        if self._device_ms:
            self.times["device_ms"] = [*(self.times["device_ms"] or []), self._device_ms]


def peak_memory_mib(variant: dict[str, str], threads: int, feeds: Feeds) -> float | None:
    """What loading a variant and one call add at most to a process with its engine. None where that cannot be
    read, and for TensorRT, whose model lies on the GPU. To be called before an engine is imported."""

    def call() -> None:
        session = open_session(variant, threads, feeds)
        session.run(arranged(session, feeds))

    if variant["backend"] == "tensorrt":
        return None
    return peak_growth_mib(lambda: backend(variant["backend"]).version(), call)


def open_session(variant: dict[str, str], threads: int, feeds: Feeds) -> Session:
    """A variant of an order, compiled for the sizes of the feeds; "reference" is the graph as written."""
    model, shapes = Path(variant["model"]), {name: array.shape for name, array in feeds.items()}
    if variant["backend"] == "reference":
        return OnnxRuntimeBackend().open(model, threads=threads, shapes=shapes, optimize=False)
    return backend(variant["backend"]).open(
        model, threads=threads, precision=variant["precision"], shapes=shapes
    )


def arranged(session: Session, feeds: Feeds) -> Array | Feeds:
    """The feeds under the session's own names; of a model with one input the array alone."""
    arrays = in_order(session.names, feeds)
    return arrays[0] if len(arrays) == 1 else dict(zip(session.names, arrays, strict=True))


def measure(order: dict[str, Any]) -> dict[str, Any]:
    """Every call of every variant, and the machine.

    Raises:
        EdgekdError: a runtime is missing, or refuses a variant.
    """
    protocol, feeds = order["protocol"], _feeds(order)
    cores = len(os.sched_getaffinity(0))
    if protocol["threads"] > cores:
        raise BackendError(f"cannot measure with {protocol['threads']} threads: there are {cores} cores")
    shuffle = random.Random(protocol["seed"]).shuffle
    peaks = {
        variant["id"]: peak_memory_mib(variant, protocol["threads"], feeds)
        for variant in (order["variants"] if order.get("memory") else ())
    }
    names = sorted({variant["backend"] for variant in order["variants"]})
    engines = {name: backend(name) for name in names}
    versions = {name: engine.version() for name, engine in engines.items()}  # imports the engines
    before, variants = _state(), list(order["variants"])
    shuffle(variants)
    calls = {variant["id"]: _Calls(variant, protocol["threads"], feeds) for variant in variants}
    turns = list(calls.values())
    gc.disable()
    for one in turns:
        one.warm_up()
    for _ in range(protocol["rounds"]):
        shuffle(turns)
        for one in turns:
            one.record(protocol["calls"])
    gc.enable()
    after = _state()
    for one in turns:
        one.layers()
    for name, peak in peaks.items():
        calls[name].times["memory_mib"] = peak
    told = environment() | {
        "devices": {name: engine.device() for name, engine in engines.items()},
        "versions": versions,
        "precision": {variant["id"]: variant["precision"] for variant in order["variants"]},
        "threads": protocol["threads"],
        "inputs": [{"name": n, "dtype": a.dtype.name, "shape": list(a.shape)} for n, a in feeds.items()],
    }
    told |= {f"{key}_before": value for key, value in before.items()}
    told |= {f"{key}_after": value for key, value in after.items()}
    return {
        "variants": {variant["id"]: calls[variant["id"]].times for variant in order["variants"]},
        "environment": told,
    }


def in_turns(loaded: Sequence[tuple[Session, Any]]) -> list[dict[str, Any]]:
    """Medians of the calls of loaded models, ms: ``wall`` and ``cpu``, and of each turn ``wall_turns`` and
    ``cpu_turns``. What disturbs a while then disturbs all alike, and no model in all of its calls."""
    wall_ms = np.zeros((_TURNS, len(loaded), _TURN_CALLS + _TURN_WARM_UP))
    cpu_ms = np.zeros_like(wall_ms)
    for turn in range(_TURNS):
        for index, (session, fed) in enumerate(loaded):
            for call in range(_TURN_CALLS + _TURN_WARM_UP):
                cpu, wall = time.process_time_ns(), time.perf_counter_ns()
                session.run(fed)
                wall_ms[turn, index, call] = (time.perf_counter_ns() - wall) / 1e6
                cpu_ms[turn, index, call] = (time.process_time_ns() - cpu) / 1e6
    wall_ms, cpu_ms = wall_ms[..., _TURN_WARM_UP:], cpu_ms[..., _TURN_WARM_UP:]
    return [
        {
            "wall": float(np.median(wall_ms[:, index])),
            "cpu": float(np.median(cpu_ms[:, index])),
            "wall_turns": np.median(wall_ms[:, index], axis=1).tolist(),
            "cpu_turns": np.median(cpu_ms[:, index], axis=1).tolist(),
        }
        for index in range(len(loaded))
    ]


def time_each(order: dict[str, Any]) -> dict[str, Any]:
    """Small models that take turns: what `in_turns` says of each; refused ones apart."""
    loaded: dict[str, tuple[Session, Any]] = {}
    refused: dict[str, str] = {}
    for variant in order["variants"]:
        dtype, shape = order["shapes"][variant["id"]]
        array, engine = _values(dtype, shape), backend(variant["backend"])
        try:
            session = engine.open(
                Path(variant["model"]), threads=order["protocol"]["threads"], precision=variant["precision"]
            )
            session.run(array)
        except BackendError as error:
            refused[variant["id"]] = error.message
            continue
        loaded[variant["id"]] = (session, array)
    times = dict(zip(loaded, in_turns(list(loaded.values())), strict=True))
    names = {variant["backend"] for variant in order["variants"]}
    told = environment() | {
        "devices": {name: backend(name).device() for name in names},
        "versions": {name: backend(name).version() for name in names},
    }
    return {"times": times, "refused": refused, "environment": told}


def _values(dtype: str, shape: Sequence[int]) -> Array:
    """Codes of 0; N(0, 1), as normalised images and maps are: a constant image drives attention into shares
    so small that processors are slow with them."""
    if np.issubdtype(np.dtype(dtype), np.floating):
        return np.random.default_rng(0).standard_normal(shape).astype(dtype)
    return np.zeros(shape, dtype)


def evaluate(order: dict[str, Any]) -> dict[str, Any]:
    """First outputs (N, K) of each variant on stored inputs, one sample a call, as batch 1 on a device runs.

    Writes an ``.npz`` with one array a variant.
    """
    arrays, outputs = _stored(order["data"]), {}
    for variant in order["variants"]:
        first = {name: array[:1] for name, array in arrays.items()}
        session = open_session(variant, order["protocol"]["threads"], first)
        rows = []
        for index in range(len(next(iter(arrays.values())))):
            one = arranged(session, {name: array[index : index + 1] for name, array in arrays.items()})
            rows.append(session.run(one).reshape(-1).astype(np.float32))
        outputs[variant["id"]] = np.stack(rows)
    np.savez(order["answers"], **outputs)  # type: ignore[arg-type]
    return {"answers": order["answers"]}


def check(order: dict[str, Any]) -> dict[str, Any]:
    """One variant of a bundle: the golden outputs replayed, and what the runtime makes of its graph.

    ONNX Runtime's optimised graph goes into the file ``answers``, for what reads it may be missing here;
    OpenVINO tells its layers itself. Of a variant that cannot run here only the ``reason`` is told;
    ``forced`` tries it all the same.

    Raises:
        BackendError: the bundle or the runtime refuses it.
    """
    bundle, name = Path(order["bundle"]), order["variant"]
    entry = next(
        one for one in json.loads((bundle / "manifest.json").read_bytes())["variants"] if one["id"] == name
    )
    runtime, reason = engine_for(entry, order["forced"])
    told = {"environment": environment(), "runtime": runtime, "reason": reason}
    if reason:
        return told
    try:
        told["golden"] = load(bundle, variant=name, threads=order["protocol"]["threads"]).selftest()
    except BundleError as error:
        raise BackendError(str(error)) from error
    engine = backend(runtime)
    told["version"] = engine.version()
    if isinstance(engine, OnnxRuntimeBackend):
        engine.optimise(bundle / entry["file"], Path(order["answers"]))
        return told
    hint = str(entry.get("openvino", {}).get("options", {}).get("INFERENCE_PRECISION_HINT", "f32"))
    try:
        layers = engine.coverage(bundle / entry["file"], precision=hint).layers
        return told | {"layers": [asdict(layer) for layer in layers]}
    except MissingExtraError as error:
        return told | {"untold": error.message}


def _feeds(order: dict[str, Any]) -> Feeds:
    """The inputs of one call: what the caller stored, or random values."""
    if order.get("stored"):
        return _stored(order["stored"])
    wanted = [Feed(one["name"], one["dtype"], tuple(one["shape"])) for one in order["inputs"]]
    return random_feeds(wanted, order["protocol"]["seed"])


def _stored(path: str) -> dict[str, Any]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


_JOBS = {"measure": measure, "evaluate": evaluate, "layers": time_each, "check": check}


def main() -> None:
    """Order on stdin, answer on stdout; what the runtimes print goes to stderr."""
    answer_to = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    order = json.load(sys.stdin)
    answer: dict[str, Any]
    try:
        answer = {"result": _JOBS[order["job"]](order)}
    except EdgekdError as error:
        refusal = {"error": type(error).__name__, "message": error.message, "hint": error.hint}
        answer = {"refusal": refusal}
    with answer_to:
        json.dump(answer, answer_to)


if __name__ == "__main__":
    main()
