"""Relational knowledge distillation, Park et al. 2019 (arXiv:1904.05068), as in mdistiller (RKD)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distillers import Context, Distiller, Needs, NonNegative
from edgekd.maps import tapped
from edgekd.nets import Batch, Outputs

_NEAR = 1e-12  # squared distance below which two samples count as one


def relations(embedding: Tensor) -> tuple[Tensor, Tensor]:
    """(N, D) to distances (N, N), divided by their mean over pairs, and cosines of angles (N, N, N).

    ``cosines[j, i, k]`` is the angle at sample j. Coincident samples have no direction: their cosines are 0
    and pass no gradient.
    """
    n = len(embedding)
    between = embedding[None] - embedding[:, None]
    squared = between.square().sum(2)
    apart = (squared > _NEAR)[:, :, None]
    length = squared.clamp_min(_NEAR).sqrt()
    off_diagonal = 1 - torch.eye(n, dtype=embedding.dtype, device=embedding.device)
    distances = length * off_diagonal
    mean = distances.sum() / max(n * (n - 1), 1)
    direction = torch.where(apart, between / length[:, :, None], torch.zeros_like(between))
    return distances / mean.clamp_min(_NEAR), direction @ direction.transpose(1, 2)


def rkd_loss(student: Tensor, teacher: Tensor, distance: float, angle: float) -> Tensor:
    """``distance * Huber(distances) + angle * Huber(cosines)``, means over N^2 and N^3; 0 at identity.

    Embeddings may differ in width. Memory grows with ``N^2 D + N^3``.
    """
    ours, theirs = relations(student), relations(teacher)
    return distance * F.smooth_l1_loss(ours[0], theirs[0]) + angle * F.smooth_l1_loss(ours[1], theirs[1])


class Rkd(Distiller):
    """Distances 25 and angles 50, weight 1 beside the labels (mdistiller)."""

    needs = Needs(teacher=("embedding",), student=("embedding",))
    weight = 1.0
    hard_weight = 1.0

    def __init__(self, distance: NonNegative = 25.0, angle: NonNegative = 50.0) -> None:
        super().__init__()
        self.distance, self.angle = distance, angle

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        ours, theirs = tapped(student, "embedding"), tapped(teacher, "embedding").detach()
        return rkd_loss(ours, theirs, self.distance, self.angle)
