"""Stage 8: what applications get."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgekd import __version__
from edgekd.backends import backend
from edgekd.backends.onnxruntime import OnnxRuntimeBackend
from edgekd.bundle import Golden, VariantFile, write_bundle
from edgekd.errors import BundleError
from edgekd.files import sha256_json
from edgekd.profiler import environment
from edgekd.runtime import BundleError as RuntimeBundleError
from edgekd.runtime import load
from edgekd.stages.bench import Array, Bench
from edgekd.stages.export import FOLDER
from edgekd.stages.gate import shipped_plan
from edgekd.stages.profile import plans_of
from edgekd.stages.variants import X86, Planned
from edgekd.target import Target

_GOLDEN_IMAGES = 8
_INT8_SINCE = "1.23.0"  # ONNX Runtime 1.21.1 and 1.22.1 run these graphs in float (docs/check.md)
# A rebuilt kernel may round a value to the neighbouring code; logits then move by some steps of their grid.
_TOLERANCE = {"f32": 1e-3, "bf16": 0.25, "int8": 0.5}


def run(bench: Bench) -> dict[str, Any]:
    """Writes ``6-bundle`` and replays its golden vectors with every variant that runs here."""
    rows = {row["id"]: row for row in bench.run.record["metrics"]["variants"]}
    shipped = shipped_plan(bench)
    plans = [p for p in plans_of(bench) if not p.runs_here or rows[p.id]["accuracy"] is not None]
    plans.sort(
        key=lambda p: (
            not p.on_device_build,
            p.runs_here and p is not shipped and p != shipped,
            _order(rows, p),
        )
    )
    inputs = bench.validation_inputs[:_GOLDEN_IMAGES].numpy()
    outputs = {plan.id: _golden(bench, plan, inputs) for plan in plans}
    folder = bench.run.folder / "6-bundle"
    write_bundle(
        folder,
        name=bench.run.folder.resolve().name,
        spec=bench.spec,
        variants=[_variant(bench, plan, rows[plan.id]) for plan in plans],
        golden=Golden(
            inputs,
            outputs,
            {p.id: _TOLERANCE["int8" if p.quantized else p.precision] * _scale(outputs[p.id]) for p in plans},
        ),
        provenance=_provenance(bench),
        evidence=_evidence(bench, rows),
    )
    tested = []
    for plan in plans:
        if plan.runs_here:
            try:
                result = load(folder, variant=plan.id).selftest()
            except RuntimeBundleError as error:
                raise BundleError(f"variant {plan.id} does not load from the bundle: {error}") from error
            if not result["ok"]:
                raise BundleError(f"variant {plan.id} does not reproduce its golden outputs: {result}")
            tested.append(plan.id)
    bench.run.reporter.say(f"  {len(plans)} variants; self-test passed with {', '.join(tested)}")
    return {"bundle": str(folder)}


def _order(rows: dict[str, dict[str, Any]], plan: Planned) -> float:
    latency = rows[plan.id]["cpu_p50_ms"]
    return 0.0 if latency is None else float(latency)


def _scale(outputs: Array) -> float:
    return max(1.0, float(np.abs(outputs).max()) / 10)


def _golden(bench: Bench, plan: Planned, inputs: Array) -> Array:
    """Outputs of the variant's own runtime; for a file of another machine, the reference executor's."""
    path = bench.run.folder / FOLDER / plan.file
    if plan.runs_here:
        return backend(plan.backend).open(path, precision=plan.precision).run(inputs)
    return OnnxRuntimeBackend().open(path, optimize=False).run(inputs)


def _variant(bench: Bench, plan: Planned, row: dict[str, Any]) -> VariantFile:
    target = bench.run.target
    recipe: dict[str, Any] = {}
    if plan.on_device_build:
        recipe = {"compute_capability": target.compute_capability, **target.runtime["tensorrt"].options}
    return VariantFile(
        id=plan.id,
        source=bench.run.folder / FOLDER / plan.file,
        runtime=(plan.backend,),
        quant=target.quant.dialect if plan.quantized else "none",
        precision="int8" if plan.quantized else plan.precision,
        min_version=_least(plan, target),
        accuracy=row["accuracy"],
        arch=plan.arch,
        requires_cpu_flags=plan.requires_cpu_flags,
        build="on-device" if plan.on_device_build else "",
        build_recipe=recipe,
        note=row["reason"],
    )


def _least(plan: Planned, target: Target) -> dict[str, str]:
    """The lowest version of an engine that runs a file as meant; a card speaks of its own processor only."""
    if plan.quantized and plan.backend == "onnxruntime":
        return {"onnxruntime": _INT8_SINCE}
    needed = target.runtime[plan.backend].version_min if plan.backend in target.runtime else None
    return {plan.backend: str(needed.value)} if needed and plan.arch != X86 else {}


def _provenance(bench: Bench) -> dict[str, Any]:
    record = bench.run.record
    return {
        "tool": f"edgekd {__version__}",
        "teacher": {key: record["metrics"]["teacher"][key] for key in ("name", "sha256")},
        "data_sha256": record["metrics"]["data"]["sha256"],
        "recipe_sha256": sha256_json(record["recipe"]),
        "seed": bench.recipe.seed,
        "packages": environment()["packages"],
    }


def _evidence(bench: Bench, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    metrics = bench.run.record["metrics"]
    measured = [row for row in rows.values() if row["latency_p50_ms"] is not None]
    return {
        "accuracy": {
            "teacher": metrics["teacher"]["accuracy"],
            "student_f32": metrics["student_float"]["accuracy"],
            "variants": {row["id"]: row["accuracy"] for row in measured},
            "n": metrics["data"]["validation"],
        },
        "latency": [
            {
                "variant": row["id"],
                "p50_ms": row["latency_p50_ms"],
                "p90_ms": row["latency_p90_ms"],
                "device": row["latency_device"],
                "clock": "wall",
                "method": "interleaved, batch 1, order statistics",
            }
            for row in measured
        ],
        "verdict": bench.run.record["verdict"],
    }
