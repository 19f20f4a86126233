"""A table of layer times measured on a device, and how well it predicts whole networks there."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgekd.backends.feeds import image_feed
from edgekd.blocks import deployed
from edgekd.cost import calibrated_path, layer_key, one_layer
from edgekd.errors import DeviceError, UsageError
from edgekd.export import save, to_onnx
from edgekd.files import write_json
from edgekd.profiler import HERE, Device, Protocol, Variant, run_session, time_layers
from edgekd.ranking import kendall_tau
from edgekd.remote import pooled
from edgekd.spaces import Genome, SearchSpace, search_space
from edgekd.spec import LayerShape, ModelSpec
from edgekd.target import Target, is_this_machine

_CHUNK = 48  # layers of one order
_FITTED = 0.4  # of the networks: the line is fitted on them, the error is that of the others
_RUNTIMES = ("onnxruntime", "openvino", "tensorrt")


@dataclass(frozen=True)
class Wanted:
    """What is measured: `candidates` random students of a space, and of them `networks` as a whole."""

    space: str
    spec: ModelSpec
    precision: str
    candidates: int = 60
    networks: int = 12
    seed: int = 0


def calibrate(
    target: Target, devices: Sequence[Device], wanted: Wanted, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure, write the table where the search finds it, and return it with the ``path``.

    Several devices of one kind share the layers.

    Raises:
        UsageError: the target's runtime cannot be measured, or this machine is not the target.
        DeviceError: a device is not the target, or none is left.
    """
    runtime = target.primary.runtime
    if runtime not in _RUNTIMES:
        raise UsageError(f"target '{target.id}' runs on {runtime}, which edgekd does not time")
    if HERE in devices and not is_this_machine(target):
        raise UsageError(f"this machine is not a {target.description}", "measure there: --on ssh://user@host")
    restrictions = target.space
    space = search_space(
        wanted.space, wanted.spec, int(float(restrictions.channel_multiple.value)),
        tuple(restrictions.kernels), tuple(restrictions.forbidden_ops),
    )  # fmt: skip
    draw = random.Random(wanted.seed)
    genomes = [tuple(draw.randrange(n) for n in space.choices) for _ in range(wanted.candidates)]
    layers = {layer_key(layer): layer for genome in genomes for layer in space.layers(genome)}
    clock = "cpu" if target.measure.clock == "cpu" else "wall"
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        entries, machine = _layer_times(target, devices, layers, wanted.precision, clock, Path(folder), say)
        header = {
            "format": 2, "target": target.id, "precision": wanted.precision, "threads": 1, "clock": clock,
            "runtime": f"{runtime} {machine['versions'][runtime]}", "device": machine["devices"][runtime],
            "space": wanted.space, "input": list(wanted.spec.input_shape),
        }  # fmt: skip
        (scale, offset), validation = (1.0, 0.0), _not_validated(wanted)
        if not validation["reason"]:
            say(f"{wanted.networks} whole networks")
            networks = _networks(space, genomes[: wanted.networks], wanted.spec, runtime, Path(folder))
            sums = [entries["empty"] + sum(entries[layer_key(layer)] for layer in space.layers(genome))
                    for genome in genomes[: wanted.networks]]  # fmt: skip
            (scale, offset), validation = _validated(networks, sums, wanted.spec, clock, devices[0])
    path = calibrated_path(target.id, wanted.precision)
    table = {
        "header": header,
        "scale": scale,
        "offset_ms": offset,
        "validation": validation,
        "entries_ms": entries,
        "environment": machine,
    }
    write_json(path, table)
    return table | {"path": str(path)}


def _layer_times(
    target: Target, devices: Sequence[Device], layers: dict[str, LayerShape], precision: str, clock: str,
    folder: Path, say: Callable[[str], None],
) -> tuple[dict[str, float], dict[str, Any]]:  # fmt: skip
    """Milliseconds of each layer beyond an empty call, and the machine."""
    int8, runtime = precision == "int8", target.primary.runtime
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for index, layer in enumerate(layers.values()):
        (folder / f"l{index}.onnx").write_bytes(one_layer(layer, int8))
        shape = (1, layer.channels_in, layer.size_in, layer.size_in)
        shapes[f"l{index}"] = ("uint8" if int8 else "float32", shape)
    (folder / "empty.onnx").write_bytes(one_layer(None, int8))
    shapes["empty"] = ("float32", (1, 1, 1, 1))
    names = [f"l{index}" for index in range(len(layers))]
    chunks = [["empty", *names[start : start + _CHUNK]] for start in range(0, len(names), _CHUNK)]
    done = 0

    def work(device: Device, chunk: list[str]) -> dict[str, Any]:
        nonlocal done
        variants = [Variant(name, runtime, str(folder / f"{name}.onnx")) for name in chunk]
        found = time_layers(variants, {n: shapes[n] for n in chunk}, protocol=Protocol(), device=device)
        _is_the_target(target, device, found["environment"])
        done += len(chunk) - 1
        say(f"{done} of {len(layers)} layers")
        return found

    parts = pooled(devices, chunks, work)
    empty = float(np.median([part["times"]["empty"][clock] for part in parts]))
    times = {name: part["times"][name][clock] for part in parts for name in part["times"]}
    entries = {key: max(1e-4, times[n] - empty) for n, key in zip(names, layers, strict=True) if n in times}
    return entries | {"empty": empty}, parts[0]["environment"]


def _is_the_target(target: Target, device: Device, machine: dict[str, Any]) -> None:
    wanted, told = target.detect.devicetree_model, machine.get("device_tree") or "nothing"
    if device is not HERE and wanted and wanted not in told:
        raise DeviceError(
            f"{device.name} calls itself '{told}', the card is about '{wanted}'", "name the device's own card"
        )


def _not_validated(wanted: Wanted) -> dict[str, Any]:
    reason = ""
    if wanted.precision == "int8":
        reason = "whole int8 networks need training data: the error of this table is not known"
    elif wanted.networks < 5:
        reason = "fewer than 5 networks: the error of this table is not known"
    return {"networks": 0, "kendall_tau": None, "median_error_percent": None, "reason": reason}


def _networks(
    space: SearchSpace, genomes: Sequence[Genome], spec: ModelSpec, runtime: str, folder: Path
) -> list[Variant]:
    """The students of some genomes, with fresh weights, as they are deployed."""
    variants = []
    for index, genome in enumerate(genomes):
        network = deployed(space.build(genome, torch.Generator().manual_seed(index)).eval())
        save(to_onnx(network, spec), folder / f"n{index}.onnx")
        variants.append(Variant(f"n{index}", runtime, str(folder / f"n{index}.onnx")))
    return variants


def fit(sums: NDArray[np.float64], measured: NDArray[np.float64]) -> tuple[float, float]:
    """Slope and offset (ms) from sums of layers to whole networks, least squares of relative errors.

    A layer alone pays for layouts that a network changes once, and a network for what no layer has. Where the
    slope or the offset would be negative, it is a factor alone.
    """
    slope, offset = np.polyfit(sums, measured, 1, w=1 / measured)
    if slope > 0 and offset >= 0:
        return float(slope), float(offset)
    return float(np.median(measured / sums)), 0.0


def _validated(
    networks: Sequence[Variant], sums: Sequence[float], spec: ModelSpec, clock: str, device: Device
) -> tuple[tuple[float, float], dict[str, Any]]:
    """The line, and how the table orders and predicts networks that it was not fitted on."""
    protocol = Protocol(rounds=20, calls=3)
    done = run_session(networks, protocol=protocol, inputs=image_feed(spec.input_shape), device=device)
    times = [done.variants[one.id] for one in networks]
    measured = np.array([np.median(one.cpu_ms if clock == "cpu" else one.wall_ms) for one in times])
    fitted = max(2, round(_FITTED * len(networks)))
    line = fit(np.array(sums)[:fitted], measured[:fitted])
    predicted = line[0] * np.array(sums) + line[1]
    errors = np.abs(predicted / measured - 1)[fitted:]
    return line, {
        "networks": len(networks),
        "fitted_on": fitted,
        "kendall_tau": kendall_tau(predicted, measured),
        "median_error_percent": 100 * float(np.median(errors)),
        "measured_ms": measured.tolist(),
        "predicted_ms": predicted.tolist(),
        "reason": "",
    }
