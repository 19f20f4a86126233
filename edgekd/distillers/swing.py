"""Experimental: inspired by Swing Distillation, Li et al. 2022 (arXiv:2212.08349), from its abstract only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distillers import Context, Distiller, NonNegative, Positive, Setting
from edgekd.errors import UsageError
from edgekd.nets import Batch, Outputs, wide


def confidence_gap(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """(N,) of 0 to 1: ``1 - min(1, ps[c] / pt[c])``, c the teacher's class of (N, classes) logits. Large
    where the teacher is sure of what the student finds unlikely, as of samples that it memorised."""
    student, teacher = (F.log_softmax(wide(z).detach(), 1) for z in (student_logits, teacher_logits))
    named = teacher.argmax(1, keepdim=True)
    return 1 - torch.exp((student - teacher).gather(1, named)[:, 0].clamp(max=0.0))


def swing_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor, noise: Tensor) -> Tensor:
    """``mean_n T_n^2 * KL(q_n || softmax(student / T_n))`` with
    ``q_n = normalise(max(0, softmax(teacher / T_n) + noise))``.

    Logits and `noise` (N, classes), `temperature` (N,). A row of which nothing is left tells nothing: q = 0.
    """
    temperature = temperature[:, None]
    student = F.log_softmax(wide(student_logits) / temperature, 1)
    noisy = torch.clamp(torch.softmax(wide(teacher_logits).detach() / temperature, 1) + noise, min=0.0)
    target = noisy / noisy.sum(1, keepdim=True).clamp(min=1e-12)
    return (F.kl_div(student, target, reduction="none") * temperature**2).sum(1).mean()


class Swing(Distiller):
    """KD that says less about samples that may be private: by their likelihood s of being so, 0 to 1, the
    temperature goes from `low` to `high`, and Laplace noise of scale ``2 * noise * s / classes`` is added to
    the target, so that about ``noise * s`` is drawn beside its 1.

    s is given in `scores`, one a sample in the order of the data; without, it is `confidence_gap`. All values
    are ours, and no privacy is promised: measure it, for instance by the exposure of planted canaries. (A
    student that can fit each sample sees through any temperature; the noise is what hides.) Zero at identity
    where s is the gap; weights as KD.
    """

    weight = 0.9
    hard_weight = 0.1
    given: Tensor

    def __init__(
        self,
        low: Positive = 4.0,
        high: Positive = 8.0,
        noise: NonNegative = 1.0,
        scores: Sequence[float] = (),
    ) -> None:
        super().__init__()
        self.low, self.high, self.noise = low, high, noise
        self.register_buffer("given", torch.tensor(tuple(scores), dtype=torch.float32))

    def build(self, student: Outputs, teacher: Outputs, setting: Setting) -> None:
        """Raises `UsageError` where `scores` are not one a sample, each of 0 to 1."""
        count = len(self.given)
        if count and (count != setting.samples or not bool(((self.given >= 0) & (self.given <= 1)).all())):
            raise UsageError(
                f"method 'swing': scores are {count} numbers, "
                f"from {self.given.min():.3g} to {self.given.max():.3g}",
                f"give one of 0 to 1 for each of the {setting.samples} training samples, or none",
            )

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        if len(self.given):
            likely = self.given[batch.index]
        else:
            likely = confidence_gap(student.logits, teacher.logits)
        shape = (2, *student.logits.shape)
        draw = -torch.log1p(-torch.rand(shape, generator=context.generator, device=student.logits.device))
        scale = 2 * self.noise * likely[:, None] / student.logits.shape[1]
        noise = scale * (draw[0] - draw[1])  # the difference of two exponentials is a Laplace
        temperature = self.low + (self.high - self.low) * likely
        return swing_loss(student.logits, teacher.logits, temperature, noise)
