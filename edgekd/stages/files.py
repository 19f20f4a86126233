"""The profile of plain ONNX files, and what this machine has: for use without a run."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from edgekd.backends import backend, backend_names
from edgekd.backends.feeds import read_feeds
from edgekd.errors import EdgekdError, MissingExtraError
from edgekd.profiler import HERE, Device, Protocol, Variant, environment, measure
from edgekd.target import all_targets, is_this_machine


def profile_files(
    models: tuple[Path, ...], backends: tuple[str, ...], precision: str, protocol: Protocol
) -> dict[str, Any]:
    """Latency and coverage of each file on each runtime, measured interleaved; all share one input shape."""
    variants = _variants(models, backends, precision)
    found = _measured(variants, protocol, models[0], HERE)
    for one in variants:
        coverage = backend(one.backend).coverage(Path(one.model), precision=one.precision)
        shares = {"int8_coverage_nodes": coverage.int8_nodes, "int8_coverage_macs": coverage.int8_macs}
        found[one.id] = shares | found[one.id]
    return found


def profile_on(
    devices: Sequence[Device], models: tuple[Path, ...], variants_of: tuple[tuple[str, ...], str],
    protocol: Protocol,
) -> dict[str, Any]:  # fmt: skip
    """The latency of each file on each runtime of each device, all devices at once; by the device's name.

    Args:
        variants_of: backends, and the precision of operators that are not quantized.

    Raises:
        EdgekdError: that of the first device, when none gave an answer. Else its error stands in its place.
    """
    variants = _variants(models, *variants_of)
    errors: list[EdgekdError] = []

    def one(device: Device) -> dict[str, Any]:
        try:
            return _measured(variants, protocol, models[0], device)
        except EdgekdError as error:
            errors.append(error)
            return {"error": error.message, "hint": error.hint}

    with ThreadPoolExecutor(len(devices)) as pool:
        found = dict(zip((device.name for device in devices), pool.map(one, devices), strict=True))
    if len(errors) == len(devices):
        raise errors[0]
    return found


def _variants(models: tuple[Path, ...], backends: tuple[str, ...], precision: str) -> list[Variant]:
    alike = len({model.name for model in models}) < len(models)
    return [
        Variant(
            f"{name}:{model if alike else model.name}",
            name,
            str(model.resolve()),
            precision if name == "openvino" else "f32",
        )
        for name in backends
        for model in models
    ]


def _measured(variants: list[Variant], protocol: Protocol, model: Path, device: Device) -> dict[str, Any]:
    found: dict[str, Any] = {}
    told: dict[str, Any] = {}
    for key, latency in measure(variants, protocol=protocol, inputs=read_feeds(model), device=device).items():
        told = latency.environment
        found[key] = {
            "latency_p50_ms": latency.wall_p50_ms,
            "latency_p90_ms": latency.wall_p90_ms,
            "latency_p99_ms": latency.wall_p99_ms,
            "cpu_p50_ms": latency.cpu_p50_ms,
            "load_ms": latency.load_ms,
            "first_call_ms": latency.first_call_ms,
            "memory_mib": latency.memory_mib,
            "energy_mj": latency.energy_mj,
        }
        if latency.device_p50_ms is not None:  # a GPU that times itself
            found[key] |= {
                name: getattr(latency, name) for name in ("device_p50_ms", "device_p90_ms", "layers_ms")
            }
    return found | {"environment": told}


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
