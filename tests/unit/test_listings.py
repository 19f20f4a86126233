"""The commands that only tell, as a script reads them."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from edgekd.cli import cli
from edgekd.distillers import distiller_names
from edgekd.errors import UsageError


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
    result = CliRunner().invoke(cli, ["methods", "show", "dkkd"])
    assert isinstance(result.exception, UsageError)
    assert result.exception.hint == "did you mean 'dkd'?"
