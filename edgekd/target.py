"""Target cards: what a device can run, how fast, and where each number comes from.

A card is a TOML file of schema version 1. Every number that states a fact or a threshold is a
`Quantity` with a source and a confidence. Unknown keys are errors, because a typo would disable a rule.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, Literal

import msgspec

from edgekd.errors import RecipeError, UsageError, unknown_name
from edgekd.files import data_folder

Confidence = Literal["primary", "measured", "policy", "unverified"]
Dialect = Literal["trt-s8sym", "x86-u8-relu0", "openvino-u8", "arm-s8", "none"]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Quantity(_Strict):
    """A number or a version with its provenance."""

    value: float | str
    source: str
    confidence: Confidence
    mode: str = ""
    sparse: bool = False
    shape: str = ""
    derivation: str = ""


class Detect(_Strict):
    """What recognises the device; any match is enough, all CPU flags must be present."""

    source: str = ""
    confidence: Confidence = "unverified"
    devicetree_model: str = ""
    module_ids: tuple[str, ...] = ()
    cpu_flags: tuple[str, ...] = ()
    cuda_capability: Quantity | None = None


class Memory(_Strict):
    unified: bool
    model_budget_mb: Quantity
    capacity_mb: Quantity | None = None


class Compute(_Strict):
    """One processing unit; the first of a card is the preferred one."""

    unit: Literal["cpu", "gpu", "npu", "dla", "wasm"]
    runtime: Literal["onnxruntime", "openvino", "tensorrt", "onnxruntime-web"]
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


class TensorScheme(_Strict):
    """How one kind of tensor is quantized."""

    dtype: Literal["int8", "uint8"]
    symmetric: bool
    granularity: Literal["per-channel", "per-tensor"]
    zero_point: int | None = None
    relu_zero_point: int | None = None
    reduce_range: bool = False


class Quant(_Strict):
    dialect: Dialect
    weights: TensorScheme
    activations: TensorScheme
    source: str
    confidence: Confidence


class Space(_Strict):
    """What the target asks of the student's architecture."""

    channel_multiple: Quantity
    kernels: tuple[int, ...] = (3, 5)
    forbidden_ops: tuple[str, ...] = ()


class Runtime(_Strict):
    options: dict[str, Any] = {}
    ep: tuple[tuple[str, dict[str, Any]], ...] = ()
    device: str = ""
    version_min: Quantity | None = None
    platform_min: Quantity | None = None
    build_on_device: bool = False
    forbid_quant: tuple[str, ...] = ()
    notes: str = ""


class Emulation(_Strict):
    arch: str
    qemu_cpu: str
    qemu_min: Quantity


class Check(_Strict):
    emulation: Emulation | None = None


class Measure(_Strict):
    clock: Literal["cpu", "wall", "device-events"]
    transport: Literal["local", "ssh", "chromium"]
    prepare: tuple[str, ...] = ()
    sensors: tuple[str, ...] = ()
    max_cv_percent: Quantity | None = None
    reject_if: dict[str, Any] = {}


class Calibration(_Strict):
    measured_on: str = ""
    layer_lut: str = ""


class Target(_Strict):
    """A target card. `id` equals the file's stem; `aliases` are short names for ``--target``."""

    schema: Literal[1]
    id: str
    device_class: Literal["nvidia-jetson", "arm-cpu", "x86-cpu", "browser", "intel-npu"] = msgspec.field(name="class")
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
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(f"target card {path}: {error}", "see docs/targets.md for the schema") from error
    try:
        card = msgspec.convert(raw, Target, strict=True)
    except msgspec.ValidationError as error:
        raise RecipeError(f"target card {path}: {error}", "see docs/targets.md for the schema") from error
    _check(card, path)
    return card


def _check(card: Target, path: Path) -> None:
    """The rules that types alone do not state."""

    def fail(key: str, message: str) -> None:
        raise RecipeError(f"target card {path}: key '{key}': {message}", "see docs/targets.md for the schema")

    if not re.fullmatch(r"[a-z0-9-]+", card.id):
        fail("id", f"expected lower-case letters, digits and '-', got '{card.id}'")
    if card.id != path.stem:
        fail("id", f"expected the file's stem '{path.stem}', got '{card.id}'")
    if not card.compute:
        fail("compute", "expected at least one [[compute]] table, got none")
    for key, quantity in quantities(card):
        if not quantity.source.strip():
            fail(f"{key}.source", "expected where the number comes from, got an empty string")
        if quantity.sparse and not key.endswith("_sparse"):
            fail(key, "a sparse number belongs under a key that ends in '_sparse'")
    multiple = card.space.channel_multiple.value
    if not isinstance(multiple, float) or multiple < 1 or multiple % 1:
        fail("space.channel_multiple.value", f"expected a whole number >= 1, got {multiple!r}")
    for runtime in {unit.runtime for unit in card.compute} - card.runtime.keys():
        fail(f"runtime.{runtime}", "expected a table for the runtime that [[compute]] names, got none")
    if card.quant.dialect == "trt-s8sym" and card.quant.activations.zero_point != 0:
        fail("quant.activations.zero_point", f"dialect 'trt-s8sym' needs 0, got {card.quant.activations.zero_point}")


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
    cards = {path.stem: load_card(path) for path in sorted(data_folder("targets").glob("*.toml"))}
    owner: dict[str, str] = {name: name for name in cards}
    for card in cards.values():
        for alias in card.aliases:
            if owner.setdefault(alias, card.id) != card.id:
                raise RecipeError(f"alias '{alias}' belongs to both '{owner[alias]}' and '{card.id}'")
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
