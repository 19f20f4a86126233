"""Masked generative distillation, Yang et al. 2022 (arXiv:2205.01529, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgekd.adapters import channel_adapter, seeded
from edgekd.distillers import Context, Distiller, Needs, NonNegative, Setting, Share
from edgekd.maps import same_size, tapped
from edgekd.nets import Batch, Outputs


class Mgd(Distiller):
    """``alpha / N * sum (generate(mask * align(student)) - teacher)^2`` on the last maps.

    `mask_ratio` is the probability that a channel, or with `spatial` a position, of a sample is set to zero;
    ``align`` is 1x1 and only there where widths differ, ``generate`` two 3x3 convolutions with a ReLU
    between. Defaults are those of the authors' classification code: alpha 7e-5, channels, 0.15; for dense
    tasks they take alpha 2e-5, positions, 0.75 (segmentation) or 0.65 (detection).
    Not zero at identity: the generator is random at first.
    """

    needs = Needs(teacher=("features",), student=("features",))
    weight = 1.0
    hard_weight = 1.0

    def __init__(self, alpha: NonNegative = 7e-5, mask_ratio: Share = 0.15, spatial: bool = False) -> None:
        super().__init__()
        self.alpha, self.mask_ratio, self.spatial = alpha, mask_ratio, spatial

    def build(self, student: Outputs, teacher: Outputs, setting: Setting) -> None:
        ours, theirs = tapped(student, "features"), tapped(teacher, "features")
        width = theirs.shape[1]
        with seeded(setting.seed):
            self.align = channel_adapter(ours, theirs)
            self.generate = nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)
            )

    def _mask(self, like: Tensor, context: Context) -> Tensor:
        """Ones and zeros, (N, C, 1, 1) or (N, 1, H, W)."""
        shape = (len(like), 1, *like.shape[2:]) if self.spatial else (*like.shape[:2], 1, 1)
        drawn = torch.rand(shape, generator=context.generator, device=like.device)
        return (drawn >= self.mask_ratio).to(like.dtype)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        ours, theirs = same_size(tapped(student, "features"), tapped(teacher, "features"))
        aligned = self.align(ours)
        generated = self.generate(aligned * self._mask(aligned, context))
        error: Tensor = (generated - theirs).square().sum() / len(theirs)
        return self.alpha * error
