"""Similarity-preserving distillation, Tung and Mori 2019 (arXiv:1907.09682), as in mdistiller (SP)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from edgekd.distillers import Context, Distiller, Needs
from edgekd.maps import tapped
from edgekd.nets import Batch, Outputs


def similarities(features: Tensor) -> Tensor:
    """(N, ...) to (N, N): inner products between the samples, each row of unit length."""
    flat = features.flatten(1)
    return F.normalize(flat @ flat.T)


def sp_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``sum (similarities(student) - similarities(teacher.detach()))^2 / N^2`` of maps of any two shapes.

    Batch-coupled: a batch given twice has half the loss.
    """
    return (similarities(student) - similarities(teacher.detach())).square().mean()


class Sp(Distiller):
    """The last maps as they are, weight 3000 beside the labels (the paper's CIFAR setting)."""

    needs = Needs(teacher=("features",), student=("features",))
    weight = 3000.0
    hard_weight = 1.0

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        return sp_loss(tapped(student, "features"), tapped(teacher, "features"))
