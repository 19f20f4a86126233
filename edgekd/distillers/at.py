"""Attention transfer, Zagoruyko and Komodakis 2017 (arXiv:1612.03928, eq. 2)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distillers import Context, Distiller, Needs, Positive
from edgekd.maps import paired
from edgekd.nets import Batch, Outputs


def attention(features: Tensor, power: float) -> Tensor:
    """(N, C, H, W) to (N, HW): mean over channels of ``|f|^power``, each row of unit length."""
    return F.normalize(features.abs().pow(power).mean(1).flatten(1))


def at_loss(student: Tensor, teacher: Tensor, power: float) -> Tensor:
    """``mean (attention(student) - attention(teacher))^2`` of two maps of one size; widths may differ."""
    return (attention(student, power) - attention(teacher, power)).square().mean()


class At(Distiller):
    """Power 2, all stages summed, weight 1000 beside the labels (mdistiller and the CRD code base)."""

    needs = Needs(teacher=("stages",), student=("stages",))
    weight = 1000.0
    hard_weight = 1.0

    def __init__(self, power: Positive = 2.0) -> None:
        super().__init__()
        self.power = power

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        pairs = paired(student.stages, teacher.stages, "stages")
        return torch.stack([at_loss(ours, theirs, self.power) for ours, theirs in pairs]).sum()
