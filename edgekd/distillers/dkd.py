"""Decoupled knowledge distillation, Zhao et al. 2022 (arXiv:2203.08679, eq. 7)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distillers import Context, Distiller, Needs, NonNegative, Positive, Whole
from edgekd.nets import Batch, Outputs, wide


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    alpha: float,
    beta: float,
    temperature: float,
) -> Tensor:
    """``T^2 * (alpha * KL(target vs rest) + beta * KL(among the rest))`` of (N, classes) logits.

    Zero at identity. The binary part works on log-probabilities, so a saturated teacher stays finite.
    """
    both = [wide(z) for z in (student_logits, teacher_logits.detach())]
    target = labels[:, None] == torch.arange(student_logits.shape[1], device=labels.device)
    binary, rest = [], []
    for logits in both:
        log_p = F.log_softmax(logits / temperature, 1)
        others = log_p.masked_fill(target, float("-inf"))
        own = log_p.gather(1, labels[:, None])
        binary.append(torch.cat([own, torch.logsumexp(others, 1, keepdim=True)], 1))
        rest.append(F.log_softmax((logits / temperature).masked_fill(target, -1000.0), 1))
    part = [F.kl_div(s, t, reduction="batchmean", log_target=True) for s, t in (binary, rest)]
    return (alpha * part[0] + beta * part[1]) * temperature**2


class Dkd(Distiller):
    """Temperature 4, alpha 1, beta 8, weight 1 beside the labels. The authors warm up linearly over 20 of 240
    epochs; runs here are about ten times shorter, and so is the warm-up."""

    needs = Needs(labels=True)
    weight = 1.0
    hard_weight = 1.0

    def __init__(
        self,
        alpha: NonNegative = 1.0,
        beta: NonNegative = 8.0,
        temperature: Positive = 4.0,
        warmup_epochs: Whole = 2,
    ) -> None:
        super().__init__()
        self.alpha, self.beta, self.temperature, self.warmup_epochs = alpha, beta, temperature, warmup_epochs

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        warmup = torch.clamp((context.epoch + 1) / self.warmup_epochs, max=1.0)
        loss = dkd_loss(student.logits, teacher.logits, batch.labels, self.alpha, self.beta, self.temperature)
        return warmup * loss
