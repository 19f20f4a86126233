"""Scores of students in this process, in several, or on a Dask cluster."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from edgekd.errors import StorageError, missing_extra
from edgekd.nets import Outputs
from edgekd.proxies import Trial, proxy
from edgekd.spaces import Genome, SearchSpace

Terms = dict[str, float]


@dataclass(frozen=True)
class Scorer:
    """Genome to the terms of its score; what can be sent to another process."""

    space: SearchSpace
    score: str
    inputs: Tensor
    labels: Tensor
    teacher: Outputs | None
    classes: int
    seed: int

    def __call__(self, genome: Genome) -> Terms:
        """Empty where a term is not finite: such a student is dropped and counted."""
        student = self.space.build(genome, torch.Generator().manual_seed(self.seed)).train()
        student.to(self.inputs.device)
        trial = Trial(student, self.inputs, self.labels, self.teacher, self.classes, self.seed)
        terms = proxy(self.score).measure(trial)
        return terms if all(math.isfinite(value) for value in terms.values()) else {}


def _score(scorer: Callable[[Genome], Terms], genome: Genome) -> Terms:
    """What a worker runs: one thread each, because threads of several processes wait for each other."""
    torch.set_num_threads(1)
    return scorer(genome)


class Workers:
    """Scores in the order of the genomes. The genome that a worker dies of, twice, has no terms; `say` is
    told. With one process and no cluster nothing is started."""

    def __init__(
        self, scorer: Callable[[Genome], Terms], processes: int, cluster: str, say: Callable[[str], None]
    ) -> None:
        self._scorer, self._processes, self._cluster, self._say = scorer, processes, cluster, say
        self._executor: Executor | None = None
        self._client: Any = None  # of a cluster
        self._deaths: tuple[type[Exception], ...] = (BrokenProcessPool,)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def __call__(self, genomes: Sequence[Genome]) -> Iterator[Terms]:
        if self._processes == 1 and not self._cluster:
            yield from map(self._scorer, genomes)
            return
        futures = [self._submit(genome) for genome in genomes]
        for genome, future in zip(genomes, futures, strict=True):
            found = self._result(future)
            if found is None:
                wait([other for other in futures if other is not None])
                found = self._alone(genome)
            yield found

    def _submit(self, genome: Genome) -> Future[Terms] | None:
        if self._executor is None:
            self._executor = self._start()
        try:
            return self._executor.submit(_score, self._scorer, genome)
        except BrokenProcessPool:
            return None

    def _start(self) -> Executor:
        if self._cluster:
            self._client = dask_client(self._cluster)
            from distributed import KilledWorker

            self._deaths = (KilledWorker,)
            executor: Executor = self._client.get_executor(pure=False)  # a second try is a new task
            return executor
        return ProcessPoolExecutor(self._processes, get_context("spawn"))

    def _result(self, future: Future[Terms] | None) -> Terms | None:
        """None where the worker died. Its pool dies with it, and so do the others' results."""
        try:
            return None if future is None else future.result()
        except self._deaths:
            if not self._cluster:
                self._stop()
            return None

    def _alone(self, genome: Genome) -> Terms:
        """Once more, with nothing else running that could have killed it: Dask too blames every task that
        was queued at a worker when it died."""
        found = self._result(self._submit(genome))
        if found is None:
            self._say(f"  a worker died while scoring {list(genome)}: the student is left out")
        return found or {}

    def _stop(self) -> None:
        if self._executor is not None:
            if self._client is None:
                self._executor.shutdown(cancel_futures=True)
            else:
                self._client.close()
            self._executor = self._client = None


def dask_client(address: str) -> Any:
    """A ``distributed.Client`` of a Dask scheduler, whose workers need this package in the same version.

    Raises:
        MissingExtraError: the package distributed is not installed.
        StorageError: nothing answers at the address.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise missing_extra("distributed", "dask", f"search.cluster = '{address}'") from error
    try:
        return Client(address, timeout=10)
    except (OSError, ValueError, TimeoutError) as error:
        raise StorageError(
            f"no Dask scheduler answers at '{address}': {error}",
            "start one (dask scheduler, dask worker tcp://…:8786), or leave search.cluster empty",
        ) from error
