"""Several teachers as one, Hinton et al. 2015 (arXiv:1503.02531, section 1: the mean of predictions)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distillers import Context, Distiller, Positive, Setting
from edgekd.errors import UsageError, unknown_name
from edgekd.nets import Batch, Outputs, softened_kl, wide

_MEANS = ("probabilities", "logits")


def mean_logits(teachers: Sequence[Tensor], of: str) -> Tensor:
    """(N, classes) logits of the mean of `teachers`, up to a constant a row: the arithmetic mean of their
    predictions for "probabilities", the geometric mean for "logits"."""
    stacked = torch.stack([wide(logits).detach() for logits in teachers])
    if of == "logits":
        return stacked.mean(0)
    return torch.logsumexp(F.log_softmax(stacked, 2), 0)


class Ensemble(Distiller):
    """KD, ``T^2 * KL`` with T = 4 and weights 0.1 (labels) and 0.9, from the mean of several teachers: the
    first one's logits are `Outputs.logits`, the others' `Outputs.exits`. Zero at identity with the mean.

    The mean replaces the target of all terms, so ``ensemble+dkd`` with weight 0 here is DKD from it.
    """

    weight = 0.9
    hard_weight = 0.1

    def __init__(self, of: str = "probabilities", temperature: Positive = 4.0) -> None:
        super().__init__()
        if of not in _MEANS:
            raise UsageError(*unknown_name("mean of method ensemble:", of, _MEANS))
        self.of, self.temperature = of, temperature

    def build(self, student: Outputs, teacher: Outputs, setting: Setting) -> None:
        """Raises `UsageError` where there is one teacher only."""
        if not teacher.exits:
            raise UsageError(
                "method 'ensemble' needs several teachers, and this is one", "--set distill.method=kd"
            )

    def target(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Outputs:
        return replace(teacher, logits=mean_logits((teacher.logits, *teacher.exits), self.of), exits=())

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        return softened_kl(student.logits, teacher.logits, self.temperature).mean()
