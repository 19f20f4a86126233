"""Knowledge review, Chen et al. 2021 (arXiv:2104.09044, section 3)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.adapters import channel_adapter, seeded
from edgekd.distillers import Context, Count, Distiller, Needs, Setting, Whole
from edgekd.maps import paired, tapped
from edgekd.nets import Batch, Outputs


def hcl_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Hierarchical context loss of two (N, C, H, W) maps: the mean square error, plus those of the maps
    pooled to 4x4, 2x2 and 1x1, over the sum of the weights.

    Levels not smaller than the map are left out, and the first one used weighs 1/2, the next 1/4, and so on.
    """
    teacher_map = teacher_map.detach()
    total, weights, weight = F.mse_loss(student_map, teacher_map), 1.0, 1.0
    for size in (4, 2, 1):
        if size < min(student_map.shape[2:]):
            weight /= 2
            ours, theirs = (F.adaptive_avg_pool2d(m, size) for m in (student_map, teacher_map))
            total = total + weight * F.mse_loss(ours, theirs)
            weights += weight
    return total / weights


class Hcl(Distiller):
    """`hcl_loss` of every pair of stages, summed: the loss of ReviewKD as a plain hint, through a 1x1
    convolution where widths differ. Weight 1, as in ReviewKD."""

    needs = Needs(teacher=("stages",), student=("stages",))
    weight = 1.0
    hard_weight = 1.0

    def build(self, student: Outputs, teacher: Outputs, setting: Setting) -> None:
        with seeded(setting.seed):
            pairs = paired(student.stages, teacher.stages, "stages")
            self.adapters = nn.ModuleList(channel_adapter(*pair) for pair in pairs)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        pairs = paired(student.stages, teacher.stages, "stages")
        levels = [hcl_loss(adapt(s), t) for adapt, (s, t) in zip(self.adapters, pairs, strict=True)]
        return torch.stack(levels).sum()


class Fusion(nn.Module):
    """Attention-based fusion of a student's map with what came from the coarser ones."""

    def __init__(self, channels: int, middle: int, out: int, *, fuse: bool) -> None:
        super().__init__()
        narrow = nn.Conv2d(channels, middle, 1, bias=False)
        smooth = nn.Conv2d(middle, out, 3, padding=1, bias=False)
        for convolution in (narrow, smooth):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.reduce = nn.Sequential(narrow, nn.BatchNorm2d(middle))
        self.expand = nn.Sequential(smooth, nn.BatchNorm2d(out))
        self.attention = nn.Conv2d(2 * middle, 2, 1) if fuse else None

    def forward(self, own: Tensor, coarser: Tensor | None) -> tuple[Tensor, Tensor]:
        """`own` (N, C, H, W), `coarser` (N, middle, h, w) or None where there is nothing to fuse.
        Returns the map for the teacher (N, out, H, W), and the fused one (N, middle, H, W)."""
        fused = self.reduce(own)
        if self.attention is not None and coarser is not None:
            above = F.interpolate(coarser, fused.shape[2:], mode="nearest")
            shares = torch.sigmoid(self.attention(torch.cat([fused, above], 1)))
            fused = fused * shares[:, :1] + above * shares[:, 1:]
        return self.expand(fused), fused


class ReviewKd(Distiller):
    """Each level of the student, fused with all coarser ones, meets the teacher's level in `hcl_loss`;
    levels are the stages and, as the coarsest, the embedding.

    `middle` bounds the width of the fusion (512). Weight 1 beside the labels; larger ones are published for
    some pairs (5 for ResNet32x4 to ResNet8x4, 8 for MobileNetV2; not checked against a configuration). The
    authors warm up linearly over 20 of 240 epochs; runs here are about ten times shorter, and so is the
    warm-up. Their CIFAR code takes the teacher's maps before the last ReLU; here both sides give the stages
    as they are. Not zero at identity: the fusion is random at first.
    """

    needs = Needs(teacher=("stages", "embedding"), student=("stages", "embedding"))
    weight = 1.0
    hard_weight = 1.0

    def __init__(self, middle: Count = 512, warmup_epochs: Whole = 2) -> None:
        super().__init__()
        self.middle, self.warmup_epochs = middle, warmup_epochs

    def _levels(self, student: Outputs, teacher: Outputs) -> list[tuple[Tensor, Tensor]]:
        """Pairs of maps, the coarsest first; an embedding is a map of one position."""
        top = (tapped(student, "embedding")[..., None, None], tapped(teacher, "embedding")[..., None, None])
        return [top, *reversed(paired(student.stages, teacher.stages, "stages"))]

    def build(self, student: Outputs, teacher: Outputs, setting: Setting) -> None:
        levels = self._levels(student, teacher)
        middle = min(self.middle, levels[0][0].shape[1])
        with seeded(setting.seed):
            self.fusions = nn.ModuleList(
                Fusion(ours.shape[1], middle, theirs.shape[1], fuse=number > 0)
                for number, (ours, theirs) in enumerate(levels)
            )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        fused: Tensor | None = None
        losses = []
        levels = self._levels(student, teacher)
        for fusion, (ours, theirs) in zip(self.fusions, levels, strict=True):
            out, fused = fusion(ours, fused)
            losses.append(hcl_loss(out, theirs))
        warmup = torch.clamp((context.epoch + 1) / self.warmup_epochs, max=1.0)
        return warmup * torch.stack(losses).sum()
