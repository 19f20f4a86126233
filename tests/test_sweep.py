"""One teacher for several targets: a student that is shared, targets that fail, names that are refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from samples import Tiny, settings

from edgekd import cli
from edgekd.errors import DataError, UsageError
from edgekd.files import sha256_file
from edgekd.recipe import load_recipe
from edgekd.run import Silent
from edgekd.sweeping import _restrictions, sweep
from edgekd.target import find_target


@pytest.mark.slow
@pytest.mark.backends
def test_a_second_target_shares_the_student_of_the_first(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tiny.folder)
    out = tmp_path / "sweep"
    words = ["sweep", "--targets", "avx2,vnni", *tiny.arguments(), *settings(), "--max-drop", "100",
             "--out", str(out), "--json"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["edgekd", *words])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    said = capsys.readouterr()
    assert caught.value.code in (0, 1, 3, 75), said.err  # verdicts of a tiny task
    rows = json.loads(said.out)
    assert [(row["target"], row["student_of"]) for row in rows.values()] == [
        ("x86-avx2", "x86-avx2"),
        ("x86-vnni", "x86-avx2"),
    ]
    assert all(row["verdict"] in ("PASS", "FAIL", "INCONCLUSIVE", "UNUSABLE") for row in rows.values())
    weights = [sha256_file(out / name / "3-distilled.safetensors") for name in rows]
    assert weights[0] == weights[1]
    assert all((out / name / "6-bundle" / "manifest.json").is_file() for name in rows)


def test_cards_that_restrict_students_alike_share_one() -> None:
    keys = {name: _restrictions(find_target(name)) for name in ("avx2", "vnni", "jetson")}
    assert keys["avx2"] == keys["vnni"] != keys["jetson"]


def test_a_target_that_fails_leaves_the_others_their_turn(tmp_path: Path) -> None:
    recipe = load_recipe(None, {"data.source": str(tmp_path / "absent.npz"), "target": "x86"})
    found = sweep(recipe, ["avx2", "jetson"], tmp_path / "out", Silent())
    assert [type(one.error) for one in found] == [DataError, DataError]
    assert [one.row()["verdict"] for one in found] == ["ERROR", "ERROR"]


@pytest.mark.parametrize("names", [["x86", "x86"], ["jetson", "jetson-orin-nano-8gb"], [], ["jetsn"]])
def test_unknown_and_repeated_targets_are_refused(names: list[str], tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        sweep(load_recipe(None, {}), names, tmp_path / "out", Silent())
    assert not (tmp_path / "out").exists()
