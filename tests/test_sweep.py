"""One teacher for several targets: a student that is shared, targets that fail, names that are refused."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
from samples import SHORT, Tiny, settings

from edgekd import cli
from edgekd.errors import DataError, StorageError, UsageError
from edgekd.executor import Workers
from edgekd.files import sha256_file
from edgekd.pipeline import run_pipeline
from edgekd.recipe import load_recipe, parse_override
from edgekd.run import Silent
from edgekd.sweeping import _check_shared, _restrictions, sweep
from edgekd.target import find_target

STUDENT = "3-distilled.safetensors"


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
    first, second = (out / name / "cache" for name in rows)
    stored = [path.name for path in first.glob("logits-*")]
    assert stored  # the second target asked the teacher for none of them again
    assert all((second / name).samefile(first / name) for name in stored)


@pytest.mark.slow
@pytest.mark.backends
def test_targets_side_by_side_on_a_cluster_survive_a_worker_that_is_killed(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker that compresses for the first target is killed once that one's student is found."""
    distributed = pytest.importorskip("distributed")
    monkeypatch.chdir(tiny.folder)
    short = dict(map(parse_override, SHORT)) | {"budget.max_drop_points": 100.0, "distill.epochs": 2}
    own = {"teacher.source": "tiny_teacher:build", "teacher.weights": str(tiny.weights)}
    recipe = load_recipe(None, short | own | {"data.source": str(tiny.data)})
    out = tmp_path / "sweep"
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0"
    ) as cluster:
        address = cluster.scheduler_address.removeprefix("tcp://")
        spread = msgspec.structs.replace(recipe, executor=f"dask://{address}")
        over = threading.Event()
        with ThreadPoolExecutor(1) as beside:
            killed = beside.submit(_kill_in_the_middle, out / "x86-avx2", over)
            try:
                found = sweep(spread, ["avx2", "vnni", "jetson"], out, Silent())
            finally:
                over.set()
    assert [(one.target, one.taken_from) for one in found] == [
        ("x86-avx2", "x86-avx2"),
        ("x86-vnni", "x86-avx2"),
        ("jetson-orin-nano-8gb", "jetson-orin-nano-8gb"),
    ]
    assert [one.error for one in found] == [None] * 3
    assert sha256_file(out / "x86-avx2" / STUDENT) == sha256_file(out / "x86-vnni" / STUDENT)
    who = [line.split()[1] for line in _log(out / "x86-avx2") if line.startswith("process ")]
    assert who[0] == str(killed.result())
    assert len(set(who)) == 2
    alone = run_pipeline(msgspec.structs.replace(recipe, target="avx2"), tmp_path / "alone", last="search")
    there, here = found[0].record or {}, alone["metrics"]["search"]
    assert there["metrics"]["search"]["candidates"] == json.loads(json.dumps(here["candidates"]))


def _kill_in_the_middle(folder: Path, over: threading.Event) -> int:
    """The process that works in a run's folder is killed when it has found a student."""
    while not (folder / "2-student.json").exists():
        if over.wait(0.05):
            return 0
    pid = int(_log(folder)[0].split()[1])
    os.kill(pid, signal.SIGKILL)
    return pid


def _log(folder: Path) -> list[str]:
    return (folder / "progress.log").read_text().splitlines()


class _Elsewhere(Workers):
    """Workers that see another file system."""

    def blind(self, path: Path) -> list[str]:
        return super().blind(path.with_name("not-there"))


@pytest.mark.slow
@pytest.mark.backends
def test_two_processes_sweep_and_a_worker_elsewhere_is_told(tmp_path: Path) -> None:
    recipe = load_recipe(None, {"data.source": str(tmp_path / "absent.npz"), "executor": "local:2"})
    found = sweep(recipe, ["avx2", "vnni", "jetson"], tmp_path / "out", Silent())
    assert [type(one.error) for one in found] == [DataError] * 3
    assert [one.taken_from for one in found] == [one.target for one in found]  # none had a student to give

    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=1, host="127.0.0.1", dashboard_address="127.0.0.1:0"
    ) as cluster:
        address = cluster.scheduler_address.removeprefix("tcp://")
        with _Elsewhere(f"dask://{address}") as workers, pytest.raises(StorageError) as caught:
            _check_shared(workers, tmp_path / "out")
    assert "do not see" in caught.value.message
    assert "tcp://127.0.0.1" in caught.value.message
    assert "file system that all workers share" in caught.value.hint
    assert not list((tmp_path / "out").glob(".sweep-*"))


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
