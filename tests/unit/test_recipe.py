"""A recipe is decoded strictly, can be overridden key by key, and is written back in full."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgekd.errors import RecipeError
from edgekd.recipe import Recipe, load_recipe, parse_override, to_toml

DOCS = Path(__file__).parents[2] / "docs" / "recipe.md"


def _keys() -> dict[str, Any]:
    """Every dotted key of a recipe with its default."""
    keys: dict[str, Any] = {}
    for name, value in msgspec.to_builtins(Recipe()).items():
        if isinstance(value, dict):
            keys |= {f"{name}.{key}": item for key, item in value.items()}
        else:
            keys[name] = value
    return keys


def test_no_file_and_no_override_is_the_default_recipe() -> None:
    assert load_recipe(None, {}) == Recipe()


def test_file_values_are_read(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('target = "rpi5"\n[distill]\nepochs = 3\n[budget]\nmax_latency_ms = 5\n')
    recipe = load_recipe(path, {})
    assert (recipe.target, recipe.distill.epochs, recipe.budget.max_latency_ms) == ("rpi5", 3, 5.0)
    assert recipe.search == Recipe().search


def test_override_wins_over_the_file_and_keeps_its_neighbours(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text("[distill]\nepochs = 3\nviews = 2\n")
    recipe = load_recipe(path, {"distill.epochs": 9, "quantize.mode": "ptq"})
    assert (recipe.distill.epochs, recipe.distill.views, recipe.quantize.mode) == (9, 2, "ptq")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[distill]\nepoch = 3\n", ["epoch", "distill"]),
        ("sed = 1\n", ["sed"]),
        ("[distil]\nepochs = 3\n", ["distil"]),
        ('[distill]\nepochs = "three"\n', ["int", "str", "distill.epochs"]),
        ("[distill]\nepochs = 3.5\n", ["int", "float", "distill.epochs"]),
        ("[distill]\nepochs = 0\n", [">= 1", "distill.epochs"]),
        ("[distill]\nepochs = true\n", ["int", "bool", "distill.epochs"]),
        ('[data]\naugment = "flip"\n', ["flip", "data.augment"]),
        ("[data]\nvalidation_fraction = 1.0\n", ["data.validation_fraction"]),
        ("[budget]\nmax_latency_ms = 0\n", ["> 0", "budget.max_latency_ms"]),
        ("distill = 3\n", ["distill"]),
        ("[distill\nepochs = 3\n", ["line 1"]),
        ("seed = 1\nseed = 2\n", ["line 2"]),
    ],
)
def test_a_bad_file_is_refused_with_its_name_and_key(tmp_path: Path, text: str, names: list[str]) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, {})
    for name in ["bad.toml", *names]:
        assert name in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 10


def test_a_missing_or_binary_file_is_a_recipe_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"absent\.toml"):
        load_recipe(tmp_path / "absent.toml", {})
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"binary\.toml"):
        load_recipe(tmp_path / "binary.toml", {})


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ({"distill.epoch": 1}, "epoch"),
        ({"distill.epochs": "many"}, "distill.epochs"),
        ({"nothing.here": 1}, "nothing"),
        ({"seed.value": 1}, "seed"),
        ({"seed": 1, "seed.value": 1}, "seed.value"),
    ],
)
def test_a_bad_override_is_refused(overrides: dict[str, Any], name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, overrides)
    assert name in caught.value.message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("distill.epochs=20", ("distill.epochs", 20)),
        ("distill.epochs = 20 ", ("distill.epochs", 20)),
        ("distill.learning_rate=1e-3", ("distill.learning_rate", 1e-3)),
        ("data.skip_bad=true", ("data.skip_bad", True)),
        ("teacher.mean=[0.1, 0.2, 0.3]", ("teacher.mean", [0.1, 0.2, 0.3])),
        ("target=rpi5", ("target", "rpi5")),
        ('target="rpi5"', ("target", "rpi5")),
        ("teacher.source=my.module:build", ("teacher.source", "my.module:build")),
        ("data.source=/tmp/a=b", ("data.source", "/tmp/a=b")),
        ("teacher.weights=", ("teacher.weights", "")),
    ],
)
def test_override_text_is_read_as_toml_and_else_as_text(text: str, expected: tuple[str, Any]) -> None:
    assert parse_override(text) == expected


@pytest.mark.parametrize(("text", "written"), [(".1", "0.1"), ("-.5", "-0.5"), ("2.", "2.0")])
def test_a_number_that_toml_does_not_know_is_spelt_out(text: str, written: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, dict([parse_override(f"budget.max_macs_ratio={text}")]))
    assert f"budget.max_macs_ratio={written}" in caught.value.hint


@pytest.mark.parametrize("text", ["distill.epochs", "=3", "  =3", ""])
def test_override_without_key_or_sign_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="expected KEY=VALUE"):
        parse_override(text)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"budget.max_latency_ms": 2.5, "budget.max_size_mib": 0.1, "teacher.mean": [0.5, 0.25, 0.125]},
        {"data.source": 'a "quoted" \\ path\nwith a line', "data.skip_bad": True, "target": "größe"},
        {"distill.learning_rate": 1e-07, "seed": 3},
    ],
)
def test_a_written_recipe_reads_back_the_same(tmp_path: Path, overrides: dict[str, Any]) -> None:
    recipe = load_recipe(None, overrides)
    path = tmp_path / "resolved.toml"
    path.write_text(to_toml(recipe), encoding="utf-8")
    assert load_recipe(path, {}) == recipe


def test_a_written_recipe_names_every_key_that_has_a_value() -> None:
    lines = to_toml(Recipe()).splitlines()
    for key, default in _keys().items():
        leaf = key.rpartition(".")[2]
        assert (default is None) != any(line.startswith(f"{leaf} = ") for line in lines), key


@pytest.mark.parametrize("key", _keys())
def test_the_documentation_lists_every_key_with_its_default(key: str) -> None:
    rows = [line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith(f"| `{key}` |")]
    assert len(rows) == 1, f"docs/recipe.md has {len(rows)} rows for {key}"
    default = _keys()[key]
    text = "none" if default is None else f"`{msgspec.json.encode(default).decode()}`"
    assert rows[0].split(" | ")[2].strip() == text


def test_the_documentation_lists_no_other_key() -> None:
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    documented = {line.split("`")[1] for line in lines if line.startswith("| `")}
    assert documented == set(_keys())


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("quantize.weight_bits", 5, "allowed: 8, 6, 4, 3; "),
        ("quantize.layer_bits.stem", "fp8", "allowed: 8, 6, 4, 3; "),
        ("search.refine", "maybe", "allowed: auto, true, false; "),
        ("distill.epochs", "many", ""),
    ],
)
def test_a_key_with_few_values_tells_them_when_it_gets_another(key: str, value: object, allowed: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(None, {key: value})
    assert caught.value.hint == f"{allowed}docs/recipe.md lists every key with its default"
