"""Zen-score: Gaussian complexity of a network, Lin et al. 2021 (arXiv:2102.01063)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from edgekd.nets import tapped_forward
from edgekd.probing import initialise, untouched, watching
from edgekd.proxies import Proxy, Trial

_STEP, _SMALLEST = 1e-2, 1e-12


class Zen(Proxy):
    """``log E ||f(x) - f(x + 0.01 e)||_1 + sum log sqrt(mean variance of each batch norm)``, weights, x and e
    from N(0, 1), f the last feature map. Works on a copy, whose residual links stay (the paper cuts them)."""

    needs = ()

    def measure(self, trial: Trial) -> dict[str, float]:
        generator = trial.generator()
        student = initialise(copy.deepcopy(trial.student), generator, "normal")
        inputs, step = (torch.randn(trial.inputs.shape, generator=generator) for _ in range(2))
        scales: list[float] = []

        def see(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            rows = args[0].float().transpose(0, 1).flatten(1)
            scales.append(rows.var(1, unbiased=False).mean().clamp(min=_SMALLEST).log().item() / 2)

        norms = [module for module in student.modules() if isinstance(module, _BatchNorm)]
        with untouched(student, trial.seed), torch.no_grad():
            with watching(norms, see):
                first = tapped_forward(student, inputs.to(trial.inputs), trial.classes)
            moved = (inputs + _STEP * step).to(trial.inputs)
            second = tapped_forward(student, moved, trial.classes)
        ends = [first.logits, second.logits]
        if first.features is not None and second.features is not None:
            ends = [first.features, second.features]
        change = (ends[0] - ends[1]).abs().flatten(1).sum(1).mean()
        return {"zen": change.clamp(min=_SMALLEST).log().item() + sum(scales)}
