"""PromptKD, Li et al. 2024 (arXiv:2403.02781; the authors' ``trainers/promptkd.py``), for encoders without
prompts: the student learns, without labels, to place images among the teacher's fixed class vectors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillers import Context, Distiller, Needs, Positive
from edgekd.nets import Batch, Outputs, wide
from edgekd.wraps import classifier_of, only_wrap


def promptkd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """``T^2 / (N classes) * sum KL(softmax(teacher / T) || softmax(student / T))``; 0 at identity."""
    student = F.log_softmax(wide(student_logits) / temperature, 1)
    teacher = F.log_softmax(wide(teacher_logits).detach() / temperature, 1)
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * temperature**2 / student.numel()


class ClassVectors(nn.Module):
    """``scale * cos(g(embedding), vector)`` for each class: g is a projector of two layers, the (classes, D)
    vectors are one frozen linear layer without bias. Its result is divided by the length of g, not its input,
    so that an integer graph reads layers only."""

    def __init__(self, width: int, vectors: Tensor, scale: float) -> None:
        super().__init__()
        classes, size = vectors.shape
        self.projector = nn.Sequential(nn.Linear(width, size), nn.ReLU(), nn.Linear(size, size))
        self.vectors = nn.Linear(size, classes, bias=False)
        self.vectors.weight = nn.Parameter(scale * F.normalize(vectors, dim=1), requires_grad=False)

    def forward(self, embedding: Tensor) -> Tensor:
        projected = wide(self.projector(embedding))
        length = projected.square().sum(1, keepdim=True).clamp(min=1e-12).sqrt()
        logits: Tensor = self.vectors(projected) / length
        return logits


class PromptKd(Distiller):
    """Weight 1000, T 1, no labels: the authors' values for most data sets (200 for fine-grained ones).

    The class vectors are the rows of the teacher's classifier, scaled to length 1: of a CLIP teacher that
    classifies without training these are its text features, and `logit_scale` 100 is its scale. The exported
    student ends in projector and vectors; its own classifier is gone.
    """

    needs = Needs(student=("logits", "embedding"), classifier=True)
    weight = 1000.0
    hard_weight = 0.0

    def __init__(self, temperature: Positive = 1.0, logit_scale: Positive = 100.0) -> None:
        super().__init__()
        self.temperature, self.logit_scale = temperature, logit_scale

    def wrap(self, student: nn.Module, outputs: Outputs, teacher: nn.Module | None) -> nn.Module:
        tapped = only_wrap(student, "promptkd", head=True)
        vectors = classifier_of(teacher, "promptkd").weight.detach().float().clone()
        own = tapped.model.get_submodule(str(tapped.layout.classifier))
        assert isinstance(own, nn.Linear)
        head = ClassVectors(own.in_features, vectors, self.logit_scale).to(outputs.logits.device)
        return tapped.changed(tapped.layout, {str(tapped.layout.classifier): head})

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        return promptkd_loss(student.logits, teacher.logits, self.temperature)
