"""Factor transfer, Kim et al. 2018 (arXiv:1802.04977), in the form of the CRD code base (FactorTransfer)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.adapters import seeded
from edgekd.distillers import Context, Distiller, Needs, Positive, Setting, Share
from edgekd.maps import same_size, tapped
from edgekd.nets import Batch, Outputs


def factor_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference of two (N, K, H, W) factors: squares, mean over channels, rows of unit length.

    Zero at identity.
    """
    ours, theirs = (F.normalize(factor.square().mean(1).flatten(1)) for factor in (student, teacher))
    return (ours - theirs).abs().mean()


def _encoder(width: int, factors: int, *, norm: bool) -> nn.Sequential:
    """Three 3x3 convolutions from `width` to `factors` channels, leaky ReLU 0.1 after each."""
    layers: list[nn.Module] = []
    for before, after in ((width, width), (width, factors), (factors, factors)):
        layers += [nn.Conv2d(before, after, 3, padding=1), *([nn.BatchNorm2d(after)] if norm else [])]
        layers.append(nn.LeakyReLU(0.1))
    return nn.Sequential(*layers)


def _decoder(factors: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in ((factors, factors), (factors, width), (width, width)):
        layers += [nn.ConvTranspose2d(before, after, 3, padding=1), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)


class Ft(Distiller):
    """The last map, `rate` times the teacher's width in factors, weight 200 beside the labels.

    The authors train the paraphraser, an autoencoder of the teacher's map, for 30 epochs before 240 of the
    student. Here it learns within the term: its reconstruction error, at weight 1 whatever the term's
    weight is, acts throughout, and the factor loss from step ``share * steps`` on, `share` 30/270. Factors
    are detached, so neither loss reaches the parameters of the other.
    """

    needs = Needs(teacher=("features",), student=("features",))
    weight = 200.0
    hard_weight = 1.0

    def __init__(self, rate: Positive = 0.5, share: Share = 30 / 270) -> None:
        super().__init__()
        self.rate, self.share = rate, share

    def build(self, student: Outputs, teacher: Outputs, setting: Setting) -> None:
        ours, theirs = (
            features.shape[1]
            for features in same_size(tapped(student, "features"), tapped(teacher, "features"))
        )
        factors = max(1, int(self.rate * theirs))
        with seeded(setting.seed):
            self.paraphrase = _encoder(theirs, factors, norm=False)
            self.reconstruct = _decoder(factors, theirs)
            self.translate = _encoder(ours, factors, norm=True)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        ours, theirs = same_size(tapped(student, "features"), tapped(teacher, "features"))
        factors = self.paraphrase(theirs)
        transfer = factor_loss(self.translate(ours), factors.detach())
        begun = (context.step >= self.share * context.steps).to(transfer.dtype)
        error = F.mse_loss(self.reconstruct(factors), theirs)
        return begun * transfer + error / max(self.weight, 1.0)
