"""A record as a complete run writes it, with made-up but plausible numbers."""

from __future__ import annotations

import random
from typing import Any

CPU = "Intel(R) Xeon(R) Platinum 8481C"
NO_GPU = "TensorRT needs an NVIDIA GPU; the graph was parsed and compiled here, not run"


def _candidates(rng: random.Random) -> list[dict[str, Any]]:
    found = []
    for index in range(240):
        width, depth = rng.uniform(0.25, 1.6), rng.randint(1, 5)
        macs = int(1.1e6 * width**2 * depth * rng.uniform(0.7, 1.5) + 2e5)
        parameters = int(9000 * width**2 * depth * rng.uniform(0.6, 1.8) + 3000)
        latency = 0.012 + macs / 6.5e7 * rng.uniform(0.8, 1.35)
        score = -0.28 + 0.07 * (macs / 1e6) ** 0.4 + rng.gauss(0, 0.018)
        found.append(
            {
                "genome": [rng.randint(0, 3) for _ in range(9)],
                "score": round(score, 5),
                "terms": {"relation": round(score * 0.8, 5), "semantic": round(score * 0.2, 5)},
                "parameters": parameters,
                "macs": macs,
                "latency_ms": round(latency, 4),
                "size_mib": round(parameters * 1.1 / 2**20, 4),
                "feasible": latency < 0.14,
                "generation": index // 40,
            }
        )
    return found


def _layers(slow: float, fallbacks: tuple[int, ...], timed: bool = True) -> list[dict[str, Any]]:
    rng, found = random.Random(5), []
    for index in range(26):
        ops = ("Conv", "DepthwiseConv", "Add") if index < 24 else ("GlobalAveragePool", "Gemm")
        op = ops[index % len(ops)]
        macs = {"Conv": 90_000, "DepthwiseConv": 21_000, "Add": 0, "Gemm": 640}.get(op, 0)
        fell = index in fallbacks
        milliseconds = slow * (0.0006 + macs / 3.2e7) * rng.uniform(0.8, 1.3) * (3.4 if fell else 1)
        found.append(
            {
                "name": f"/blocks.{index // 3}/{op.lower()}/{op}" if index < 24 else f"/head/{op}",
                "op": op,
                "precision": "f32" if fell else "int8",
                "macs": macs,
                "ms": round(milliseconds, 6) if timed else None,
                "reason": "no int8 kernel for a depthwise 5x5 with stride 2" if fell else "",
            }
        )
    return found


def _fidelity(accuracy: float) -> dict[str, Any]:
    """Of a student whose teacher is right on 92.83 % of the images."""
    won = 0.021
    return {
        "top1_agreement": 0.951,
        "kl_divergence": 0.0613,
        "total_variation": 0.0702,
        "cohen_kappa": 0.9456,
        "error_consistency": 0.688,
        "confidence_correlation": 0.871,
        "negative_flips": round(0.9283 - accuracy + won, 4),
        "positive_flips": won,
        "negative_log_likelihood": 0.241,
        "brier_score": 0.121,
        "expected_calibration_error": 0.0124,
    }


def _variant(backend: str, precision: str, accuracy: float, p50: float | None, size: float) -> dict[str, Any]:
    int8 = precision == "int8"
    return {
        "id": f"{backend}-{precision}",
        "backend": backend,
        "precision": precision,
        "file": f"5-export/{backend}-{precision}.onnx",
        "accuracy": accuracy,
        "top1_agreement": 0.9953 if int8 else 1.0,
        "max_abs_diff": 0.104 if int8 else 2.1e-6,
        "int8_coverage_nodes": 1.0 if int8 else 0.0,
        "int8_coverage_macs": 1.0 if int8 else 0.0,
        "latency_p50_ms": p50,
        "latency_p90_ms": None if p50 is None else round(p50 * 1.17, 4),
        "latency_kind": "unknown" if p50 is None else "measured",
        "latency_device": "" if p50 is None else CPU,
        "size_mib": size,
        "cpu_p50_ms": p50,
        "load_ms": 31.0,
        "first_call_ms": 1.2,
        "version": {"openvino": "2026.4.1", "onnxruntime": "1.31.1"}.get(backend, "1.7.1"),
        "fidelity": _fidelity(accuracy),
        "reason": NO_GPU if p50 is None else "",
    }


def _variants() -> list[dict[str, Any]]:
    return [
        _variant("onnxruntime", "int8", 0.9187, 0.151, 0.058),
        _variant("onnxruntime", "fp32", 0.9203, 0.262, 0.171),
        _variant("openvino", "int8", 0.919, 0.0942, 0.0584),
        _variant("openvino", "bf16", 0.92, 0.118, 0.168),
        _variant("openvino", "fp32", 0.9203, 0.171, 0.171),
    ]


def _backends(variants: list[dict[str, Any]]) -> dict[str, Any]:
    protocol = {"threads": 1, "calls": 200, "clock": "wall", "batch": 1}
    ort = {**variants[0], "int8_coverage_nodes": 0.923, "int8_coverage_macs": 0.951}
    return {
        "onnxruntime": {**ort, "layers": _layers(1.6, (7, 16)), "protocol": protocol},
        "openvino": {**variants[2], "layers": _layers(1.0, ()), "protocol": protocol},
        "tensorrt": {
            "id": "tensorrt-int8",
            "backend": "tensorrt",
            "precision": "int8",
            "accuracy": None,
            "latency_p50_ms": None,
            "latency_kind": "unknown",
            "reason": NO_GPU,
            "version": "1.7.1",
            "layers": [],
        },
    }


def _history(
    epochs: int, loss: float, accuracy: float, rate: float, gain: float = 0.19
) -> list[dict[str, Any]]:
    rng, found = random.Random(epochs), []
    for epoch in range(1, epochs + 1):
        done = epoch / epochs
        found.append(
            {
                "epoch": epoch,
                "loss": round(loss * (0.22 + 0.78 * (1 - done) ** 2.2) + rng.gauss(0, 0.006), 4),
                "selection_accuracy": round(accuracy - gain * (1 - done) ** 3 + rng.gauss(0, 0.003), 4),
                "learning_rate": rate * (1 - done) + 1e-6,
                "seconds": 4.1,
            }
        )
    return found


def _gate() -> dict[str, Any]:
    def check(
        name: str, measured: float | None, unit: str, limit: float | None, **more: Any
    ) -> dict[str, Any]:
        return {"name": name, "measured": measured, "unit": unit, "limit": limit, "interval": None,
                "verdict": "PASS", "note": "", **more}  # fmt: skip

    paired = "3000 images, 95% interval (paired, Newcombe)"
    return {
        "checks": [
            check("accuracy drop, teacher to openvino-int8", 0.93, "points", 2.0,
                  interval=[0.21, 1.65], note=paired),
            check("accuracy drop, float student to openvino-int8", 0.13, "points", 1.0,
                  interval=[-0.18, 0.44], note=paired),
            check("agreement with torch, openvino-int8", 0.9953, "share", 0.97, interval=[0.9922, 0.9972]),
            check("int8 coverage, openvino-int8", 1.0, "share", 0.95),
            check("size of openvino-int8", 0.0584, "MiB", None, note="no limit set"),
            check("latency, openvino-int8 over the float student", 0.551, "ratio", 1.05,
                  interval=[0.538, 0.566]),
            check("p90 latency on the target", None, "ms", 5.0, verdict="NOT_MEASURED", note=NO_GPU),
        ],
        "latency": {
            "backend": "openvino", "clock": "cpu", "level": 0.9975, "restarts": 3,
            "candidate": {"ratio": 0.551, "lo": 0.538, "hi": 0.566, "dropped": 2},
            "control": {"ratio": 1.001, "lo": 0.988, "hi": 1.017, "dropped": 1},
            "reference": "openvino-fp32", "shipped": "openvino-int8",
        },
        "shipped": "openvino-int8",
        "reason": "the fastest within 1 points of the float student is openvino-int8 0.1 ms of CPU time",
    }  # fmt: skip


def _search(rng: random.Random) -> dict[str, Any]:
    candidates = _candidates(rng)
    allowed = [i for i, c in enumerate(candidates) if c["feasible"]]
    return {
        "score": "diswot",
        "evaluated": 240,
        "dropped": 3,
        "seconds": 21.4,
        "cost_model": {
            "kind": "layer-table",
            "device": CPU,
            "error_percent": 9.0,
            "note": "fitted on 8 networks",
        },
        "budget": {"max_latency_ms": 0.14, "max_size_mib": 0.25, "max_macs": None},
        "candidates": candidates,
        "chosen": max(allowed, key=lambda i: candidates[i]["score"]),
        "by_macs": max(allowed, key=lambda i: candidates[i]["macs"]),
        "by_parameters": max(allowed, key=lambda i: candidates[i]["parameters"]),
        "finalists": {
            "device": CPU,
            "clock": "cpu",
            "precision": "int8",
            "limit_ms": 0.14,
            "rows": [
                {
                    "row": allowed[0],
                    "predicted_ms": candidates[allowed[0]]["latency_ms"],
                    "measured_ms": 0.123456,
                    "within": True,
                }
            ],
            "chosen_by_prediction": allowed[0],
        },
        "refine": {
            "epochs": 4,
            "images": 5700,
            "held_out": 5700,
            "compared_by": "labels",
            "trained": [
                {"row": allowed[1], "why": "best and most diverse", "accuracy": 0.8567, "predicted": None},
                {"row": allowed[0], "why": "largest that fits", "accuracy": 0.8456, "predicted": 0.8345},
            ],
            "ridge": {"strength": 3.0, "left_out_tau": 0.61, "fitted_on": 16, "features": ["macs"]},
            "finalists": [{"row": allowed[0], "selection_accuracy": 0.9123}],
            "control": allowed[0],
            "chosen": allowed[0],
        },
        "latency_measured_ms": 0.171,
        "latency_measured_on": CPU,
    }


def teacher_record() -> dict[str, Any]:
    """A run that stopped after its first stage."""
    return {
        "edgekd_version": "0.1.0",
        "created": "2026-11-22T02:50:00+00:00",
        "recipe": {"target": "jetson-orin-nano-8gb", "seed": 0, "distill": {"method": "dist", "epochs": 24}},
        "demo": True,
        "target": {
            "id": "jetson-orin-nano-8gb",
            "description": "NVIDIA Jetson Orin Nano 8 GB",
            "class": "nvidia-jetson",
            "runtime": "tensorrt",
            "dialect": "trt-s8sym",
            "unverified": ["compute[0].peak.int8_tops", "compute[0].bandwidth"],
        },
        "environment": {
            "cpu": CPU,
            "isa": ["avx2", "avx512_vnni", "amx_int8"],
            "cores": 2,
            "load_average": [0.5, 0.42, 0.31],
            "python": "3.11.7",
            "platform": "Linux-6.1-x86_64",
            "packages": {"torch": "2.13.0", "openvino": "2026.4.1", "onnxruntime": "1.31.1"},
        },
        "stages": {"teacher": {"seconds": 3.1, "inputs_sha256": "5f" * 32, "resumed": False}},
        "metrics": {
            "data": {
                "source": "hand-written signs, shipped with edgekd",
                "classes": [f"sign {index}" for index in range(10)],
                "train": 11400,
                "selection": 600,
                "validation": 3000,
                "shape": [28, 28, 1],
                "sha256": "a1" * 32,
                "skipped": [],
            },
            "teacher": {
                "name": "demo",
                "accuracy": 0.9283,
                "parameters": 696042,
                "macs": 80_000_000,
                "size_mib": 2.66,
                "size_kind": "float32 weights",
                "sha256": "c3" * 32,
                "runtime": "openvino bf16",
                "logits_max_abs_diff": 0.011,
            },
        },
    }


def full_record() -> dict[str, Any]:
    """A complete run: 240 candidates, 24 epochs, three runtimes, no latency from TensorRT."""
    record, variants = teacher_record(), _variants()
    seconds = {"search": 21.4, "distill": 98.6, "quantize": 31.0, "export": 4.2, "profile": 12.9, "gate": 9.1}
    for stage, spent in {**seconds, "bundle": 0.8}.items():
        record["stages"][stage] = {"seconds": spent, "inputs_sha256": "77" * 32, "resumed": stage == "search"}
    record["metrics"] |= {
        "search": _search(random.Random(7)),
        "student_float": {
            "accuracy": 0.9203,
            "parameters": 44_120,
            "macs": 1_440_000,
            "size_mib": 0.171,
            "top1_agreement": 0.953,
            "fidelity": _fidelity(0.9203),
            "genome": [1, 2, 0, 3],
            "architecture": ["stem 3x3 16", "ds 3x3 24 s2", "ds 5x5 32 ×2", "ds 3x3 64 s2", "head 10"],
        },
        "distill": {
            "method": "dist",
            "probe": {
                "chosen": "f32 channels-last, 1 thread",
                "images_per_second": {"f32": 900.0, "bf16": 1100.0},
            },
            "history": _history(24, 1.31, 0.921, 3e-3),
        },
        "quantize": {
            "mode": "auto",
            "chosen": "qat",
            "reason": "PTQ lost 1.1 points on the selection images, more than the 0.5 allowed",
            "dialect": "trt-s8sym",
            "calibrator": "mse",
            "float_layers": ["body.1.weight"],
            "sensitivity": {"stem.weight": 0.004, "body.1.weight": 0.09, "head.weight": -0.001},
            "accuracy": 0.919,
            "fidelity": _fidelity(0.919),
            "ptq_selection_accuracy": 0.91,
            "qat_selection_accuracy": 0.92,
            "history": _history(4, 0.42, 0.921, 3e-4, 0.012),
        },
        "variants": variants,
        "backends": _backends(variants),
        "speedup_over_teacher": {
            "ratio": 17.4,
            "interval": [16.9, 17.8],
            "backend": "openvino",
            "variant": "openvino-int8",
            "device": CPU,
            "clock": "cpu",
        },
    }
    record |= {"gate": _gate(), "verdict": "PASS", "bundle": "runs/demo/6-bundle"}
    return record
