"""The commands that only tell, as a script reads them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from edgekd.cli import cli
from edgekd.distillers import distiller_names
from edgekd.errors import RecipeError, UsageError
from edgekd.files import data_folder
from edgekd.target import find_target, quantities


def told(*words: str) -> str:
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    return result.output


def test_methods_are_listed_with_what_they_need() -> None:
    rows = {row["name"]: row for row in json.loads(told("methods", "list", "--json"))}
    assert set(rows) == set(distiller_names())
    assert rows["kd"]["black_box"]
    assert not rows["at"]["black_box"]
    assert rows["ofa"]["parts"] == ["term", "wrap"]
    assert rows["pskd"]["teacher"] == []
    assert all(row["source"] for row in rows.values())


@pytest.mark.parametrize("name", distiller_names())
def test_each_method_shows_its_options_as_they_are_set(name: str) -> None:
    row = json.loads(told("methods", "show", name, "--json"))
    text = told("methods", "show", name)
    assert row["text"]
    for option in row["options"]:
        assert f"--set distill.options.{name}.{option}=" in text


def test_an_unknown_method_is_answered_with_the_nearest() -> None:
    assert told("methods", "show", "hints") == told("methods", "show", "fitnet")
    result = CliRunner().invoke(cli, ["methods", "show", "dkkd"])
    assert isinstance(result.exception, UsageError)
    assert result.exception.hint == "did you mean 'dkd'?"


@pytest.mark.parametrize("name", ["jetson", "web"])
def test_a_card_shows_every_number_with_its_source(name: str) -> None:
    lines = told("targets", "show", name).splitlines()
    for key, one in quantities(find_target(name)):
        line = next(line for line in lines if line.startswith(f"  {key} "))
        assert one.confidence in line
        assert one.source in line
    assert json.loads(told("targets", "show", name, "--json"))["id"] == find_target(name).id


def test_cards_are_validated_all_breaches_told(tmp_path: Path) -> None:
    text = (data_folder("targets") / "rpi5-8gb.toml").read_text(encoding="utf-8")
    text = text.replace('id = "rpi5-8gb"', 'id = "good"').replace('aliases = ["rpi5"]', "aliases = []")
    good, bad = tmp_path / "good.toml", tmp_path / "bad.toml"
    good.write_text(text, encoding="utf-8")
    bad.write_text(text.replace("kernels = [3, 5]", "kernels = [4]"), encoding="utf-8")
    assert told("targets", "validate", str(good), "jetson").count("ok: ") == 2
    result = CliRunner().invoke(cli, ["targets", "validate", str(bad), str(good)])
    assert "ok: good" in result.output
    assert isinstance(result.exception, RecipeError)
    assert "key 'id': expected the file's stem 'bad'" in result.exception.message
    assert "key 'space.kernels': expected odd sizes >= 1, got [4]" in result.exception.message
