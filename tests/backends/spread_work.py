"""Work for other processes, in a module that loads quickly there."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

Genome = tuple[int, ...]


class Deadly:
    """Work that is killed, as from outside, for one item: always, or the first time."""

    def __init__(self, genome: Genome, once: str = "") -> None:
        self.genome, self.once = genome, once

    def __call__(self, genome: Genome) -> int:
        if genome == self.genome and not (self.once and Path(self.once).exists()):
            if self.once:
                Path(self.once).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return sum(genome)


class InGroups:
    """Work for each of a group."""

    def __init__(self, work: Deadly) -> None:
        self.work = work

    def __call__(self, genomes: list[Genome]) -> list[int]:
        return [self.work(genome) for genome in genomes]


def own_id(_: int) -> int:
    """Of the process that runs this."""
    return os.getpid()


def resources(_: int) -> Any:
    """What the worker of a cluster that runs this was started with."""
    from distributed import get_worker

    return get_worker().state.total_resources
