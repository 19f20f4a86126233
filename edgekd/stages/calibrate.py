"""A table of layer times measured on a device, and how well it predicts whole networks there."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from edgekd import __version__
from edgekd.calibrated import StoredTable, Subject, store_table, table_path
from edgekd.cost import Line, layer_key
from edgekd.errors import DeviceError, UsageError
from edgekd.files import append_line, sha256_json
from edgekd.layer_files import codes_of, input_of, one_layer
from edgekd.profiler import HERE, Device, Protocol, Variant, time_layers
from edgekd.ranking import Values, kendall_tau
from edgekd.remote import pooled
from edgekd.spaces import Genome, SearchSpace, search_space
from edgekd.spec import LayerShape, ModelSpec
from edgekd.stages.untrained import form_for, write_network
from edgekd.target import Target, is_this_machine

_CHUNK = 400  # models of one order: what is measured together is disturbed alike
_CHUNK_TENSORRT = 48  # whose engines take a second each to build
_FITTED = 10  # networks: the line is fitted on them, the error is that of the others
_LEAST = 14  # networks: with fewer nothing is fitted
_RUNTIMES = ("onnxruntime", "openvino", "tensorrt")


@dataclass(frozen=True)
class Wanted:
    """What is measured: the layers of `candidates` students of a space, and `networks` of them whole. So many
    students show nearly all layers of a space (400 of `mobile-cnn`): a search finds those whose layers are
    missing and underestimated. With the table that another device `lent`, networks alone are measured, and
    the line leads from its layers to them."""

    space: str
    spec: ModelSpec
    precision: str
    candidates: int = 2000
    networks: int = 18
    seed: int = 0
    lent: StoredTable | None = None

    @property
    def subject(self) -> Subject:
        return Subject(self.space, self.spec.input_shape, len(self.spec.classes))


def calibrate(
    target: Target,
    devices: Sequence[Device],
    wanted: Wanted,
    say: Callable[[str], None],
    kept: Path | None = None,
) -> dict[str, Any]:
    """Measure, write the table where the search finds it, and return it with the ``path``.

    Several devices of one kind share the layers. When the last one is lost, the next call goes on with the
    parts that were measured.

    Args:
        kept: a folder for the networks' files, for another runtime that takes the same.

    Raises:
        UsageError: the target's runtime cannot be measured, or this machine is not the target.
        DeviceError: a device is not the target, or none is left, or they differ.
    """
    _refuse(target, devices, wanted)
    space = space_of(target, wanted)
    genomes = drawn(space.choices, wanted.candidates, wanted.seed)
    whole = _whole(space, genomes, wanted)
    every = (layer for genome in genomes if wanted.lent is None for layer in space.layers(genome))
    layers = {layer_key(layer): layer for layer in every if layer.op != "add"}
    clock = "cpu" if target.measure.clock == "cpu" else "wall"
    with tempfile.TemporaryDirectory(prefix="edgekd-") as name:
        folder = Path(name)
        models = _layer_models(target, layers, wanted.precision, folder)
        for number, genome in enumerate(whole):
            say(f"{number + 1} of {len(whole)} networks written")
            form = form_for(target) if wanted.precision == "int8" else wanted.precision
            file = (kept or folder) / f"{wanted.space}-{form}-{number}.onnx"
            if not file.exists():
                network = space.build(genome, torch.Generator().manual_seed(number))
                write_network(network, target, wanted.spec, wanted.precision, file)
            shutil.copyfile(file, folder / f"n{number}.onnx")
            models[f"n{number}"] = ("float32", (1, *wanted.spec.input_shape))
        times, machine = _measured(target, devices, models, folder, _Parts(target, wanted, say))
    entries = _entries(layers, times, clock) if wanted.lent is None else wanted.lent.entries_ms
    line, validation = _line(entries, times, list(map(space.layers, whole)), f"{clock}_turns")
    table = {
        "header": _header(target, wanted, machine, clock),
        "line": asdict(line),
        "validation": validation,
        "entries_ms": entries,
        "environment": machine,
    }
    path = store_table(target, wanted.subject, table)
    _Parts(target, wanted, say).forget()
    return table | {"path": str(path)}


def _whole(space: SearchSpace, genomes: Sequence[Genome], wanted: Wanted) -> Sequence[Genome]:
    """Students that are measured whole: the first, or the first that are made of layers which were lent.

    Raises:
        UsageError: there are too few of them.
    """
    if wanted.lent is None:
        return genomes[: wanted.networks]
    lender, known = wanted.lent.header.target, wanted.lent.entries_ms.keys()
    layers = ({layer_key(layer) for layer in space.layers(g) if layer.op != "add"} for g in genomes)
    whole = [genome for genome, keys in zip(genomes, layers, strict=True) if keys <= known]
    if len(whole) < _LEAST:
        raise UsageError(
            f"{len(whole)} of {len(genomes)} students consist of layers that the table of {lender} has; at "
            f"least {_LEAST} have to be measured",
            f"measure {lender} with more --candidates; a card of other widths or kernels cannot lend layers",
        )
    return whole[: wanted.networks]


def _refuse(target: Target, devices: Sequence[Device], wanted: Wanted) -> None:
    """What cannot be measured, before anything is."""
    runtime = target.primary.runtime
    if runtime not in _RUNTIMES:
        raise UsageError(f"target '{target.id}' runs on {runtime}, which edgekd does not time")
    if wanted.lent is not None:
        if (wanted.lent.header.target, wanted.lent.made_for[1]) == (target.id, runtime):
            raise UsageError(
                f"'{target.id}' cannot lend its layers to itself", "name another target, or none"
            )
        if wanted.networks < _LEAST:
            raise UsageError(
                f"{wanted.networks} networks do not show how another device's layers fare here",
                f"--networks {_LEAST} at least",
            )
    if HERE in devices and not is_this_machine(target):
        raise UsageError(f"this machine is not a {target.description}", "measure there: --on ssh://user@host")


def _header(target: Target, wanted: Wanted, machine: dict[str, Any], clock: str) -> dict[str, Any]:
    runtime, lent = target.primary.runtime, wanted.lent
    return {
        "format": 3,
        "target": target.id,
        "precision": wanted.precision,
        "threads": 1,
        "clock": clock,
        "runtime": f"{runtime} {machine['versions'][runtime]}",
        "device": machine["devices"][runtime],
        "space": wanted.space,
        "input": list(wanted.spec.input_shape),
        "classes": len(wanted.spec.classes),
        "layers_of": "" if lent is None else f"{lent.header.device} with {lent.header.runtime}",
    }


def space_of(target: Target, wanted: Wanted) -> SearchSpace:
    """The space, as the target's card restricts it."""
    card = target.space
    multiple = int(float(card.channel_multiple.value))
    return search_space(wanted.space, wanted.spec, multiple, tuple(card.kernels), tuple(card.forbidden_ops))


def drawn(choices: Sequence[int], count: int, seed: int) -> list[Genome]:
    """Different genomes, each scattered around a level of size of its own: even draws are nearly all of one
    size. Fewer than `count` of a small space."""
    rng = np.random.default_rng(seed)
    levels = rng.random((4 * count, 1)) + rng.normal(0, 0.2, (4 * count, len(choices)))
    rows = (np.clip(levels, 0, 0.999) * np.asarray(choices)).astype(int).tolist()
    return list(dict.fromkeys(tuple(row) for row in rows))[:count]


_Models = dict[str, tuple[str, tuple[int, ...]]]  # file's stem: type and shape of its input


def _layer_models(target: Target, layers: dict[str, LayerShape], precision: str, folder: Path) -> _Models:
    """A file for each layer, ``l0`` the first, and ``empty``."""
    codes = codes_of(target) if precision == "int8" else None
    models: _Models = {}
    for name, layer in (("empty", None), *((f"l{n}", layer) for n, layer in enumerate(layers.values()))):
        (folder / f"{name}.onnx").write_bytes(one_layer(layer, codes))
        models[name] = input_of(layer, codes)
    return models


class _Parts:
    """What was measured of a table that is not complete yet, in a file beside it."""

    def __init__(self, target: Target, wanted: Wanted, say: Callable[[str], None]) -> None:
        self.say, self._runtime = say, target.primary.runtime
        table = table_path(target.id, wanted.precision, self._runtime, wanted.subject)
        self._path = table.with_name(f"{table.stem}-{sha256_json([__version__, wanted])[:12]}.parts")
        self._lock = threading.Lock()

    def read(self) -> dict[str, dict[str, Any]]:
        """By the names of the models; a line that was cut off is left out."""
        try:
            lines = self._path.read_bytes().splitlines()
        except OSError:
            return {}
        found = {}
        for line in lines:
            try:
                row = msgspec.json.decode(line)
            except msgspec.DecodeError:
                continue
            found[" ".join(row["names"])] = row["found"]
        return found

    def keep(self, names: Sequence[str], found: dict[str, Any]) -> None:
        with self._lock:
            append_line(self._path, {"names": names, "found": found})

    def forget(self) -> None:
        self._path.unlink(missing_ok=True)

    def machine(self, part: dict[str, Any]) -> str:
        """Device and runtime that a part was measured with."""
        told = part["environment"]
        return f"{told['devices'][self._runtime]}, {self._runtime} {told['versions'][self._runtime]}"


def _measured(
    target: Target, devices: Sequence[Device], models: _Models, folder: Path, kept: _Parts
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `time_layers` says of each model, and the machine. Each order has an empty call of its own; whole
    networks come first, beside layers."""
    runtime = target.primary.runtime
    names = sorted((name for name in models if name != "empty"), key=lambda name: name[0] != "n")
    chunk_size = _CHUNK_TENSORRT if runtime == "tensorrt" else _CHUNK
    count = max(len(devices), -(-len(names) // chunk_size))
    chunks = [["empty", *part.tolist()] for part in np.array_split(np.array(names), count) if len(part)]
    known = kept.read()
    parts = {key: known[key] for key in map(" ".join, chunks) if key in known}
    done = sum(len(key.split()) - 1 for key in parts)
    if done:
        kept.say(f"{done} of {len(names)} layers and networks were measured before")

    def work(device: Device, chunk: list[str]) -> None:
        nonlocal done
        variants = [Variant(name, runtime, str(folder / f"{name}.onnx")) for name in chunk]
        shapes = {name: models[name] for name in chunk}
        found = time_layers(variants, shapes, protocol=Protocol(), device=device)
        _is_the_target(target, device, found["environment"])
        kept.keep(chunk, found)
        parts[" ".join(chunk)] = found
        done += len(chunk) - 1
        kept.say(f"{done} of {len(names)} layers and networks measured")

    pooled(devices, [chunk for chunk in chunks if " ".join(chunk) not in parts], work)
    machines = {kept.machine(part) for part in parts.values()}
    if len(machines) > 1:
        kept.forget()
        raise DeviceError(
            f"the parts of the table come from different machines: {'; '.join(sorted(machines))}",
            "one kind of device with one version of the runtime; the same command measures anew",
        )
    times: dict[str, Any] = {}
    for part in parts.values():
        empty = part["times"]["empty"]
        times |= {name: row | {"empty": empty} for name, row in part["times"].items()}
    return times, next(iter(parts.values()))["environment"]


def _entries(layers: dict[str, LayerShape], times: dict[str, Any], clock: str) -> dict[str, float]:
    """Milliseconds of each layer beyond the empty call of its order; a refused one has none."""
    rows = {key: times[f"l{number}"] for number, key in enumerate(layers) if f"l{number}" in times}
    entries = {key: max(1e-4, row[clock] - row["empty"][clock]) for key, row in rows.items()}
    return entries | {"empty": times["empty"][clock]}


def _is_the_target(target: Target, device: Device, machine: dict[str, Any]) -> None:
    wanted, told = target.detect.devicetree_model, machine.get("device_tree") or "nothing"
    if device is not HERE and wanted and wanted not in told:
        raise DeviceError(
            f"{device.name} calls itself '{told}', the card is about '{wanted}'", "name the device's own card"
        )


def _line(
    entries: dict[str, float], times: dict[str, Any], whole: Sequence[tuple[LayerShape, ...]], turns: str
) -> tuple[Line, dict[str, Any]]:
    """The line of the networks that were measured with all of their layers, and how good it is."""
    known = {
        f"n{number}": shapes
        for number, shapes in enumerate(whole)
        if f"n{number}" in times and all(shape.op == "add" or layer_key(shape) in entries for shape in shapes)
    }
    features = [Line.features(entries, shapes) for shapes in known.values()]
    line, validation = _validated(np.array(features), np.array([times[name][turns] for name in known]))
    return line, validation | {"sums_ms": [row[0] for row in features]}


def fit(features: Values, measured: Values) -> Line:
    """The `Line` of least relative squares, its coefficients not negative (Lawson & Hanson 1974); of so few
    the best support is found by trying all.

    Args:
        features: (networks, 5), rows of `Line.features`; with few networks only the first ones are used.
        measured: (networks,), ms.
    """
    width = features.shape[1]
    used = max(1, min(width, len(measured) // 2))
    best, least = np.zeros(width), np.inf
    for size in range(1, used + 1):
        for support in map(list, itertools.combinations(range(used), size)):
            rows = features[:, support] / measured[:, None]
            found = np.linalg.lstsq(rows, np.ones(len(measured)), rcond=None)[0]
            rest = float(((rows @ found - 1) ** 2).sum())
            if (found >= 0).all() and rest < least:
                best, least = np.zeros(width), rest
                best[support] = found
    slope, offset_ms, weight_ms, border_ms, attention = map(float, best)
    return Line(offset_ms, slope, border_ms, weight_ms, attention)


def _validated(features: Values, turns: Values) -> tuple[Line, dict[str, Any]]:
    """The line, and how it orders and predicts networks that it was not fitted on.

    Args:
        turns: (networks, turns), ms; ``remeasured_tau`` is between their odd and even ones.
    """
    networks = len(turns)
    if networks < _LEAST:
        reason = f"fewer than {_LEAST} networks measured: the error of this table is not known"
        return Line(), {
            "networks": networks,
            "kendall_tau": None,
            "median_error_percent": None,
            "reason": reason,
        }
    measured = np.median(turns, axis=1)
    line = fit(features[:_FITTED], measured[:_FITTED])
    predicted = features @ line.coefficients
    held = slice(_FITTED, None)
    again = [np.median(turns[held, start::2], axis=1) for start in (0, 1)]
    return line, {
        "networks": networks,
        "fitted_on": _FITTED,
        "kendall_tau": kendall_tau(predicted[held], measured[held]),
        "median_error_percent": 100 * float(np.median(np.abs(predicted / measured - 1)[held])),
        "remeasured_tau": kendall_tau(*again),
        "measured_ms": measured.tolist(),
        "predicted_ms": predicted.tolist(),
        "reason": "",
    }
