"""One way to measure latency for every backend: a fresh process, interleaved rounds, two clocks.

A session is one process that loads every variant. Variants take turns in shuffled rounds, so that a change
of the machine's load meets all of them alike. Nothing here imports torch.
"""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import random
import signal
import statistics
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgekd.backends import Array, Feeds, Session, backend, processor_name
from edgekd.errors import BackendError, EdgekdError, MissingExtraError, UsageError

_ISA = (
    "avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16",
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
_PACKAGES = (
    "edgekd", "numpy", "msgspec", "torch", "onnx", "onnxruntime", "openvino", "optuna", "tensorrt",
    "tensorrt-rtx", "tensorrt-rtx-cu13",
)  # fmt: skip
_ONE_IN = 100  # a reported percentile is too small at most once in so many sessions
_WINDOW = 5  # calls in a warm-up window
_WINDOWS = 10  # at most
_AGREEMENT = 0.03  # two consecutive window medians this close end the warm-up
_STDERR_LINES = 8


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing to measure: a file on a runtime. `precision` is that of operators not quantized in it."""

    id: str
    backend: str
    model: str
    precision: str = "f32"


class Protocol(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to measure. Calls of one variant: `rounds` times `calls`."""

    threads: int = 1
    rounds: int = 40
    calls: int = 5
    seed: int = 0
    timeout_s: float = 600.0


class VariantTimes(msgspec.Struct, frozen=True):
    """Every call of one variant in one session, in milliseconds, indexed [round][call]."""

    load_ms: float
    first_call_ms: float
    wall_ms: list[list[float]]
    cpu_ms: list[list[float]]  # process time of all threads


class SessionResult(msgspec.Struct, frozen=True):
    """One session: the calls of each variant by id, and the machine it ran on."""

    variants: dict[str, VariantTimes]
    environment: dict[str, Any]


class Latency(msgspec.Struct, frozen=True):
    """Steady-state latency at batch 1; a percentile is None when there are not enough calls for it."""

    runs: int
    wall_p50_ms: float | None
    wall_p90_ms: float | None
    cpu_p50_ms: float | None
    cpu_p90_ms: float | None
    load_ms: float
    first_call_ms: float
    environment: dict[str, Any]


class _Order(msgspec.Struct, forbid_unknown_fields=True):
    """What the parent asks the worker for."""

    variants: list[Variant]
    protocol: Protocol
    input_shape: tuple[int, int, int] | str


class _Refusal(msgspec.Struct):
    """Why the worker has no result."""

    error: str  # name of the exception's class
    message: str
    hint: str


class _Answer(msgspec.Struct):
    result: SessionResult | None = None
    refusal: _Refusal | None = None


def measure(
    variants: list[Variant], *, protocol: Protocol, input_shape: tuple[int, int, int] | str
) -> dict[str, Latency]:
    """Latency of each variant by id, all measured interleaved in one session.

    Raises:
        BackendError: a runtime refuses a variant, or the session died or ran out of time.
    """
    result = run_session(
        variants,
        rounds=protocol.rounds,
        calls_per_round=protocol.calls,
        threads=protocol.threads,
        seed=protocol.seed,
        input_shape=input_shape,
        timeout_s=protocol.timeout_s,
    )
    return {name: _latency(times, result.environment) for name, times in result.variants.items()}


def _latency(times: VariantTimes, environment: dict[str, Any]) -> Latency:
    wall = [call for calls in times.wall_ms for call in calls]
    cpu = [call for calls in times.cpu_ms for call in calls]
    return Latency(
        runs=len(wall),
        wall_p50_ms=percentile(wall, 50),
        wall_p90_ms=percentile(wall, 90),
        cpu_p50_ms=percentile(cpu, 50),
        cpu_p90_ms=percentile(cpu, 90),
        load_ms=times.load_ms,
        first_call_ms=times.first_call_ms,
        environment=environment,
    )


def percentile(calls_ms: list[float], p: float) -> float | None:
    """Upper 99 % confidence bound of the p-th percentile (p in percent); None when there are too few calls.

    MLPerf LoadGen's early-stopping rule with tolerance 0: the (n - t + 1)-th smallest call, t as in
    `discarded`.
    """
    t = discarded(len(calls_ms), p)
    return None if t is None else sorted(calls_ms)[len(calls_ms) - t]


def discarded(calls: int, p: float) -> int | None:
    """Largest t >= 1 with P(X <= t) <= 1 % for X ~ Binomial(calls, 1 - p/100); None when there is none.

    Computed in whole numbers: every probability is a multiple of ``denominator ** -calls``.

    Raises:
        UsageError: p is not between 0 and 100.
    """
    if not 0 < p < 100:
        raise UsageError(f"a percentile lies between 0 and 100, got {p}")
    slower = 1 - Fraction(str(p)) / 100
    a, b = slower.numerator, slower.denominator - slower.numerator
    limit = slower.denominator**calls // _ONE_IN
    term = total = b**calls  # X = 0
    t = -1
    while total <= limit:
        t += 1
        term = term * (calls - t) * a // ((t + 1) * b)
        total += term
    return t if t >= 1 else None


def run_session(
    variants: list[Variant],
    *,
    rounds: int,
    calls_per_round: int,
    threads: int,
    seed: int,
    input_shape: tuple[int, int, int] | str,
    timeout_s: float = 600.0,
) -> SessionResult:
    """Measure the variants at batch 1 in one fresh process.

    Args:
        variants: ids must differ; the same file may appear twice (A/A control).
        rounds: in each, every variant takes its turn in a shuffled order.
        calls_per_round: consecutive calls of a variant in its turn.
        threads: inside one call, for every runtime.
        seed: of the orders and of the input, the same for all variants.
        input_shape: (C, H, W); or a ``.npz`` file that holds the inputs of one call by name.
        timeout_s: the process is ended after this many seconds.

    Raises:
        UsageError: two variants share an id, or more threads than usable cores were asked for.
        MissingExtraError: a runtime is not installed.
        BackendError: a runtime refuses a variant, or the process died or ran out of time.
    """
    names = [variant.id for variant in variants]
    if not names or len(set(names)) != len(names):
        raise UsageError(f"variants need different ids, got: {', '.join(names) or 'none'}")
    cores = len(os.sched_getaffinity(0))
    if not 1 <= threads <= cores:
        raise UsageError(f"cannot measure with {threads} threads: this process may use {cores} cores")
    protocol = Protocol(threads, rounds, calls_per_round, seed, timeout_s)
    order = msgspec.json.encode(_Order(variants, protocol, input_shape))
    package = str(Path(__file__).parents[1])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH", ""))))
    try:
        done = subprocess.run(
            [sys.executable, "-m", "edgekd.profiler"],
            input=order,
            capture_output=True,
            timeout=timeout_s,
            env=os.environ | {"PYTHONPATH": path},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BackendError(f"the measuring process did not end within {timeout_s:g} s") from error
    return _read(done)


def _read(done: subprocess.CompletedProcess[bytes]) -> SessionResult:
    """The worker's result.

    Raises:
        BackendError: it died, or a runtime refused a variant.
    """
    try:
        answer = msgspec.json.decode(done.stdout, type=_Answer)
    except msgspec.DecodeError as error:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        told = "\n".join(lines[-_STDERR_LINES:]) or "nothing on stderr"
        raise BackendError(f"the measuring process died ({_ending(done.returncode)}): {told}") from error
    if answer.refusal is not None:
        kind = MissingExtraError if answer.refusal.error == "MissingExtraError" else BackendError
        raise kind(answer.refusal.message, answer.refusal.hint)
    if answer.result is None:
        raise BackendError("the measuring process gave neither a result nor a reason")
    return answer.result


def _ending(code: int) -> str:
    """A process's exit code in words."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def environment() -> dict[str, Any]:
    """The machine and the software, for the record; ``packages`` holds versions of those installed."""
    flags = _cpu_flags()
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "cpu": processor_name(),
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


def _first_line(path: str) -> str:
    """First line of a system file; "" when it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8").partition("\n")[0].strip()
    except OSError:
        return ""


def _steal_ticks() -> int | None:
    """Ticks that the hypervisor gave to others since boot; None when not told."""
    fields = _first_line("/proc/stat").split()
    return int(fields[8]) if len(fields) > 8 else None


def _session(order: _Order) -> SessionResult:
    """The worker's part: load, warm up, measure."""
    protocol = order.protocol
    shuffle = random.Random(protocol.seed).shuffle
    images = _inputs(order)
    engines = {name: backend(name) for name in sorted({variant.backend for variant in order.variants})}
    versions = {name: engine.version() for name, engine in engines.items()}  # imports the engines
    steal, load = _steal_ticks(), list(os.getloadavg())
    variants = list(order.variants)
    shuffle(variants)
    sessions: dict[str, Session] = {}
    times: dict[str, VariantTimes] = {}
    for variant in variants:
        started = time.perf_counter_ns()
        session = engines[variant.backend].open(
            Path(variant.model), threads=protocol.threads, precision=variant.precision, batch=1
        )
        loaded = time.perf_counter_ns()
        session.run(images)
        called = time.perf_counter_ns()
        sessions[variant.id] = session
        times[variant.id] = VariantTimes((loaded - started) / 1e6, (called - loaded) / 1e6, [], [])
    gc.disable()
    for variant in variants:
        _warm_up(sessions[variant.id], images)
    for _ in range(protocol.rounds):
        shuffle(variants)
        for variant in variants:
            wall_ms, cpu_ms = _turn(sessions[variant.id], images, protocol.calls)
            times[variant.id].wall_ms.append(wall_ms)
            times[variant.id].cpu_ms.append(cpu_ms)
    gc.enable()
    told = environment() | {
        "devices": {name: engine.device() for name, engine in engines.items()},
        "versions": versions,
        "precision": {variant.id: variant.precision for variant in order.variants},
        "threads": protocol.threads,
        "batch": 1,
        "input_shape": order.input_shape,
        "load_average_before": load,
        "load_average_after": list(os.getloadavg()),
        "steal_ticks_before": steal,
        "steal_ticks_after": _steal_ticks(),
    }
    return SessionResult({variant.id: times[variant.id] for variant in order.variants}, told)


def _inputs(order: _Order) -> Array | Feeds:
    """The inputs of one call: random images, or what the caller stored."""
    if isinstance(order.input_shape, str):
        with np.load(order.input_shape, allow_pickle=False) as held:
            return {name: held[name] for name in held.files}
    draw = np.random.default_rng(order.protocol.seed)
    return draw.standard_normal((1, *order.input_shape), dtype=np.float32)


def _warm_up(session: Session, images: Array | Feeds) -> None:
    """Windows of calls until two consecutive medians agree."""
    before = 0.0
    for _ in range(_WINDOWS):
        now = statistics.median(_turn(session, images, _WINDOW)[0])
        if abs(now - before) < _AGREEMENT * now:
            return
        before = now


def _turn(session: Session, images: Array | Feeds, calls: int) -> tuple[list[float], list[float]]:
    """Wall and process milliseconds of consecutive calls."""
    wall_ms, cpu_ms = [], []
    for _ in range(calls):
        cpu, wall = time.process_time_ns(), time.perf_counter_ns()
        session.run(images)
        wall_ms.append((time.perf_counter_ns() - wall) / 1e6)
        cpu_ms.append((time.process_time_ns() - cpu) / 1e6)
    return wall_ms, cpu_ms


def _worker() -> None:
    """Order on stdin, answer on stdout; what the runtimes print goes to stderr."""
    answer_to = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=_Order)
    try:
        answer = _Answer(result=_session(order))
    except EdgekdError as error:
        answer = _Answer(refusal=_Refusal(type(error).__name__, error.message, error.hint))
    with answer_to:
        answer_to.write(msgspec.json.encode(answer))


if __name__ == "__main__":
    _worker()
