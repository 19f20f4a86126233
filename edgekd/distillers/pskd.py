"""Progressive self-distillation, no teacher; Kim et al. 2021 (arXiv:2006.12000; the authors' code)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distillers import Context, Distiller, Needs, Setting, Share
from edgekd.nets import Batch, Outputs, wide


def pskd_loss(logits: Tensor, labels: Tensor, past: Tensor, alpha: Tensor) -> Tensor:
    """``-mean_n sum_c [(1 - alpha) * onehot(label) + alpha * past] * log softmax(logits)``.

    `logits` and `past`, probabilities of an earlier pass, are (N, classes); `alpha` is 0-dim. A soft
    cross-entropy: alpha = 0 is that with the labels, and its minimum is the target's entropy, not zero.
    """
    logits = wide(logits)
    own = (labels[:, None] == torch.arange(logits.shape[1], device=labels.device)).to(logits.dtype)
    target = (1 - alpha) * own + alpha * past.to(logits.dtype)
    return -(target * F.log_softmax(logits, 1)).sum(1).mean()


class Pskd(Distiller):
    """Each sample's target holds a growing share of what the student last said about it: alpha goes linearly
    to 0.8 at the last epoch (published). The labels are in the target, so there is no other cross-entropy.

    `past`, (samples, classes), is a buffer that is read and written by `Batch.index`; `half` stores it in
    float16. It holds probabilities of augmented passes in training mode, as published. Beside a method with a
    teacher (``kd+pskd``) both terms are added.
    """

    needs = Needs(teacher=(), labels=True, mixable=False)
    weight = 1.0
    hard_weight = 0.0
    past: Tensor

    def __init__(self, alpha: Share = 0.8, half: bool = False) -> None:
        super().__init__()
        self.alpha, self.half_precision = alpha, half
        self._latest: tuple[Tensor, Tensor] | None = None

    def build(self, student: Outputs, teacher: Outputs, setting: Setting) -> None:
        """Before a sample was seen, its past prediction is its label."""
        known = setting.labels[:, None] == torch.arange(setting.classes, device=setting.labels.device)
        self.register_buffer("past", known.to(torch.float16 if self.half_precision else torch.float32))

    def share(self, context: Context) -> Tensor:
        """Weight of the past prediction in the target: ``alpha * (epoch + 1) / epochs``."""
        return self.alpha * (context.epoch + 1) / context.epochs

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        self._latest = batch.index, torch.softmax(wide(student.logits).detach(), 1)
        return pskd_loss(student.logits, batch.labels, self.past[batch.index], self.share(context))

    @torch.no_grad()
    def after_step(self, loss: Tensor, context: Context) -> None:
        if self._latest is not None:
            index, probabilities = self._latest
            self.past.index_copy_(0, index, probabilities.to(self.past.dtype))
