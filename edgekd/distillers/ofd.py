"""Overhaul of feature distillation, Heo et al. 2019 (arXiv:1904.01866), in the form of mdistiller (OFD)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgekd.adapters import seeded
from edgekd.distillers import Context, Distiller, Needs, Setting
from edgekd.maps import paired
from edgekd.nets import Batch, Outputs

_DECAY = 0.99  # of the margin's statistics, a step


def partial_loss(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """Sum over (C, H, W) of ``(s - t')^2``, ``t' = max(t, margin)``, except where both ``s <= t'`` and
    ``t' <= 0``; mean over the batch. `margin` (C,), not positive. Zero where ``s = t'``."""
    target = torch.maximum(teacher, margin[:, None, None])
    counted = ((student > target) | (target > 0)).to(student.dtype)
    return ((student - target).square() * counted).sum() / len(student)


class Level(nn.Module):
    """One stage: the student's connector and the teacher's margin, its mean negative value per channel."""

    negative: Tensor  # (2, C): sum and count of the teacher's negative values, decayed

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        convolution = nn.Conv2d(student_width, teacher_width, 1, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out")
        self.connect = nn.Sequential(convolution, nn.BatchNorm2d(teacher_width))
        self.register_buffer("negative", torch.zeros(2, teacher_width))

    def margin(self, teacher: Tensor) -> Tensor:
        """(C,), after `teacher` has been counted; 0 for a channel that was never negative."""
        if self.training:
            below = torch.stack([teacher.clamp_max(0), (teacher < 0).to(teacher.dtype)]).sum((1, 3, 4))
            self.negative.mul_(_DECAY).add_(below)
        total, count = self.negative.clone()
        margin: Tensor = total / count.clamp_min(1e-6)
        return margin

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        return partial_loss(self.connect(student), teacher, self.margin(teacher))


class Ofd(Distiller):
    """Maps before their ReLU through a 1x1 convolution with batch norm; stage i of L weighs ``2^(i - L)``.

    Weight 0.001 beside the labels (mdistiller). The margin is the mean of the teacher's negative values of
    a channel, measured while training: the paper's definition. The authors' code computes it from the
    scale and shift of a batch norm before the ReLU, which not every teacher has there.
    """

    needs = Needs(teacher=("preactivations",), student=("preactivations",))
    weight = 1e-3
    hard_weight = 1.0

    def build(self, student: Outputs, teacher: Outputs, setting: Setting) -> None:
        pairs = paired(student.preactivations, teacher.preactivations, "preactivations")
        with seeded(setting.seed):
            self.levels = nn.ModuleList(Level(ours.shape[1], theirs.shape[1]) for ours, theirs in pairs)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        pairs = paired(student.preactivations, teacher.preactivations, "preactivations")
        losses = [level(*pair) for level, pair in zip(self.levels, pairs, strict=True)]
        halved = [loss / 2 ** (len(losses) - 1 - rank) for rank, loss in enumerate(losses)]
        return torch.stack(halved).sum()
