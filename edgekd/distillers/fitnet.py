"""Hints, Romero et al. 2015 (arXiv:1412.6550, eq. 3)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.adapters import seeded
from edgekd.distillers import Context, Count, Distiller, Needs, Setting
from edgekd.maps import paired
from edgekd.nets import Batch, Outputs


class FitNet(Distiller):
    """``mean (ReLU(BN(conv(student))) - teacher)^2`` of one map, conv 1x1 to the teacher's width.

    Weight 100 beside the labels and one stage for both (the CRD code base); the paper trains the hint first
    and alone. `hint` counts maps from the coarsest, which is 1; the published hint layer is the one before
    the last stage. Where a network has fewer maps, its finest is taken. Maps of two sizes are pooled, where
    the authors use strided or transposed convolutions.
    """

    needs = Needs(teacher=("stages",), student=("stages",))
    weight = 100.0
    hard_weight = 1.0

    def __init__(self, hint: Count = 2) -> None:
        super().__init__()
        self.hint = hint

    def _pair(self, student: Outputs, teacher: Outputs) -> tuple[Tensor, Tensor]:
        pairs = paired(student.stages, teacher.stages, "stages")
        return pairs[-min(self.hint, len(pairs))]

    def build(self, student: Outputs, teacher: Outputs, setting: Setting) -> None:
        ours, theirs = self._pair(student, teacher)
        width = theirs.shape[1]
        with seeded(setting.seed):
            convolution = nn.Conv2d(ours.shape[1], width, 1)
        self.regressor = nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU())

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        ours, theirs = self._pair(student, teacher)
        return F.mse_loss(self.regressor(ours), theirs)
