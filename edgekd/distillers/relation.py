"""DisWOT's relation similarity as a loss, Dong et al. 2023 (arXiv:2303.15678, eq. 3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from edgekd.distillers import Context, Distiller, Needs
from edgekd.maps import tapped
from edgekd.nets import Batch, Outputs


def relation_loss(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """``||G_T - G_S||_F^2 / N^2``, ``G`` the row-normalised ``F F^T`` of (N, ...) features; any widths.

    The score that DisWOT ranks students by, negated; the same as the loss of Tung and Mori (`sp`).
    """
    student, teacher = (
        F.normalize(rows @ rows.T, dim=1)
        for rows in (student_features.flatten(1), teacher_features.detach().flatten(1))
    )
    return (teacher - student).square().sum() / len(student) ** 2


class Relation(Distiller):
    """The last map, so that a student found by this score is trained by it. The paper does not state the
    weight; 3000 is that of the same formula in the CRD code base."""

    needs = Needs(teacher=("features",), student=("features",))
    weight = 3000.0
    hard_weight = 1.0

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        return relation_loss(tapped(student, "features"), tapped(teacher, "features"))
