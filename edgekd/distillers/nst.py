"""Neuron selectivity transfer, Huang and Wang 2017 (arXiv:1707.01219), as in mdistiller (NST)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distillers import Context, Distiller, Needs
from edgekd.maps import paired
from edgekd.nets import Batch, Outputs


def _kernel_mean(one: Tensor, other: Tensor) -> Tensor:
    """Mean of ``<a, b>^2`` over samples and pairs of channels, of (N, C, HW) and (N, C', HW)."""
    return (one @ other.transpose(1, 2)).square().mean()


def nst_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared MMD between the channels of two maps of one size, as points of unit length in HW dimensions.

    ``mean k(s, s) + mean k(t, t) - 2 mean k(s, t)``, ``k = <a, b>^2``; zero at identity, widths may differ.
    """
    ours, theirs = (F.normalize(m.flatten(2), dim=2) for m in (student, teacher))
    return _kernel_mean(ours, ours) + _kernel_mean(theirs, theirs) - 2 * _kernel_mean(ours, theirs)


class Nst(Distiller):
    """All stages summed, weight 50 beside the labels (mdistiller and the CRD code base)."""

    needs = Needs(teacher=("stages",), student=("stages",))
    weight = 50.0
    hard_weight = 1.0

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        pairs = paired(student.stages, teacher.stages, "stages")
        return torch.stack([nst_loss(ours, theirs) for ours, theirs in pairs]).sum()
