"""One transfer method a file. A method is a term of the loss with its published default weights."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from edgekd.errors import UsageError, unknown_name
from edgekd.nets import Outputs

_TABLE = {
    "kd": "edgekd.distillers.kd:Kd",
    "lskd": "edgekd.distillers.lskd:Lskd",
    "dkd": "edgekd.distillers.dkd:Dkd",
    "dist": "edgekd.distillers.dist:Dist",
}


@dataclass(frozen=True)
class Needs:
    """What a method asks for; checked before training."""

    teacher: tuple[str, ...] = ("logits",)
    student: tuple[str, ...] = ("logits",)
    labels: Literal["none", "required"] = "none"


class Term(Protocol):
    """A transfer loss. `weight` and `hard_weight` (of the cross-entropy with labels) are published values."""

    needs: Needs
    weight: float
    hard_weight: float

    def __call__(self, student: Outputs, teacher: Outputs, labels: Tensor, epoch: int) -> Tensor:
        """Mean over the batch, a float32 (or float64) scalar."""


def terms(method: str) -> tuple[Term, ...]:
    """The terms of a method such as ``dist`` or ``kd+dkd``.

    Raises:
        UsageError: a name is not in the table.
    """
    made: list[Term] = []
    for name in method.split("+"):
        if name not in _TABLE:
            raise UsageError(*unknown_name("distillation method", name, _TABLE))
        module, _, attribute = _TABLE[name].partition(":")
        made.append(getattr(importlib.import_module(module), attribute)())
    return tuple(made)


def distiller_names() -> tuple[str, ...]:
    """Names of all methods."""
    return tuple(_TABLE)
