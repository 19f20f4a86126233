"""The folder of a run: what is up to date stays, what is not runs again, and nothing is left half-written."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgekd import run as run_module
from edgekd.errors import StorageError, UsageError
from edgekd.files import write_atomic, write_json, write_text
from edgekd.pipeline import run_pipeline
from edgekd.recipe import Recipe, load_recipe
from edgekd.run import STAGES, Run, Silent, fingerprint
from edgekd.target import find_target

pytestmark = pytest.mark.slow  # whole runs of small stages


class Listener(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def open_run(folder: Path, recipe: Recipe | None = None) -> Run:
    return Run(folder, recipe or Recipe(), find_target("jetson"), Listener())


def go(
    folder: Path,
    inputs: dict[str, Any] | None = None,
    last: str = "bundle",
    fail: str = "",
    verdict: str = "PASS",
) -> list[str]:
    """Run stages that write their name into a file; returns those that worked."""
    worked: list[str] = []
    run = open_run(folder)

    def work(name: str) -> Callable[[], dict[str, Any]]:
        def inner() -> dict[str, Any]:
            worked.append(name)
            write_text(folder / f"{name}.txt", name)
            if name == fail:
                raise RuntimeError("the stage failed")
            return {"verdict": verdict, "gate": {}} if name == "gate" else {name: {"value": len(worked)}}

        return inner

    with run.locked():
        for name in STAGES:
            run.stage(name, {"of": (inputs or {}).get(name)}, (f"{name}.txt",), work(name))
            if name == last:
                break
    return worked


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "record.json").read_text())
    return found


# ---------------------------------------------------------------- resuming


def test_a_second_run_finds_everything_up_to_date(tmp_path: Path) -> None:
    assert go(tmp_path) == list(STAGES)
    before = record(tmp_path)
    assert go(tmp_path) == []
    assert record(tmp_path) == before


def test_a_stage_that_did_not_run_again_says_so(tmp_path: Path) -> None:
    go(tmp_path)
    run = open_run(tmp_path)
    with run.locked():
        run.stage("teacher", {"of": None}, ("teacher.txt",), dict)
    assert run.record["stages"]["teacher"]["resumed"] is True
    assert isinstance(run.reporter, Listener)
    assert run.reporter.lines == ["[1/8] teacher: up to date"]


@pytest.mark.parametrize("name", STAGES)
def test_a_changed_input_runs_its_stage_and_all_later_ones(name: str, tmp_path: Path) -> None:
    go(tmp_path)
    assert go(tmp_path, {name: "new"}) == list(STAGES[STAGES.index(name) :])


@pytest.mark.parametrize("name", STAGES)
def test_a_deleted_artefact_is_made_again(name: str, tmp_path: Path) -> None:
    go(tmp_path)
    (tmp_path / f"{name}.txt").unlink()
    assert go(tmp_path) == list(STAGES[STAGES.index(name) :])


def test_an_altered_artefact_is_made_again(tmp_path: Path) -> None:
    go(tmp_path)
    (tmp_path / "distill.txt").write_text("edited")
    assert go(tmp_path)[0] == "distill"
    assert (tmp_path / "distill.txt").read_text() == "distill"


def test_another_version_runs_everything_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go(tmp_path)
    monkeypatch.setattr(run_module, "__version__", "999")
    assert go(tmp_path) == list(STAGES)
    assert record(tmp_path)["edgekd_version"] == "999"


def test_a_run_can_be_taken_further_in_steps(tmp_path: Path) -> None:
    assert go(tmp_path, last="distill") == ["teacher", "search", "distill"]
    assert go(tmp_path)[0] == "quantize"


def test_a_failing_stage_keeps_those_before_it(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        go(tmp_path, fail="quantize")
    assert list(record(tmp_path)["stages"]) == ["teacher", "search", "distill"]
    assert go(tmp_path)[0] == "quantize"


@pytest.mark.parametrize("verdict", ["INCONCLUSIVE", "UNUSABLE"])
def test_a_gate_without_answer_is_asked_again(verdict: str, tmp_path: Path) -> None:
    go(tmp_path, verdict=verdict)
    assert go(tmp_path, verdict="FAIL") == ["gate", "bundle"]
    assert go(tmp_path) == []
    assert record(tmp_path)["verdict"] == "FAIL"


def test_a_stage_that_fails_leaves_no_results_of_its_own(tmp_path: Path) -> None:
    go(tmp_path)
    with pytest.raises(RuntimeError):
        go(tmp_path, {"gate": "stricter"}, fail="gate")
    assert "verdict" not in record(tmp_path)
    assert "profile" in record(tmp_path)["metrics"]


def test_a_verdict_does_not_outlive_its_student(tmp_path: Path) -> None:
    go(tmp_path)
    assert record(tmp_path)["verdict"] == "PASS"
    go(tmp_path, {"distill": "another method"}, last="distill")
    found = record(tmp_path)
    assert "verdict" not in found
    assert "gate" not in found
    assert set(found["metrics"]) == {"teacher", "search", "distill"}


def test_a_folder_is_an_artefact_with_all_its_files(tmp_path: Path) -> None:
    def work() -> dict[str, Any]:
        for name in ("a", "b"):
            write_text(tmp_path / "out" / name, name)
        calls.append(1)
        return {}

    calls: list[int] = []
    for _ in range(2):
        open_run(tmp_path).stage("teacher", {}, ("out",), work)
    assert len(calls) == 1
    (tmp_path / "out" / "b").unlink()
    open_run(tmp_path).stage("teacher", {}, ("out",), work)
    assert len(calls) == 2


# ---------------------------------------------------------------- the record


def test_the_record_tells_version_recipe_target_and_stages(tmp_path: Path) -> None:
    go(tmp_path)
    found = record(tmp_path)
    assert found["recipe"]["distill"]["method"] == Recipe().distill.method
    assert found["target"]["id"] == "jetson-orin-nano-8gb"
    assert found["demo"] is True
    for stage in found["stages"].values():
        assert stage["seconds"] >= 0
        assert len(stage["inputs_sha256"]) == 64


def test_the_record_is_complete_after_every_stage(tmp_path: Path) -> None:
    for position, name in enumerate(STAGES):
        go(tmp_path, last=name)
        assert list(record(tmp_path)["stages"]) == list(STAGES[: position + 1])


def test_the_resolved_recipe_is_written_and_reads_back(tmp_path: Path) -> None:
    recipe = load_recipe(
        None, {"distill.epochs": 3, "budget.max_latency_ms": 0.5, "teacher.mean": [0.1, 0.2]}
    )
    with open_run(tmp_path, recipe).locked():
        pass
    assert load_recipe(tmp_path / "recipe.toml", {}) == recipe


def test_unverified_numbers_are_kept_with_the_target(tmp_path: Path) -> None:
    run = open_run(tmp_path)
    run.stage("teacher", {}, (), lambda: {"_unverified": ["a key"]})
    assert record(tmp_path)["target"]["unverified"] == ["a key"]
    assert record(tmp_path)["metrics"] == {}


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    (tmp_path / "record.json").write_text('{"stages": ')
    with pytest.raises(StorageError) as caught:
        open_run(tmp_path)
    assert str(tmp_path / "record.json") in caught.value.message
    assert "delete it" in caught.value.hint


# ---------------------------------------------------------------- writing


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    with (
        open_run(tmp_path).locked(),
        pytest.raises(StorageError, match="another process works in"),
        open_run(tmp_path).locked(),
    ):
        pass
    with open_run(tmp_path).locked():  # it is free again
        pass


def test_a_folder_that_cannot_be_made_is_named() -> None:
    with pytest.raises(StorageError) as caught, open_run(Path("/dev/null/x")).locked():
        pass
    assert "cannot write into /dev/null/x" in caught.value.message
    assert "--out" in caught.value.hint
    assert caught.value.exit_code == 18


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_old_record_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StorageError) as caught:
        go(tmp_path, {"gate": "new"})
    assert "No space left on device" in caught.value.message
    assert "--out" in caught.value.hint
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("error", [OSError(errno.EROFS, "Read-only file system"), KeyboardInterrupt()])
def test_an_interrupted_write_keeps_the_old_file(error: BaseException, tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"old": 1})

    def broken(temporary: Path) -> None:
        temporary.write_text("half")
        raise error

    with pytest.raises((StorageError, KeyboardInterrupt)):
        write_atomic(tmp_path / "a.json", broken)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert json.loads((tmp_path / "a.json").read_text()) == {"old": 1}


# ---------------------------------------------------------------- what lies outside


def test_a_fingerprint_follows_a_files_bytes(tmp_path: Path) -> None:
    path = tmp_path / "w"
    path.write_text("one")
    first = fingerprint(str(path))
    os.utime(path, (1, 1))
    assert fingerprint(str(path)) == first
    path.write_text("two")
    assert fingerprint(str(path)) != first


def test_a_fingerprint_follows_a_folders_files(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"1")
    first = fingerprint(str(tmp_path))
    assert fingerprint(str(tmp_path)) == first
    (tmp_path / "a" / "2.png").write_bytes(b"2")
    assert fingerprint(str(tmp_path)) != first


def test_no_source_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = fingerprint("")
    (tmp_path / "new").write_text("x")
    assert fingerprint("") == first == ""


def test_a_fingerprint_follows_the_source_of_a_factory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own").mkdir()
    path = tmp_path / "own" / "models.py"
    path.write_text("def build(): ...")
    first = fingerprint("own.models:build")
    path.write_text("def build(): return 1")
    assert fingerprint("own.models:build") != first


def test_a_fingerprint_follows_all_files_of_a_factorys_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine" / "parts").mkdir(parents=True)
    (tmp_path / "mine" / "models.py").write_text("from mine.parts.block import Block")
    (tmp_path / "mine" / "parts" / "block.py").write_text("class Block: ...")
    first = fingerprint("mine.models:build")
    monkeypatch.chdir(tmp_path)
    assert fingerprint("mine.models:build") == first
    (tmp_path / "mine" / "parts" / "block.py").write_text("class Block: size = 2")
    assert fingerprint("mine.models:build") != first


def test_a_fingerprint_follows_a_local_folder_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    first = fingerprint(f"transformers:{tmp_path}")
    (tmp_path / "config.json").write_text('{"a": 1}')
    assert fingerprint(f"transformers:{tmp_path}") != first


def test_the_record_is_read_under_the_lock(tmp_path: Path) -> None:
    """What another process wrote between opening and locking is not lost."""
    early = open_run(tmp_path)
    go(tmp_path)
    with early.locked():
        assert list(early.record["stages"]) == list(STAGES)


def test_a_name_is_its_own_fingerprint() -> None:
    assert fingerprint("timm:resnet18") == "timm:resnet18"


def test_an_unknown_last_stage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        run_pipeline(Recipe(), tmp_path, last="distil")
    assert caught.value.hint == "did you mean 'distill'?"
