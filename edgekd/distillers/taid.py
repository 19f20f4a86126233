"""Temporally adaptive interpolation, Shing et al. 2025 (arXiv:2501.16937; the authors' code)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distillers import Context, Distiller, NonNegative, Positive, Share
from edgekd.nets import Batch, Outputs, wide


def taid_loss(student_logits: Tensor, teacher_logits: Tensor, t: Tensor) -> Tensor:
    """``-mean_n sum_c p log softmax(student)``, p = softmax((1 - t) * stopgrad(student) + t * teacher).

    Logits (N, classes), `t` 0-dim. A soft cross-entropy: at t = 1 that with the teacher, and at its minimum
    the target's entropy, not zero.
    """
    student, teacher = wide(student_logits), wide(teacher_logits).detach()
    target = torch.softmax((1 - t) * student.detach() + t * teacher, 1)
    return -(target * F.log_softmax(student, 1)).sum(1).mean()


class Taid(Distiller):
    """`t` goes from 0.4 to 1: by at least a straight line, and faster while the loss falls.

    After step k: ``r = (l[k-1] - l[k]) / l[k-1]``, ``m = 0.99 m + 0.01 r``,
    ``t = min(1, max(0.4 + 0.6 k / steps, t + alpha * sigmoid(m) * (1 - t)))``; the first step only stores its
    loss. The published alpha, 5e-4 a step, never beats the line in runs under about 4,000 steps, so alpha is
    multiplied by `reference_steps / steps`; 16,000 is our estimate of the length of the authors' runs.
    Weight 1, no cross-entropy with the labels.
    """

    weight = 1.0
    hard_weight = 0.0
    t: Tensor
    momentum: Tensor
    previous: Tensor
    started: Tensor

    def __init__(
        self,
        t_start: Share = 0.4,
        t_end: Share = 1.0,
        alpha: NonNegative = 5e-4,
        beta: NonNegative = 0.99,
        reference_steps: Positive = 16_000,
    ) -> None:
        super().__init__()
        self.t_start, self.t_end, self.alpha, self.beta = t_start, t_end, alpha, beta
        self.reference_steps = reference_steps
        self.register_buffer("t", torch.tensor(t_start))
        for name in ("momentum", "previous", "started"):
            self.register_buffer(name, torch.zeros(()))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        return taid_loss(student.logits, teacher.logits, self.t)

    @torch.no_grad()
    def after_step(self, loss: Tensor, context: Context) -> None:
        loss = loss.to(self.t.dtype)
        change = (self.previous - loss) / (self.previous + 1e-15)
        momentum = self.beta * self.momentum + (1 - self.beta) * change
        alpha = self.alpha * self.reference_steps / context.steps
        adaptive = self.t + alpha * torch.sigmoid(momentum) * (1 - self.t)
        line = self.t_start + (self.t_end - self.t_start) * context.step / context.steps
        t = torch.clamp(torch.maximum(line, adaptive), max=self.t_end)
        known = self.started > 0
        self.t.copy_(torch.where(known, t, self.t))
        self.momentum.copy_(torch.where(known, momentum, self.momentum))
        self.previous.copy_(loss)
        self.started.fill_(1.0)
