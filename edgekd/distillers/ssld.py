"""Label-free distillation with a symmetric KL, Cui et al. 2021 (arXiv:2103.05959; PaddleClas)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from edgekd.distillers import Context, Distiller
from edgekd.nets import Batch, Outputs, wide


def symmetric_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """``mean_n [KL(pt || ps) + KL(ps || pt)] / 2`` of (N, classes) logits, no temperature; zero at identity.

    The source's documentation calls it JS. ``sum_c (pt - ps) * (log pt - log ps)`` is the same sum.
    """
    student = F.log_softmax(wide(student_logits), 1)
    teacher = F.log_softmax(wide(teacher_logits).detach(), 1)
    return 0.5 * ((teacher.exp() - student.exp()) * (teacher - student)).sum(1).mean()


class Ssld(Distiller):
    """Weight 1 and no cross-entropy: labels are never read, so the images may be any of the domain. The
    published gain comes from many of them (labelled and not), long schedules and little weight decay."""

    weight = 1.0
    hard_weight = 0.0

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        return symmetric_kl(student.logits, teacher.logits)
