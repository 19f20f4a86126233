"""Contrastive representation distillation, Tian et al. 2020 (arXiv:1910.10699, eq. 17 to 19)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.adapters import seeded
from edgekd.distillers import Context, Count, Distiller, Needs, Positive, Setting, Share
from edgekd.errors import UsageError
from edgekd.maps import tapped
from edgekd.nets import Batch, Outputs


def nce_loss(scores: Tensor, log_normaliser: Tensor, samples: int) -> Tensor:
    """``-mean_n [log h_n0 + sum_k log(1 - h_nk)]`` with ``h = p / (p + K / samples)``, ``p = exp(s) / Z``.

    `scores` (N, 1 + K) over the temperature, the positive first; `log_normaliser` is ``log Z``. As
    log-probabilities: ``log h = logsigmoid(s - log Z - log(K / samples))``.
    """
    odds = scores - log_normaliser - math.log((scores.shape[1] - 1) / samples)
    return -(F.logsigmoid(odds[:, 0]) + F.logsigmoid(-odds[:, 1:]).sum(1)).mean()


class Crd(Distiller):
    """Weight 0.8, 128 dimensions, 16384 negatives, temperature 0.07, bank momentum 0.5: the authors' values.

    Two banks hold the last projected embeddings of all samples, `samples` x `width` floats each, and are part
    of the checkpoint; a batch is scored against a whole bank at once (N x `samples` floats). Negatives are
    drawn with replacement among the samples of other classes; a sample without a label has all others.
    Where there are fewer samples than `negatives`, as many negatives are drawn as there are samples.
    The normalisers Z are set by the first batch and kept. Batch-coupled only through the negatives drawn.
    """

    needs = Needs(teacher=("embedding",), student=("embedding",), mixable=False)
    weight = 0.8
    hard_weight = 1.0
    banks: Tensor
    log_normalisers: Tensor
    by_class: Tensor
    class_start: Tensor
    class_size: Tensor

    def __init__(
        self,
        negatives: Count = 16384,
        width: Count = 128,
        temperature: Positive = 0.07,
        momentum: Share = 0.5,
    ) -> None:
        super().__init__()
        self.negatives, self.width = negatives, width
        self.temperature, self.momentum = temperature, momentum

    def build(self, student: Outputs, teacher: Outputs, setting: Setting) -> None:
        """Raises:
        UsageError: there is one sample only.
        """
        if setting.samples < 2:
            raise UsageError("method 'crd' contrasts samples and needs two or more; there is one")
        with seeded(setting.seed):
            self.project_student = nn.Linear(tapped(student, "embedding").shape[1], self.width)
            self.project_teacher = nn.Linear(tapped(teacher, "embedding").shape[1], self.width)
            bound = math.sqrt(3 / self.width)
            banks = torch.empty(2, setting.samples, self.width).uniform_(-bound, bound)
        self.register_buffer("banks", banks)  # the student's and the teacher's
        self.register_buffer("log_normalisers", torch.full((2,), math.inf))  # until the first batch
        self._group(setting.labels, setting.samples)

    def _group(self, labels: Tensor, samples: int) -> None:
        """Samples sorted by class, and where in that order the class of each sample begins and how long it
        is: a negative of sample i is then any place outside ``[class_start[i], + class_size[i])``."""
        labels = labels.cpu()
        own = torch.arange(samples) + int(labels.max()) + 1  # an unlabelled sample is a class of its own
        kinds = torch.where(labels < 0, own, labels)
        if int(kinds.min()) == int(kinds.max()):
            kinds = torch.arange(samples)
        order = torch.argsort(kinds, stable=True)
        _, kind, sizes = torch.unique(kinds, return_inverse=True, return_counts=True)
        self.register_buffer("by_class", order, persistent=False)
        self.register_buffer("class_start", (sizes.cumsum(0) - sizes)[kind], persistent=False)
        self.register_buffer("class_size", sizes[kind], persistent=False)

    def draw(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Sample numbers of negatives, int64 (N, K), for the samples `index` (N,)."""
        samples = self.banks.shape[1]
        shape = (len(index), min(self.negatives, samples))
        start, size = self.class_start[index][:, None], self.class_size[index][:, None]
        drawn = torch.randint(2**62, shape, generator=generator, device=index.device) % (samples - size)
        return self.by_class[torch.where(drawn < start, drawn, drawn + size)]

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        ours = F.normalize(self.project_student(tapped(student, "embedding")), dim=1)
        theirs = F.normalize(self.project_teacher(tapped(teacher, "embedding").detach()), dim=1)
        index = torch.cat([batch.index[:, None], self.draw(batch.index, context.generator)], 1)
        losses = []
        others = self.banks.flip(0)  # a copy: what backward needs must not change below
        for number, (anchor, bank) in enumerate(zip((ours, theirs), others, strict=True)):
            scores = (anchor @ bank.T / self.temperature).gather(1, index)
            losses.append(nce_loss(scores, self._normaliser(number, scores), len(bank)))
        self._remember(batch.index, torch.stack([ours, theirs]))
        return losses[0] + losses[1]

    @torch.no_grad()
    def _normaliser(self, number: int, scores: Tensor) -> Tensor:
        """``log Z``: of the first batch, ``samples`` times its mean exponentiated score."""
        kept = self.log_normalisers[number]
        log_mean = torch.logsumexp(scores.detach(), (0, 1)) - math.log(scores.numel())
        kept.copy_(torch.where(torch.isinf(kept), log_mean + math.log(self.banks.shape[1]), kept))
        return kept.clone()

    @torch.no_grad()
    def _remember(self, index: Tensor, embeddings: Tensor) -> None:
        """Moves the samples' rows in both banks towards these (2, N, width) embeddings."""
        mixed = self.momentum * self.banks[:, index] + (1 - self.momentum) * embeddings
        self.banks.index_copy_(1, index, F.normalize(mixed, dim=2))
