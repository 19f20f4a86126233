"""Commands that only tell: target cards, distillation methods, this machine."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgekd.errors import RecipeError, StorageError, UsageError, unknown_name

if TYPE_CHECKING:
    from edgekd.target import Target


@click.group()
def targets() -> None:
    """Target cards: what each device can run."""


@targets.command("list")
@click.option("--json", "as_json", is_flag=True)
def targets_list(as_json: bool) -> None:
    """All shipped cards. Example: edgekd targets list"""
    from edgekd.target import all_targets, is_this_machine

    rows: list[dict[str, Any]] = [
        {
            "id": card.id,
            "aliases": list(card.aliases),
            "runtime": card.primary.runtime,
            "dialect": card.quant.dialect,
            "this_machine": is_this_machine(card),
            "description": card.description,
        }
        for card in all_targets().values()
    ]
    if as_json:
        click.echo(json.dumps(rows))
        return
    click.echo(f"{'id':22} {'names':18} {'runtime':15} {'dialect':13} device")
    for row in rows:
        here = "  (this machine)" if row["this_machine"] else ""
        names = ", ".join(row["aliases"]) or "-"
        click.echo(
            f"{row['id']:22} {names:18} {row['runtime']:15} {row['dialect']:13} {row['description']}{here}"
        )


@targets.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print every key of the card as JSON.")
def targets_show(name: str, as_json: bool) -> None:
    """A card with the source and confidence of every number; a shipped one, or a path.

    \b
    Example: edgekd targets show jetson
    A card of your own: edgekd targets show ./my-board.toml
    """
    import msgspec

    from edgekd.target import find_target, is_this_machine, quantities

    card = find_target(name)
    tables = _tables(card)
    if as_json:
        told = msgspec.to_builtins(card) | {"calibrated_tables": tables}
        click.echo(json.dumps(told, indent=2))
        return
    click.echo(f"{card.id}: {card.description}")
    told = {
        "names": ", ".join(card.aliases) or "-",
        "class": card.device_class,
        "dialect": f"{card.quant.dialect} ({card.quant.confidence}: {card.quant.source})",
        "runtimes": ", ".join(f"{unit.runtime} on {unit.unit}" for unit in card.compute),
        "precisions": ", ".join(card.primary.precisions),
        "refused": ", ".join((*card.primary.unsupported, *card.space.forbidden_ops)) or "-",
        "layer table": card.calibration.layer_lut or "none in the card",
        "this machine": "yes" if is_this_machine(card) else "no",
    }
    for key, text in told.items():
        click.echo(f"  {key:13} {text}")
    for table in tables:
        click.echo(f"  {'calibrated':13} {table['text']}")
    rows = quantities(card)
    width = max(len(key) for key, _ in rows)
    click.echo(f"numbers: {_by_confidence(card)}")
    for key, one in rows:
        value = f"{one.value:g}" if isinstance(one.value, float) else str(one.value)
        mode = f" [{one.mode}]" if one.mode else ""
        click.echo(f"  {key:{width}} {value:>9}  {one.confidence:10} {one.source}{mode}")


def _tables(card: Target) -> list[dict[str, str]]:
    """What `edgekd targets calibrate` left for a card, the newest first; a file that is none is named."""
    from edgekd.calibrated import read_table, table_files

    rows = []
    for path in table_files(card.id):
        try:
            table = read_table(path, card.id)
        except StorageError as error:
            rows.append({"path": str(path), "text": f"unreadable: {error.message}; {error.hint}"})
        else:
            rows.append({"path": str(path), "text": table.words})
    return rows


def _by_confidence(card: Target) -> str:
    """How many numbers of a card are of each confidence: "19 (5 policy, 14 unverified)"."""
    from edgekd.target import quantities

    counts = Counter(one.confidence for _, one in quantities(card))
    return f"{counts.total()} ({', '.join(f'{n} {kind}' for kind, n in sorted(counts.items()))})"


@targets.command("validate")
@click.argument("names", metavar="CARD...", nargs=-1, required=True)
def targets_validate(names: tuple[str, ...]) -> None:
    """Check cards against the schema and its rules; leaves with 10 when one breaks them.

    \b
    Example: edgekd targets validate my-board.toml other-board.toml
    """
    from edgekd.target import find_target

    failed: list[RecipeError] = []
    for name in names:
        try:
            card = find_target(name)
        except RecipeError as error:
            failed.append(error)
        else:
            click.echo(f"ok: {card.id}: {card.description}; numbers: {_by_confidence(card)}")
    for one in failed[:-1]:
        click.echo(f"edgekd: {one.message}", err=True)
    if failed:
        raise failed[-1]


@targets.command("calibrate")
@click.argument("name")
@click.option("--on", "urls", multiple=True, metavar="ssh://USER@HOST",
              help="Devices of this kind; several share the work.  [default: this machine]")  # fmt: skip
@click.option("--ssh-config", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--executor", default="local", show_default=True, metavar="local|dask://HOST:PORT",
              help="A cluster: those of its workers share the work that are such a device.")  # fmt: skip
@click.option("--space", default="mobile-cnn", show_default=True, help="Whose layers are measured.")
@click.option("--image-size", default=32, show_default=True, type=click.IntRange(8))
@click.option("--color", default="rgb", show_default=True, type=click.Choice(["rgb", "grey"]))
@click.option("--classes", default=10, show_default=True, type=click.IntRange(2))
@click.option("--precision", type=click.Choice(["fp32", "int8"]),
              help="What students run in.  [default: int8 where the card has a dialect]")  # fmt: skip
@click.option(
    "--candidates",
    default=2000,
    show_default=True,
    type=click.IntRange(1),
    help="Students whose layers are measured.",
)
@click.option("--networks", default=18, show_default=True, type=click.IntRange(0))
@click.option("--layers-of", metavar="TARGET",
              help="Measure networks alone; the layers are those of this target's table.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, type=int)
@click.option("--json", "as_json", is_flag=True)
def targets_calibrate(name: str, urls: tuple[str, ...], as_json: bool, **given: Any) -> None:
    """Measure a table of layers on the device; searches for this target then use it. Tables of several
    spaces, inputs and precisions are kept side by side: edgekd targets show lists them.

    \b
    Example: edgekd targets calibrate rpi5 --on ssh://pi@board --image-size 96
    Cluster: edgekd targets calibrate rpi5 --executor dask://HOST:8786      (docs/scale-out.md)
    From another device's layers: edgekd targets calibrate orin-nx --on ssh://me@board --layers-of jetson
    """
    from edgekd.calibrated import lent_table
    from edgekd.cluster import cluster_devices
    from edgekd.executor import Workers
    from edgekd.profiler import HERE, Device
    from edgekd.remote import ssh_device
    from edgekd.spec import ModelSpec, Preprocessing
    from edgekd.stages.calibrate import Wanted, calibrate
    from edgekd.target import find_target

    target = find_target(name)
    measure, ssh_config, side = target.measure, given["ssh_config"], given["image_size"]
    card: dict[str, Any] = {"prepare": measure.prepare, "sensors": measure.sensors}
    devices: list[Device] = [ssh_device(url, config=ssh_config, **card) for url in urls]
    channels = 3 if given["color"] == "rgb" else 1
    normal = Preprocessing(side, side, given["color"], (0.5,) * channels, (0.5,) * channels)
    spec = ModelSpec(normal, tuple(map(str, range(given["classes"]))))
    numbers = {key: given[key] for key in ("candidates", "networks", "seed")}
    precision = given["precision"] or ("fp32" if target.quant.dialect == "none" else "int8")
    wanted = Wanted(given["space"], spec, precision, **numbers)
    if given["layers_of"]:
        lent = lent_table(find_target(given["layers_of"]), precision, wanted.subject)
        wanted = replace(wanted, lent=lent)
    with Workers(given["executor"]) as workers:
        if not workers.here:
            if devices:
                raise click.UsageError("--on names devices, --executor a cluster that has them: give one")
            devices = [*cluster_devices(workers, (target.id, *target.aliases), **card)]
        table = calibrate(target, devices or [HERE], wanted, lambda text: click.echo(f"  {text}", err=True))
    told = {key: table[key] for key in ("path", "line")}
    named = ("precision", "space", "input", "classes", "device", "runtime", "layers_of")
    told |= {key: table["header"][key] for key in named}
    told["layers"] = len(table["entries_ms"]) - 1
    emit(told | {"validation": table["validation"]}, as_json)


@click.group()
def methods() -> None:
    """Distillation methods: what each transfers and what it needs."""


def _method_row(name: str) -> dict[str, Any]:
    from edgekd.distillers import Distiller, method_class

    made_by = method_class(name)
    needs, module = made_by.needs, inspect.getmodule(made_by)
    overridden = {
        part: getattr(made_by, part) is not getattr(Distiller, part)
        for part in ("forward", "target", "wrap", "augment")
    }
    named = {"forward": "term", "target": "target", "wrap": "wrap", "augment": "data"}
    return {
        "name": name,
        "parts": [named[part] for part, own in overridden.items() if own],
        "teacher": list(needs.teacher),
        "student": list(needs.student),
        "labels": needs.labels,
        "black_box": not (needs.torch_teacher or needs.classifier),
        "blends": needs.mixable,
        "weight": made_by.weight,
        "hard_weight": made_by.hard_weight,
        "source": (inspect.getdoc(module) or "").partition("\n\n")[0].replace("\n", " "),
    }


_METHOD_KEYS = {  # of a row, with what `show` calls them
    "parts": "parts",
    "teacher": "taps of the teacher",
    "student": "taps of the student",
    "labels": "reads labels",
    "black_box": "teacher may be a black box",
    "blends": "learns from blended images",
}


@methods.command("list")
@click.option("--json", "as_json", is_flag=True)
def methods_list(as_json: bool) -> None:
    """All methods; `+` joins them: --method dkd+fitnet. Example: edgekd methods list"""
    from edgekd.distillers import distiller_names

    rows = [_method_row(name) for name in sorted(distiller_names())]
    if as_json:
        click.echo(json.dumps(rows))
        return
    click.echo(f"{'name':10} {'parts':17} {'of the teacher':18} source")
    for row in rows:
        teacher = ", ".join(row["teacher"]) or "-"
        click.echo(f"{row['name']:10} {'+'.join(row['parts']):17} {teacher:18} {row['source']}")


@methods.command("show")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True)
def methods_show(name: str, as_json: bool) -> None:
    """What a method is, needs and can be told. Example: edgekd methods show dkd"""
    from edgekd.distillers import distiller_names, method_class, own_name

    name = own_name(name)
    if name not in distiller_names():
        raise UsageError(*unknown_name("distillation method", name, distiller_names()))
    made_by = method_class(name)
    options = {
        option: parameter.default
        for option, parameter in inspect.signature(made_by).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    row = _method_row(name) | {"options": options, "text": inspect.getdoc(made_by) or ""}
    if as_json:
        click.echo(json.dumps(row, default=str))
        return
    click.echo(f"{row['name']}: {row['source']}\n\n{row.pop('text')}\n")
    for key, meaning in _METHOD_KEYS.items():
        value = row[key]
        shown = ", ".join(value) or "-" if isinstance(value, list) else {True: "yes", False: "no"}[value]
        click.echo(f"  {meaning:28} {shown}")
    weights = {"weight": row["weight"], "hard_weight": row["hard_weight"]}
    for option, default in (weights | options).items():
        click.echo(f"  --set distill.options.{name}.{option}={json.dumps(default, default=str)}")


@click.command()
@click.option("--json", "as_json", is_flag=True)
def doctor(as_json: bool) -> None:
    """What this machine really has: runtimes, versions, devices, precisions. Example: edgekd doctor"""
    from edgekd.stages.files import examine

    emit(examine(), as_json)


def emit(value: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(value, default=str))
        return
    _print_tree(value, 0)


def _print_tree(value: dict[str, Any], depth: int) -> None:
    for key, item in value.items():
        pad = "  " * depth
        if isinstance(item, dict):
            click.echo(f"{pad}{key}")
            _print_tree(item, depth + 1)
        else:
            items = item if isinstance(item, list | tuple) else [item]
            shown = ", ".join(f"{one:.4g}" if isinstance(one, float) else str(one) for one in items)
            shown = "-" if item is None or not shown else shown
            click.echo(f"{pad}{key}: {shown}")
