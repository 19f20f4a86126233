"""Dual-head optimisation, Kang et al. 2025 (arXiv:2505.07675; the authors' ``train_others.py``): one head
learns from few labels, one from the teacher on all images, and their probabilities are mixed."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillers import Context, Distiller, Needs, NonNegative, Positive, Share
from edgekd.errors import UsageError
from edgekd.nets import Batch, Outputs, wide
from edgekd.taps import Tapped
from edgekd.wraps import only_wrap


def dho_loss(
    label_logits: Tensor, distilled_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float
) -> Tensor:
    """``CE / 2 + (KD over labelled + KD over unlabelled) / 2`` of (N, classes) logits; -1 is no label.

    CE is the first head's mean over labelled samples, KD the second head's ``T^2 KL(teacher || student)``,
    a mean over its own part of the batch. A part without samples counts zero.
    """
    labelled = (labels >= 0).to(torch.float32)
    log_p = F.log_softmax(wide(label_logits), 1)
    surprise = -log_p.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    student = F.log_softmax(wide(distilled_logits) / temperature, 1)
    teacher = F.log_softmax(wide(teacher_logits).detach() / temperature, 1)
    apart = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1) * temperature**2
    return 0.5 * (_mean(surprise, labelled) + _mean(apart, labelled) + _mean(apart, 1 - labelled))


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of (N,) values where `chosen` is 1; 0 where it never is."""
    return (values * chosen).sum() / chosen.sum().clamp(min=1)


def mixed_log_probabilities(
    label_logits: Tensor, distilled_logits: Tensor, w_ce: float, beta: float
) -> Tensor:
    """``log(w_ce softmax(label head) + (1 - w_ce) softmax(distilled head / beta))``, (N, classes).

    In logarithms, so that nothing is lost in the tails:
    ``log(e^a + e^b) = max(a, b) - log sigmoid(|a - b|)``.
    """
    a = F.log_softmax(label_logits, 1) + math.log(w_ce)
    b = F.log_softmax(distilled_logits / beta, 1) + math.log(1 - w_ce)
    return torch.maximum(a, b) - F.logsigmoid((a - b).abs())


class DualHead(nn.Module):
    """Two classifiers of an embedding (N, D) and their mix."""

    def __init__(self, classifier: nn.Linear, w_ce: float, beta: float) -> None:
        super().__init__()
        self.labelled = classifier
        self.distilled = nn.Linear(classifier.in_features, classifier.out_features)
        self.w_ce, self.beta = w_ce, beta

    def forward(self, embedding: Tensor) -> Tensor:
        heads = wide(self.labelled(embedding)), wide(self.distilled(embedding))
        return mixed_log_probabilities(*heads, self.w_ce, self.beta)


class _Dual(nn.Module):
    """The student with two heads: `logits` is the mix, `exits` in training mode the heads themselves."""

    def __init__(self, student: Tapped) -> None:
        super().__init__()
        self.student = student

    def forward(self, inputs: Tensor) -> Outputs:
        outputs: Outputs = self.student(inputs)
        if not self.training:
            return outputs
        head = self.student.model.get_submodule(str(self.student.layout.classifier))
        assert isinstance(head, DualHead)
        return replace(outputs, exits=(head.labelled(outputs.embedding), head.distilled(outputs.embedding)))

    def deploy(self) -> nn.Module:
        """The student with both heads and their mix."""
        return self.student.deploy()


class Dho(Distiller):
    """T 2, both halves of the loss 1/2, as in the authors' few-shot scripts; the labels are in the term, so
    there is no cross-entropy beside it. `w_ce` 0.5 and `beta` 0.5 are those of their ImageNet script; for
    other data they search w_ce in 0 to 1 and beta in 0.5 to 4 on validation images.

    Both heads and the mix are in the exported graph. Its output is the logarithm of the mixed probabilities:
    as logits it gives the same probabilities and the same top-1.
    """

    needs = Needs(student=("logits", "embedding"), labels=True, some_labels=True, mixable=False)
    weight = 1.0
    hard_weight = 0.0

    def __init__(self, w_ce: Share = 0.5, beta: NonNegative = 0.5, temperature: Positive = 2.0) -> None:
        super().__init__()
        if not (0 < w_ce < 1 and beta > 0):
            raise UsageError(
                f"method 'dho': w_ce must lie between 0 and 1, and beta be positive; got {w_ce}, {beta}"
            )
        self.w_ce, self.beta, self.temperature = w_ce, beta, temperature

    def wrap(self, student: nn.Module, outputs: Outputs, teacher: nn.Module | None) -> nn.Module:
        tapped = only_wrap(student, "dho", head=True)
        path = str(tapped.layout.classifier)
        own = tapped.model.get_submodule(path)
        assert isinstance(own, nn.Linear)
        head = DualHead(own, self.w_ce, self.beta).to(outputs.logits.device)
        return _Dual(tapped.changed(tapped.layout, {path: head}))

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        labelled, distilled = student.exits[:2]
        return dho_loss(labelled, distilled, teacher.logits, batch.labels, self.temperature)
