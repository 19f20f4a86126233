"""Knowledge distillation, Hinton et al. 2015 (arXiv:1503.02531, section 2)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from edgekd.distillers import Context, Distiller, Positive
from edgekd.nets import Batch, Outputs, wide


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """``T^2 * mean_n KL(softmax(teacher / T) || softmax(student / T))``, (N, classes); 0 at identity."""
    student = F.log_softmax(wide(student_logits) / temperature, 1)
    teacher = F.log_softmax(wide(teacher_logits).detach() / temperature, 1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


class Kd(Distiller):
    """Temperature 4, weights 0.1 (labels) and 0.9: the defaults of the CRD code base (arXiv:1910.10699)."""

    weight = 0.9
    hard_weight = 0.1

    def __init__(self, temperature: Positive = 4.0) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        return kd_loss(student.logits, teacher.logits, self.temperature)
