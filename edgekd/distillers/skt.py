"""Structured knowledge transfer, Liu et al. 2020 (arXiv:2003.10120, section 3), mean-normalised."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.adapters import seeded
from edgekd.distillers import Context, Distiller, Needs, NonNegative, Setting
from edgekd.maps import paired
from edgekd.nets import Batch, Outputs


def cosine_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """``mean (1 - cos(student, teacher))`` over samples and positions, cosine over the channels of
    (N, C, H, W) maps. A position that is zero in both counts as equal."""
    gap = 1 - F.cosine_similarity(student_map, teacher_map.detach(), dim=1)
    silent = (student_map == 0).all(1) & (teacher_map == 0).all(1)
    return gap.masked_fill(silent, 0.0).mean()


def flow(first: Tensor, second: Tensor) -> Tensor:
    """(N, C1, C2) inner products over the positions, over their number, of two maps of one size, each
    channel of each sample standardised first."""
    maps = [F.instance_norm(m).flatten(2) for m in (first, second)]
    return maps[0] @ maps[1].transpose(1, 2) / maps[0].shape[2]


class Skt(Distiller):
    """``cosine * sum_taps cosine_loss + fsp * sum_{i<j} mean (flow_S,ij - flow_T,ij)^2``, both weights 1/2.

    For dense outputs, or maps in general: the terms for density maps are left out. The authors sum over
    positions and samples, take the flow of the batch's first sample only and train one image at a time; here
    both terms are means over the whole batch. Where widths differ, a 1x1 convolution leads to the teacher's,
    with a ReLU behind it where the teacher's map has no negative value. For the flow, maps are max-pooled to
    the coarsest size.
    """

    needs = Needs(teacher=("stages",), student=("stages",))
    weight = 1.0
    hard_weight = 1.0

    def __init__(self, cosine: NonNegative = 0.5, fsp: NonNegative = 0.5) -> None:
        super().__init__()
        self.cosine, self.fsp = cosine, fsp

    def build(self, student: Outputs, teacher: Outputs, setting: Setting) -> None:
        self.adapters = nn.ModuleList()
        with seeded(setting.seed):
            for ours, theirs in paired(student.stages, teacher.stages, "stages"):
                adapter = nn.Sequential()
                if ours.shape[1] != theirs.shape[1]:
                    adapter.append(nn.Conv2d(ours.shape[1], theirs.shape[1], 1))
                    if float(theirs.min()) >= 0:
                        adapter.append(nn.ReLU())
                self.adapters.append(adapter)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        pairs = paired(student.stages, teacher.stages, "stages")
        ours = [adapt(s) for adapt, (s, _) in zip(self.adapters, pairs, strict=True)]
        theirs = [t for _, t in pairs]
        loss = (
            self.cosine * torch.stack([cosine_loss(*pair) for pair in zip(ours, theirs, strict=True)]).sum()
        )
        flows = [_flows(maps) for maps in (ours, theirs)]
        for first, second in zip(*flows, strict=True):
            loss = loss + self.fsp * F.mse_loss(first, second)
        return loss


def _flows(maps: list[Tensor]) -> list[Tensor]:
    """`flow` of every two of the maps, at the coarsest one's size."""
    height, width = maps[-1].shape[2:]
    small = [F.adaptive_max_pool2d(m, (height, width)) for m in maps]
    return [flow(*two) for two in itertools.combinations(small, 2)]
