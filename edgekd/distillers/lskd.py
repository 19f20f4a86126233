"""Logit standardisation, Sun et al. 2024 (arXiv:2403.01427, algorithm 1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from edgekd.distillers import Context, Distiller, Positive
from edgekd.nets import Batch, Outputs, wide


def standardise(logits: Tensor) -> Tensor:
    """Per sample: minus the mean over classes, over the unbiased standard deviation (plus 1e-7)."""
    logits = wide(logits)
    return (logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7)


def lskd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KD of z-scored (N, classes) logits; invariant to ``a * student + b`` for a > 0; zero at identity."""
    student = F.log_softmax(standardise(student_logits) / temperature, 1)
    teacher = F.log_softmax(standardise(teacher_logits).detach() / temperature, 1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


class Lskd(Distiller):
    """Temperature 2, weights 0.1 (labels) and 9, as the authors' CIFAR-100 configurations."""

    weight = 9.0
    hard_weight = 0.1

    def __init__(self, temperature: Positive = 2.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        return lskd_loss(student.logits, teacher.logits, self.temperature)
