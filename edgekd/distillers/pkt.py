"""Probabilistic knowledge transfer, Passalis and Tefas 2018 (arXiv:1803.10837), as in mdistiller (PKT)."""

from __future__ import annotations

from torch import Tensor

from edgekd.distillers import Context, Distiller, Needs
from edgekd.maps import tapped
from edgekd.nets import Batch, Outputs

_EPS = 1e-7


def neighbourhood(embedding: Tensor) -> Tensor:
    """(N, D) to (N, N): ``(cosine + 1) / 2``, each row divided by its sum."""
    unit: Tensor = embedding / (embedding.norm(dim=1, keepdim=True) + _EPS)
    kernel: Tensor = ((unit @ unit.T + 1) / 2).clamp_min(0)  # products are rounded
    return kernel / kernel.sum(1, keepdim=True)


def pkt_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean t * log(t / s)`` over N^2 entries of the two neighbourhoods (1e-7 added within the logarithm).

    Zero at identity; embeddings may differ in width. Batch-coupled: a batch given twice has half the loss.
    """
    ours, theirs = neighbourhood(student), neighbourhood(teacher)
    return (theirs * ((theirs + _EPS) / (ours + _EPS)).log()).mean()


class Pkt(Distiller):
    """Weight 30000 beside the labels (the CRD code base)."""

    needs = Needs(teacher=("embedding",), student=("embedding",))
    weight = 30000.0
    hard_weight = 1.0

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        return pkt_loss(tapped(student, "embedding"), tapped(teacher, "embedding").detach())
