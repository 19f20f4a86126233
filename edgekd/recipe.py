"""Every free choice of a run. The resolved recipe is written out in full into the run's folder."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from edgekd.errors import RecipeError
from edgekd.executor import FORMS, PATTERN

_Count = Annotated[int, msgspec.Meta(ge=1)]
_Positive = Annotated[float, msgspec.Meta(gt=0)]
_NonNegative = Annotated[float, msgspec.Meta(ge=0)]
_Share = Annotated[float, msgspec.Meta(gt=0, lt=1)]
_Augment = Literal[
    "crop-mix", "crop-flip-mix", "crop-trivial", "crop-flip-trivial", "crop-flip", "crop", "none"
]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class TeacherRecipe(_Strict, frozen=True):
    """`source`: ``demo``, ``package.module:factory``, ``timm:NAME``, ``torchvision:NAME``,
    ``transformers:PATH`` or a ``.onnx`` file. Empty `mean`, `std`: what the teacher states, else 0 and 1.
    `others`: further teachers, ``source`` or ``source@weights``."""

    source: str = "demo"
    weights: str = ""
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    others: tuple[str, ...] = ()


class DataRecipe(_Strict, frozen=True):
    """`source`: ``demo``, an image folder, a ``.npz`` file or a `datasets` folder saved to disk. `unlabeled`:
    further images to train on, a folder or a ``.npz`` file; `pool_per_class` of them at most, 0 is all.
    `labelled_fraction`: share of the training images whose labels are used."""

    source: str = "demo"
    unlabeled: str = ""
    pool_per_class: Annotated[int, msgspec.Meta(ge=0)] = 0
    labelled_fraction: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    validation_fraction: _Share = 0.2
    selection_fraction: _Share = 0.04
    image_size: Annotated[int, msgspec.Meta(ge=0)] = 0
    augment: _Augment = "crop-mix"
    crop_margin: Annotated[int, msgspec.Meta(ge=0)] = 0  # pixels; 0: 1/28 of the image's size
    skip_bad: bool = False


class BudgetRecipe(_Strict, frozen=True):
    """What the student may cost. A `None` is no limit; ratios are relative to the teacher.
    `max_latency_ratio` counts only without `max_latency_ms`, and compares predictions in the student's
    precision."""

    max_latency_ms: _Positive | None = None
    max_latency_ratio: _Positive = 0.75
    max_size_mib: _Positive | None = None
    max_drop_points: _NonNegative = 2.0
    max_macs_ratio: _Positive = 0.06
    max_memory_mib: _Positive | None = None


class SearchRecipe(_Strict, frozen=True):
    """`student`: empty to search one; ``package.module:factory`` or a ``2-student.json`` to bring one.
    `score`: "auto" is ``nwot`` where a CUDA device trains, and ``diswot``, whose students train faster,
    elsewhere.
    `finalists` are measured whole where this machine is the target. `refine`: distil `refine_candidates` for
    `refine_epochs`, then `refine_finalists` in full, and take the best."""

    student: str = ""
    space: str = "mobile-cnn"
    score: str = "auto"
    teacher_state: Literal["trained", "random"] = "trained"
    evaluations: _Count = 240
    population: Annotated[int, msgspec.Meta(ge=4)] = 24
    batch_size: Annotated[int, msgspec.Meta(ge=8)] = 64
    algorithm: Literal["nsga2", "aging"] = "nsga2"
    finalists: Annotated[int, msgspec.Meta(ge=0)] = 3
    refine: bool | Literal["auto"] = "auto"
    refine_candidates: Annotated[int, msgspec.Meta(ge=2)] = 16
    refine_epochs: _Count = 4
    refine_finalists: Annotated[int, msgspec.Meta(ge=1, le=5)] = 2


class PhaseRecipe(_Strict, frozen=True):
    """One of several trainings of the same student; null is what `distill` and `data.augment` say."""

    method: str | None = None
    options: dict[str, dict[str, Any]] | None = None
    epochs: _Count | None = None
    learning_rate: _Positive | None = None
    augment: _Augment | None = None


class DistillRecipe(_Strict, frozen=True):
    """`method`: names of `edgekd.distillers`, joined by ``+``, with `options` by name. `weights`: the given
    student's, which is then not trained. `views`: augmented views of each image, 0 for new ones every epoch.
    `milestones`: shares of the run where the rate falls to a tenth, instead of a cosine. `hard_weight`: of
    the cross-entropy with labels; null is the method's own. Taps: module paths instead of those found.
    `phases`: trainings one after the other; empty is one. `prepare`: fine-tune the teacher first.
    `assistants`: networks between teacher and student. `suggest_...`: what method ``suggest`` tries."""

    weights: str = ""
    method: str = "dist"
    options: dict[str, dict[str, Any]] = {}
    epochs: _Count = 20
    batch_size: Annotated[int, msgspec.Meta(ge=2)] = 128
    optimizer: Literal["adamw", "muon", "sgd"] = "muon"
    learning_rate: _Positive = 1e-2
    milestones: tuple[_Share, ...] = ()
    weight_decay: _NonNegative = 0.2
    ema_decay: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.998
    hard_weight: _NonNegative | None = None
    views: Annotated[int, msgspec.Meta(ge=0)] = 6
    student_taps: tuple[str, ...] = ()
    teacher_taps: tuple[str, ...] = ()
    compile: bool = False
    phases: tuple[PhaseRecipe, ...] = ()
    prepare: Literal["", "mcmi"] = ""
    prepare_epochs: _Count = 20
    prepare_learning_rate: _Positive = 5e-3
    prepare_weight: _NonNegative = 0.15
    assistants: Annotated[int, msgspec.Meta(ge=0, le=3)] = 0
    suggest_from: tuple[str, ...] = ()
    suggest_epochs: _Count = 2
    suggest_seeds: _Count = 3


class QuantizeRecipe(_Strict, frozen=True):
    """`mode`: ``card`` is ``qat``, or ``none`` on a target whose card says that int8 does not pay. `method`:
    of quantization-aware training, with `options`; empty: the student's, as far as logits are enough.
    `engine`: who quantizes an ONNX file."""

    engine: Literal["edgekd", "onnxruntime", "nncf", "torchao", "neural-compressor"] = "edgekd"
    mode: Literal["card", "qat", "ptq", "none"] = "card"
    calibrator: str = "mse"
    calibration_images: Annotated[int, msgspec.Meta(ge=2)] = 512
    calibration_choice: Literal["stratified", "random", "coverage"] = "stratified"
    weight_bits: Literal[8, 6, 4, 3] = 8
    layer_bits: dict[str, Literal[8, 6, 4, 3]] = {}
    activation_bits: Literal[8, 6, 4] = 8
    layer_activation_bits: dict[str, Literal[8, 6, 4]] = {}
    learn_offsets: bool = False
    freeze_after: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    correct_biases: bool = False
    damping: _NonNegative = 0.0
    sensitivity: bool = False
    method: str = ""
    options: dict[str, dict[str, Any]] = {}
    epochs: _Count = 1
    learning_rate: _Positive = 2e-4


class ProfileRecipe(_Strict, frozen=True):
    threads: _Count = 1
    calls: Annotated[int, msgspec.Meta(ge=64)] = 200


class GateRecipe(_Strict, frozen=True):
    """Limits of the gate; `max_ratio` is candidate latency over reference latency on the same runtime."""

    max_ratio: _Positive = 1.05
    max_quantization_drop_points: _NonNegative = 1.0
    min_top1_agreement: _Share = 0.97
    min_int8_coverage: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.95
    restarts: Annotated[int, msgspec.Meta(ge=2)] = 3
    max_restarts: Annotated[int, msgspec.Meta(ge=2)] = 5
    rounds: Annotated[int, msgspec.Meta(ge=10)] = 40
    calls_per_round: _Count = 3


class TrackRecipe(_Strict, frozen=True):
    """Where else a run is told to; empty: nowhere. `mlflow`: an address, or a folder for its database."""

    mlflow: str = ""
    tensorboard: str = ""


class Recipe(_Strict, frozen=True):
    """A whole run. Decoded strictly from TOML: an unknown key is an error. `executor`: where students are
    scored, see `edgekd.executor`; it changes no result."""

    target: str = "jetson"
    seed: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] = 0
    threads: Annotated[int, msgspec.Meta(ge=0)] = 0  # 0: measure at the start and keep the faster number
    device: Literal["fastest", "cuda", "cpu"] = "fastest"  # of training: a CUDA device where there is one
    executor: Annotated[str, msgspec.Meta(pattern=PATTERN)] = "local"
    teacher: TeacherRecipe = TeacherRecipe()
    data: DataRecipe = DataRecipe()
    budget: BudgetRecipe = BudgetRecipe()
    search: SearchRecipe = SearchRecipe()
    distill: DistillRecipe = DistillRecipe()
    quantize: QuantizeRecipe = QuantizeRecipe()
    profile: ProfileRecipe = ProfileRecipe()
    gate: GateRecipe = GateRecipe()
    track: TrackRecipe = TrackRecipe()


def load_recipe(path: Path | None, overrides: dict[str, Any]) -> Recipe:
    """A recipe from an optional TOML file and dotted overrides such as ``{"distill.epochs": 20}``.

    Raises:
        RecipeError: names the file or override, the key, what was expected and what was got.
    """
    raw: dict[str, Any] = {}
    where = "recipe"
    if path is not None:
        where = f"recipe {path}"
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise RecipeError(
                f"{where}: {error}", "`edgekd compress --help` shows a runnable example"
            ) from error
    for key, value in overrides.items():
        table = raw
        *parents, leaf = key.split(".")
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise RecipeError(f"{where}: '{key}': '{parent}' is a value, not a table")
        table[leaf] = value
    try:
        return msgspec.convert(raw, Recipe, strict=True)
    except msgspec.ValidationError as error:
        hint = _number_hint(overrides, str(error)) or _allowed_hint(str(error))
        hint = f"executor is {FORMS}" if "`$.executor`" in str(error) else hint
        raise RecipeError(f"{where}: {error}", hint) from error


def _allowed_hint(error: str) -> str:
    """The values that a key may have where they are few."""
    kind: Any = Recipe
    for part in re.sub(r"\[.*?\]", "", error.partition("`$.")[2].partition("`")[0]).split("."):
        kind = get_type_hints(kind).get(part) if isinstance(kind, type) else None
    kinds = (kind, *get_args(kind))
    values = [value for one in kinds if get_origin(one) is Literal for value in get_args(one)]
    values += ["true", "false"] if bool in kinds else []
    known = f"allowed: {', '.join(str(value) for value in values)}; " if values else ""
    return f"{known}docs/recipe.md lists every key with its default"


def _number_hint(overrides: dict[str, Any], error: str) -> str:
    """How TOML writes a number that stayed a text: with digits on both sides of the point."""
    for key, value in overrides.items():
        if key in error and isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.|\.\d+)", value):
            return f"in TOML, '{value}' is a text; write the number as {key}={float(value)!r}"
    return ""


def parse_override(text: str) -> tuple[str, Any]:
    """``KEY=VALUE`` of ``--set``; the value is read as TOML, and as plain text when it is not TOML."""
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise RecipeError(f"--set '{text}': expected KEY=VALUE", "for example --set distill.epochs=20")
    try:
        return key.strip(), tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        return key.strip(), value.strip()


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML that `load_recipe` reads back to the same value."""
    lines: list[str] = []
    tables: list[str] = []
    for name, value in msgspec.to_builtins(recipe).items():
        if isinstance(value, dict):
            rows = [f"{key} = {_toml_value(item)}" for key, item in value.items() if item is not None]
            tables += ["", f"[{name}]", *rows]
        else:
            lines.append(f"{name} = {_toml_value(value)}")
    return "\n".join(lines + tables) + "\n"


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return msgspec.json.encode(value).decode()
    if isinstance(value, dict):
        known = {key: item for key, item in value.items() if item is not None}
        return "{" + ", ".join(f"{_toml_value(k)} = {_toml_value(v)}" for k, v in known.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)
