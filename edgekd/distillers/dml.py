"""Deep mutual learning, Zhang et al. 2018 (arXiv:1706.00384, eq. 5 and 6): two networks teach each other."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillers import Context, Distiller, Needs, Positive
from edgekd.nets import Batch, Outputs, wide
from edgekd.tasks.classification import hard_label_loss
from edgekd.wraps import Peers, only_wrap


def mutual_loss(ours: Tensor, theirs: Tensor, temperature: float) -> Tensor:
    """``T^2 (KL(theirs || ours) + KL(ours || theirs))`` of (N, classes) logits, a mean over the batch; in
    each part the first of the two is held fixed. Zero at identity."""
    a, b = (F.log_softmax(wide(logits) / temperature, 1) for logits in (ours, theirs))
    forth = F.kl_div(a, b.detach(), reduction="batchmean", log_target=True)
    back = F.kl_div(b, a.detach(), reduction="batchmean", log_target=True)
    return (forth + back) * temperature**2


class Dml(Distiller):
    """No teacher: the term is the peer's own cross-entropy and what both learn from each other, T 1, weight 1
    beside the student's labels. The peer has the same architecture and other first weights; both take each
    step together, where the authors alternate. The student is exported, the peer dropped."""

    needs = Needs(teacher=(), labels=True, mixable=False)
    weight = 1.0
    hard_weight = 1.0

    def __init__(self, temperature: Positive = 1.0, peer_seed: int = 1) -> None:
        super().__init__()
        self.temperature, self.peer_seed = temperature, peer_seed

    def wrap(self, student: nn.Module, outputs: Outputs, teacher: nn.Module | None) -> nn.Module:
        return Peers(only_wrap(student, "dml"), self.peer_seed)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        assert student.peer is not None  # given in training mode
        mutual = mutual_loss(student.logits, student.peer.logits, self.temperature)
        return mutual + hard_label_loss(student.peer.logits, batch.labels)
