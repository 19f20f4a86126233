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


def to_tensor(images: NDArray[np.uint8]) -> Tensor:
    """uint8 (N, H, W, C) images as a uint8 (N, C, H, W) tensor."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def normalise(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """uint8 (N, C, H, W) to float32, as the bundle's runtime does: ``(pixel * scale - mean) / std``."""
    shape = (1, preprocessing.channels, 1, 1)
    mean = torch.tensor(preprocessing.mean, device=images.device).view(shape)
    std = torch.tensor(preprocessing.std, device=images.device).view(shape)
    return (images.float() * preprocessing.scale - mean) / std
