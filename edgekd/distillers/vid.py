"""Variational information distillation, Ahn et al. 2019 (arXiv:1904.05835), as in the CRD code base."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.adapters import seeded
from edgekd.distillers import Context, Distiller, Needs, Positive, Setting
from edgekd.maps import paired
from edgekd.nets import Batch, Outputs

_EPS = 1e-5


class Regressor(nn.Module):
    """Predicts a teacher's map: three 1x1 convolutions for the mean, one variance for each channel."""

    def __init__(self, student_width: int, teacher_width: int, variance: float) -> None:
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(student_width, teacher_width, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_width, teacher_width, 1, bias=False),
            nn.ReLU(),
            nn.Conv2d(teacher_width, teacher_width, 1, bias=False),
        )
        self.scale = nn.Parameter(torch.full((teacher_width,), math.log(math.expm1(variance - _EPS))))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """``mean ((mu(student) - teacher)^2 / v + log v) / 2``, ``v = softplus(scale) + 1e-5``."""
        variance = (F.softplus(self.scale) + _EPS)[:, None, None]
        error: Tensor = self.mean(student) - teacher
        return 0.5 * (error.square() / variance + variance.log()).mean()


class Vid(Distiller):
    """All stages summed, variance 5 at the start, weight 1 beside the labels (the CRD code base).

    The variance is learned, as in the paper. Not zero at identity: a Gaussian's log-density has no floor.
    """

    needs = Needs(teacher=("stages",), student=("stages",))
    weight = 1.0
    hard_weight = 1.0

    def __init__(self, variance: Positive = 5.0) -> None:
        super().__init__()
        self.variance = variance

    def build(self, student: Outputs, teacher: Outputs, setting: Setting) -> None:
        with seeded(setting.seed):
            self.regressors = nn.ModuleList(
                Regressor(ours.shape[1], theirs.shape[1], self.variance)
                for ours, theirs in paired(student.stages, teacher.stages, "stages")
            )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        pairs = paired(student.stages, teacher.stages, "stages")
        losses = [regress(*pair) for regress, pair in zip(self.regressors, pairs, strict=True)]
        return torch.stack(losses).sum()
