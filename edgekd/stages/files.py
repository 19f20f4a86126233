"""Profile and gate for plain ONNX files, and what this machine has: for use without a run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.backends import backend, backend_names
from edgekd.errors import BackendError, EdgekdError, MissingExtraError
from edgekd.gate import LatencyLimits, LatencySession, run_latency_gate
from edgekd.profiler import Protocol, Variant, environment, measure, run_session
from edgekd.target import all_targets, is_this_machine

_ROUNDS = 40


def input_shape(model: Path) -> tuple[int, int, int]:
    """(C, H, W) of a file's image input.

    Raises:
        BackendError: there is no single input of four dimensions with known sizes.
    """
    from edgekd.backends.macs import load_graph

    graph = load_graph(model).graph
    constants = {tensor.name for tensor in graph.initializer}
    shapes = [
        [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in graph.input
        if value.name not in constants
    ]
    if len(shapes) != 1 or len(shapes[0]) != 4 or not all(shapes[0][1:]):
        raise BackendError(f"{model}: expected one input (N, C, H, W) with fixed C, H, W, got {shapes}")
    _, channels, height, width = shapes[0]
    return channels, height, width


def profile_files(
    models: tuple[Path, ...], backends: tuple[str, ...], precision: str, threads: int, calls: int
) -> dict[str, Any]:
    """Latency and coverage of each file on each runtime, measured interleaved; all share one input shape."""
    alike = len({model.name for model in models}) < len(models)
    shown = {model: str(model) if alike else model.name for model in models}
    names = {f"{name}:{shown[model]}": (name, model) for name in backends for model in models}
    found: dict[str, Any] = {}
    variants = []
    for key, (name, model) in names.items():
        used = precision if name == "openvino" else "f32"
        coverage = backend(name).coverage(model, precision=used)
        found[key] = {"int8_coverage_nodes": coverage.int8_nodes, "int8_coverage_macs": coverage.int8_macs}
        variants.append(Variant(key, name, str(model.resolve()), used))
    protocol = Protocol(threads, _ROUNDS, -(-calls // _ROUNDS))
    for key, latency in measure(variants, protocol=protocol, input_shape=input_shape(models[0])).items():
        found[key] |= {
            "latency_p50_ms": latency.wall_p50_ms,
            "latency_p90_ms": latency.wall_p90_ms,
            "cpu_p50_ms": latency.cpu_p50_ms,
            "load_ms": latency.load_ms,
            "first_call_ms": latency.first_call_ms,
        }
    return found | {"environment": environment()}


def gate_files(
    candidate: Path, reference: Path, limits: LatencyLimits, *, runtime: str, threads: int
) -> dict[str, Any]:
    """Latency verdict of two ONNX files on one runtime (docs/gate.md).

    Raises:
        UsageError: no such runtime.
        BackendError: a file is not an ONNX model of one image input, or the runtime refuses it.
    """
    backend(runtime)
    paths = {"ref": reference, "aa": reference, "cand": candidate}
    variants = [Variant(name, runtime, str(path.resolve())) for name, path in paths.items()]
    shape = input_shape(reference)

    def session(number: int) -> LatencySession:
        done = run_session(
            variants, rounds=_ROUNDS, calls_per_round=3, threads=threads, seed=number, input_shape=shape
        )
        return LatencySession(*(np.median(np.asarray(done.variants[v].cpu_ms), axis=1) for v in paths))

    return asdict(run_latency_gate(session, limits)) | {
        "clock": "cpu",
        "backend": runtime,
        "limit": limits.max_ratio,
    }


def examine() -> dict[str, Any]:
    """Runtimes with version, device and precisions, or why one is missing; targets that are this machine."""
    found: dict[str, Any] = {}
    for name in backend_names():
        try:
            engine = backend(name)
            found[name] = {
                "version": engine.version(),
                "device": engine.device(),
                "precisions": list(engine.precisions()),
            }
        except MissingExtraError as error:
            found[name] = {"version": None, "reason": error.message, "install": error.hint}
        except EdgekdError as error:
            found[name] = {"version": None, "reason": error.message}
    here = [card.id for card in all_targets().values() if is_this_machine(card)]
    return {
        "runtimes": found,
        "this_machine_is": here or ["none of the shipped cards"],
        "environment": environment(),
    }
