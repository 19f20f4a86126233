"""`edgekd quantize MODEL.onnx`: candidates of one ONNX file for a target, measured; the best one is kept."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgekd.backends import Coverage, backend
from edgekd.errors import BackendError, MissingExtraError, UnsupportedModelError, UsageError
from edgekd.files import write_bytes, write_json, write_text
from edgekd.memory import give_back
from edgekd.profiler import Protocol, Variant, environment, measure
from edgekd.quantize.engines import engine_names, run_engine
from edgekd.quantize.observe import Calibration
from edgekd.quantize.onnx_file import load_float
from edgekd.quantize.post_training import (
    Judges,
    Quantized,
    quantize_graph,
    sums_in_float,
    with_floats,
    with_sensitivity,
)
from edgekd.quantize.quality import DEFAULT_DROP
from edgekd.quantize.samples import load_samples
from edgekd.quantize.scheme import QuantScheme, scheme_for
from edgekd.report import file_page
from edgekd.run import Reporter
from edgekd.stages.onnx_choice import Wanted, check_engine, choose
from edgekd.stages.onnx_job import Job
from edgekd.stages.onnx_parity import OLD_ISA, overflows, parity_rows
from edgekd.target import Target

RECORD, PAGE, KEPT = "quantize.json", "report.html", "model.onnx"
_ROUNDS = 40
_UNKNOWN = (
    "drop", "standard_error", "accuracy", "agreement", "signal_to_noise_db", "int8_coverage_nodes",
    "int8_coverage_macs", "kernels", "float_layers", "latency_p50_ms", "latency_p90_ms", "cpu_p50_ms",
)  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A file on a runtime. `form`: fp32, bf16, int8, mixed, w8, w4; `made`: how it was quantized; `by`: what
    quantized it."""

    id: str
    form: str
    path: Path
    runtime: str
    precision: str = "f32"
    made: Quantized | None = None
    by: str = "edgekd"


def quantize_file(wanted: Wanted, reporter: Reporter) -> dict[str, Any]:
    """Everything: read, calibrate, try, measure, choose, write. Returns the record (docs/quantize.md).

    Raises:
        EdgekdError: `UsageError` no such file; `UnsupportedModelError` a model that cannot be quantized;
            `DataError` samples that do not fit; `InfeasibleBudgetError` no candidate within the budget;
            `MissingExtraError` no runtime of the target here.
    """
    job = _job(wanted, reporter)
    for name in (RECORD, PAGE, KEPT):  # of an earlier run: nobody takes them for this one's if it fails
        (wanted.folder / name).unlink(missing_ok=True)
    model = job.model
    facts = job.calibration_facts()
    limit = DEFAULT_DROP[job.kind] if wanted.max_drop is None else wanted.max_drop
    notes = "".join(f"; {note}" for note in model.notes)
    reporter.say(
        f"  {wanted.model.name}: {facts['calibration']} samples calibrate, {facts['deciding']} decide, "
        f"{facts['reporting']} report; the limit is {limit:g} points of {job.kind}{notes}"
    )
    made = _quantized_graphs(job, wanted, limit) if wanted.engine == "edgekd" else []
    candidates = _candidates(job, wanted, made)
    failed: dict[str, str] = {}
    candidates += _engines(job, wanted, candidates, failed)
    made, candidates = _in_files(made, candidates)
    rows = _measure(job, wanted, candidates)
    parity = _parity(job, candidates)
    if wanted.target.device_class == "x86-cpu" and (told := overflows(parity)):
        reporter.say(
            f"  8-bit products overflow on {OLD_ISA} without VNNI: {'; '.join(told)}; --target avx2 avoids it"
        )
    chosen, reason = choose(rows, limit, wanted, quantized=bool(made) or wanted.engine != "edgekd")
    by_id = {candidate.id: candidate for candidate in candidates}
    kept = wanted.folder / KEPT
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(kept, by_id[chosen["id"]].path.read_bytes())
    shutil.rmtree(job.folder / "latency", ignore_errors=True)
    record = {
        "model": {"path": str(wanted.model), "sha256": model.sha256, "notes": list(model.notes)},
        "target": {"id": wanted.target.id, "dialect": wanted.target.quant.dialect},
        "calibration": facts,
        "quality": {"kind": job.kind, "max_drop_points": limit},
        "candidates": rows,
        "chosen": chosen["id"],
        "reason": reason,
        "kept": str(kept),
        "engines_failed": failed,
        "parity": parity,
        "build": _build(job, wanted, candidates),
        "tried": {
            f"{one.dialect}{' mixed' if one.floats else ''}": one.tried for one in made if not one.trained
        },
        "float_operators": {_named(one): list(one.floats) for one in made if one.floats},
        "sensitivity": {_named(one): [asdict(s) for s in one.sensitivity] for one in made if one.sensitivity},
        "environment": environment(),
    }
    write_json(wanted.folder / RECORD, record)
    write_text(wanted.folder / PAGE, file_page(record))
    reporter.say(f"  kept {chosen['id']}: {reason}")
    return record


def _named(made: Quantized) -> str:
    return f"{made.dialect}{'-float-sums' if made.float_sums else ''}{'-qat' if made.trained else ''}"


def _job(wanted: Wanted, reporter: Reporter) -> Job:
    if (wanted.folder / KEPT).resolve() == wanted.model.resolve():
        raise UsageError(
            f"--out {wanted.folder}: the result would replace {wanted.model}", "choose another folder: --out"
        )
    check_engine(wanted)
    model = load_float(wanted.model)
    job = Job(
        model,
        load_samples(wanted.data, model, wanted.pixels),
        wanted.folder / "candidates",
        reporter,
        wanted.seed,
        wanted.calibration_images,
        wanted.calibration_choice,
        wanted.training is not None,
    )
    if wanted.training is not None:
        from edgekd.stages.qat_file import check_trainable

        check_trainable(job, wanted.training)
    return job


def _quantized_graphs(job: Job, wanted: Wanted, limit: float) -> list[Quantized]:
    """The int8 graphs of each dialect that a runtime of the target reads; none where the card ships float."""
    scheme = scheme_for(wanted.target)
    if scheme.dialect == "none":
        job.reporter.say(f"  the card says that int8 does not pay: {wanted.target.quant.source}")
        return []
    made: list[Quantized] = []
    calibration = Calibration(lambda: job.batches(job.parts.calibration, "calibrate"))
    for one in _schemes(scheme, wanted.target):
        judges = _judges(job, one.dialect)
        job.reporter.say(f"  {one.dialect}: divergence from float by calibrator")
        ours = quantize_graph(
            job.model,
            one,
            calibration,
            judges,
            limit,
            calibrators=wanted.calibrators,
            reporter=(job.reporter.say, job.reporter.step),
        )
        if wanted.sensitivity:
            ours = [with_sensitivity(one, judges, job.reporter.step) for one in ours]
        made += ours + (sums_in_float(ours[0]) if one.dialect == "openvino-u8" else [])
        if wanted.training is not None:
            from edgekd.stages.qat_file import train_file

            base = next(found for found in made if found.dialect == one.dialect)
            trained = train_file(job, base, wanted.training, wanted.seed)
            drop = judges.drop(trained.model)
            reporting = (job.reporter.say, job.reporter.step)
            made += [trained] if drop <= limit else with_floats(trained, drop, judges, limit, reporting)
    return made


def _judges(job: Job, dialect: str) -> Judges:
    """Distances on ONNX Runtime, which is quick to load a graph; what the budget limits on the runtime that
    the dialect is for, because two runtimes do not always compute the same of one graph."""
    try:
        runtime = backend("openvino" if dialect == "openvino-u8" else "onnxruntime")
        runtime.version()
    except MissingExtraError:
        runtime = backend("onnxruntime")
    return Judges(
        job.damage,
        lambda model: job.damage(model, rough=True),
        lambda model: job.drop(model, runtime.name),
    )


def _schemes(scheme: QuantScheme, target: Target) -> list[QuantScheme]:
    """The card's scheme; where OpenVINO runs beside ONNX Runtime, the one that suits it too."""
    found = [scheme]
    if scheme.dialect == "x86-u8-relu0" and "openvino" in target.runtime:
        found.append(replace(scheme, dialect="openvino-u8"))
    return found


def _candidates(job: Job, wanted: Wanted, made: list[Quantized]) -> list[Candidate]:
    runtimes = [name for name in ("onnxruntime", "openvino") if name in wanted.target.runtime]
    here = []
    for name in runtimes or ["onnxruntime"]:
        try:
            here.append((name, backend(name).precisions()))
        except MissingExtraError as error:
            job.reporter.say(f"  {error.message}")
    if not here:
        raise MissingExtraError(
            f"no runtime of target '{wanted.target.id}' is installed",
            "python -m pip install 'edgekd[onnxruntime,openvino]'",
        )
    found = []
    for name, precisions in here:
        found.append(Candidate(f"{name}-fp32", "fp32", job.float_path, name))
        if "bf16" in precisions:
            found.append(Candidate(f"{name}-bf16", "bf16", job.float_path, name, "bf16"))
        for one in made:
            if one.float_sums and name != "openvino":
                continue
            form = "mixed" if one.floats else "int8"
            named = f"{form}-{_named(one)}"
            path = job.folder / f"{named}.onnx"
            _save(one.model, path)
            found.append(Candidate(f"{name}-{named}", form, path, name, made=one))
    if wanted.weights_only:
        from edgekd.quantize.weight_only import write_weight_only

        path = job.folder / f"w{wanted.weights_only}.onnx"
        _save(write_weight_only(job.model, wanted.weights_only), path)
        found += [Candidate(f"{name}-w{wanted.weights_only}", path.stem, path, name) for name, _ in here]
    return found


def _in_files(made: list[Quantized], candidates: list[Candidate]) -> tuple[list[Quantized], list[Candidate]]:
    """Both without graphs and numbers, which lie in files: what measures needs the memory."""
    light = {id(one): replace(one, model=onnx.ModelProto(), work=None, numbers=None) for one in made}
    return list(light.values()), [
        replace(one, made=light[id(one.made)]) if one.made is not None else one for one in candidates
    ]


def _engines(job: Job, wanted: Wanted, ours: list[Candidate], failed: dict[str, str]) -> list[Candidate]:
    """Candidates by the other engines, on the same samples and runtimes; `failed` gets why one has none, of
    several that are compared: the one that was asked for raises."""
    found = []
    for name in engine_names() if wanted.compare_engines else {wanted.engine} - {"edgekd"}:
        try:
            made = run_engine(name, job.model, lambda: job.batches(job.parts.calibration))
        except (BackendError, MissingExtraError, UnsupportedModelError) as error:
            if name == wanted.engine:
                raise
            missing = isinstance(error, MissingExtraError)
            failed[name] = f"{error.message}: {error.hint}" if missing else error.message
            job.reporter.say(f"  engine {name}: {failed[name]}")
            continue
        path = job.folder / f"int8-{name}.onnx"
        _save(made, path)
        runtimes = dict.fromkeys(one.runtime for one in ours)
        found += [
            Candidate(f"{runtime}-int8-by-{name}", "int8", path, runtime, by=name) for runtime in runtimes
        ]
    return found


def _save(model: onnx.ModelProto, path: Path) -> None:
    model.producer_name = "edgekd"
    write_bytes(path, model.SerializeToString(deterministic=True))


def _measure(job: Job, wanted: Wanted, candidates: list[Candidate]) -> list[dict[str, Any]]:
    """Quality on the samples that report, coverage, size and interleaved latency of each candidate."""
    rows: dict[str, dict[str, Any]] = {}
    for number, one in enumerate(candidates):
        job.reporter.step("measure candidates", number, len(candidates) + 1)
        row: dict[str, Any] = {
            "id": one.id,
            "form": one.form,
            "runtime": one.runtime,
            "precision": one.precision,
            "engine": one.by,
            "file": str(one.path),
            "size_mib": one.path.stat().st_size / 2**20,
            "how": one.made.how if one.made else "",
            "float_operators": len(one.made.floats) if one.made else 0,
            "reason": "",
        }
        rows[one.id] = row | dict.fromkeys(_UNKNOWN)
        try:
            got = job.outputs_on(one.path, one.runtime, one.precision, job.parts.report)
            rows[one.id] |= job.quality(got, "report").row()
        except BackendError as error:
            rows[one.id]["reason"] = error.message
            continue
        try:
            rows[one.id] |= _coverage_row(backend(one.runtime).coverage(one.path, precision=one.precision))
        except BackendError as error:
            job.reporter.say(f"  {one.id}: its kernels are not known: {error.message.splitlines()[0]}")
            rows[one.id]["reason"] = _refused_alone(one)
    _time(job, wanted, [one for one in candidates if not rows[one.id]["reason"]], rows)
    job.reporter.step("measure candidates", len(candidates) + 1, len(candidates) + 1)
    return list(rows.values())


def _refused_alone(one: Candidate) -> str:
    """Why the runtime does not load it for one sample; empty where it does. ONNX Runtime 1.31 runs some
    graphs that it cannot write down, and others with any batch but one."""
    try:
        backend(one.runtime).open(one.path, precision=one.precision, batch=1)
    except BackendError as error:
        return error.message
    return ""


def _coverage_row(coverage: Coverage) -> dict[str, Any]:
    kernels: dict[str, int] = {}
    for layer in coverage.layers:
        if layer.macs:
            kernels[f"{layer.op} {layer.precision}"] = kernels.get(f"{layer.op} {layer.precision}", 0) + 1
    return {
        "int8_coverage_nodes": coverage.int8_nodes,
        "int8_coverage_macs": coverage.int8_macs,
        "kernels": kernels,
        "float_layers": [
            {"name": layer.name, "kernel": layer.op, "reason": layer.reason}
            for layer in coverage.layers
            if layer.macs and layer.precision != "int8"
        ],
    }


def _time(job: Job, wanted: Wanted, candidates: list[Candidate], rows: dict[str, dict[str, Any]]) -> None:
    """Latency of one call with one real sample, all candidates interleaved in one fresh process."""
    if not candidates:
        return
    feeds = next(iter(job.samples.batches(job.parts.report, job.model.batch or 1)))
    give_back()  # before a process with all candidates starts
    path = job.folder / "latency" / "inputs.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **feeds)  # type: ignore[arg-type] # numpy's stub takes the names for its own options
    variants = [Variant(c.id, c.runtime, str(c.path.resolve()), c.precision) for c in candidates]
    protocol = Protocol(wanted.threads, _ROUNDS, 3, wanted.seed)
    try:
        found = measure(variants, protocol=protocol, inputs=path.resolve())
    except BackendError as error:
        for one in candidates:
            rows[one.id]["reason"] = f"not timed: {error.message}"
        return
    for name, latency in found.items():
        rows[name] |= {
            "latency_p50_ms": latency.wall_p50_ms,
            "latency_p90_ms": latency.wall_p90_ms,
            "cpu_p50_ms": latency.cpu_p50_ms,
        }


def _parity(job: Job, candidates: list[Candidate]) -> list[dict[str, Any]]:
    """Each int8 file on every executor, over a batch of the samples that decide."""
    feeds = next(iter(job.batches(job.parts.choice)))
    inputs = job.folder / "latency" / "batch.npz"
    inputs.parent.mkdir(parents=True, exist_ok=True)
    np.savez(inputs, **feeds)  # type: ignore[arg-type]
    files = {
        one.path: one.made.dialect if one.made else "" for one in candidates if one.form in ("int8", "mixed")
    }
    rows = []
    for number, (path, dialect) in enumerate(files.items()):
        job.reporter.step("compare executors", number, len(files))
        rows += parity_rows(path, inputs, dialect)
    job.reporter.step("compare executors", len(files), len(files))
    return rows


def _build(job: Job, wanted: Wanted, candidates: list[Candidate]) -> dict[str, Any] | None:
    """Of a TensorRT target: whether its int8 graph parses and compiles ahead of time; nothing is executed."""
    ours = [one for one in candidates if one.made is not None and one.made.dialect == "trt-s8sym"]
    if "tensorrt" not in wanted.target.runtime or not ours:
        return None
    from edgekd.backends.tensorrt import prove_build

    feeds = next(iter(job.samples.batches(job.parts.report, job.model.batch or 1)))
    shapes = {name: value.shape for name, value in feeds.items()}
    try:
        return asdict(prove_build(ours[-1].path, wanted.target.compute_capability, shapes))
    except (MissingExtraError, BackendError) as error:
        return {"ok": None, "message": error.message}
