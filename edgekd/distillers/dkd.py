"""Decoupled knowledge distillation, Zhao et al. 2022 (arXiv:2203.08679, eq. 7)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distillers import Needs
from edgekd.nets import Outputs


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
    wide = [z if z.dtype.itemsize >= 4 else z.float() for z in (student_logits, teacher_logits.detach())]
    target = F.one_hot(labels, student_logits.shape[1]).bool()
    binary, rest = [], []
    for logits in wide:
        log_p = F.log_softmax(logits / temperature, 1)
        others = log_p.masked_fill(target, float("-inf"))
        binary.append(torch.stack([log_p[target], torch.logsumexp(others, 1)], 1))
        rest.append(F.log_softmax((logits / temperature).masked_fill(target, -1000.0), 1))
    part = [F.kl_div(s, t, reduction="batchmean", log_target=True) for s, t in (binary, rest)]
    return (alpha * part[0] + beta * part[1]) * temperature**2


class Dkd:
    """Temperature 4, alpha 1, beta 8, weight 1 beside the labels. The authors warm up linearly over 20 of 240
    epochs; runs here are about ten times shorter, and so is the warm-up."""

    needs = Needs(labels="required")
    weight = 1.0
    hard_weight = 1.0

    def __init__(
        self, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, warmup_epochs: int = 2
    ) -> None:
        self.alpha, self.beta, self.temperature, self.warmup_epochs = alpha, beta, temperature, warmup_epochs

    def __call__(self, student: Outputs, teacher: Outputs, labels: Tensor, epoch: int) -> Tensor:
        warmup = min((epoch + 1) / self.warmup_epochs, 1.0)
        loss = dkd_loss(student.logits, teacher.logits, labels, self.alpha, self.beta, self.temperature)
        return warmup * loss
