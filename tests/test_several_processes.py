"""The command line under torchrun: two processes distill, one of them does everything else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from samples import Tiny, settings

from edgekd.files import read_json

ROOT = Path(__file__).parent.parent
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def distill(tiny: Tiny, folder: Path) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *TORCHRUN, "-m", "edgekd", "distill", "--target", "x86", *tiny.arguments()]
    words += [*settings("search.evaluations=4", "distill.epochs=3"), "--out", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        words, cwd=tiny.folder, env=environment, capture_output=True, text=True, check=False
    )


def test_two_processes_leave_one_run_and_find_it_up_to_date(tiny: Tiny, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    done = distill(tiny, folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("[3/8] distill") == 1  # the other process is silent
    record = read_json(folder / "record.json")
    assert list(record["stages"]) == ["teacher", "search", "distill"]
    history = record["metrics"]["distill"]["history"]
    assert len(history) == 3
    assert history[-1]["loss"] < 0.9 * history[0]["loss"]
    assert [path.name for path in folder.rglob(".*")] == [".lock"]
    again = distill(tiny, folder)  # nothing to train: the other process is sent away
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("up to date") == 3
