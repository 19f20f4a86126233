"""Inter-channel correlation, Liu et al. 2021 (arXiv:2202.03680), its channel form (ICKD-C)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.adapters import seeded
from edgekd.distillers import Context, Distiller, Needs, Setting
from edgekd.maps import same_size, tapped
from edgekd.nets import Batch, Outputs


def correlations(features: Tensor) -> Tensor:
    """(N, C, H, W) to (N, C, C): inner products between the channels, each row of unit length."""
    flat = features.flatten(2)
    return F.normalize(flat @ flat.transpose(1, 2), dim=2)


def ickd_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``sum (correlations(student) - correlations(teacher))^2 / (C * N)``; 0 at identity, equal widths."""
    apart = correlations(student) - correlations(teacher)
    return apart.square().sum() / (apart.shape[0] * apart.shape[1])


class Ickd(Distiller):
    """The last map; a 1x1 convolution with batch norm where the widths differ.

    Weight 2.5 beside the labels; this value has not been checked against a published configuration.
    """

    needs = Needs(teacher=("features",), student=("features",))
    weight = 2.5
    hard_weight = 1.0

    def build(self, student: Outputs, teacher: Outputs, setting: Setting) -> None:
        ours, theirs = (
            features.shape[1]
            for features in same_size(tapped(student, "features"), tapped(teacher, "features"))
        )
        self.embed: nn.Module = nn.Identity()
        if ours != theirs:
            with seeded(setting.seed):
                convolution = nn.Conv2d(ours, theirs, 1, bias=False)
            self.embed = nn.Sequential(convolution, nn.BatchNorm2d(theirs))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        ours, theirs = same_size(tapped(student, "features"), tapped(teacher, "features"))
        return ickd_loss(self.embed(ours), theirs)
