"""A score as something that can be sent to another process: a genome in, the terms of its score out."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.nets import Outputs
from edgekd.proxies import Trial, proxy
from edgekd.spaces import Genome, SearchSpace

Terms = dict[str, float]
_GROUP = 32  # students that a GPU is given at once
_ALIGNED = 64  # values: where a weight begins on a GPU


@dataclass(frozen=True)
class Scorer:
    """Genome to the terms of its score. `device` is where students are scored; what is given may lie on the
    CPU. A process it is sent to keeps it."""

    space: SearchSpace
    score: str
    inputs: Tensor
    labels: Tensor
    teacher: Outputs | None
    classes: int
    seed: int
    device: str = "cpu"

    def __call__(self, genome: Genome) -> Terms:
        """Empty where a term is not finite: such a student is dropped and counted."""
        return self.many([genome])[0]

    def many(self, genomes: Sequence[Genome]) -> list[Terms]:
        """The terms of each. On a GPU one student is built while the one before is still computed, and all
        are waited for together."""
        made = proxy(self.score)
        inputs, labels, teacher = self._placed
        started: list[Mapping[str, Tensor | float]] = []
        with _exact(inputs.device):
            for genome in genomes:
                student = self.space.build(genome, torch.Generator().manual_seed(self.seed))
                if inputs.device.type != "cpu":
                    moved(student, lambda weights: weights.to(inputs.device))
                trial = Trial(student, inputs, labels, teacher, self.classes, self.seed, fresh=True)
                started.append(made.started(trial))
        return [_finite(terms) for terms in _read(started)]

    @cached_property
    def _placed(self) -> tuple[Tensor, Tensor, Outputs | None]:
        """Inputs, labels and teacher on the device; on the CPU of a machine without one."""
        device = self.device if torch.cuda.is_available() or self.device == "cpu" else "cpu"
        teacher = self.teacher
        if teacher is not None:
            parts = (teacher.logits, teacher.embedding, teacher.features)
            teacher = Outputs(*(None if part is None else part.to(device) for part in parts))  # type: ignore[arg-type]
        layout = torch.channels_last if device == "cpu" else torch.contiguous_format
        inputs = self.inputs.to(device).contiguous(memory_format=layout)
        return inputs, self.labels.to(device), teacher

    @cached_property
    def _packed(self) -> bytes:
        return pickle.dumps({field.name: getattr(self, field.name) for field in fields(self)})

    def __reduce__(self) -> tuple[Callable[[bytes], Scorer], tuple[bytes]]:
        return _unpacked, (self._packed,)


@lru_cache(2)
def _unpacked(packed: bytes) -> Scorer:
    """The same object for the same bytes: it is sent along with each piece of work."""
    return Scorer(**pickle.loads(packed))


@dataclass(frozen=True)
class OneThread:
    """A scorer for a process beside others: with one thread, because threads of several processes wait for
    each other."""

    scorer: Scorer

    def __call__(self, genomes: Sequence[Genome]) -> list[Terms]:
        torch.set_num_threads(1)
        return self.scorer.many(genomes)


def in_groups(genomes: Sequence[Genome], device: str, processes: int) -> list[list[Genome]]:
    """Pieces of work: one student on a CPU; on a GPU as many as keep it busy, and each process."""
    share = -(-len(genomes) // processes)
    size = 1 if device == "cpu" else max(1, min(_GROUP, share))
    return [list(genomes[at : at + size]) for at in range(0, len(genomes), size)]


def one_by_one(group: list[Genome], found: Sequence[Any] | None) -> list[list[Genome]]:
    """What is left to do where a worker died with a group: each of it alone."""
    return [[genome] for genome in group] if found is None and len(group) > 1 else []


def moved(model: nn.Module, move: Callable[[Tensor], Tensor]) -> nn.Module:
    """The network with its weights moved in one piece, in place, rather than one by one. Buffers of integers,
    which count batches, stay."""
    tensors = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    sizes = [-(-tensor.numel() // _ALIGNED) * _ALIGNED for tensor in tensors]
    flat = torch.empty(sum(sizes))
    for tensor, part in zip(tensors, flat.split(sizes), strict=True):
        part[: tensor.numel()] = tensor.detach().flatten()
    for tensor, part in zip(tensors, move(flat).split(sizes), strict=True):
        tensor.data = part[: tensor.numel()].view_as(tensor)
    return model


def _exact(device: torch.device) -> AbstractContextManager[Any]:
    """Convolutions of float32 as on a CPU: with all bits."""
    return (
        torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if device.type == "cuda" else nullcontext()
    )


def _read(started: Sequence[Mapping[str, Tensor | float]]) -> list[Terms]:
    """All terms as numbers, brought over together."""
    waiting = [value for terms in started for value in terms.values() if isinstance(value, Tensor)]
    numbers = iter(torch.stack(waiting).tolist() if waiting else [])
    return [
        {name: next(numbers) if isinstance(value, Tensor) else value for name, value in terms.items()}
        for terms in started
    ]


def _finite(terms: Terms) -> Terms:
    return terms if all(math.isfinite(value) for value in terms.values()) else {}
