"""DisWOT: distillation-aware search without training, Dong et al. 2023 (arXiv:2303.15678, eq. 3 to 6)."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.nets import Outputs
from edgekd.probing import rows_of
from edgekd.proxies import OutputProxy

_KEPT = 32  # of what depends on a width alone


def _gram(features: Tensor) -> Tensor:
    """Row-normalised ``X X^T`` of flattened features."""
    rows = rows_of(features).float()
    return F.normalize(rows @ rows.T, dim=1)


def relation(student_features: Tensor, teacher_features: Tensor) -> Tensor:
    """Similarity of sample relations: ``-||G_T - G_S||_F^2 / N^2``; features (N, ...), widths may differ."""
    return _difference(_gram(student_features), _gram(teacher_features), len(student_features) ** 2)


def _difference(student: Tensor, teacher: Tensor, count: int) -> Tensor:
    return -(student - teacher).square().sum() / count


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
    student, teacher = (_class_grams(gradient) for gradient in (student_gradient, teacher_gradient))
    return _difference(student, teacher, student_gradient.numel())


def _class_grams(gradient: Tensor) -> Tensor:
    return F.normalize(gradient[:, :, None] * gradient[:, None, :], dim=2)


def to_width(embedding: Tensor, width: int) -> Tensor:
    """A fixed random projection of (N, D) embeddings to `width` columns, which keeps inner products in the
    mean (Johnson & Lindenstrauss); the identity when D is `width`. Our extension: the paper needs equal
    widths."""
    if embedding.shape[1] == width:
        return embedding
    return embedding.float() @ _projection(embedding.shape[1], width, embedding.device)


@lru_cache(_KEPT)
def _projection(depth: int, width: int, device: torch.device) -> Tensor:
    drawn: Tensor = torch.randn(depth, width, generator=torch.Generator().manual_seed(depth)) / width**0.5
    return drawn.to(device)


# One teacher meets thousands of students. A tensor is known again by being the same object.
_teacher_gram = lru_cache(4)(_gram)


@lru_cache(_KEPT)
def _teacher_classes(logits: Tensor, embedding: Tensor, labels: Tensor, width: int) -> Tensor:
    return _class_grams(classifier_gradient(logits, to_width(embedding, width), labels))


class DisWot(OutputProxy):
    """Both terms, combined over a population: z-scored during the evolution, as ranks at its end.

    A teacher without features is compared by its logits' relations; without an embedding the semantic term
    is left out.
    """

    def compare(self, student: Outputs, teacher: Outputs, labels: Tensor) -> dict[str, Tensor]:
        return _relation_term(student, teacher) | _semantic_term(student, teacher, labels)


class DisWotSum(OutputProxy):
    """The plain sum of both terms, as published; their magnitudes differ about a hundredfold."""

    needs = ("images", "labels", "teacher", "embedding")

    def compare(self, student: Outputs, teacher: Outputs, labels: Tensor) -> dict[str, Tensor]:
        found = _semantic_term(student, teacher, labels)
        found |= _relation_term(student, teacher) if found else {}
        return {"diswot-sum": torch.stack(list(found.values())).sum()} if found else {}


class Relation(OutputProxy):
    """Similarity of sample relations alone."""

    needs = ("images", "teacher")

    def compare(self, student: Outputs, teacher: Outputs, labels: Tensor) -> dict[str, Tensor]:
        return _relation_term(student, teacher)


class Semantic(OutputProxy):
    """Similarity of class semantics alone."""

    needs = ("images", "labels", "teacher", "embedding")

    def compare(self, student: Outputs, teacher: Outputs, labels: Tensor) -> dict[str, Tensor]:
        return _semantic_term(student, teacher, labels)


def _relation_term(student: Outputs, teacher: Outputs) -> dict[str, Tensor]:
    ours, theirs = student.features, teacher.features
    if ours is None or theirs is None:
        ours, theirs = student.logits, teacher.logits
    return {"relation": _difference(_gram(ours), _teacher_gram(theirs), len(ours) ** 2)}


def _semantic_term(student: Outputs, teacher: Outputs, labels: Tensor) -> dict[str, Tensor]:
    if teacher.embedding is None or student.embedding is None:
        return {}
    width = min(student.embedding.shape[1], teacher.embedding.shape[1])
    gradient = classifier_gradient(student.logits, to_width(student.embedding, width), labels)
    theirs = _teacher_classes(teacher.logits, teacher.embedding, labels, width)
    return {"semantic": _difference(_class_grams(gradient), theirs, gradient.numel())}
