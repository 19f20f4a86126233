"""The commands about training-free scores, as a script reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgekd.cli import cli
from edgekd.errors import EdgekdError, UsageError
from edgekd.proxies import proxy_names

GENOME = ",".join("0" for _ in range(18))
LARGER = ",".join(["1"] + ["0"] * 17)


def call(*words: str) -> Result:
    return CliRunner().invoke(cli, ["proxies", *words])


def told(*words: str) -> Any:
    result = call(*words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_scores_are_listed_with_what_they_need() -> None:
    rows = {row["name"]: row for row in told("list")}
    assert set(rows) == set(proxy_names())
    assert rows["params"]["needs"] == []
    assert "teacher" in rows["diswot"]["needs"]
    assert all(row["source"] for row in rows.values())
    text = call("list").stdout
    assert all(name in text for name in rows)


@pytest.mark.slow
def test_several_students_are_scored_beside_their_costs_and_ranked(tmp_path: Path) -> None:
    blueprint = {"space": "mobile-cnn", "genome": [0] * 18, "channel_multiple": 8, "kernels": [3, 5]}
    path = tmp_path / "2-student.json"
    path.write_text(json.dumps(blueprint))
    words = ("score", "--student", str(path), "--genome", LARGER, "--proxy", "diswot", "--proxy", "params")
    found = told(*words)
    small, large = found["students"]
    assert small["student"] == str(path)
    assert large["student"] == LARGER
    assert list(small["terms"]) == ["diswot.relation", "diswot.semantic", "params"]
    assert small["terms"]["params"] < large["terms"]["params"]
    assert small["macs"] < large["macs"]
    assert small["latency_ms"] > 0
    assert small["rank_sum"] + large["rank_sum"] == pytest.approx(1)
    assert found["teacher_state"] == "trained"
    table = call(*words)
    assert table.exit_code == 0
    assert len(table.stdout.splitlines()) == 3
    assert "rank sum" in table.stdout.splitlines()[0]


@pytest.mark.slow
def test_a_random_teacher_and_another_seed_change_the_score() -> None:
    words = ("score", "--genome", GENOME, "--proxy", "relation")
    values = [told(*words, *more)["students"][0]["terms"]["relation"] for more in
              ((), ("--teacher-state", "random"), ("--seed", "1"), ())]  # fmt: skip
    assert values[0] == values[3]
    assert len(set(values)) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("score", "--proxy", "nwot"), "no student"),
        (("score", "--proxy", "nwoot", "--genome", GENOME), "unknown search score 'nwoot'"),
        (("score", "--proxy", "nwot", "--genome", "1,a"), "expected whole numbers"),
        (("score", "--proxy", "params", "--genome", "1,2"), "none of the space"),
    ],
)
def test_mistakes_are_named(words: tuple[str, ...], message: str) -> None:
    error = call(*words).exception
    assert isinstance(error, EdgekdError)
    assert message in error.message


def test_an_unknown_score_is_answered_with_the_nearest() -> None:
    error = call("score", "--proxy", "synflo", "--genome", GENOME).exception
    assert isinstance(error, UsageError)
    assert error.hint == "did you mean 'synflow'?"
