"""One way to measure latency for every backend, here or on another device.

A session is one fresh process (`edgekd.worker`) that loads every variant. Variants take turns in shuffled
rounds, so that a change of the machine's load meets all of them alike. Nothing here imports torch.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any
from typing import Protocol as Interface

import msgspec

from edgekd.backends.feeds import Feed
from edgekd.errors import BackendError, MissingExtraError, UsageError
from edgekd.worker import environment

__all__ = ["Device", "Latency", "Protocol", "SessionResult", "Variant", "environment", "evaluate", "measure",
           "percentile", "run_session"]  # fmt: skip

Inputs = Sequence[Feed] | Path  # to be filled with random values; or an ``.npz`` with those of one call

_ONE_IN = 100  # a reported percentile is too small at most once in so many sessions
_STDERR_LINES = 8


class Variant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One thing to measure: a file on a runtime. `precision` is that of operators not quantized in it."""

    id: str
    backend: str
    model: str
    precision: str = "f32"


class Protocol(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to measure. Calls of one variant: `rounds` times `calls`, consecutive ones in its turn.

    `threads` are those inside one call, `seed` is of the orders and of the input, the same for all variants.
    """

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
    memory_mib: float | None = None  # see `edgekd.memory`; None when not asked for
    energy_uj: float | None = None  # of the processor packages during all timed calls; None without a counter
    device_ms: list[list[float]] | None = None  # on a GPU by its own events, without copies; None elsewhere
    layers_ms: dict[str, float] | None = None  # median of each layer, of an engine that tells it


class SessionResult(msgspec.Struct, frozen=True):
    """One session: the calls of each variant by id, and the machine it ran on."""

    variants: dict[str, VariantTimes]
    environment: dict[str, Any]


class Latency(msgspec.Struct, frozen=True):
    """Steady-state latency at batch 1; a percentile is None when there are not enough calls for it."""

    runs: int
    wall_p50_ms: float | None
    wall_p90_ms: float | None
    wall_p99_ms: float | None
    cpu_p50_ms: float | None
    cpu_p90_ms: float | None
    load_ms: float
    first_call_ms: float
    memory_mib: float | None
    energy_mj: float | None  # millijoules a call
    environment: dict[str, Any]
    device_p50_ms: float | None = None  # on a GPU by its own events; None elsewhere
    device_p90_ms: float | None = None
    layers_ms: dict[str, float] | None = None


class Device(Interface):
    """Where sessions run."""

    @property
    def name(self) -> str:
        """In words."""

    def work(self, order: dict[str, Any], timeout_s: float) -> subprocess.CompletedProcess[bytes]:
        """Run `edgekd.worker` on an order; its paths are those of this machine, its stdout is the answer.

        Raises:
            BackendError: the process did not end in time.
        """


class _Refusal(msgspec.Struct):
    """Why the worker has no result."""

    error: str  # name of the exception's class
    message: str
    hint: str


class _Answer(msgspec.Struct):
    result: dict[str, Any] | None = None
    refusal: _Refusal | None = None


class Here:
    """This machine: a fresh Python process."""

    name = "this machine"

    def work(self, order: dict[str, Any], timeout_s: float) -> subprocess.CompletedProcess[bytes]:
        """See `Device`.

        Raises:
            UsageError: more threads than usable cores were asked for.
            BackendError: the process did not end in time.
        """
        threads, cores = order["protocol"]["threads"], len(os.sched_getaffinity(0))
        if not 1 <= threads <= cores:
            raise UsageError(f"cannot measure with {threads} threads: this process may use {cores} cores")
        package = str(Path(__file__).parents[1])
        path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH", ""))))
        try:
            return subprocess.run(
                [sys.executable, "-m", "edgekd.worker"],
                input=msgspec.json.encode(order),
                capture_output=True,
                timeout=timeout_s,
                env=os.environ | {"PYTHONPATH": path},
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise BackendError(f"the measuring process did not end within {timeout_s:g} s") from error


HERE = Here()


def measure(
    variants: Sequence[Variant], *, protocol: Protocol, inputs: Inputs, device: Device = HERE
) -> dict[str, Latency]:
    """Latency of each variant by id, all measured interleaved in one session, and its memory.

    Raises:
        BackendError: a runtime refuses a variant, or the session died or ran out of time.
    """
    result = run_session(variants, protocol=protocol, inputs=inputs, device=device, memory=True)
    return {name: latency(times, result.environment) for name, times in result.variants.items()}


def latency(times: VariantTimes, environment: dict[str, Any]) -> Latency:
    """The figures of one session."""
    wall = [call for calls in times.wall_ms for call in calls]
    cpu = [call for calls in times.cpu_ms for call in calls]
    device = [call for calls in times.device_ms or () for call in calls]
    return Latency(
        runs=len(wall),
        wall_p50_ms=percentile(wall, 50),
        wall_p90_ms=percentile(wall, 90),
        wall_p99_ms=percentile(wall, 99),
        cpu_p50_ms=percentile(cpu, 50),
        cpu_p90_ms=percentile(cpu, 90),
        load_ms=times.load_ms,
        first_call_ms=times.first_call_ms,
        memory_mib=times.memory_mib,
        energy_mj=None if times.energy_uj is None else times.energy_uj / 1e3 / len(wall),
        environment=environment,
        device_p50_ms=percentile(device, 50),
        device_p90_ms=percentile(device, 90),
        layers_ms=times.layers_ms,
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
    variants: Sequence[Variant],
    *,
    protocol: Protocol,
    inputs: Inputs,
    device: Device = HERE,
    memory: bool = False,
) -> SessionResult:
    """Measure the variants in one fresh process; the same file may appear twice (A/A control).

    Args:
        memory: also that of each variant, in a process of its own before anything is timed.

    Raises:
        UsageError: two variants share an id, or more threads than usable cores were asked for.
        MissingExtraError: a runtime is not installed.
        BackendError: a runtime refuses a variant, or the process died or ran out of time.
        DeviceError: the device cannot be reached, or was lost.
    """
    names = [variant.id for variant in variants]
    if not names or len(set(names)) != len(names):
        raise UsageError(f"variants need different ids, got: {', '.join(names) or 'none'}")
    order = _order("measure", variants, protocol) | {"memory": memory}
    if isinstance(inputs, Path):
        order |= {"stored": str(inputs)}
    else:
        order |= {"inputs": [{"name": f.name, "dtype": f.dtype, "shape": f.shape} for f in inputs]}
    return msgspec.convert(_read(device.work(order, protocol.timeout_s)), SessionResult)


def evaluate(
    variants: Sequence[Variant], *, data: Path, answers: Path, protocol: Protocol, device: Device = HERE
) -> None:
    """First outputs (N, K) of each variant, one sample a call, in an ``.npz`` with one array a variant.

    Args:
        data: ``.npz`` with one array (N, …) for each input.
        answers: the file to write. The backend "reference" runs a graph as written in ONNX Runtime.

    Raises:
        As `run_session`.
    """
    order = _order("evaluate", variants, protocol) | {"data": str(data), "answers": str(answers)}
    _read(device.work(order, protocol.timeout_s))


def time_layers(
    variants: Sequence[Variant],
    shapes: dict[str, tuple[str, tuple[int, ...]]],
    *,
    protocol: Protocol,
    device: Device = HERE,
) -> dict[str, Any]:
    """Small models that take turns: ``times`` (id: what `edgekd.worker.in_turns` says), ``environment``.

    Args:
        shapes: dtype and shape of each model's input.

    Raises:
        As `run_session`.
    """
    order = _order("layers", variants, protocol) | {"shapes": shapes}
    return _read(device.work(order, protocol.timeout_s))


def check(
    bundle: Path,
    variant: str,
    *,
    answers: Path,
    forced: bool = False,
    protocol: Protocol,
    device: Device = HERE,
) -> dict[str, Any]:
    """One variant of a bundle replayed in a fresh process; the result is that of `edgekd.worker.check`.

    Args:
        answers: the file for the graph that ONNX Runtime executes.
        forced: try it where its conditions are not met too.

    Raises:
        As `run_session`.
    """
    order = _order("check", (), protocol) | {"bundle": str(bundle), "variant": variant, "forced": forced}
    return _read(device.work(order | {"answers": str(answers)}, protocol.timeout_s))


def _order(job: str, variants: Sequence[Variant], protocol: Protocol) -> dict[str, Any]:
    return {
        "job": job,
        "variants": [msgspec.structs.asdict(variant) for variant in variants],
        "protocol": msgspec.structs.asdict(protocol),
    }


def _read(done: subprocess.CompletedProcess[bytes]) -> dict[str, Any]:
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
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    meaning = {
        "SIGILL": "an instruction that this processor does not have",
        "SIGKILL": "often for want of memory",
    }
    return f"signal {name}" + (f", {meaning[name]}" if name in meaning else "")
