"""The optimiser of a training and the rates of its steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgekd.muon import Muon

Kind = Literal["adamw", "muon", "sgd"]


def make_optimizer(
    modules: Sequence[nn.Module],
    kind: Kind,
    learning_rate: float,
    weight_decay: float,
    device: str,
    *,
    decay_all: bool = False,
) -> torch.optim.Optimizer:
    """AdamW, Muon, or SGD with momentum 0.9; no weight decay on biases, batch norm and quantizer scales
    (everything with one dimension) unless `decay_all`. The rate is a tensor, so that a captured step can
    read a new one."""
    trained = [p for module in modules for p in module.parameters() if p.requires_grad]
    mixing: set[Tensor] = _mixing(modules) if kind == "muon" else set()
    kinds: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for parameter in trained:
        decay = weight_decay if decay_all or parameter.dim() > 1 else 0.0
        kinds.setdefault((decay, parameter in mixing), []).append(parameter)
    groups: list[dict[str, Any]] = []
    for (decay, orthogonal), members in kinds.items():
        rate = torch.tensor(learning_rate, device=device)
        groups.append({"params": members, "weight_decay": decay, "peak": learning_rate, "lr": rate})
        if orthogonal:
            groups[-1]["orthogonal"] = True
    if kind == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=0.9, fused=True)
    if kind == "muon":
        return Muon(groups, capturable=device != "cpu")
    return torch.optim.AdamW(groups, lr=learning_rate, fused=True, capturable=device != "cpu")


def _mixing(modules: Sequence[nn.Module]) -> set[Tensor]:
    """Weights of dense convolutions."""
    layers = [layer for module in modules for layer in module.modules()]
    found = [layer.weight for layer in layers if isinstance(layer, (nn.Conv1d, nn.Conv2d))]
    return {weight for weight in found if min(weight.shape[:2]) > 1}


def rate_share(share: float, warmup: float, milestones: tuple[float, ...] = ()) -> float:
    """The rate as a share of its peak. Linear warm-up, then half a cosine to zero (Loshchilov & Hutter 2017,
    arXiv:1608.03983, eq. 5); with `milestones`, a tenth at each of them."""
    if milestones:
        return float(0.1 ** sum(share >= milestone for milestone in milestones))
    if share < warmup:
        return 0.05 + 0.95 * share / warmup
    return 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))
