"""Curriculum temperature, Li et al. 2023 (arXiv:2211.16231), with one global temperature."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from edgekd.distillers import Context, Distiller, NonNegative, Positive, Setting
from edgekd.nets import Batch, Outputs, softened_kl


def curriculum(epoch: Tensor, ramp_epochs: float) -> Tensor:
    """Factor of the temperature's gradient: half a cosine from 0 to -1 over `ramp_epochs`, then -1."""
    share = torch.clamp(epoch / ramp_epochs, max=1.0)
    return -1 + 0.5 * (1 + torch.cos(math.pi * share))


def scale_gradient(value: Tensor, factor: Tensor) -> Tensor:
    """`value` itself, with a gradient that is `factor` times as large."""
    return value.detach() + factor * (value - value.detach())


class Ctkd(Distiller):
    """``T^2 * mean_n KL(softmax(teacher / T) || softmax(student / T))``, T = 1 + 20 * sigmoid(theta); zero at
    identity. Theta starts at 1 (T = 15.6) and climbs the loss that the student descends, at first slowly:
    its gradient is multiplied by `curriculum`. Weights 0.1 (labels) and 0.9, 10 of 240 epochs of curriculum:
    the published CIFAR-100 setting."""

    weight = 0.9
    hard_weight = 0.1
    theta: Tensor

    def __init__(self, low: Positive = 1.0, span: Positive = 20.0, ramp_epochs: NonNegative = 10.0) -> None:
        super().__init__()
        self.low, self.span, self.ramp_epochs = low, span, ramp_epochs

    def build(self, student: Outputs, teacher: Outputs, setting: Setting) -> None:
        self.theta = nn.Parameter(torch.ones(()))

    def temperature(self, theta: Tensor) -> Tensor:
        """Between `low` and `low + span`."""
        return self.low + self.span * torch.sigmoid(theta)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        theta = scale_gradient(self.theta, curriculum(context.epoch, self.ramp_epochs))
        return softened_kl(student.logits, teacher.logits, self.temperature(theta)).mean()
