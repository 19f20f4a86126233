"""Stage 5: float ONNX, and one QDQ file for each form that a runtime of this run or target needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgekd import export
from edgekd.backends.onnxruntime import OnnxRuntimeBackend
from edgekd.errors import ParityError
from edgekd.quantize.lower import FORMS, lower
from edgekd.stages.bench import Bench
from edgekd.stages.quantize import FILE, load_quantized, rebuild
from edgekd.stages.search import quantize_mode
from edgekd.stages.variants import planned_variants
from edgekd.tasks.classification import top1_agreement
from edgekd.train import evaluate

FOLDER = "5-export"
# A value that two executors round to neighbouring codes moves logits by far less; a wrong scale by far more.
_MAX_MEAN_SHARE = 0.01


def run(bench: Bench) -> dict[str, Any]:
    """Metric `export`; leaves ``5-export/`` with ONNX files and the reference logits of the torch models."""
    folder = bench.run.folder / FOLDER
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    float_model = export.to_onnx(bench.captured, bench.spec)
    export.save(float_model, folder / "float.onnx")
    inputs = bench.validation_inputs
    logits: dict[str, Any] = {"float": evaluate(bench.captured, inputs).numpy()}
    report = {"float.onnx": _check(folder / "float.onnx", inputs.numpy(), logits["float"], 1e-3, 0.999)}
    if quantize_mode(bench) != "none":
        parameters, sites, scheme = load_quantized(bench.run.folder / FILE)
        logits["int8"] = evaluate(rebuild(bench), inputs).numpy()
        planned = {variant.file for variant in planned_variants(bench.run.target, True, False)}
        for form in FORMS:
            name = f"{form}.onnx"
            if name not in planned:
                continue
            lowered = lower(
                float_model, parameters, sites, form, split_relu=scheme.symmetric and form == "uint8"
            )
            export.describe(lowered, bench.spec)
            export.save(lowered, folder / name)
            report[name] = _check(folder / name, inputs.numpy(), logits["int8"], None, 0.995) | _counts(
                lowered
            )
    np.savez(folder / "reference.npz", **logits)
    said = ", ".join(f"{k} agrees on {100 * v['top1_agreement']:.2f} %" for k, v in report.items())
    bench.run.reporter.say(f"  against torch, ONNX Runtime without optimisation: {said}")
    return {"export": report}


def _check(
    path: Path, inputs: np.ndarray, exact: np.ndarray, max_abs: float | None, agreement: float
) -> dict[str, Any]:
    """The file, run without graph optimisation, against the torch model it came from.

    One sample may always differ: on a small validation set it is more than the allowed share.

    Raises:
        ParityError: it computes something else.
    """
    session = OnnxRuntimeBackend().open(path, optimize=False)
    got = np.concatenate([session.run(part) for part in np.array_split(inputs, max(1, len(inputs) // 256))])
    difference = float(np.abs(got - exact).max())
    average = float(np.abs(got - exact).mean() / max(float(np.ptp(exact)), 1e-9))
    agreed = top1_agreement(got, exact)
    if (
        agreed < min(agreement, 1 - 1 / len(exact))
        or average > _MAX_MEAN_SHARE
        or (max_abs is not None and difference > max_abs * max(1.0, float(np.abs(exact).max())))
    ):
        raise ParityError(
            f"{path.name} does not compute what the torch model computes: top-1 agreement {agreed:.4f} "
            f"(at least {agreement}), largest difference {difference:.3g}, mean difference "
            f"{100 * average:.2f} % of the logits' range (at most {100 * _MAX_MEAN_SHARE:g} %)",
            "please report this with the run's folder",
        )
    return {"top1_agreement": agreed, "max_abs_diff": difference, "size_mib": path.stat().st_size / 2**20}


def _counts(model: onnx.ModelProto) -> dict[str, int]:
    kinds = [node.op_type for node in model.graph.node]
    return {
        "quantize_nodes": kinds.count("QuantizeLinear"),
        "dequantize_nodes": kinds.count("DequantizeLinear"),
    }
