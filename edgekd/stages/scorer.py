"""A score as something that can be sent to another process: a genome in, the terms of its score out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from edgekd.nets import Outputs
from edgekd.proxies import Trial, proxy
from edgekd.spaces import Genome, SearchSpace

Terms = dict[str, float]


@dataclass(frozen=True)
class Scorer:
    """Genome to the terms of its score."""

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


@dataclass(frozen=True)
class OneThread:
    """A scorer for a process beside others: with one thread, because threads of several processes wait for
    each other."""

    scorer: Scorer

    def __call__(self, genome: Genome) -> Terms:
        torch.set_num_threads(1)
        return self.scorer(genome)
