"""Layered self-supervised self-distillation: inspired by LSSKD, of which only the abstract was at hand.

What is computed follows HSAKD (Yang et al. 2021, arXiv:2107.13715): four rotations and joint labels of class
and rotation on every stage. Without its teacher, the deepest stage teaches the others.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillers import Context, Distiller, Needs, NonNegative, Positive
from edgekd.errors import UnsupportedModelError
from edgekd.nets import Batch, Outputs, wide
from edgekd.taps import Tapped
from edgekd.tasks.classification import hard_label_loss
from edgekd.wraps import Branch, only_wrap, square, trunk_to

ROTATIONS = 4


def joint_labels(labels: Tensor, rotations: int) -> Tensor:
    """``label * rotations + r`` for the samples at rotation 0, then those at rotation 1, and so on:
    (N,) to (rotations N,). -1 stays -1."""
    turned = torch.arange(rotations, device=labels.device)[:, None]
    return torch.where(labels >= 0, labels * rotations + turned, -1).flatten()


class _Rotated(nn.Module):
    """In training mode the student sees its N images at four rotations. `exits` are the joint logits (4N,
    4 classes) of each stage, `extra_maps` the maps (4N, C, H, W) behind them; all else is of the N upright
    images."""

    def __init__(self, student: Tapped, branches: list[Branch]) -> None:
        super().__init__()
        self.student, self.branches = student, nn.ModuleList(branches)

    def forward(self, inputs: Tensor) -> Outputs:
        if not self.training:
            upright: Outputs = self.student(inputs)
            return upright
        views = torch.cat([torch.rot90(inputs, turns, (2, 3)) for turns in range(ROTATIONS)])
        outputs: Outputs = self.student(views)
        made = [branch(map_) for branch, map_ in zip(self.branches, outputs.stages, strict=True)]
        return replace(
            _first(outputs, len(inputs)),
            exits=tuple(logits for _, logits in made),
            extra_maps=tuple(map_ for map_, _ in made),
        )

    def deploy(self) -> nn.Module:
        """The student without its branches."""
        return self.student.deploy()


def _first(outputs: Outputs, count: int) -> Outputs:
    """The outputs of the first `count` samples."""

    def part(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[:count]

    def parts(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(tensor[:count] for tensor in tensors)

    return Outputs(
        outputs.logits[:count],
        part(outputs.embedding),
        part(outputs.features),
        parts(outputs.stages),
        parts(outputs.preactivations),
        parts(outputs.tokens),
    )


class Lsskd(Distiller):
    """Beside the labels: ``sum_l CE(branch l, joint label) + kl_weight sum_(l<L) T^2 KL(branch L || branch l)
    + hint_weight sum_(l<L) mean (map l - map L)^2``, the deepest branch L held fixed in the last two.

    No teacher. T 3 as in HSAKD; the weights 1 and 0.01 are ours, since the abstract names none. A branch
    halves its stage's map to the shape of the last map by separable convolutions. Not zero at identity.
    """

    needs = Needs(teacher=(), student=("logits", "stages"), labels=True, mixable=False)
    weight = 1.0
    hard_weight = 1.0

    def __init__(
        self, temperature: Positive = 3.0, kl_weight: NonNegative = 1.0, hint_weight: NonNegative = 0.01
    ) -> None:
        super().__init__()
        self.temperature, self.kl_weight, self.hint_weight = temperature, kl_weight, hint_weight

    def wrap(self, student: nn.Module, outputs: Outputs, teacher: nn.Module | None) -> nn.Module:
        tapped, maps = only_wrap(student, "lsskd"), outputs.stages
        if not square(tapped.layout):
            raise UnsupportedModelError(
                "method 'lsskd' rotates images by a quarter turn, and these are not square",
                "set data.image_size, or choose another method without a teacher: dml",
            )
        width, joint = maps[-1].shape[1], ROTATIONS * outputs.logits.shape[1]
        trunks: list[nn.Module] = [trunk_to(maps, index, width) for index in range(len(maps) - 1)]
        branches = [Branch(trunk, width, joint) for trunk in (*trunks, nn.Identity())]
        return _Rotated(tapped, [branch.to(maps[0].device) for branch in branches])

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        rotations = len(student.exits[-1]) // len(student.logits)
        labels = joint_labels(batch.labels, rotations)
        loss = torch.stack([hard_label_loss(logits, labels) for logits in student.exits]).sum()
        deepest = F.log_softmax(wide(student.exits[-1]).detach() / self.temperature, 1)
        for logits in student.exits[:-1]:
            branch = F.log_softmax(wide(logits) / self.temperature, 1)
            apart = F.kl_div(branch, deepest, reduction="batchmean", log_target=True)
            loss = loss + self.kl_weight * self.temperature**2 * apart
        for map_ in student.extra_maps[:-1]:
            last = wide(student.extra_maps[-1]).detach()
            pooled = F.adaptive_avg_pool2d(wide(map_), (last.shape[2], last.shape[3]))
            loss = loss + self.hint_weight * F.mse_loss(pooled, last)
        return loss
