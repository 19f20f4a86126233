"""Target cards: what a device can run, how fast, and where each number comes from.

A card is a TOML file of schema version 1. Every number that states a fact or a threshold is a
`Quantity` with a source and a confidence. Unknown keys are errors, because a typo would disable a rule.
The schema is described in ``docs/targets.md``.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec

from edgekd.card import Compute, Quantity, Runtime, RuntimeName, Target
from edgekd.errors import RecipeError, UsageError, unknown_name
from edgekd.files import data_folder

__all__ = [
    "Compute",
    "Quantity",
    "Target",
    "all_targets",
    "find_target",
    "is_this_machine",
    "load_card",
    "quantities",
]

# What each dialect fixes: dtype, symmetric, zero_point, relu_zero_point of the activations.
_DIALECTS: dict[str, tuple[str, bool, int | None, int | None]] = {
    "trt-s8sym": ("int8", True, 0, None),
    "x86-u8-relu0": ("uint8", False, None, 0),
    "openvino-u8": ("uint8", False, None, 0),
    "arm-s8": ("int8", False, None, -128),
}
# Which runtimes take each dialect; "none" ships float, which all of them take.
_TAKEN_BY: dict[str, tuple[str, ...]] = {
    "trt-s8sym": ("tensorrt",),
    "x86-u8-relu0": ("onnxruntime", "openvino"),
    "openvino-u8": ("openvino",),
    "arm-s8": ("onnxruntime",),
}
_SPEED_KEY = re.compile(r"\w+_(gflops|tops|tops_sparse|gbs)")
_HINT = "docs/targets.md lists every key"
_DEVICE_TREE, _CPUINFO = Path("/proc/device-tree/model"), Path("/proc/cpuinfo")


def load_card(path: Path) -> Target:
    """Read and check one card.

    Raises:
        RecipeError: names the file, the key, what was expected and what was got.
    """
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"target card {path}: {error.strerror or error}", "check the path") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"target card {path}: not TOML: {error}", _HINT) from error
    try:
        card = msgspec.convert(raw, Target, strict=True)
    except msgspec.ValidationError as error:
        raise RecipeError(f"target card {path}: {_explain(str(error), raw)}", _HINT) from error
    if problems := [f"key '{key}': {message}" for key, message in _problems(card, path.stem)]:
        raise RecipeError(f"target card {path}: {'; '.join(problems)}", _HINT)
    return card


def _explain(message: str, raw: dict[str, Any]) -> str:
    """msgspec's "… - at `$.space`" as "key 'space': …"; an unknown or a missing key is named in full."""
    what, _, place = message.partition(" - at `$")
    key = place.rstrip("`").lstrip(".")
    if "[...]" in key:  # msgspec does not say which entry of a free table is at fault
        table, _, rest = key.partition("[...]")
        key = f"{table}.{_entry_at_fault(raw, table)}{rest}"
    if match := re.search(r"(unknown|required) field `([^`]+)`", what):
        expected = f"unknown key; expected one of: {', '.join(_known_keys(key))}"
        key = f"{key}.{match[2]}".lstrip(".")
        what = expected if match[1] == "unknown" else "missing"
    return f"key '{key}': {what}" if key else what


def _known_keys(table: str) -> list[str]:
    """The keys that a table of a card may hold; ``table`` is dotted, such as ``compute[0].facts.cores``."""
    kind: Any = msgspec.inspect.type_info(Target)
    for step in [name for name in re.sub(r"\[\d+\]", "", table).split(".") if name]:
        if isinstance(kind, msgspec.inspect.StructType):
            kind = next(field.type for field in kind.fields if field.encode_name == step)
        elif isinstance(kind, msgspec.inspect.DictType):
            kind = kind.value_type
        if isinstance(kind, msgspec.inspect.UnionType):
            kind = next(one for one in kind.types if isinstance(one, msgspec.inspect.StructType))
        if isinstance(kind, msgspec.inspect.VarTupleType):
            kind = kind.item_type
    return sorted(field.encode_name for field in kind.fields)


def _entry_at_fault(raw: Any, table: str) -> str:
    for step in re.findall(r"\w+", table):
        raw = raw[int(step)] if isinstance(raw, list) else raw[step]
    kind: Any = {"runtime": Runtime, "measure.reject_if": bool | Quantity}.get(table, Quantity)
    for name, value in raw.items():
        try:
            msgspec.convert(value, kind, strict=True)
        except msgspec.ValidationError:
            return str(name)
    return "*"


def _problems(card: Target, stem: str) -> Iterator[tuple[str, str]]:
    """Breaches of the rules that types alone do not state, as (key, message)."""
    if not re.fullmatch(r"[a-z0-9-]+", card.id):
        yield "id", f"expected lower-case letters, digits and '-', got '{card.id}'"
    if card.id != stem:
        yield "id", f"expected the file's stem '{stem}', got '{card.id}'"
    if not card.compute:
        yield "compute", "expected at least one [[compute]] table, got none"
    for key, quantity in quantities(card):
        yield from _quantity_problems(key, quantity)
    for key, source in _sources(card):
        if not source.strip():
            yield key, "expected where this comes from, got an empty string"
    multiple = card.space.channel_multiple.value
    if not isinstance(multiple, float) or multiple < 1 or multiple % 1:
        yield "space.channel_multiple.value", f"expected a whole number >= 1, got {multiple!r}"
    if not card.space.kernels or any(kernel < 1 or kernel % 2 == 0 for kernel in card.space.kernels):
        yield "space.kernels", f"expected odd sizes >= 1, got {list(card.space.kernels)}"
    yield from _compute_problems(card)
    yield from _quant_problems(card)


def _quantity_problems(key: str, quantity: Quantity) -> Iterator[tuple[str, str]]:
    if not quantity.source.strip():
        yield f"{key}.source", "expected where the number comes from, got an empty string"
    if quantity.sparse != key.endswith("_sparse"):
        yield key, "a sparse number, and no other, has a key that ends in '_sparse' and 'sparse = true'"
    if isinstance(quantity.value, float) and not math.isfinite(quantity.value):
        yield f"{key}.value", f"expected a finite number, got {quantity.value}"
    number = re.search(r"(^memory|\.(peak|achieved|bandwidth))\.", key)
    if number and not (isinstance(quantity.value, float) and quantity.value > 0):
        yield f"{key}.value", f"expected a number > 0, got {quantity.value!r}"


def _sources(card: Target) -> Iterator[tuple[str, str]]:
    """The free-standing source keys that must not be empty."""
    yield "detect.source", card.detect.source
    yield "quant.source", card.quant.source
    if card.space.forbidden_ops:
        yield "space.source", card.space.source
    for index, unit in enumerate(card.compute):
        yield f"compute[{index}].precisions_source", unit.precisions_source
        if unit.isa:
            yield f"compute[{index}].isa_source", unit.isa_source


def _compute_problems(card: Target) -> Iterator[tuple[str, str]]:
    for missing in sorted({unit.runtime for unit in card.compute} - card.runtime.keys()):
        yield f"runtime.{missing}", "expected a table for the runtime that [[compute]] names, got none"
    known = get_args(RuntimeName)
    for runtime in card.runtime:
        if runtime not in known:
            yield f"runtime.{runtime}", unknown_name("runtime", runtime, known)[0]
    for index, unit in enumerate(card.compute):
        for table in ("peak", "achieved", "bandwidth"):
            for name, quantity in getattr(unit, table).items():
                key = f"compute[{index}].{table}.{name}"
                if not _SPEED_KEY.fullmatch(name):
                    yield key, "the name must end in its unit: _gflops, _tops, _tops_sparse or _gbs"
                if card.device_class == "nvidia-jetson" and not quantity.mode:
                    yield f"{key}.mode", "expected the power mode this number holds in, got none"
        if both := set(unit.precisions) & set(unit.unsupported):
            yield f"compute[{index}].unsupported", f"{', '.join(sorted(both))} also in 'precisions'"


def _quant_problems(card: Target) -> Iterator[tuple[str, str]]:
    quant, weights, activations = card.quant, card.quant.weights, card.quant.activations
    for index, unit in enumerate(card.compute):
        if unit.runtime not in (taken := _TAKEN_BY.get(quant.dialect, (unit.runtime,))):
            yield (
                "quant.dialect",
                f"expected one that '{unit.runtime}' (compute[{index}]) takes, got '{quant.dialect}', "
                f"which is for {' and '.join(taken)}",
            )
    if weights.dtype != "int8" or not weights.symmetric:
        yield "quant.weights", "expected dtype 'int8' and symmetric = true: every runtime takes that form"
    if quant.dialect in _DIALECTS:
        names = ("dtype", "symmetric", "zero_point", "relu_zero_point")
        for name, expected in zip(names, _DIALECTS[quant.dialect], strict=True):
            got = getattr(activations, name)
            if got != expected:
                yield (
                    f"quant.activations.{name}",
                    f"dialect '{quant.dialect}' needs {_say(expected)}, got {_say(got)}",
                )


def _say(value: object) -> str:
    return "no such key" if value is None else repr(value).lower()


def quantities(card: Target) -> list[tuple[str, Quantity]]:
    """Every `Quantity` of a card with its dotted key, in the order of the schema."""
    found: list[tuple[str, Quantity]] = []

    def walk(key: str, value: object) -> None:
        if isinstance(value, Quantity):
            found.append((key, value))
        elif isinstance(value, msgspec.Struct):
            for field in msgspec.structs.fields(value):
                walk(f"{key}.{field.encode_name}".lstrip("."), getattr(value, field.name))
        elif isinstance(value, dict):
            for name, item in value.items():
                walk(f"{key}.{name}", item)
        elif isinstance(value, tuple):
            for index, item in enumerate(value):
                walk(f"{key}[{index}]", item)

    walk("", card)
    return found


def all_targets() -> dict[str, Target]:
    """Every shipped card by its id, sorted.

    Raises:
        RecipeError: a card is malformed, or two cards share an alias.
    """
    folder = data_folder("targets")
    cards = {path.stem: load_card(path) for path in sorted(folder.glob("*.toml"))}
    owner: dict[str, str] = {name: name for name in cards}
    for card in cards.values():
        for alias in card.aliases:
            if (other := owner.setdefault(alias, card.id)) != card.id:
                raise RecipeError(
                    f"target card {folder / card.id}.toml: key 'aliases': '{alias}' already names '{other}'",
                    "a short name belongs to one card",
                )
    return cards


def find_target(name: str) -> Target:
    """A shipped card by id or alias, or a user's own card by path (``.toml``).

    Raises:
        UsageError: nothing has this name; the hint holds the nearest one.
    """
    if name.endswith(".toml"):
        return load_card(Path(name))
    cards = all_targets()
    by_name = cards | {alias: card for card in cards.values() for alias in card.aliases}
    if name not in by_name:
        raise UsageError(*unknown_name("target", name, by_name))
    return by_name[name]


def is_this_machine(target: Target) -> bool:
    """Whether the target is the machine this process runs on: its device-tree name, or its CPU model and all
    its CPU flags when no shipped card that asks for more of them fits too."""
    if not _fits(target):
        return False
    flags = len(target.detect.cpu_flags)
    return not any(len(card.detect.cpu_flags) > flags and _fits(card) for card in all_targets().values())


def _fits(target: Target) -> bool:
    if target.detect.devicetree_model:
        return _DEVICE_TREE.is_file() and target.detect.devicetree_model in _DEVICE_TREE.read_text("utf-8")
    if not target.detect.cpu_flags or not _CPUINFO.is_file():
        return False
    lines = [line.partition(":") for line in _CPUINFO.read_text("utf-8").splitlines()]
    here = next((value.split() for name, _, value in lines if name.startswith("flags")), [])
    model_name = next((value for name, _, value in lines if name.startswith("model name")), "")
    return target.detect.cpu_model in model_name and set(target.detect.cpu_flags) <= set(here)
