"""The optimiser of a training and the rates of its steps."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

Kind = Literal["adamw", "sgd"]


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    kind: Kind,
    learning_rate: float,
    weight_decay: float,
    device: str,
    *,
    decay_all: bool = False,
) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum 0.9; no weight decay on biases, batch norm and quantizer scales
    (everything with one dimension) unless `decay_all`. The rate is a tensor, so that a captured step can
    read a new one."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    matrices = [p for p in trained if decay_all or p.dim() > 1]
    vectors = [p for p in trained if not (decay_all or p.dim() > 1)]
    groups: list[dict[str, Any]] = []
    for members, decay in ((matrices, weight_decay), (vectors, 0.0)):
        rate = torch.tensor(learning_rate, device=device)
        groups.append({"params": members, "weight_decay": decay, "peak": learning_rate, "lr": rate})
    groups = [group for group in groups if group["params"]]
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9, fused=True)
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True, capturable=device != "cpu")


def rate_share(share: float, warmup: float, milestones: tuple[float, ...] = ()) -> float:
    """The rate as a share of its peak. Linear warm-up, then half a cosine to zero (Loshchilov & Hutter 2017,
    arXiv:1608.03983, eq. 5); with `milestones`, a tenth at each of them."""
    if milestones:
        return float(0.1 ** sum(share >= milestone for milestone in milestones))
    if share < warmup:
        return 0.05 + 0.95 * share / warmup
    return 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))
