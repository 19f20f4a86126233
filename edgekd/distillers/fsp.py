"""Flow of solution procedure, Yim et al. 2017 (CVPR 2017, eq. 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from edgekd.distillers import Context, Distiller, Needs, Setting
from edgekd.errors import UnsupportedModelError
from edgekd.maps import paired, pooled
from edgekd.nets import Batch, Outputs


def flow(first: Tensor, second: Tensor) -> Tensor:
    """(N, C, H, W) and (N, C', H', W') of one network to (N, C, C'): ``first @ second^T / HW``, the larger
    map pooled to the smaller."""
    size = (min(first.shape[2], second.shape[2]), min(first.shape[3], second.shape[3]))
    one, other = (pooled(map_, size).flatten(2) for map_ in (first, second))
    return one @ other.transpose(1, 2) / one.shape[2]


def fsp_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """``sum over neighbouring maps of mean (flow(student) - flow(teacher))^2``; zero at identity."""
    flows = [[flow(a, b) for a, b in pairwise(maps)] for maps in (student, teacher)]
    return torch.stack([(s - t).square().mean() for s, t in zip(*flows, strict=True)]).sum()


class Fsp(Distiller):
    """Weight 50 beside the labels, throughout; the authors train it first and alone.

    It compares channel with channel, so each pair of stages must have equal widths: there is no adapter.
    """

    needs = Needs(teacher=("stages",), student=("stages",))
    weight = 50.0
    hard_weight = 1.0

    def build(self, student: Outputs, teacher: Outputs, setting: Setting) -> None:
        count = min(len(student.stages), len(teacher.stages))
        if count < 2:
            raise UnsupportedModelError(
                f"tap 'stages': method 'fsp' needs two maps of each network; the student gives "
                f"{len(student.stages)}, the teacher {len(teacher.stages)}",
                "choose a method of one map, such as sp or ickd",
            )
        for ours, theirs in zip(student.stages[-count:], teacher.stages[-count:], strict=True):
            if ours.shape[1] != theirs.shape[1]:
                raise UnsupportedModelError(
                    f"tap 'stages': method 'fsp' needs equal widths; the student's map is "
                    f"{tuple(ours.shape)}, the teacher's {tuple(theirs.shape)}",
                    "choose a method with an adapter, such as fitnet or vid",
                )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        pairs = paired(student.stages, teacher.stages, "stages")
        return fsp_loss([ours for ours, _ in pairs], [theirs for _, theirs in pairs])
