"""Layers that bring a student's tensor to the teacher's width; they are trained along and then dropped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def channel_adapter(student: Tensor, teacher: Tensor) -> nn.Module:
    """1x1 convolution from the width of one (N, C, H, W) map to that of another; nothing where both agree."""
    if student.shape[1] == teacher.shape[1]:
        return nn.Identity()
    return nn.Conv2d(student.shape[1], teacher.shape[1], 1)


def width_adapter(student: Tensor, teacher: Tensor) -> nn.Module:
    """Linear map of the last axis from one width to another, no bias; nothing where both agree."""
    if student.shape[-1] == teacher.shape[-1]:
        return nn.Identity()
    return nn.Linear(student.shape[-1], teacher.shape[-1], bias=False)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Layers made in this block are a function of `seed`; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
