"""In which order a training set is shown in one epoch."""

from __future__ import annotations

import torch
from torch import Tensor


def epoch_order(labels: Tensor, shape: torch.Size, generator: torch.Generator, *, paired: bool) -> Tensor:
    """(steps, batch) sample numbers, shuffled anew by `generator`.

    `paired` and labels that are partly -1: half of each batch, rounded down, is labelled and cycles through
    the labelled samples; the rest are samples without a label, as where a labelled and an unlabelled loader
    are zipped (`erjui/DHO`, ``train_others.py``). Else every sample comes at most once.
    """
    steps, batch = shape
    known = torch.nonzero(labels >= 0).view(-1)
    if not paired or not 0 < len(known) < len(labels):
        return torch.randperm(len(labels), generator=generator)[: steps * batch].view(steps, batch)
    half = batch // 2
    parts = [
        _cycled(known, steps * half, generator).view(steps, half),
        _cycled(torch.nonzero(labels < 0).view(-1), steps * (batch - half), generator).view(steps, -1),
    ]
    return torch.cat(parts, 1)


def _cycled(rows: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of `rows`: shuffled, and shuffled again whenever all have been used."""
    rounds = [rows[torch.randperm(len(rows), generator=generator)] for _ in range(-(-count // len(rows)))]
    return torch.cat([*rounds, rows[:0]])[:count]
