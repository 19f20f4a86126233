"""Spread work has the result that one process has; a process that dies costs at most the work it dies of."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from samples import SHORT, Tiny

from edgekd import executor
from edgekd.errors import DeviceError, MissingExtraError, RecipeError, UsageError
from edgekd.executor import Workers, dask_client
from edgekd.nets import Outputs
from edgekd.pipeline import run_pipeline
from edgekd.recipe import load_recipe, parse_override
from edgekd.spaces import search_space
from edgekd.spec import ModelSpec, Preprocessing
from edgekd.stages.scorer import OneThread, Scorer, in_groups, one_by_one

from .spread_work import Deadly, InGroups, resources

pytestmark = [pytest.mark.backends, pytest.mark.slow]
LOOPBACK: dict[str, Any] = {"host": "127.0.0.1", "dashboard_address": "127.0.0.1:0"}  # any free port
GENOMES = [(0, 0, 0), (1, 0, 2), (3, 3, 3), (2, 1, 0)]


def scorer() -> Scorer:
    spec = ModelSpec(Preprocessing(16, 16, "grey", (0.0,), (1.0,)), ("a", "b", "c"))
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, 1, 16, 16, generator=generator)
    teacher = Outputs(torch.randn(8, 3), torch.randn(8, 20), torch.randn(8, 20, 4, 4))
    labels = torch.arange(8) % 3
    return Scorer(search_space("cifar-resnet", spec, 8, (3,)), "diswot", inputs, labels, teacher, 3, 0)


@contextmanager
def running_cluster() -> Iterator[str]:
    """Two worker processes on loopback, one of them on a device. A task is given up when its worker dies."""
    dask, distributed = pytest.importorskip("dask"), pytest.importorskip("distributed")
    alone = {"nthreads": 1, "host": "127.0.0.1"}
    made = {
        0: {"cls": distributed.Nanny, "options": alone | {"resources": {"rpi5": 1}}},
        1: {"cls": distributed.Nanny, "options": alone},
    }
    scheduler = {"cls": distributed.Scheduler, "options": LOOPBACK}
    once = dask.config.set({"distributed.scheduler.allowed-failures": 0})
    with once, distributed.SpecCluster(workers=made, scheduler=scheduler) as running:
        yield "dask://" + running.scheduler_address.removeprefix("tcp://")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with running_cluster() as address:
        yield address


@pytest.fixture(params=["local:2", "dask"])
def spread(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue("cluster") if request.param == "dask" else request.param)


@pytest.fixture(params=["local:2", "dask"])
def mortal(request: pytest.FixtureRequest) -> Iterator[str]:
    """Processes of a test alone: a nanny does not start a worker again that dies while it starts."""
    with nullcontext("local:2") if request.param == "local:2" else running_cluster() as address:
        yield address


def test_scores_are_those_of_one_process(spread: str) -> None:
    score = scorer()
    alone = {genome: score(genome) for genome in GENOMES}
    with Workers(spread) as workers:
        for groups in (in_groups(GENOMES, "cpu", 2), in_groups(GENOMES, "cuda", 2)):
            made = [pair for group, terms in workers.run(OneThread(score), groups)
                    for pair in zip(group, terms or [], strict=True)]  # fmt: skip
            assert dict(made) == alone
    assert all(terms.keys() == {"relation", "semantic"} for terms in alone.values())


def test_a_search_finds_the_same_everywhere_and_is_not_repeated_elsewhere(
    spread: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny.folder)
    own = {"teacher.source": "tiny_teacher:build", "teacher.weights": str(tiny.weights), "target": "avx2"}
    own |= dict(map(parse_override, SHORT)) | {"data.source": str(tiny.data)}
    places = {"local": tmp_path / "here", spread: tmp_path / "there"}
    found = {
        place: run_pipeline(load_recipe(None, own | {"executor": place}), folder, last="search")
        for place, folder in places.items()
    }
    here, there = (found[place]["metrics"]["search"] for place in places)
    assert here["candidates"] == there["candidates"]
    assert here["chosen"] == there["chosen"]
    assert there["dropped"] == 0
    again = run_pipeline(load_recipe(None, own), tmp_path / "there", last="search")
    assert again["stages"]["search"]["resumed"] is True


@pytest.mark.parametrize("text", ["local:0", "dask", "dask://host", "tcp://host:1", "local:two", ""])
def test_an_executor_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"\$\.executor") as caught:
        load_recipe(None, {"executor": text})
    assert caught.value.hint == "executor is local, local:PROCESSES or dask://HOST:PORT"
    with pytest.raises(UsageError, match="expected local, local:PROCESSES or dask://HOST:PORT"):
        Workers(text)


def test_work_that_kills_its_process_has_no_result_and_the_rest_has(mortal: str) -> None:
    with Workers(mortal) as workers:
        found = dict(workers.run(Deadly(GENOMES[1]), GENOMES))
    assert found == {genome: None if genome == GENOMES[1] else sum(genome) for genome in GENOMES}


def test_of_a_group_that_kills_its_process_only_the_deadly_student_is_lost() -> None:
    work = InGroups(Deadly(GENOMES[1]))
    groups = in_groups(GENOMES, "cuda", 2)
    with Workers("local:2") as workers:
        found = list(workers.run(work, groups, then=one_by_one))
    alone = {group[0]: made for group, made in found if len(group) == 1}
    assert [made for group, made in found if len(group) > 1 and GENOMES[1] in group] == [None]
    assert alone == {GENOMES[0]: [sum(GENOMES[0])], GENOMES[1]: None}
    assert (groups[1], [sum(genome) for genome in groups[1]]) in found


def test_a_process_that_is_killed_by_chance_costs_nothing(mortal: str, tmp_path: Path) -> None:
    with Workers(mortal) as workers:
        found = dict(workers.run(Deadly(GENOMES[1], str(tmp_path / "died")), GENOMES))
    assert found == {genome: sum(genome) for genome in GENOMES}


def test_an_outcome_makes_further_work_possible(spread: str) -> None:
    def then(item: tuple[int, ...], made: int | None) -> list[tuple[int, ...]]:
        return [(made + 1,)] if made is not None and made < 3 else []

    for place in ("local", spread):
        with Workers(place) as workers:
            first: list[tuple[int, ...]] = [(0,), (7,)]
            found = dict(workers.run(sum, first, then=then))
        assert found == {(0,): 0, (1,): 1, (2,): 2, (3,): 3, (7,): 7}


def test_an_error_of_the_work_is_the_callers(spread: str) -> None:
    with Workers(spread) as workers, pytest.raises(UsageError, match="expected local") as caught:
        list(workers.run(executor.scheduler_of, ["nowhere"]))
    assert "--executor local:4" in caught.value.hint


def test_work_for_a_device_runs_on_it(cluster: str) -> None:
    with Workers(cluster) as workers:
        found = [had for _, had in workers.run(resources, range(6), needs=lambda _: "rpi5")]
        assert found == [{"rpi5": 1}] * 6
        assert workers.devices() == ["rpi5"]
    assert Workers("local:2").devices() == []


def test_a_device_that_no_worker_has_left_is_an_error(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "_LOOK_S", 0.1)
    with Workers(cluster) as workers, pytest.raises(DeviceError, match="no worker left") as caught:
        list(workers.run(sum, [(1,)], needs=lambda _: "jetson"))
    assert caught.value.exit_code == 23


def test_without_scheduler_workers_or_package_the_error_says_what_to_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    distributed = pytest.importorskip("distributed")
    monkeypatch.setattr(executor, "_CONNECT_S", 1)
    with pytest.raises(DeviceError, match=r"no Dask scheduler answers at 127\.0\.0\.1:1") as caught:
        dask_client("127.0.0.1:1")
    assert "dask scheduler" in caught.value.hint
    none = distributed.LocalCluster(n_workers=0, **LOOPBACK)
    with none, pytest.raises(DeviceError, match="has no workers"):
        dask_client(none.scheduler_address.removeprefix("tcp://"))
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingExtraError) as missing:
        dask_client("localhost:1")
    assert "edgekd[dask]" in missing.value.hint


def test_workers_of_another_version_are_refused(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor, "__version__", "9.9")
    with pytest.raises(DeviceError, match=r"2 of 2 Dask workers lack edgekd 9\.9"):
        dask_client(cluster.removeprefix("dask://"))


def test_a_score_that_is_not_finite_is_none() -> None:
    broken = scorer()
    object.__setattr__(broken, "inputs", torch.full((8, 1, 16, 16), torch.nan))
    assert broken(GENOMES[0]) == {}


KILLED = """
import os, signal
from backends.spread_work import own_id
from edgekd.executor import Workers
if __name__ == "__main__":
    with Workers("local:2") as workers:
        found = workers.run(own_id, range(8))
        print(*{made for _, made in found}, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_processes_end_when_what_started_them_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    path = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
    words, env, told = [sys.executable, str(script)], os.environ | {"PYTHONPATH": path}, tmp_path / "ids"
    with told.open("w") as file:  # a pipe would stay open in what does not end
        done = subprocess.run(words, env=env, stdout=file, stderr=file, check=False)
    assert done.returncode == -signal.SIGKILL, told.read_text()
    for number in map(int, told.read_text().split()):
        with suppress(ProcessLookupError):  # it has ended
            assert select.select([os.pidfd_open(number)], [], [], 20)[0], f"process {number} waits for ever"
