"""MeCo: smallest eigenvalue of the channels' correlation, Jiang et al. 2023 (NeurIPS 2023)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgekd.probing import untouched, watching
from edgekd.proxies import Proxy, Trial


class Meco(Proxy):
    """``sum_l lambda_min(P_l)``: P_l Pearson's correlation of the channels of layer l's map for one random
    image. A channel that does not vary correlates with nothing, itself included."""

    needs = ()

    def measure(self, trial: Trial) -> dict[str, float]:
        total = 0.0

        def see(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            nonlocal total
            if isinstance(output, Tensor) and output.dim() == 4:
                total += _smallest(output[0].flatten(1))

        leaves = [module for module in trial.student.modules() if not any(module.children())]
        with untouched(trial.student, trial.seed) as student, torch.no_grad(), watching(leaves, see):
            student(trial.noise()[:1])
        return {"meco": total}


def _smallest(channels: Tensor) -> float:
    """Least eigenvalue of the correlation of (C, positions); 0 with fewer positions than channels."""
    count, positions = channels.shape
    centred = (channels - channels.mean(1, keepdim=True)).double()
    if count == 1 or positions <= count:
        return 0.0
    rows = nn.functional.normalize(centred, dim=1)
    return max(0.0, float(torch.linalg.eigvalsh(rows @ rows.T)[0]))
