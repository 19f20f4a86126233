"""Outputs of networks that do not exist, for the tests of transfer methods."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from edgekd.distillers import Context, Distiller, Setting, methods
from edgekd.nets import Batch, Outputs

SAMPLES, CLASSES = 12, 6
LABELS = torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2, -1, -1, 0])


def integers(*shape: int) -> Tensor:
    return torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).reshape(shape)


# The inputs of tests/golden/losses.json.
INPUTS = {
    "fs": torch.sin(0.3 * integers(4, 8, 4, 4)).relu(),
    "ft": torch.cos(0.2 * integers(4, 8, 4, 4)).relu(),
    "f2": torch.sin(0.11 * integers(4, 5, 8, 8)).relu(),
    "t2": torch.cos(0.07 * integers(4, 8, 4, 4)).relu(),
    "t8": torch.cos(0.07 * integers(4, 5, 8, 8)).relu(),
    "es": torch.sin(0.37 * integers(4, 8)),
    "et": torch.cos(0.23 * integers(4, 12)),
    "sc": torch.sin(0.6 * integers(4, 4)),
    "lb": torch.cos(integers(4)),
    "gs_grad": torch.sin(0.2 * integers(6, 8)),
    "gt_grad": torch.cos(0.3 * integers(6, 8)),
    "seg_s": torch.sin(0.13 * integers(2, 5, 6, 6)),
    "seg_t": 2 * torch.cos(0.17 * integers(2, 5, 6, 6)),
    "tok_s": torch.sin(0.21 * integers(5, 6)),
    "tok_t": torch.cos(0.19 * integers(5, 6)),
}


def context(step: int = 0, steps: int = 100, seed: int = 0) -> Context:
    draw = torch.Generator().manual_seed(seed)
    return Context(torch.tensor(float(step // 10)), torch.tensor(float(step)), steps // 10, steps, draw)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cnn(widths: tuple[int, ...], sizes: tuple[int, ...], seed: int, images: int = 4) -> Outputs:
    """What a convolutional network gives; its last width is that of the embedding."""
    maps = tuple(
        drawn(images, c, s, s, seed=seed + i).relu()
        for i, (c, s) in enumerate(zip(widths, sizes, strict=True))
    )
    logits = drawn(images, CLASSES, seed=seed + 9)
    return Outputs(logits, maps[-1].mean((2, 3)), maps[-1], maps)


def vit(blocks: int, length: int, width: int, seed: int, images: int = 4) -> Outputs:
    tokens = tuple(drawn(images, length, width, seed=seed + i) for i in range(blocks))
    return Outputs(drawn(images, CLASSES, seed=seed + 99), tokens[-1][:, 0], tokens=tokens)


def only_map(map_: Tensor) -> Outputs:
    return Outputs(map_.mean((2, 3)), map_.mean((2, 3)), map_, (map_,))


def learning(outputs: Outputs) -> tuple[Outputs, list[Tensor]]:
    """The same tensors as leaves that ask for gradients."""
    leaves = {id(t): t.clone().requires_grad_() for t in (*outputs.stages, *outputs.tokens)}
    stages = tuple(leaves[id(t)] for t in outputs.stages)
    tokens = tuple(leaves[id(t)] for t in outputs.tokens)
    embedding = stages[-1].mean((2, 3)) if stages else tokens[-1][:, 0]
    features = stages[-1] if stages else None
    return Outputs(outputs.logits, embedding, features, stages, tokens=tokens), list(leaves.values())


def built(name: str, student: Outputs, teacher: Outputs, **options: Any) -> Any:
    (method,) = methods(name, {name: options})
    method.build(student, teacher, Setting(SAMPLES, CLASSES, LABELS, seed=0))
    return method.double() if student.logits.dtype is torch.float64 else method


def batch(index: tuple[int, ...] = (0, 1, 2, 3)) -> Batch:
    numbers = torch.tensor(index)
    return Batch(torch.zeros(len(index), 1), LABELS[numbers].clamp(min=0), numbers)


def value(method: Distiller, student: Outputs, teacher: Outputs, now: Context | None = None) -> Tensor:
    found: Tensor = method(student, teacher, batch(), now or context())
    return found


def on_map(name: str, student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    """A method on networks whose one stage is this map."""
    ours, theirs = only_map(student), only_map(teacher)
    return value(built(name, ours, theirs, **options), ours, theirs)
