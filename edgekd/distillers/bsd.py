"""Two students that teach each other where each is the better: inspired by the HFD and BSD losses for online
CNN-transformer segmentation, of which only the abstract was at hand. Here for classification, with two
networks of one architecture; what the gates decide pixel by pixel there is decided by class maps here."""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillers import Context, Count, Distiller, Needs, NonNegative, Setting
from edgekd.nets import Batch, Outputs, wide
from edgekd.taps import Tapped
from edgekd.tasks.classification import hard_label_loss
from edgekd.wraps import Peers, only_wrap


def class_map(network: Tapped, outputs: Outputs) -> Tensor:
    """The classifier at every pixel of the last map, (N, classes, H, W): its mean is the logits of a network
    that pools and classifies (Zhou et al. 2016, arXiv:1512.04150, eq. 1). Otherwise one pixel, the logits."""
    path, features = network.layout.classifier, outputs.features
    classifier = network.model.get_submodule(path) if path is not None else None
    if not isinstance(classifier, nn.Linear) or features is None:
        return outputs.logits[:, :, None, None]
    if classifier.in_features != features.shape[1]:
        return outputs.logits[:, :, None, None]
    return F.conv2d(features, classifier.weight[:, :, None, None], classifier.bias)


class _Mapped(Peers):
    """Both networks give their class map as the only one of `extra_maps`, in training mode."""

    def forward(self, inputs: Tensor) -> Outputs:
        ours: Outputs = self.student(inputs)
        if not self.training:
            return ours
        theirs: Outputs = self.peer(inputs)
        theirs = replace(theirs, extra_maps=(class_map(self.peer, theirs),))
        return replace(ours, extra_maps=(class_map(self.student, ours),), peer=theirs)


def surprise(maps: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (N, H, W) of the image's label at every pixel of class maps; 0 without a label (-1)."""
    chosen = labels.clamp(min=0)[:, None, None, None].expand(-1, 1, *maps.shape[2:])
    here = -F.log_softmax(maps, 1).gather(1, chosen)[:, 0]
    return here * (labels >= 0).to(here.dtype)[:, None, None]


def pixel_loss(ours: Tensor, theirs: Tensor, labels: Tensor) -> Tensor:
    """``mean KL(p_theirs || p_ours) [surprise_theirs < surprise_ours]`` over the pixels of two class maps
    (N, classes, H, W); the other's is held fixed. Zero at identity."""
    theirs = theirs.detach()
    gate = (surprise(theirs, labels) < surprise(ours.detach(), labels)).to(ours.dtype)
    mine, other = F.log_softmax(ours, 1), F.log_softmax(theirs, 1)
    return (gate * F.kl_div(mine, other, reduction="none", log_target=True).sum(1)).mean()


class Bsd(Distiller):
    """The peer's own cross-entropy, and for each of the two networks, beside the labels:

    - HFD: ``mean (projector(finest map) - the other's finest map)^2``;
    - by region, `regions` x `regions` of the last map, where the other's class map is less surprised by the
      label: ``mean (projector(last map) - the other's last map)^2``;
    - by pixel `pixel_loss` of the class maps.

    No teacher. The three weights of 1 and the 2x2 regions are ours, since the abstract names none.
    """

    needs = Needs(teacher=(), student=("logits", "features", "stages"), labels=True, mixable=False)
    weight = 1.0
    hard_weight = 1.0

    def __init__(
        self,
        hint_weight: NonNegative = 1.0,
        region_weight: NonNegative = 1.0,
        pixel_weight: NonNegative = 1.0,
        regions: Count = 2,
        peer_seed: int = 1,
    ) -> None:
        super().__init__()
        self.hint_weight, self.region_weight, self.pixel_weight = hint_weight, region_weight, pixel_weight
        self.regions, self.peer_seed = regions, peer_seed

    def wrap(self, student: nn.Module, outputs: Outputs, teacher: nn.Module | None) -> nn.Module:
        return _Mapped(only_wrap(student, "bsd"), self.peer_seed)

    def build(self, student: Outputs, teacher: Outputs, setting: Setting) -> None:
        fine, last = student.stages[0].shape[1], student.stages[-1].shape[1]
        self.low = nn.ModuleList(nn.Conv2d(fine, fine, 1) for _ in range(2))
        self.high = nn.ModuleList(nn.Conv2d(last, last, 1) for _ in range(2))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        peer = student.peer
        assert peer is not None  # given in training mode
        loss = hard_label_loss(peer.logits, batch.labels)
        for side, (ours, theirs) in enumerate(((student, peer), (peer, student))):
            for mine, other in zip(ours.stages[:1], theirs.stages[:1], strict=False):
                gap = self.low[side](wide(mine)) - wide(other).detach()
                loss = loss + self.hint_weight * gap.square().mean()
            maps = [wide(_class_map(outputs)) for outputs in (ours, theirs)]
            loss = loss + self.pixel_weight * pixel_loss(maps[0], maps[1], batch.labels)
            loss = loss + self.region_weight * self._by_region(side, ours, theirs, batch.labels)
        return loss

    def _by_region(self, side: int, ours: Outputs, theirs: Outputs, labels: Tensor) -> Tensor:
        assert ours.features is not None
        assert theirs.features is not None
        gap = self.high[side](wide(ours.features)) - wide(theirs.features).detach()
        maps = [F.adaptive_avg_pool2d(wide(_class_map(o)).detach(), self.regions) for o in (ours, theirs)]
        gate = (surprise(maps[1], labels) < surprise(maps[0], labels)).to(gap.dtype)
        return (gate * F.adaptive_avg_pool2d(gap.square().mean(1), self.regions)).mean()


def _class_map(outputs: Outputs) -> Tensor:
    return outputs.extra_maps[0] if outputs.extra_maps else outputs.logits[:, :, None, None]
