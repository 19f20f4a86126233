"""Stage 6: every variant on every runtime present: accuracy, agreement, coverage, latency, size."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.backends import Backend, Coverage, backend, backend_names
from edgekd.backends.feeds import image_feed
from edgekd.errors import BackendError, MissingExtraError
from edgekd.profiler import Latency, Protocol, Variant, measure
from edgekd.stages.bench import Array, Bench
from edgekd.stages.export import FOLDER
from edgekd.stages.search import quantize_mode
from edgekd.stages.variants import Planned, planned_variants
from edgekd.tasks.classification import accuracy, top1_agreement

_ROUNDS = 40
LOGITS = "checkpoints/profile-logits.npz"


def run(bench: Bench) -> dict[str, Any]:
    """Metrics `variants` and `backends`; leaves the logits of each variant beside the files."""
    reference = np.load(bench.run.folder / FOLDER / "reference.npz")
    plans = plans_of(bench)
    rows: dict[str, dict[str, Any]] = {}
    logits: dict[str, Any] = {}  # arrays
    coverages: dict[str, Coverage] = {}
    for number, plan in enumerate(plans):
        bench.run.reporter.step("profile variants", number, len(plans) + 1)
        row = _empty_row(bench, plan)
        rows[plan.id] = row
        if plan.on_device_build:
            row |= _prove(bench, plan)
            continue
        if not plan.runs_here:
            row["reason"] = f"a file for {plan.arch[0]}; not run on this machine"
            continue
        try:
            engine = backend(plan.backend)
            row |= {"version": engine.version(), "latency_device": engine.device()}
            logits[plan.id] = _logits(engine, bench, plan)
            coverages[plan.id] = engine.coverage(
                _path(bench, plan), precision=plan.precision, time_layers=True
            )
        except (MissingExtraError, BackendError) as error:
            row["reason"] = error.message
            logits.pop(plan.id, None)
            continue
        row |= _quality(bench, logits[plan.id], reference["int8" if plan.quantized else "float"])
        row |= {
            "int8_coverage_nodes": coverages[plan.id].int8_nodes,
            "int8_coverage_macs": coverages[plan.id].int8_macs,
        }
    _time(bench, [plan for plan in plans if plan.id in coverages], rows)
    np.savez(bench.run.folder / LOGITS, **logits)
    bench.run.reporter.step("profile variants", len(plans) + 1, len(plans) + 1)
    return {"variants": list(rows.values()), "backends": _by_backend(bench, plans, rows, coverages)}


def plans_of(bench: Bench) -> tuple[Planned, ...]:
    """The variants of this run's target on this machine."""
    try:
        bfloat16 = "bf16" in backend("openvino").precisions()
    except MissingExtraError:
        bfloat16 = False
    return planned_variants(bench.run.target, quantize_mode(bench) != "none", bfloat16)


def _path(bench: Bench, plan: Planned) -> Path:
    return bench.run.folder / FOLDER / plan.file


def _empty_row(bench: Bench, plan: Planned) -> dict[str, Any]:
    unknown = (
        "accuracy", "top1_agreement", "max_abs_diff", "int8_coverage_nodes", "int8_coverage_macs",
        "latency_p50_ms", "latency_p90_ms", "latency_kind", "latency_device", "cpu_p50_ms", "load_ms",
        "first_call_ms", "memory_mib", "energy_mj", "version", "fidelity",
    )  # fmt: skip
    return {
        "id": plan.id,
        "backend": plan.backend,
        "precision": "int8" if plan.quantized else plan.precision,
        "file": f"{FOLDER}/{plan.file}",
        "size_mib": _path(bench, plan).stat().st_size / 2**20,
        "reason": "",
    } | dict.fromkeys(unknown)


def _logits(engine: Backend, bench: Bench, plan: Planned) -> Array:
    session = engine.open(_path(bench, plan), precision=plan.precision)
    inputs = bench.validation_inputs.numpy()
    return np.concatenate([session.run(part) for part in np.array_split(inputs, max(1, len(inputs) // 256))])


def _quality(bench: Bench, logits: Array, reference: Array) -> dict[str, Any]:
    return {
        "fidelity": bench.fidelity(logits),
        "accuracy": accuracy(logits, bench.data.validation_labels),
        "top1_agreement": top1_agreement(logits, reference),
        "max_abs_diff": float(np.abs(logits - reference).max()),
    }


def _prove(bench: Bench, plan: Planned) -> dict[str, Any]:
    """What can be shown of a TensorRT variant without its device: that the graph parses and compiles."""
    from edgekd.backends.tensorrt import prove_build

    try:
        proof = prove_build(_path(bench, plan), bench.run.target.compute_capability)
    except (MissingExtraError, BackendError) as error:
        return {"reason": f"not compiled: {error.message}", "build": None}
    if proof.ok:
        built = proof.compute_capability_built
        wanted = f"SM{bench.run.target.compute_capability.replace('.', '')}"
        stand_in = (
            f"; {built} stands in for {wanted}, which that package does not know" if proof.substituted else ""
        )
        reason = f"compiled, not executed: {proof.runtime} built an engine for {built}{stand_in}"
    else:
        reason = f"not compiled: {proof.message}"
    return {"reason": reason, "version": proof.runtime, "build": asdict(proof)}


def _time(bench: Bench, plans: list[Planned], rows: dict[str, dict[str, Any]]) -> None:
    """Latency at batch 1 of all variants, interleaved in one fresh process."""
    if not plans:
        return
    recipe = bench.recipe.profile
    protocol = Protocol(recipe.threads, _ROUNDS, -(-recipe.calls // _ROUNDS), bench.recipe.seed)
    variants = [Variant(p.id, p.backend, str(_path(bench, p).resolve()), p.precision) for p in plans]
    found: dict[str, Latency] = measure(
        variants, protocol=protocol, inputs=image_feed(bench.spec.input_shape)
    )
    for name, latency in found.items():
        rows[name] |= {
            "latency_p50_ms": latency.wall_p50_ms,
            "latency_p90_ms": latency.wall_p90_ms,
            "cpu_p50_ms": latency.cpu_p50_ms,
            "load_ms": latency.load_ms,
            "first_call_ms": latency.first_call_ms,
            "memory_mib": latency.memory_mib,
            "energy_mj": latency.energy_mj,
            "latency_kind": "measured",
        }


def _by_backend(
    bench: Bench, plans: tuple[Planned, ...], rows: dict[str, dict[str, Any]], coverages: dict[str, Coverage]
) -> dict[str, dict[str, Any]]:
    """For each runtime the quantized variant, or the float one where nothing is quantized."""
    recipe = bench.recipe.profile
    calls = -(-recipe.calls // _ROUNDS) * _ROUNDS
    protocol = {"threads": recipe.threads, "calls": calls, "clock": "wall", "batch": 1, "interleaved": True}
    found: dict[str, dict[str, Any]] = {}
    for name in backend_names():
        mine = [plan for plan in plans if plan.backend == name]
        run_here = [plan for plan in mine if plan.id in coverages] or mine
        if not run_here:
            reason = f"target '{bench.run.target.id}' does not use {name}"
            found[name] = dict.fromkeys(_empty_row(bench, plans[0])) | {
                "backend": name,
                "reason": reason,
            }
            continue
        plan = run_here[0]
        layers = [asdict(layer) for layer in coverages[plan.id].layers] if plan.id in coverages else []
        found[name] = rows[plan.id] | {"variant": plan.id, "layers": layers, "protocol": protocol}
    return found
