"""Tokens of student and teacher side by side: which block meets which, and how many tokens of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from edgekd.errors import UnsupportedModelError
from edgekd.nets import wide


def paired_blocks(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(N, L, D) hidden states: block i of the student's M with block floor(i T / M) of the teacher's T,
    counted from 1; float32 or wider, no gradient to the teacher's. Lengths and widths may differ.

    Raises:
        UnsupportedModelError: one network gives none, or the student has more blocks than the teacher.
    """
    ours, theirs = len(student), len(teacher)
    if not 0 < ours <= theirs:
        raise UnsupportedModelError(
            f"tap 'tokens': the student gives {ours} blocks{_shape(student)}, the teacher {theirs}"
            f"{_shape(teacher)}; needed are one or more of the student and as many or more of the teacher",
            "choose a student with fewer blocks, or a method that taps the embedding",
        )
    return [(wide(h), wide(teacher[(i + 1) * theirs // ours - 1]).detach()) for i, h in enumerate(student)]


def _shape(tokens: Sequence[Tensor]) -> str:
    return f" of shape {tuple(tokens[0].shape)}" if tokens else ""


def same_length(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """(N, L, D) tokens with one L. Different lengths are read as square grids of patches behind 0, 1, 2 or 5
    others (class, distillation, four registers), which are left out, and the finer grid is pooled.

    Raises:
        UnsupportedModelError: the lengths differ, and one is not that of such a grid.
    """
    if student.shape[1] == teacher.shape[1]:
        return student, teacher
    grids = [grid(tokens) for tokens in (student, teacher)]
    side = min(found.shape[2] if found is not None else 0 for found in grids)
    if not side:
        raise UnsupportedModelError(
            f"tap 'tokens': the student's {tuple(student.shape)} and the teacher's {tuple(teacher.shape)} "
            "have different lengths and are not both square grids of patches",
            "use one input size and one patch size, or a method that taps the embedding",
        )
    ours, theirs = (positions(F.adaptive_avg_pool2d(found, side)) for found in grids if found is not None)
    return ours, theirs


def grid(tokens: Tensor) -> Tensor | None:
    """Patches (N, others + g^2, D) as a map (N, D, g, g), or None where the length is not of this kind."""
    for others in (0, 1, 2, 5):
        side = math.isqrt(max(tokens.shape[1] - others, 0))
        if side and side * side == tokens.shape[1] - others:
            patches = tokens[:, others:].transpose(1, 2)
            return patches.reshape(*patches.shape[:2], side, side)
    return None


def positions(map_: Tensor) -> Tensor:
    """The positions of a map as tokens: (N, C, H, W) to (N, H W, C)."""
    return map_.flatten(2).transpose(1, 2)
