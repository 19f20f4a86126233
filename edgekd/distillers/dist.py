"""Distillation from a stronger teacher, Huang et al. 2022 (arXiv:2205.10536, eq. 8 to 10)."""

from __future__ import annotations

import torch
from torch import Tensor

from edgekd.distillers import Context, Distiller, NonNegative, Positive
from edgekd.nets import Batch, Outputs, wide


def _one_minus_pearson(a: Tensor, b: Tensor) -> Tensor:
    """Mean over rows of 1 - correlation."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    correlation: Tensor = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)
    return (1 - correlation).mean()


def dist_loss(
    student_logits: Tensor, teacher_logits: Tensor, beta: float, gamma: float, temperature: float
) -> Tensor:
    """``T^2 * (beta * (1 - rho over classes) + gamma * (1 - rho over the batch))`` of softmax(logits / T).

    Logits are (N, classes). The factor T^2 follows the published code; as the correlation tends to a
    constant for large T, the loss grows with T (rescale the weight when changing T).
    """
    both = [wide(z) for z in (student_logits, teacher_logits.detach())]
    student, teacher = (torch.softmax(z / temperature, 1) for z in both)
    between = _one_minus_pearson(student, teacher)
    within = _one_minus_pearson(student.T, teacher.T)
    return (beta * between + gamma * within) * temperature**2


class Dist(Distiller):
    """Beta and gamma 2, temperature 4, weight 1 beside the labels (the paper's CIFAR setting)."""

    weight = 1.0
    hard_weight = 1.0

    def __init__(
        self, beta: NonNegative = 2.0, gamma: NonNegative = 2.0, temperature: Positive = 4.0
    ) -> None:
        super().__init__()
        self.beta, self.gamma, self.temperature = beta, gamma, temperature

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        return dist_loss(student.logits, teacher.logits, self.beta, self.gamma, self.temperature)
