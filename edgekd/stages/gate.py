"""Stage 7: may this student be shipped? Measured numbers against the limits of recipe and budget."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np

from edgekd.backends.feeds import image_feed
from edgekd.checks import (
    Check,
    Verdict,
    accuracy_check,
    coverage_check,
    overall,
    parity_check,
    size_check,
    with_unit,
)
from edgekd.gate import LatencyLimits, LatencySession, LatencyVerdict, latency_verdict, run_latency_gate
from edgekd.profiler import Protocol, SessionResult, Variant, run_session
from edgekd.stages.bench import Bench
from edgekd.stages.export import FOLDER
from edgekd.stages.profile import LOGITS, plans_of
from edgekd.stages.variants import Planned
from edgekd.target import is_this_machine
from edgekd.tasks.classification import correct


def run(bench: Bench) -> dict[str, Any]:
    """`gate` and `verdict` of the record, and the metric `speedup_over_teacher`."""
    shipped = shipped_plan(bench)
    reason = _why(bench, shipped)
    bench.run.reporter.say(f"  {reason}")
    row = _rows(bench)[shipped.id]
    checks = _accuracy_checks(bench, shipped)
    checks += _runtime_checks(bench)
    checks.append(
        size_check(
            round(row["size_mib"] * 2**20), bench.recipe.budget.max_size_mib, name=f"size of {shipped.id}"
        )
    )
    sessions: list[SessionResult] = []
    latency = _latency(bench, shipped, sessions)
    checks.append(_latency_check(bench, shipped, latency))
    checks += _absolute_check(bench, row)
    speedup = _speedup(bench, shipped, sessions)
    verdict = overall(checks)
    for check in checks:
        measured = "" if check.measured is None else f" {with_unit(check.measured, check.unit)}"
        bench.run.reporter.say(f"  {check.verdict:12} {check.name}{measured}")
    gate = {
        "checks": [check.record() for check in checks],
        "latency": None
        if latency is None
        else {
            "backend": shipped.backend,
            "clock": "cpu",
            "level": latency.level,
            "restarts": latency.restarts,
            "candidate": latency.candidate and asdict(latency.candidate),
            "control": latency.control and asdict(latency.control),
            "reference": _reference(bench, shipped).id,
            "shipped": shipped.id,
        },
        "shipped": shipped.id,
        "reason": reason,
    }
    return {"gate": gate, "verdict": verdict, "speedup_over_teacher": speedup}


def shipped_plan(bench: Bench) -> Planned:
    """The fastest variant measured here among those faithful to their torch model and within the allowed
    drop; int8 ships only where it pays."""
    measured = _measured(bench)
    faithful = [plan for plan in measured if not _excluded(bench, plan)]
    if not is_this_machine(
        bench.run.target
    ):  # elsewhere int8 is what the card asks for; the host only checks it
        faithful = [plan for plan in faithful if plan.quantized] or faithful
    rows = _rows(bench)
    return min(faithful or measured, key=lambda plan: rows[plan.id]["cpu_p50_ms"])


def _measured(bench: Bench) -> list[Planned]:
    rows = _rows(bench)
    return [plan for plan in plans_of(bench) if rows[plan.id]["latency_p50_ms"] is not None]


def _excluded(bench: Bench, plan: Planned) -> str:
    """Why a variant may not be shipped; empty where it may."""
    row, limits = _rows(bench)[plan.id], bench.recipe.gate
    if row["top1_agreement"] < limits.min_top1_agreement:
        return f"agrees with torch on {100 * row['top1_agreement']:.2f} %"
    lost = _lost(bench, plan)
    return f"loses {lost:.2f} points" if lost > limits.max_quantization_drop_points else ""


def _lost(bench: Bench, plan: Planned) -> float:
    """Points of accuracy against the float student."""
    best: float = bench.run.record["metrics"]["student_float"]["accuracy"]
    return 100 * (best - float(_rows(bench)[plan.id]["accuracy"]))


def _why(bench: Bench, shipped: Planned) -> str:
    """Why this variant and none of the others, in words: what each costs and loses, what is out and why."""
    rows, limit = _rows(bench), bench.recipe.gate.max_quantization_drop_points
    mixed = bench.run.record["metrics"]["quantize"].get("float_layers") or ()

    def told(plan: Planned) -> str:
        form = f" (mixed: {len(mixed)} layers in float)" if mixed and plan.quantized else ""
        cost = f"{rows[plan.id]['cpu_p50_ms']:.3g} ms of CPU time"
        lost = _lost(bench, plan)
        return f"{plan.id}{form} {cost}, {abs(lost):.2f} points {'lost' if lost >= 0 else 'gained'}"

    others = [plan for plan in _measured(bench) if plan.id != shipped.id]
    out = {plan.id: why for plan in others if (why := _excluded(bench, plan))}
    inside = [told(plan) for plan in others if plan.id not in out]
    if _excluded(bench, shipped):
        first = f"no variant keeps within {limit:g} points and agrees with torch; the fastest is"
    elif is_this_machine(bench.run.target):
        first = f"the fastest within {limit:g} points of the float student is"
    else:
        first = f"within {limit:g} points, and quantized as the card of the device asks for:"
    parts = [f"{first} {told(shipped)}"]
    parts += [f"beside {'; '.join(inside)}"] if inside else []
    parts += [f"out: {'; '.join(f'{name} {why}' for name, why in out.items())}"] if out else []
    return ". ".join(parts)


def _rows(bench: Bench) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in bench.run.record["metrics"]["variants"]}


def _accuracy_checks(bench: Bench, shipped: Planned) -> list[Check]:
    labels = bench.data.validation_labels
    with np.load(bench.run.folder / FOLDER / "reference.npz") as file:
        student = correct(file["float"], labels)
    with np.load(bench.run.folder / LOGITS) as file:
        candidate = correct(file[shipped.id], labels)
    teacher = correct(bench.teacher_logits, labels)
    return [
        accuracy_check(
            teacher,
            candidate,
            max_drop_points=bench.recipe.budget.max_drop_points,
            name=f"accuracy drop, teacher to {shipped.id}",
        ),
        accuracy_check(
            student,
            candidate,
            max_drop_points=bench.recipe.gate.max_quantization_drop_points,
            name=f"accuracy drop, float student to {shipped.id}",
        ),
    ]


def _runtime_checks(bench: Bench) -> list[Check]:
    """Parity of every variant that ran, coverage of every quantized one, compilation of on-device builds."""
    rows, limits, n = _rows(bench), bench.recipe.gate, len(bench.data.validation_labels)
    checks: list[Check] = []
    for plan in plans_of(bench):
        row = rows[plan.id]
        if plan.on_device_build:
            build = row.get("build")
            verdict: Verdict = (
                "NOT_MEASURED" if build is None or build["ok"] is None else "PASS" if build["ok"] else "FAIL"
            )
            checks.append(Check(f"{plan.id} compiles", None, None, None, verdict, "", row["reason"]))
        if row["top1_agreement"] is None:
            continue
        name = f"agreement with torch, {plan.id}"
        checks.append(
            parity_check(row["top1_agreement"], limits.min_top1_agreement, n, row["max_abs_diff"], name=name)
        )
        if plan.quantized:
            checks.append(
                coverage_check(
                    row["int8_coverage_nodes"],
                    row["int8_coverage_macs"],
                    limits.min_int8_coverage,
                    name=f"int8 coverage, {plan.id}",
                )
            )
    return checks


def _reference(bench: Bench, shipped: Planned) -> Planned:
    """The float student in f32 on the same runtime."""
    return next(p for p in plans_of(bench) if p.backend == shipped.backend and p.id.endswith("-f32"))


def _latency(bench: Bench, shipped: Planned, sessions: list[SessionResult]) -> LatencyVerdict | None:
    """Shipped variant over float student on one runtime, interleaved with an A/A control and the teacher."""
    recipe, folder = bench.recipe.gate, bench.run.folder
    reference = _reference(bench, shipped)
    path = str((folder / FOLDER / reference.file).resolve())
    variants = [
        Variant("ref", reference.backend, path, "f32"),
        Variant("aa", reference.backend, path, "f32"),
        Variant("cand", shipped.backend, str((folder / FOLDER / shipped.file).resolve()), shipped.precision),
    ]
    if bench.teacher.onnx is not None:
        variants.append(Variant("teacher", shipped.backend, str(bench.teacher.onnx.resolve()), "f32"))

    def session(seed: int) -> LatencySession:
        bench.run.reporter.step("latency sessions", len(sessions), recipe.max_restarts)
        sessions.append(
            run_session(
                variants,
                protocol=Protocol(bench.recipe.profile.threads, recipe.rounds, recipe.calls_per_round, seed),
                inputs=image_feed(bench.spec.input_shape),
            )
        )
        return LatencySession(*(_rounds(sessions[-1], name) for name in ("ref", "aa", "cand")))

    limits = LatencyLimits(
        max_ratio=recipe.max_ratio,
        restarts=recipe.restarts,
        max_restarts=recipe.max_restarts,
        seed=bench.recipe.seed,
    )
    verdict = run_latency_gate(session, limits)
    bench.run.reporter.step("latency sessions", recipe.max_restarts, recipe.max_restarts)
    return verdict


def _rounds(session: SessionResult, variant: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Median CPU time of each round's calls, ms."""
    return np.median(np.asarray(session.variants[variant].cpu_ms, dtype=np.float64), axis=1)


def _latency_check(bench: Bench, shipped: Planned, latency: LatencyVerdict | None) -> Check:
    name = f"latency, {shipped.id} over the float student"
    assert latency is not None
    check = latency.check(bench.recipe.gate.max_ratio)
    note = f"{shipped.backend} on this host, CPU clock, interleaved; {check.note}"
    verdict = check.verdict
    if not is_this_machine(bench.run.target):
        note = f"measured on this host, which is not a {bench.run.target.description}: no verdict; {note}"
        verdict = "NOT_MEASURED"
    return Check(name, check.measured, check.limit, check.interval, verdict, check.unit, note)


def _absolute_check(bench: Bench, row: dict[str, Any]) -> list[Check]:
    limit = bench.recipe.budget.max_latency_ms
    if limit is None:
        return []
    if not is_this_machine(bench.run.target):
        note = "an absolute limit needs the device itself; the prediction only steered the search"
        return [Check("latency p90", None, limit, None, "NOT_MEASURED", "ms", note)]
    measured = row["latency_p90_ms"]
    return [
        Check(
            "latency p90", measured, limit, None, "PASS" if measured <= limit else "FAIL", "ms", "wall clock"
        )
    ]


def _speedup(bench: Bench, shipped: Planned, sessions: list[SessionResult]) -> dict[str, Any] | None:
    """Teacher's latency over the shipped variant's, from the same interleaved sessions."""
    if bench.teacher.onnx is None:
        return None
    parts = [LatencySession(*(_rounds(s, name) for name in ("cand", "cand", "teacher"))) for s in sessions]
    ratio = latency_verdict(parts, max_ratio=1.0).candidate
    if ratio is None:
        return None
    return {
        "ratio": ratio.ratio,
        "interval": [ratio.lo, ratio.hi],
        "backend": shipped.backend,
        "variant": shipped.id,
        "device": _rows(bench)[shipped.id]["latency_device"],
        "clock": "cpu",
        "teacher_precision": "f32",
    }
