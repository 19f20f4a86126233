"""One for all, Hao et al. 2023 (arXiv:2310.19444; the authors' ``distillers/ofa.py``): exits of the student
learn the teacher's answer.

Only logits of the teacher are read, so its architecture does not matter and a black box will do.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillers import Context, Distiller, Needs, NonNegative, Positive
from edgekd.nets import Batch, Outputs, wide
from edgekd.taps import Tapped
from edgekd.wraps import Branch, classifier_of, only_wrap, trunk_to


def ofa_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, eps: float, temperature: float
) -> Tensor:
    """``-mean_n sum_c ((p_c + [c = y])^eps - [c = y]) log softmax(student / T)_c``, p = softmax(teacher / T).

    Logits are (N, classes). Not zero at identity: for eps 1 it is the soft cross-entropy, for eps above 1
    the right class counts the more, the surer the teacher is of it. A label of -1 is no class.
    """
    log_q = F.log_softmax(wide(student_logits) / temperature, 1)
    p = torch.softmax(wide(teacher_logits).detach() / temperature, 1)
    target = (labels[:, None] == torch.arange(p.shape[1], device=p.device)).to(p.dtype)
    return -(((p + target) ** eps - target) * log_q).sum(1).mean()


class _Exits(nn.Module):
    """The student with a head on each stage; the heads run in training mode only."""

    def __init__(self, student: Tapped, heads: list[Branch]) -> None:
        super().__init__()
        self.student, self.heads = student, nn.ModuleList(heads)

    def forward(self, inputs: Tensor) -> Outputs:
        outputs: Outputs = self.student(inputs)
        if not self.training:
            return outputs
        pairs = zip(self.heads, outputs.stages, strict=True)
        return replace(outputs, exits=tuple(head(map_)[1] for head, map_ in pairs))

    def deploy(self) -> nn.Module:
        """The student without its heads."""
        return self.student.deploy()


class Ofa(Distiller):
    """``w_kd l(student) + w_ofa sum_k l(exit k)`` beside the labels, all weights and T 1, eps 1 (the authors'
    CIFAR-100; 1.5 for a transformer that teaches a ResNet on ImageNet).

    A head halves its stage's map to the last one's size by separable convolutions, doubling the width each
    time up to the wider of both networks' features; the last stage gets a 1x1 convolution.
    """

    needs = Needs(student=("logits", "stages"), labels=True)
    weight = 1.0
    hard_weight = 1.0

    def __init__(
        self,
        eps: NonNegative = 1.0,
        temperature: Positive = 1.0,
        kd_weight: NonNegative = 1.0,
        exit_weight: NonNegative = 1.0,
    ) -> None:
        super().__init__()
        self.eps, self.temperature, self.kd_weight, self.exit_weight = (
            eps,
            temperature,
            kd_weight,
            exit_weight,
        )

    def wrap(self, student: nn.Module, outputs: Outputs, teacher: nn.Module | None) -> nn.Module:
        tapped, maps = only_wrap(student, "ofa"), outputs.stages
        width = maps[-1].shape[1]
        if isinstance(teacher, Tapped) and teacher.layout.classifier is not None:
            width = max(width, classifier_of(teacher, "ofa").in_features)
        classes = outputs.logits.shape[1]
        heads = [Branch(trunk_to(maps, index, width), width, classes) for index in range(len(maps))]
        return _Exits(tapped, [head.to(maps[0].device) for head in heads])

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        def loss(logits: Tensor) -> Tensor:
            return ofa_loss(logits, teacher.logits, batch.labels, self.eps, self.temperature)

        exits = [self.exit_weight * loss(logits) for logits in student.exits]
        return torch.stack([self.kd_weight * loss(student.logits), *exits]).sum()
