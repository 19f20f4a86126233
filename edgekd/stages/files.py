"""The profile of plain ONNX files, and what this machine has: for use without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgekd.backends import backend, backend_names
from edgekd.backends.feeds import read_feeds
from edgekd.errors import EdgekdError, MissingExtraError
from edgekd.profiler import Protocol, Variant, environment, measure
from edgekd.target import all_targets, is_this_machine

_ROUNDS = 40


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
    for key, latency in measure(variants, protocol=protocol, inputs=read_feeds(models[0])).items():
        found[key] |= {
            "latency_p50_ms": latency.wall_p50_ms,
            "latency_p90_ms": latency.wall_p90_ms,
            "cpu_p50_ms": latency.cpu_p50_ms,
            "load_ms": latency.load_ms,
            "first_call_ms": latency.first_call_ms,
        }
    return found | {"environment": environment()}


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
