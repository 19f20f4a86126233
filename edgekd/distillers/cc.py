"""Correlation congruence, Peng et al. 2019 (arXiv:1904.01802), in the form of the CRD code base."""

from __future__ import annotations

from torch import Tensor, nn

from edgekd.adapters import seeded
from edgekd.distillers import Context, Count, Distiller, Needs, Setting
from edgekd.maps import tapped
from edgekd.nets import Batch, Outputs


def cc_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean_i sum_d D[i, d] * D[i+1, d]`` with ``D = |student - teacher|``, (N, D); 0 at identity.

    Neighbours in the batch are compared, so the order of the batch matters: it must be shuffled.
    """
    apart = (student - teacher).abs()
    return (apart[:-1] * apart[1:]).sum() / max(len(apart) - 1, 1)


class Cc(Distiller):
    """Linear embeddings of `width` values, weight 0.02 beside the labels.

    As published, both embeddings are trained, the teacher's too (from its detached embedding).
    """

    needs = Needs(teacher=("embedding",), student=("embedding",))
    weight = 0.02
    hard_weight = 1.0

    def __init__(self, width: Count = 128) -> None:
        super().__init__()
        self.width = width

    def build(self, student: Outputs, teacher: Outputs, setting: Setting) -> None:
        ours, theirs = tapped(student, "embedding"), tapped(teacher, "embedding")
        with seeded(setting.seed):
            self.ours = nn.Linear(ours.shape[1], self.width)
            self.theirs = nn.Linear(theirs.shape[1], self.width)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        ours, theirs = tapped(student, "embedding"), tapped(teacher, "embedding").detach()
        return cc_loss(self.ours(ours), self.theirs(theirs))
