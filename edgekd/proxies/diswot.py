"""DisWOT: distillation-aware search without training, Dong et al. 2023 (arXiv:2303.15678, eq. 3 to 6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.nets import Outputs
from edgekd.proxies import OutputProxy


def _gram(rows: Tensor) -> Tensor:
    """Row-normalised ``X X^T``."""
    return F.normalize(rows @ rows.T, dim=1)


def relation(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Similarity of sample relations: ``-||G_T - G_S||_F^2 / N^2``; features (N, ...), widths may differ."""
    grams = [_gram(f.flatten(1).float()) for f in (student_features, teacher_features)]
    return -(grams[0] - grams[1]).square().sum() / len(student_features) ** 2


def classifier_gradient(logits: Tensor, embedding: Tensor, labels: Tensor) -> Tensor:
    """Gradient of the mean cross-entropy by a linear classifier's weight, (classes, D).

    ``(softmax(z) - onehot(y))^T E / N``, without a backward pass, equals what autograd gives.
    """
    residual = torch.softmax(logits.float(), 1) - F.one_hot(labels, logits.shape[1])
    return residual.T @ embedding.float() / len(logits)


def semantic(student_gradient: Tensor, teacher_gradient: Tensor) -> Tensor:
    """Similarity of class semantics: ``-sum_c ||E_c,T - E_c,S||^2 / (C D)``, ``E_c = rownorm(w_c w_c^T)``.

    Both gradients are (classes, D) of one width D.
    """

    def grams(w: Tensor) -> Tensor:
        return F.normalize(w[:, :, None] * w[:, None, :], dim=2)

    difference = grams(student_gradient) - grams(teacher_gradient)
    return -difference.square().sum() / student_gradient.numel()


def to_width(embedding: Tensor, width: int) -> Tensor:
    """A fixed random projection of (N, D) embeddings to `width` columns, which keeps inner products in the
    mean (Johnson & Lindenstrauss); the identity when D is `width`. Our extension: the paper needs equal
    widths."""
    if embedding.shape[1] == width:
        return embedding
    generator = torch.Generator().manual_seed(embedding.shape[1])
    projection: Tensor = torch.randn(embedding.shape[1], width, generator=generator) / width**0.5
    return embedding.float() @ projection.to(embedding.device)


class DisWot(OutputProxy):
    """Both terms, combined over a population: z-scored during the evolution, as ranks at its end.

    A teacher without features is compared by its logits' relations; without an embedding the semantic term
    is left out.
    """

    def terms(self, student: Outputs, teacher: Outputs, labels: Tensor) -> dict[str, float]:
        return _relation_term(student, teacher) | _semantic_term(student, teacher, labels)


class DisWotSum(OutputProxy):
    """The plain sum of both terms, as published; their magnitudes differ about a hundredfold."""

    needs = ("images", "labels", "teacher", "embedding")

    def terms(self, student: Outputs, teacher: Outputs, labels: Tensor) -> dict[str, float]:
        found = _semantic_term(student, teacher, labels)
        return {"diswot-sum": sum((found | _relation_term(student, teacher)).values())} if found else {}


class Relation(OutputProxy):
    """Similarity of sample relations alone."""

    needs = ("images", "teacher")

    def terms(self, student: Outputs, teacher: Outputs, labels: Tensor) -> dict[str, float]:
        return _relation_term(student, teacher)


class Semantic(OutputProxy):
    """Similarity of class semantics alone."""

    needs = ("images", "labels", "teacher", "embedding")

    def terms(self, student: Outputs, teacher: Outputs, labels: Tensor) -> dict[str, float]:
        return _semantic_term(student, teacher, labels)


def _relation_term(student: Outputs, teacher: Outputs) -> dict[str, float]:
    if teacher.features is None or student.features is None:
        return {"relation": relation(student.logits, teacher.logits).item()}
    return {"relation": relation(student.features, teacher.features).item()}


def _semantic_term(student: Outputs, teacher: Outputs, labels: Tensor) -> dict[str, float]:
    if teacher.embedding is None or student.embedding is None:
        return {}
    width = min(student.embedding.shape[1], teacher.embedding.shape[1])
    gradients = [
        classifier_gradient(logits, to_width(embedding, width), labels)
        for logits, embedding in (
            (student.logits, student.embedding),
            (teacher.logits, teacher.embedding),
        )
    ]
    return {"semantic": semantic(*gradients).item()}
