"""Multi-level logit distillation, Jin et al. 2023 (CVPR; formulas of the authors' code), on one view."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgekd.distillers import Context, Distiller, NonNegative, Positive
from edgekd.nets import Batch, Outputs, softened_kl, wide


def _probabilities(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    student = torch.softmax(wide(student_logits) / temperature, 1)
    return student, torch.softmax(wide(teacher_logits).detach() / temperature, 1)


def class_correlation(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """``|Pt^T Pt - Ps^T Ps|^2 / C`` with P = softmax(logits / T), (N, C). A batch given twice makes it four
    times as large: the sums over the batch are not divided by its size, as published."""
    student, teacher = _probabilities(student_logits, teacher_logits, temperature)
    return (teacher.T @ teacher - student.T @ student).square().sum() / student.shape[1]


def batch_correlation(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """``|Pt Pt^T - Ps Ps^T|^2 / N`` with P = softmax(logits / T), (N, C). A batch given twice makes it twice
    as large."""
    student, teacher = _probabilities(student_logits, teacher_logits, temperature)
    return (teacher @ teacher.T - student @ student.T).square().sum() / len(student)


class Mlkd(Distiller):
    """``sum_T [T^2 * KL + class correlation + batch correlation]`` over the temperatures 2 to 6, weights 0.1
    (labels) and 0.9; zero at identity.

    The published runs add a second, strongly augmented view of each image (four forward passes a sample) and
    confidence masks that, as coded, only multiply some sums by about one half; here there is one view and no
    mask. The correlations grow with the batch: the weight belongs to batches of 64.
    """

    weight = 0.9
    hard_weight = 0.1

    def __init__(
        self,
        temperatures: Sequence[Positive] = (2.0, 3.0, 4.0, 5.0, 6.0),
        class_weight: NonNegative = 1.0,
        batch_weight: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        self.temperatures = tuple(temperatures)
        self.class_weight, self.batch_weight = class_weight, batch_weight

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        parts = []
        for temperature in self.temperatures:
            given = student.logits, teacher.logits, temperature
            parts.append(softened_kl(*given).mean())
            parts.append(self.class_weight * class_correlation(*given))
            parts.append(self.batch_weight * batch_correlation(*given))
        return torch.stack(parts).sum()
