"""Single-label image classification."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from edgekd.spec import Preprocessing


def hard_label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of (N, classes) logits over the samples that have a label (not -1)."""
    losses = F.cross_entropy(logits.float(), labels, ignore_index=-1, reduction="none")
    return losses.sum() / (labels >= 0).sum().clamp(min=1)


def correct(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which samples the arg-max class of (N, classes) logits gets right."""
    right: NDArray[np.bool_] = logits.argmax(1) == labels
    return right


def accuracy(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Top-1 accuracy, 0 to 1."""
    return float(correct(logits, labels).mean())


def top1_agreement(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Share of samples on which two models name the same class."""
    return float((a.argmax(1) == b.argmax(1)).mean())


def expected_calibration_error(
    logits: NDArray[np.float32], labels: NDArray[np.int64], bins: int = 15
) -> float:
    """ECE with equal-width bins (Guo et al. 2017, arXiv:1706.04599, eq. 5)."""
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    probabilities = shifted / shifted.sum(1, keepdims=True)
    confidence = probabilities.max(1)
    right = correct(logits, labels)
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    error = 0.0
    for index in np.unique(bin_of):
        inside = bin_of == index
        error += float(inside.mean() * abs(right[inside].mean() - confidence[inside].mean()))
    return error


def _log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    logarithms: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return logarithms


def negative_log_likelihood(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Mean of ``-log p[label]``, in nats."""
    return float(-_log_probabilities(logits)[np.arange(len(labels)), labels].mean())


def brier_score(logits: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Mean over samples of ``sum_c (p_c - onehot_c)^2``, 0 to 2 (Brier 1950, eq. 2)."""
    own = np.arange(logits.shape[1]) == labels[:, None]
    return float(np.square(np.exp(_log_probabilities(logits)) - own).sum(1).mean())


def kl_divergence(teacher: NDArray[np.float32], student: NDArray[np.float32]) -> float:
    """Mean over samples of ``KL(p_teacher || p_student)``, in nats; logits (N, classes)."""
    taught, learnt = _log_probabilities(teacher), _log_probabilities(student)
    return float((np.exp(taught) * (taught - learnt)).sum(1).mean())


def total_variation(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Mean over samples of ``sum_c |p_a - p_b| / 2``, 0 to 1; logits (N, classes)."""
    gap = np.exp(_log_probabilities(a)) - np.exp(_log_probabilities(b))
    return float(0.5 * np.abs(gap).sum(1).mean())


def negative_flips(
    before: NDArray[np.float32], after: NDArray[np.float32], labels: NDArray[np.int64]
) -> float:
    """Share of samples that `before` gets right and `after` wrong."""
    return float((correct(before, labels) & ~correct(after, labels)).mean())


def positive_flips(
    before: NDArray[np.float32], after: NDArray[np.float32], labels: NDArray[np.int64]
) -> float:
    """Share of samples that `before` gets wrong and `after` right."""
    return negative_flips(after, before, labels)


def cohen_kappa(a: NDArray[np.generic], b: NDArray[np.generic]) -> float:
    """Agreement of two sequences of answers beyond chance, ``(seen - chance) / (1 - chance)`` (Cohen 1960).

    Of arg-max classes it is Cohen's kappa; of what is right and wrong, the error consistency of Geirhos et
    al. 2020 (arXiv:2006.16736, eq. 1). Where both give one and the same answer throughout it is 1.
    """
    seen = float((a == b).mean())
    answers = np.union1d(a, b)
    chance = float(sum((a == answer).mean() * (b == answer).mean() for answer in answers))
    return 1.0 if chance == 1.0 else (seen - chance) / (1 - chance)


def class_agreement(teacher: NDArray[np.float32], student: NDArray[np.float32]) -> NDArray[np.float64]:
    """(classes,) share of the samples the teacher puts in a class that the student puts there too; NaN for a
    class that the teacher never names."""
    theirs, ours = teacher.argmax(1), student.argmax(1)
    named = np.bincount(theirs, minlength=teacher.shape[1]).astype(np.float64)
    shared = np.bincount(theirs[theirs == ours], minlength=teacher.shape[1])
    shares = np.full(len(named), np.nan)
    np.divide(shared, named, out=shares, where=named > 0)
    return shares


def confidence_correlation(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Spearman's rank correlation of the two models' largest probabilities; NaN where one is constant."""
    ranks = []
    for logits in (a, b):
        confidence = _log_probabilities(logits).max(1)
        _, where, counts = np.unique(confidence, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(counts) - (counts - 1) / 2)[where])  # ties share their mean rank
    centred = [rank - rank.mean() for rank in ranks]
    scale = float(np.sqrt(np.square(centred[0]).sum() * np.square(centred[1]).sum()))
    return float((centred[0] * centred[1]).sum()) / scale if scale > 0 else float("nan")


def fidelity(
    teacher: NDArray[np.float32], student: NDArray[np.float32], labels: NDArray[np.int64]
) -> dict[str, float]:
    """How the student's (N, classes) logits agree with the teacher's; accuracy alone does not tell."""
    return {
        "top1_agreement": top1_agreement(student, teacher),
        "kl_divergence": kl_divergence(teacher, student),
        "total_variation": total_variation(teacher, student),
        "cohen_kappa": cohen_kappa(teacher.argmax(1), student.argmax(1)),
        "error_consistency": cohen_kappa(correct(teacher, labels), correct(student, labels)),
        "confidence_correlation": confidence_correlation(teacher, student),
        "negative_flips": negative_flips(teacher, student, labels),
        "positive_flips": positive_flips(teacher, student, labels),
        "negative_log_likelihood": negative_log_likelihood(student, labels),
        "brier_score": brier_score(student, labels),
    }


def to_tensor(images: NDArray[np.uint8]) -> Tensor:
    """uint8 (N, H, W, C) images as a uint8 (N, C, H, W) tensor."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def normalise(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 (N, C, H, W) to float32, as the bundle's runtime does: ``(pixel * scale - mean) / std``."""
    shape = (1, preprocessing.channels, 1, 1)
    mean = torch.tensor(preprocessing.mean, device=images.device).view(shape)
    std = torch.tensor(preprocessing.std, device=images.device).view(shape)
    return (images.float() * preprocessing.scale - mean) / std
