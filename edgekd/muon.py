"""Muon: steps of weight matrices whose singular values are all about one."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# Jordan et al. 2024, "Muon" (https://kellerjordan.github.io/posts/muon/): f(x) = a x + b x^3 + c x^5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_MOMENTUM = 0.95
_RMS = 0.2  # of an AdamW step in units of the rate (Liu et al. 2025, arXiv:2502.16982, eq. 4)


def orthogonalised(matrices: Tensor) -> Tensor:
    """(B, M, N) matrices with the singular vectors of those given and singular values between about 0.7 and
    1.2, the smallest ones below that: five Newton-Schulz iterations, in bfloat16 on a CUDA device."""
    a, b, c = _COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    x = x.bfloat16() if x.is_cuda else x
    for _ in range(_ITERATIONS):
        square = x @ x.mT
        x = a * x + torch.baddbmm(square, square, square, beta=b, alpha=c) @ x
    found: Tensor = (x.mT if tall else x).to(matrices.dtype)
    return found


class Muon(torch.optim.AdamW):
    """AdamW, but for the groups with `orthogonal`: their parameters (M, ...) are matrices (M, N), and step by
    the orthogonalised Nesterov momentum times ``0.2 sqrt(max(M, N))``, so that one rate and one decoupled
    weight decay suit both kinds. Can be captured as a CUDA graph where rates are tensors."""

    def __init__(self, groups: Iterable[dict[str, Any]], *, capturable: bool) -> None:
        super().__init__(groups, fused=True, capturable=capturable)
        self.register_step_pre_hook(lambda *_: self._step_all_matrices())

    @torch.no_grad()
    def _step_all_matrices(self) -> None:
        """Their gradients are gone afterwards, so that AdamW passes them over."""
        for group in self.param_groups:
            if group.get("orthogonal"):
                self._step_matrices(group)

    def _step_matrices(self, group: dict[str, Any]) -> None:
        alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
        for parameter in group["params"]:
            if (gradient := parameter.grad) is None:
                continue
            state = self.state[parameter]
            if not state:  # AdamW, when it is restored, looks for the step of every parameter
                state["step"] = torch.zeros((), device=parameter.device)
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(gradient, 1 - _MOMENTUM)
            ahead = gradient.lerp(state["momentum"], _MOMENTUM).flatten(1)
            alike[ahead.shape].append((parameter, ahead))
            parameter.grad = None
        for shape, members in alike.items():
            made = orthogonalised(torch.stack([ahead for _, ahead in members]))
            rate = group["lr"] * _RMS * math.sqrt(max(shape))
            for (parameter, _), step in zip(members, made, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(rate * step.view_as(parameter))
