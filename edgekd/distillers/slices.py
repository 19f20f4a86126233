"""Inspired by Knowledge Concentration, Gao et al. 2017 (arXiv:1711.07607), from its abstract only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgekd.distillers import Context, Distiller, Needs, Positive, Setting, Share
from edgekd.errors import UsageError
from edgekd.nets import Batch, Outputs, softened_kl


class Slices(Distiller):
    """One student of many classes from specialists of a few: ``mean_n sum_k lambda_k * v_kn * KL_kn`` with
    ``KL_kn = T^2 * KL(softmax(teacher_k / T) || softmax(student[subset_k] / T))``; zero at identity.

    `subsets` are lists of class numbers, one a specialist; none is one specialist for all classes. A sample
    goes to the specialists whose subset holds its label. Self-paced: v is 1 where
    ``KL_kn * (1 - step / steps) <= pace * mean_n KL_kn``, so that all take part in the end, and 0 elsewhere.
    lambda_k is the mean over the specialists of the running loss over that of k, at most 10.

    `specialists` False slices the logits of one teacher of all classes. True takes the k-th of
    ``(teacher.logits, *teacher.exits)``, with all classes or just those of its subset, in their order.
    Temperature, pace and weights (1 and 1) are ours.
    """

    needs = Needs(labels=True)
    weight = 1.0
    hard_weight = 1.0
    member: Tensor
    running: Tensor

    def __init__(
        self,
        subsets: Sequence[Sequence[int]] = (),
        temperature: Positive = 4.0,
        specialists: bool = False,
        pace: Positive = 1.0,
        decay: Share = 0.99,
    ) -> None:
        super().__init__()
        self.subsets = [list(subset) for subset in subsets]
        self.temperature, self.specialists, self.pace, self.decay = temperature, specialists, pace, decay
        self._latest: tuple[Tensor, Tensor] | None = None

    def build(self, student: Outputs, teacher: Outputs, setting: Setting) -> None:
        """Raises `UsageError` where subsets name no class, one class, or do not fit the specialists."""
        self.subsets = self.subsets or [list(range(setting.classes))]
        _refuse(self.subsets, setting.classes)
        if self.specialists:
            _refuse_specialists(self.subsets, (teacher.logits, *teacher.exits), setting.classes)
        member = torch.zeros(len(self.subsets), setting.classes)
        for number, subset in enumerate(self.subsets):
            member[number, subset] = 1.0
            self.register_buffer(f"classes_{number}", torch.tensor(subset))
        self.register_buffer("member", member)
        self.register_buffer("running", torch.ones(len(self.subsets)))

    def _divergence(self, number: int, student: Outputs, teacher: Outputs) -> Tensor:
        """(N,) of one specialist."""
        classes = self.get_buffer(f"classes_{number}")
        theirs = (teacher.logits, *teacher.exits)[number] if self.specialists else teacher.logits
        if theirs.shape[1] == student.logits.shape[1]:
            theirs = theirs.index_select(1, classes)
        return softened_kl(student.logits.index_select(1, classes), theirs, self.temperature)

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        each = torch.stack([self._divergence(k, student, teacher) for k in range(len(self.subsets))])
        routed = self.member.index_select(1, batch.labels)
        count = routed.sum(1)
        mean = (routed * each.detach()).sum(1) / count.clamp(min=1.0)
        self._latest = mean, count
        left = 1 - context.step / context.steps
        chosen = routed * (each.detach() * left <= self.pace * mean[:, None])
        share = torch.clamp(self.running.mean() / self.running, max=10.0)
        return (share[:, None] * chosen * each).sum(0).mean()

    @torch.no_grad()
    def after_step(self, loss: Tensor, context: Context) -> None:
        if self._latest is not None:
            mean, count = self._latest
            moved = self.decay * self.running + (1 - self.decay) * mean
            self.running.copy_(torch.where(count > 0, moved, self.running).clamp(min=1e-6))


def _refuse(subsets: Sequence[Sequence[int]], classes: int) -> None:
    for number, subset in enumerate(subsets):
        different = len(set(subset))
        if different != len(subset) or different < 2:
            raise _wrong(f"subset {number} lists {len(subset)} classes, {different} of them different")
        if min(subset) < 0 or max(subset) >= classes:
            raise _wrong(f"subset {number} names a class outside 0 to {classes - 1}")


def _refuse_specialists(subsets: Sequence[Sequence[int]], logits: Sequence[Tensor], classes: int) -> None:
    widths, sizes = [given.shape[1] for given in logits], [len(subset) for subset in subsets]
    one_each = len(widths) == len(sizes)
    if not one_each or any(w not in (size, classes) for w, size in zip(widths, sizes, strict=True)):
        raise _wrong(f"the specialists' logits have {widths} columns, the subsets {sizes} classes")


def _wrong(what: str) -> UsageError:
    return UsageError(f"method 'slices': {what}", "distill.options.slices.subsets: [[0, 1, 2], [3, 4], ...]")
