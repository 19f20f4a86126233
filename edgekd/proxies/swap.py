"""SWAP: sample-wise activation patterns, Peng et al. 2024 (arXiv:2403.04161)."""

from __future__ import annotations

import torch
from torch import Tensor

from edgekd.probing import Activations, untouched
from edgekd.proxies import Proxy, Trial


class Swap(Proxy):
    """Number of different patterns: one rectifier's pattern is for which of the N images it is on.

    Without the optional regularisation by size. A pattern is compared by a 64-bit hash.
    """

    needs = ("images",)

    def measure(self, trial: Trial) -> dict[str, float]:
        count = len(trial.inputs)
        keys = torch.randint(-(2**62), 2**62, (count,), generator=trial.generator()).tolist()
        found: list[Tensor] = []

        def see(values: Tensor) -> None:
            if len(values) == count:
                found.append(_hashes((values.flatten(1) > 0), keys).unique())

        with untouched(trial.student, trial.seed) as student, torch.no_grad(), Activations(see):
            student(trial.inputs)
        return {"swap": float(len(torch.cat(found).unique())) if found else 0.0}


def _hashes(on: Tensor, keys: list[int]) -> Tensor:
    """int64 (V,) of (N, V) patterns: the wrapped sum of the keys of the images for which each is on."""
    hashed = torch.zeros(on.shape[1], dtype=torch.int64, device=on.device)
    for row, key in zip(on, keys, strict=True):
        hashed.add_(row.long(), alpha=key)
    return hashed
