"""Scores in several processes: the same as in one, and a worker that dies costs one student."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from edgekd.errors import MissingExtraError
from edgekd.nets import Outputs
from edgekd.spaces import Genome, search_space
from edgekd.spec import ModelSpec, Preprocessing
from edgekd.stages.workers import Scorer, Workers, dask_client

GENOMES = [(0, 0, 0), (1, 0, 2), (3, 3, 3), (2, 1, 0)]


def scorer() -> Scorer:
    spec = ModelSpec(Preprocessing(16, 16, "grey", (0.0,), (1.0,)), ("a", "b", "c"))
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(8, 1, 16, 16, generator=generator)
    teacher = Outputs(torch.randn(8, 3), torch.randn(8, 20), torch.randn(8, 20, 4, 4))
    labels = torch.arange(8) % 3
    return Scorer(search_space("cifar-resnet", spec, 8, (3,)), "diswot", inputs, labels, teacher, 3, 0)


class Deadly:
    """A score that kills its process for one genome, always or the first time."""

    def __init__(self, genome: Genome, once: str = "") -> None:
        self.genome, self.once = genome, once

    def __call__(self, genome: Genome) -> dict[str, float]:
        if genome == self.genome and not (self.once and Path(self.once).exists()):
            if self.once:
                Path(self.once).touch()
            os._exit(1)
        return {"a": float(sum(genome))}


@pytest.mark.backends
def test_two_processes_find_what_one_finds() -> None:
    score = scorer()
    alone = list(Workers(score, 1, "", print)(GENOMES))
    with Workers(score, 2, "", print) as workers:
        assert list(workers(GENOMES)) == alone
        assert list(workers(GENOMES[:1])) == alone[:1]
    assert all(set(terms) == {"relation", "semantic"} for terms in alone)


@pytest.mark.backends
def test_a_genome_that_kills_its_worker_has_no_score_and_the_others_have() -> None:
    said: list[str] = []
    with Workers(Deadly(GENOMES[1]), 2, "", said.append) as workers:
        assert list(workers(GENOMES)) == [{"a": 0.0}, {}, {"a": 9.0}, {"a": 3.0}]
    assert len(said) == 1
    assert str(list(GENOMES[1])) in said[0]


@pytest.mark.backends
def test_a_worker_that_dies_by_chance_costs_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    with Workers(Deadly(GENOMES[1], str(tmp_path / "died")), 2, "", said.append) as workers:
        assert list(workers(GENOMES)) == [{"a": float(sum(genome))} for genome in GENOMES]
    assert not said


def test_a_score_that_is_not_finite_is_none() -> None:
    broken = scorer()
    object.__setattr__(broken, "inputs", torch.full((8, 1, 16, 16), torch.nan))
    assert broken(GENOMES[0]) == {}


def test_a_cluster_without_its_package_names_the_extra() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "distributed", None)
        with pytest.raises(MissingExtraError) as caught:
            dask_client("tcp://localhost:1")
    assert "edgekd[dask]" in caught.value.hint


@pytest.mark.backends
def test_a_cluster_finds_what_one_process_finds_and_survives_a_deadly_student() -> None:
    distributed = pytest.importorskip("distributed")
    score, said = scorer(), list[str]()
    alone = list(Workers(score, 1, "", print)(GENOMES))
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        with Workers(score, 1, cluster.scheduler_address, said.append) as workers:
            assert list(workers(GENOMES)) == alone
        assert not said
        with Workers(Deadly(GENOMES[1]), 1, cluster.scheduler_address, said.append) as workers:
            assert list(workers(GENOMES)) == [{"a": 0.0}, {}, {"a": 9.0}, {"a": 3.0}]
    assert len(said) == 1
