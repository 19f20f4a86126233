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
from typing import Any, Literal, get_args

import msgspec

from edgekd.errors import RecipeError, UsageError, unknown_name
from edgekd.files import data_folder

Confidence = Literal["primary", "measured", "policy", "unverified"]
RuntimeName = Literal["onnxruntime", "openvino", "tensorrt", "onnxruntime-web"]
DeviceClass = Literal["nvidia-jetson", "arm-cpu", "x86-cpu", "browser", "intel-npu"]
Op = Literal["relu6", "hardswish", "silu", "gelu", "squeeze-excite", "depthwise", "concat"]
Dialect = Literal["trt-s8sym", "x86-u8-relu0", "openvino-u8", "arm-s8", "none"]


# What each dialect fixes: dtype, symmetric, zero_point, relu_zero_point of the activations.
_DIALECTS: dict[str, tuple[str, bool, int | None, int | None]] = {
    "trt-s8sym": ("int8", True, 0, None),
    "x86-u8-relu0": ("uint8", False, None, 0),
    "openvino-u8": ("uint8", False, None, 0),
    "arm-s8": ("int8", False, None, -128),
}
_SPEED_KEY = re.compile(r"\w+_(gflops|tops|tops_sparse|gbs)")
_HINT = "docs/targets.md lists every key"


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Quantity(_Strict, frozen=True):
    """A number or a version with its provenance."""

    value: float | str
    source: str
    confidence: Confidence
    mode: str = ""
    sparse: bool = False
    shape: str = ""
    derivation: str = ""


class Detect(_Strict, frozen=True):
    """What recognises the device; any match is enough, all CPU flags must be present."""

    source: str = ""
    confidence: Confidence = "unverified"
    devicetree_model: str = ""
    module_ids: tuple[str, ...] = ()
    cpu_flags: tuple[str, ...] = ()
    cuda_capability: Quantity | None = None


class Memory(_Strict, frozen=True):
    unified: bool
    model_budget_mb: Quantity
    capacity_mb: Quantity | None = None


class Compute(_Strict, frozen=True):
    """One processing unit; the first of a card is the preferred one."""

    unit: Literal["cpu", "gpu", "npu", "dla", "wasm"]
    runtime: RuntimeName
    precisions: tuple[str, ...]
    precisions_source: str
    precisions_confidence: Confidence
    threads: int = 1
    isa: tuple[str, ...] = ()
    isa_source: str = ""
    isa_confidence: Confidence = "unverified"
    unsupported: tuple[str, ...] = ()
    facts: dict[str, Quantity] = {}
    peak: dict[str, Quantity] = {}
    achieved: dict[str, Quantity] = {}
    bandwidth: dict[str, Quantity] = {}


class TensorScheme(_Strict, frozen=True):
    """How one kind of tensor is quantized."""

    dtype: Literal["int8", "uint8"]
    symmetric: bool
    granularity: Literal["per-channel", "per-tensor"]
    zero_point: int | None = None
    relu_zero_point: int | None = None
    reduce_range: bool = False


class Quant(_Strict, frozen=True):
    dialect: Dialect
    weights: TensorScheme
    activations: TensorScheme
    source: str
    confidence: Confidence


class Space(_Strict, frozen=True):
    """What the target asks of the student's architecture."""

    channel_multiple: Quantity
    kernels: tuple[int, ...] = (3, 5)
    forbidden_ops: tuple[Op, ...] = ()
    source: str = ""


class Runtime(_Strict, frozen=True):
    options: dict[str, Any] = {}
    ep: tuple[tuple[str, dict[str, Any]], ...] = ()
    device: str = ""
    version_min: Quantity | None = None
    platform_min: Quantity | None = None
    build_on_device: bool = False
    forbid_quant: tuple[str, ...] = ()
    notes: str = ""


class Emulation(_Strict, frozen=True):
    arch: str
    qemu_cpu: str
    qemu_min: Quantity


class Check(_Strict, frozen=True):
    emulation: Emulation | None = None


class Measure(_Strict, frozen=True):
    clock: Literal["cpu", "wall", "device-events"]
    transport: Literal["local", "ssh", "chromium"]
    prepare: tuple[str, ...] = ()
    sensors: tuple[str, ...] = ()
    max_cv_percent: Quantity | None = None
    reject_if: dict[str, bool | Quantity] = {}


class Calibration(_Strict, frozen=True):
    measured_on: str = ""
    layer_lut: str = ""


class Target(_Strict, frozen=True):
    """A target card. `id` equals the file's stem; `aliases` are short names for ``--target``."""

    schema: Literal[1]
    id: str
    device_class: DeviceClass = msgspec.field(name="class")
    description: str
    detect: Detect
    memory: Memory
    compute: tuple[Compute, ...]
    quant: Quant
    space: Space
    runtime: dict[str, Runtime]
    measure: Measure
    aliases: tuple[str, ...] = ()
    check: Check = Check()
    size: dict[str, Quantity] = {}
    calibration: Calibration = Calibration()

    @property
    def primary(self) -> Compute:
        """The preferred processing unit."""
        return self.compute[0]

    @property
    def compute_capability(self) -> str:
        """CUDA compute capability such as "8.7", or an empty string."""
        quantity = self.detect.cuda_capability
        return "" if quantity is None else str(quantity.value)


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
    for key, message in _problems(card, path.stem):
        raise RecipeError(f"target card {path}: key '{key}': {message}", _HINT)
    return card


def _explain(message: str, raw: dict[str, Any]) -> str:
    """msgspec's "… - at `$.space`" as "key 'space': …"; an unknown or a missing key is named in full."""
    what, _, place = message.partition(" - at `$")
    key = place.rstrip("`").lstrip(".")
    if "[...]" in key:  # msgspec does not say which entry of a free table is at fault
        table, _, rest = key.partition("[...]")
        key = f"{table}.{_entry_at_fault(raw, table)}{rest}"
    if match := re.search(r"(unknown|required) field `([^`]+)`", what):
        key = f"{key}.{match[2]}".lstrip(".")
        what = "unknown key" if match[1] == "unknown" else "missing"
    return f"key '{key}': {what}" if key else what


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
    yield from _quant_problems(card.quant)


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


def _quant_problems(quant: Quant) -> Iterator[tuple[str, str]]:
    weights, activations = quant.weights, quant.activations
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
    """Whether the target is the machine this process runs on: its device-tree name, or all its CPU flags when
    no shipped card that asks for more of them fits too."""
    if not _fits(target):
        return False
    flags = len(target.detect.cpu_flags)
    return not any(len(card.detect.cpu_flags) > flags and _fits(card) for card in all_targets().values())


def _fits(target: Target) -> bool:
    model, cpuinfo = Path("/proc/device-tree/model"), Path("/proc/cpuinfo")
    if target.detect.devicetree_model:
        return model.is_file() and target.detect.devicetree_model in model.read_text(encoding="utf-8")
    if not target.detect.cpu_flags or not cpuinfo.is_file():
        return False
    lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    here = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return set(target.detect.cpu_flags) <= set(here)
