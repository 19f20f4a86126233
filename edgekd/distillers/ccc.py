"""Concordance, inspired by Wav2Small, Kounadis-Bastian et al. 2024 (arXiv:2408.13920), which does not state
its training loss; the coefficient is that of Lin 1989 (Biometrics 45, eq. 2)."""

from __future__ import annotations

from torch import Tensor

from edgekd.distillers import Context, Distiller
from edgekd.nets import Batch, Outputs, wide


def ccc(student: Tensor, teacher: Tensor) -> Tensor:
    """``2 cov / (var_S + var_T + (mean_S - mean_T)^2)`` down the columns of (N, C), population moments; (C,).

    1 where both are equal, also where both are the same constant.
    """
    means = student.mean(0), teacher.mean(0)
    ours, theirs = student - means[0], teacher - means[1]
    spread = ours.square().mean(0) + theirs.square().mean(0) + (means[0] - means[1]).square()
    return (2 * (ours * theirs).mean(0) + 1e-12) / (spread + 1e-12)


class Ccc(Distiller):
    """``mean over outputs of 1 - CCC(student, teacher)`` over the batch, for outputs that are quantities;
    on logits it asks for the teacher's values, scale and offset included. No labels. Use large batches: the
    coefficient of a batch is not that of the set."""

    weight = 1.0
    hard_weight = 0.0

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        return 1 - ccc(wide(student.logits), wide(teacher.logits).detach()).mean()
