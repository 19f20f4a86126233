"""A small student that each wrapping method has wrapped and trained for some steps."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.demo import DemoTeacher
from edgekd.distillers import Context, Distiller, Setting, methods
from edgekd.nets import Batch
from edgekd.spec import ModelSpec, Preprocessing
from edgekd.taps import Tapped, find_layout

WRAPS = ("ofa", "simkd", "promptkd", "dho", "lsskd", "dml", "bsd")
KEPT = ("simkd", "promptkd", "dho")  # their wraps stay in the exported network
CLASSES, SIZE = 10, 28
SPEC = ModelSpec(Preprocessing(SIZE, SIZE, "grey", (0.0,), (1.0,)), tuple("abcdefghij"))
LABELS = torch.tensor([0, 3, 5, 2])


def integers(*shape: int) -> Tensor:
    return torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).reshape(shape)


def zs() -> Tensor:
    return (2 * torch.sin(0.7 * integers(4, 6))).requires_grad_()


def zt() -> Tensor:
    return 3 * torch.cos(0.5 * integers(4, 6))


class Cnn(nn.Module):
    """Three resolutions, batch norm with statistics of its own, global pooling, classifier."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers: list[nn.Module] = []
            for before, after, stride in ((1, 8, 1), (8, 12, 2), (12, 16, 2), (16, 16, 1)):
                layers += [nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU()]
            self.body = nn.Sequential(*layers)
            self.pool = nn.AdaptiveAvgPool2d(1)
            self.classifier = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.pool(self.body(x)), 1))
        return logits


def images(count: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def tapped(model: nn.Module, *wanted: str) -> Tapped:
    return Tapped(model, find_layout(model, images(2), CLASSES), wanted)


def teacher() -> Tapped:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        model = DemoTeacher(widths=(8, 16, 24), blocks=1).eval()
    return tapped(model.requires_grad_(requires_grad=False), "features", "embedding", "stages")


def context() -> Context:
    return Context(torch.zeros(()), torch.zeros(()), 10, 100, torch.Generator().manual_seed(0))


@dataclass
class Case:
    """A method, the student it wrapped, and the student as it was before."""

    method: Distiller
    wrapped: nn.Module
    plain: nn.Module

    def deploy(self) -> nn.Module:
        made: nn.Module = self.wrapped.deploy()  # type: ignore[operator]
        return made

    def term(self) -> Tensor:
        """Of one training step, with the cross-entropy beside it."""
        batch = Batch(images(), LABELS, torch.arange(4))
        ours, theirs = self.wrapped.train()(batch.inputs), teacher()(batch.inputs)
        loss: Tensor = self.method(ours, self.method.target(ours, theirs, batch, context()), batch, context())
        return loss + self.method.hard_weight * F.cross_entropy(ours.logits, LABELS)


def case(name: str, network: Tapped | None = None, *, steps: int = 3, **options: Any) -> Case:
    """Wrapped and built as before a training, then trained for some steps, so that nothing is as it began."""
    (method,) = methods(name, {name: options})
    student = Cnn()
    plain = copy.deepcopy(student)
    shown = tapped(student, *method.needs.student)
    network = teacher() if network is None else network
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrapped = method.wrap(shown, shown.eval()(images(2)), network)
        setting = Setting(100, CLASSES, torch.arange(100) % CLASSES, 0)
        method.build(wrapped.eval()(images(2)), network(images(2)), setting)
    made = Case(method, wrapped, plain)
    trained = [p for p in (*wrapped.parameters(), *method.parameters()) if p.requires_grad]
    optimizer = torch.optim.SGD(trained, 0.01 / method.weight)
    for _ in range(steps):
        optimizer.zero_grad()
        (method.weight * made.term()).backward()
        optimizer.step()
    wrapped.eval()
    return made


@cache
def _trained(name: str) -> Case:
    return case(name)


def trained(name: str) -> Case:
    """A copy of the method's case after its steps."""
    return copy.deepcopy(_trained(name))
