"""Two models side by side: latency, and what else was asked for, as one result."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekd.backends import backend
from edgekd.checks import Check, coverage_check, overall, size_check
from edgekd.errors import EXIT_GATE, BackendError, MissingExtraError, UsageError
from edgekd.files import append_line
from edgekd.gate import LatencyLimits, LatencySession, LatencyVerdict, run_latency_gate
from edgekd.gating.absolute import absolute_check
from edgekd.gating.accuracy import Evaluation, accuracy_checks
from edgekd.gating.subject import Subject
from edgekd.profiler import HERE, Device, Protocol, SessionResult, percentile, run_session
from edgekd.remote import pooled
from edgekd.target import Target, is_this_machine

_FALL_BACKS = 5  # layers that stay in float, named in the note


@dataclass(frozen=True)
class Limits:
    """What may be lost. `None`: measured, not judged. Of accuracy, points; `max_p90_ms` needs a `target`."""

    latency: LatencyLimits = field(default_factory=LatencyLimits)
    max_drop: float = 1.0
    min_agreement: float | None = None
    min_coverage: float | None = None
    max_size_mib: float | None = None
    max_p90_ms: float | None = None
    target: Target | None = None


@dataclass(frozen=True)
class How:
    """The protocol of a session (seeds are those of the limits), "cpu", "wall" or "device" clock, and where.

    Several devices of one kind share the sessions; one that is lost leaves its own to the others. Every
    session is added to the file `kept` as soon as it is measured.
    """

    protocol: Protocol = field(default_factory=lambda: Protocol(calls=3))
    clock: str = "cpu"
    devices: tuple[Device, ...] = (HERE,)
    progress: Callable[[str], None] = lambda _: None
    kept: Path | None = None


def compare(
    candidate: Subject, reference: Subject, limits: Limits, how: How, evaluation: Evaluation | None = None
) -> dict[str, Any]:
    """The result that `gate.json` holds (docs/gate.md).

    Args:
        evaluation: images or inputs with labels, for the accuracy.

    Raises:
        UsageError: the inputs of the two differ, or an absolute limit without the device it is about.
        BackendError: a runtime refuses a model, or the process died.
    """
    started = time.perf_counter()
    _same_inputs(candidate, reference)
    sessions: list[SessionResult] = []
    if limits.max_p90_ms is not None:
        _admissible(limits, here=HERE in how.devices)
    agreement: dict[str, Any] | None = None
    lines: list[Check] = []
    if evaluation is not None:  # first: most of what users get wrong shows here
        how.progress("accuracy")
        allowed = (limits.max_drop, limits.min_agreement)
        lines, agreement = pooled(
            how.devices,
            [evaluation],
            lambda device, samples: accuracy_checks(
                candidate, reference, samples, allowed, how.protocol, device
            ),
        )[0]
    found = _latency(candidate, reference, limits.latency, how, sessions)
    checks = [found.check(limits.latency.max_ratio)]
    if limits.max_p90_ms is not None and limits.target is not None:
        checks.append(absolute_check(sessions, limits.max_p90_ms, limits.target))
    checks += lines
    if HERE in how.devices:
        checks += candidate.golden_check("candidate")
    checks.append(_coverage(candidate, limits.min_coverage))
    checks.append(size_check(candidate.size_bytes, limits.max_size_mib, name="size"))
    verdict = overall(checks)
    return {
        "format": "edgekd-gate",
        "version": 1,
        "verdict": verdict,
        "exit": EXIT_GATE[verdict],
        "reason": found.reason,
        "limit": limits.latency.max_ratio,
        "clock": how.clock,
        "level": found.level,
        "restarts": found.restarts,
        "candidate": found.candidate and asdict(found.candidate),
        "control": found.control and asdict(found.control),
        "aa_limit": limits.latency.aa_limit,
        "checks": [check.record() for check in checks],
        "agreement": agreement,
        "models": {"candidate": candidate.record(), "reference": reference.record()},
        "device": ", ".join(dict.fromkeys(device.name for device in how.devices)),
        **_told(sessions),
        "seconds": round(time.perf_counter() - started, 2),
    }


def _same_inputs(candidate: Subject, reference: Subject) -> None:
    """Inputs of the same names, or else of the same order, have the same types and sizes.

    Raises:
        UsageError: they have not.
    """

    def kinds(subject: Subject) -> list[tuple[str, tuple[int, ...]]]:
        return [(feed.dtype, feed.shape) for feed in subject.feeds]

    if set(candidate.feeds) != set(reference.feeds) and kinds(candidate) != kinds(reference):
        told = [", ".join(map(str, subject.feeds)) for subject in (candidate, reference)]
        raise UsageError(
            f"the inputs differ: {candidate.given} takes {told[0]}; {reference.given} takes {told[1]}",
            "compare models of one task and one input size; --shape NAME=1,3,224,224 fixes an open size",
        )


def _admissible(limits: Limits, *, here: bool) -> None:
    """An absolute limit is about a device, and holds on that device only.

    Raises:
        UsageError: no target was named, or this is a shared runner.
    """
    if limits.target is None:
        raise UsageError(
            "--max-p90-ms is an absolute limit: it needs the device that it is about",
            "add --target CARD, on that device or with --on ssh://…; --max-ratio needs no device",
        )
    if here and not is_this_machine(limits.target):
        raise UsageError(
            f"--max-p90-ms: this machine is not a {limits.target.description}",
            "measure there: --on ssh://user@host",
        )
    if here and os.environ.get("CI", "") not in ("", "false", "0"):
        raise UsageError(
            "--max-p90-ms on a shared CI runner: its absolute times differ 4 to 10 fold between two runs",
            "measure on the device itself with --on ssh://…, or gate the ratio: --max-ratio",
        )


def _latency(
    candidate: Subject, reference: Subject, limits: LatencyLimits, how: How, sessions: list[SessionResult]
) -> LatencyVerdict:
    """The verdict; every session is added to the list."""
    variants = [reference.measured("ref"), reference.measured("aa"), candidate.measured("cand")]

    lock = threading.Lock()
    started = itertools.count(1)

    def measured(device: Device, seed: int) -> SessionResult:
        with lock:
            how.progress(f"session {next(started)} of {limits.restarts} to {limits.looks[-1]}")
        protocol = msgspec.structs.replace(how.protocol, seed=seed)
        done = run_session(variants, protocol=protocol, inputs=reference.feeds, device=device)
        if how.kept is not None:
            with lock:
                append_line(how.kept, {"device": device.name, "seed": seed, "session": done})
        return done

    def session(seed: int) -> LatencySession:
        first = limits.seed * 100
        if seed - first == len(sessions):  # all of the look that it belongs to
            upto = next(look for look in limits.looks if look > len(sessions))
            sessions.extend(pooled(how.devices, range(seed, first + upto), measured))
        done = sessions[seed - first]
        return LatencySession(*(round_values(done, name, how.clock) for name in ("ref", "aa", "cand")))

    return run_latency_gate(session, limits)


def round_values(session: SessionResult, variant: str, clock: str) -> NDArray[np.float64]:
    """Median of each round's calls on a clock, ms.

    Raises:
        UsageError: the runtime has no clock of its device.
    """
    times = session.variants[variant]
    calls = {"cpu": times.cpu_ms, "wall": times.wall_ms, "device": times.device_ms}[clock]
    if calls is None:
        raise UsageError(
            "--clock device: only tensorrt times itself, on a GPU", "--clock cpu, or wall on a quiet machine"
        )
    return np.asarray(np.median(np.asarray(calls, dtype=np.float64), axis=1))


def _coverage(candidate: Subject, limit: float | None) -> Check:
    """int8 share of the candidate, with the layers that stay in float."""
    try:
        found = backend(candidate.backend).coverage(candidate.model, precision=candidate.precision)
    except (BackendError, MissingExtraError) as error:
        return Check("int8 coverage", None, limit, None, "NOT_MEASURED", "share", error.message)
    check = coverage_check(found.int8_nodes, found.int8_macs, limit)
    floats = [layer.name for layer in found.layers if layer.macs and layer.precision != "int8"]
    if not floats or found.int8_nodes == 0.0:
        return check
    more = f" and {len(floats) - _FALL_BACKS} more" if len(floats) > _FALL_BACKS else ""
    note = f"{check.note}; in float: {', '.join(floats[:_FALL_BACKS])}{more}"
    return Check(check.name, check.measured, check.limit, None, check.verdict, check.unit, note)


def _told(sessions: list[SessionResult]) -> dict[str, Any]:
    """Both clocks of every variant, what each session met, and the machine."""
    clocks: dict[str, Any] = {}
    for name in ("ref", "aa", "cand"):
        wall = [c for s in sessions for calls in s.variants[name].wall_ms for c in calls]
        cpu = [c for s in sessions for calls in s.variants[name].cpu_ms for c in calls]
        clocks[name] = {f"wall_p{p}_ms": percentile(wall, p) for p in (50, 90, 99)} | {
            "cpu_p50_ms": percentile(cpu, 50),
            "calls": len(wall),
        }
    state = ("load_average", "steal_ticks", "temp_c", "throttle_count")
    keys = [f"{key}_{when}" for key in state for when in ("before", "after")]
    rows = [
        {key: session.environment.get(key) for key in keys}
        | {
            "first_call_ms": {name: times.first_call_ms for name, times in session.variants.items()},
            "load_ms": {name: times.load_ms for name, times in session.variants.items()},
        }
        for session in sessions
    ]
    machine = {key: value for key, value in sessions[-1].environment.items() if key not in keys}
    return {"times": clocks, "sessions": rows, "environment": machine}
