"""Training-free scores of an untrained student, some beside its teacher; one score a file."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from edgekd.blocks import Classifier
from edgekd.errors import UsageError, unknown_name
from edgekd.fused import fused
from edgekd.nets import Outputs, tapped_forward
from edgekd.probing import loss_gradients, untouched

_TABLE = {
    "diswot": "edgekd.proxies.diswot:DisWot",
    "diswot-sum": "edgekd.proxies.diswot:DisWotSum",
    "relation": "edgekd.proxies.diswot:Relation",
    "semantic": "edgekd.proxies.diswot:Semantic",
    "params": "edgekd.proxies.params:Parameters",
    "macs": "edgekd.proxies.macs:Macs",
    "activations": "edgekd.proxies.activations:LayerValues",
    "live-macs": "edgekd.proxies.macs:LiveMacs",
    "gradnorm": "edgekd.proxies.gradnorm:GradNorm",
    "snip": "edgekd.proxies.snip:Snip",
    "grasp": "edgekd.proxies.grasp:Grasp",
    "synflow": "edgekd.proxies.synflow:SynFlow",
    "fisher": "edgekd.proxies.fisher:Fisher",
    "nwot": "edgekd.proxies.nwot:Nwot",
    "zen": "edgekd.proxies.zen:Zen",
    "zico": "edgekd.proxies.zico:Zico",
    "meco": "edgekd.proxies.meco:Meco",
    "swap": "edgekd.proxies.swap:Swap",
    "az-nas": "edgekd.proxies.az_nas:AzNas",
}
NEEDS = {
    "images": "normalised images",
    "labels": "their labels",
    "teacher": "the teacher's outputs; logits are enough",
    "embedding": "the teacher's classifier input",
}


@dataclass
class Trial:
    """One untrained student and what a score may look at; what a score does not need may be missing.

    `inputs` are normalised (N, C, H, W), `labels` int64 (N,), `seed` decides what a score draws itself.
    `fresh`: the student is as a space built it, in training mode.
    """

    student: nn.Module
    inputs: Tensor
    labels: Tensor | None = None
    teacher: Outputs | None = None
    classes: int = 0
    seed: int = 0
    fresh: bool = False

    @cached_property
    def outputs(self) -> Outputs:
        """The student's outputs in training mode, as batch norm behaves in its first step."""
        with torch.no_grad():
            if self.fresh and isinstance(self.student, Classifier):
                with fused(self.student):
                    found = self.student.outputs(self.inputs)
                if found.features is not None and found.features[0, 0].numel() > 1:
                    return found
            with untouched(self.student, self.seed):
                return tapped_forward(self.student, self.inputs, self.classes)

    def forward(self) -> None:
        """One pass in training mode without gradients, for those who watch it."""
        fast = self.fresh and isinstance(self.student, Classifier)
        with torch.no_grad(), fused(self.student) if fast else untouched(self.student, self.seed):
            self.student(self.inputs)

    @cached_property
    def gradients(self) -> list[Tensor]:
        """Gradients of the mean cross-entropy by the student's `edgekd.probing.weights_of`."""
        with untouched(self.student, self.seed) as student:
            return loss_gradients(student, self.inputs, self.known_labels())

    def generator(self) -> torch.Generator:
        """A fresh generator of this trial's seed, on the CPU."""
        return torch.Generator().manual_seed(self.seed)

    def noise(self) -> Tensor:
        """N(0, 1) images of the shape of `inputs`."""
        return torch.randn(self.inputs.shape, generator=self.generator()).to(self.inputs)

    def known_labels(self) -> Tensor:
        """The labels of a trial whose score needs them.

        Raises:
            UsageError: it has none.
        """
        if self.labels is None:
            raise UsageError("this score needs labels", "give the trial `labels`, or choose another score")
        return self.labels


class Proxy(ABC):
    """A score; higher is better. Its terms may differ in scale by orders of magnitude.

    `needs` are keys of `NEEDS`, beside the student itself. A score leaves the student's weights, gradients,
    buffers and modes as they were, and is a function of the trial alone.
    """

    needs: ClassVar[tuple[str, ...]] = ("images",)

    @abstractmethod
    def measure(self, trial: Trial) -> dict[str, float]:
        """Named parts of the score; a part whose inputs are missing is left out."""

    def started(self, trial: Trial) -> Mapping[str, Tensor | float]:
        """What `measure` gives; on a GPU perhaps still under way, so that the next student need not wait."""
        return self.measure(trial)


class OutputProxy(Proxy):
    """A score of what student and teacher answer, without looking into the student."""

    needs: ClassVar[tuple[str, ...]] = ("images", "labels", "teacher")

    @abstractmethod
    def compare(self, student: Outputs, teacher: Outputs, labels: Tensor) -> dict[str, Tensor]:
        """Named parts of the score for one batch, scalars; a part whose inputs are missing is left out."""

    def terms(self, student: Outputs, teacher: Outputs, labels: Tensor) -> dict[str, float]:
        """The same as numbers."""
        return {name: value.item() for name, value in self.compare(student, teacher, labels).items()}

    def measure(self, trial: Trial) -> dict[str, float]:
        return {name: value.item() for name, value in self.started(trial).items()}

    def started(self, trial: Trial) -> Mapping[str, Tensor]:
        if trial.teacher is None:
            raise UsageError("this score compares the student with a teacher, and there is none")
        labels = trial.known_labels() if "labels" in self.needs else trial.inputs.new_zeros(0).long()
        return self.compare(trial.outputs, trial.teacher, labels)


class Sum(Proxy):
    """Several scores of one student. A term is ``score.term``, or ``score`` where that has one term only.

    Their scales differ, so they are added as ranks over a population (`edgekd.ranking.rank_sum`); each score
    counts alike, however many terms it has.
    """

    def __init__(self, parts: dict[str, Proxy]) -> None:
        self.parts = parts
        found = dict.fromkeys(need for part in parts.values() for need in part.needs)
        self.needs = tuple(found)  # type: ignore[misc] # of this sum

    def measure(self, trial: Trial) -> dict[str, float]:
        return {name: float(value) for name, value in self.started(trial).items()}

    def started(self, trial: Trial) -> Mapping[str, Tensor | float]:
        found: dict[str, Tensor | float] = {}
        for name, part in self.parts.items():
            terms = part.started(trial)
            found |= {name if term == name else f"{name}.{term}": value for term, value in terms.items()}
        return found


def proxy(name: str) -> Proxy:
    """The score of this name, or the sum of several: ``nwot+synflow``.

    Raises:
        UsageError: no such score, or one is named twice.
    """
    names = [part.strip() for part in name.split("+")]
    if len(set(names)) < len(names):
        raise UsageError(f"search score '{name}' names one score twice", "name each score once")
    parts = {part: proxy_class(part)() for part in names}
    return Sum(parts) if len(parts) > 1 else parts[names[0]]


def proxy_class(name: str) -> type[Proxy]:
    """The class of one score.

    Raises:
        UsageError: no such score.
    """
    if name not in _TABLE:
        raise UsageError(*unknown_name("search score", name, _TABLE))
    module, _, attribute = _TABLE[name].partition(":")
    made: type[Proxy] = getattr(importlib.import_module(module), attribute)
    return made


def check_teacher(name: str, needs: Sequence[str], teacher: Outputs) -> None:
    """Refuse a score that this teacher cannot serve.

    Raises:
        UsageError: it needs the input of the teacher's classifier, and the teacher shows none.
    """
    if "embedding" in needs and teacher.embedding is None:
        raise UsageError(
            f"the score '{name}' compares gradients of classifiers, and this teacher shows logits only",
            "use --set search.score=diswot, which leaves that term out, or a score without a teacher",
        )


def proxy_names() -> tuple[str, ...]:
    """Names of all scores."""
    return tuple(_TABLE)
