"""Taps of student and teacher side by side: which maps belong together, at which size, of which width."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from edgekd.errors import UnsupportedModelError
from edgekd.nets import Outputs, wide


def tapped(outputs: Outputs, tap: str) -> Tensor:
    """The tensor of ``features`` or ``embedding``, in float32 or wider.

    Raises:
        UnsupportedModelError: the network gives none.
    """
    found = getattr(outputs, tap)
    if not isinstance(found, Tensor):
        raise UnsupportedModelError(f"tap '{tap}': the network gives none", "edgekd methods list")
    return wide(found)


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two (N, C, H, W) maps, the larger average-pooled to the smaller, float32 or wider, no gradient to
    the teacher's."""
    size = (min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3]))
    return pooled(wide(student), size), pooled(wide(teacher).detach(), size)


def pooled(map_: Tensor, size: tuple[int, int]) -> Tensor:
    """Averages of (N, C, H, W) over `size` cells; the map itself where it has that size."""
    return map_ if map_.shape[2:] == size else F.adaptive_avg_pool2d(map_, size)


def paired(student: Sequence[Tensor], teacher: Sequence[Tensor], tap: str) -> list[tuple[Tensor, Tensor]]:
    """The maps of `tap` that belong together, counted from the coarsest and given finest first, each pair
    as `same_size` makes it. Where one network has more maps, its finest are left out.

    Raises:
        UnsupportedModelError: one network gives none.
    """
    count = min(len(student), len(teacher))
    if not count:
        raise UnsupportedModelError(
            f"tap '{tap}': the student gives {len(student)} maps, the teacher {len(teacher)}",
            "edgekd methods list",
        )
    return [same_size(s, t) for s, t in zip(student[-count:], teacher[-count:], strict=True)]
