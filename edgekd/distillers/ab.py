"""Activation boundaries, Heo et al. 2019 (arXiv:1811.03233), in the form of the CRD code base (ABLoss)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgekd.adapters import seeded
from edgekd.distillers import Context, Distiller, Needs, Positive, Setting, Share
from edgekd.maps import paired
from edgekd.nets import Batch, Outputs

_SCALE = 3e-3  # the published factor on the sum over all neurons


def boundary_loss(student: Tensor, teacher: Tensor, margin: float) -> Tensor:
    """Squared distance to the margin on the teacher's side of zero, where it is not reached.

    ``sum (s + m)^2 [s > -m, t <= 0] + (s - m)^2 [s <= m, t > 0]`` over a (C, H, W) map of values before
    their ReLU, mean over the batch. Not zero at identity: an activation on the right side, but within the
    margin, pays.
    """
    on = (teacher > 0).to(student.dtype)
    short = on * (margin - student).clamp_min(0) + (1 - on) * (margin + student).clamp_min(0)
    return short.square().sum() / len(student)


def _connector(ours: int, theirs: int) -> nn.Module:
    if ours == theirs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(ours, theirs, 1, bias=False), nn.BatchNorm2d(theirs))


class Ab(Distiller):
    """Margin 1; stage i of L weighs ``2^(i - L)``; only in the first `share` of the steps, then zero.

    The authors initialise with this loss alone for 30 epochs and train with labels for 240 after that, so
    `share` is 30/270. Here the labels act from the start and the term acts beside them, weight 1. Student
    maps pass a 1x1 convolution with batch norm where the widths differ.
    """

    needs = Needs(teacher=("preactivations",), student=("preactivations",))
    weight = 1.0
    hard_weight = 1.0

    def __init__(self, margin: Positive = 1.0, share: Share = 30 / 270) -> None:
        super().__init__()
        self.margin, self.share = margin, share

    def build(self, student: Outputs, teacher: Outputs, setting: Setting) -> None:
        with seeded(setting.seed):
            self.connectors = nn.ModuleList(
                _connector(ours.shape[1], theirs.shape[1])
                for ours, theirs in paired(student.preactivations, teacher.preactivations, "preactivations")
            )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        pairs = paired(student.preactivations, teacher.preactivations, "preactivations")
        losses = [
            boundary_loss(connect(ours), theirs, self.margin)
            for connect, (ours, theirs) in zip(self.connectors, pairs, strict=True)
        ]
        halved = [loss / 2 ** (len(losses) - 1 - rank) for rank, loss in enumerate(losses)]
        loss = _SCALE * torch.stack(halved).sum()
        return loss * (context.step < self.share * context.steps).to(loss.dtype)
