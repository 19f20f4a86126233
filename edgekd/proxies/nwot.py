"""NASWOT: neural architecture search without training, Mellor et al. 2021 (arXiv:2006.04647)."""

from __future__ import annotations

import torch
from torch import Tensor

from edgekd.probing import Activations, rows_of
from edgekd.proxies import Proxy, Trial

_SMALLEST = 1e-6  # stands in for the zero eigenvalues of images that a network cannot tell apart


class Nwot(Proxy):
    """``log |K|``, ``K_ij`` the number of rectifiers that are both on or both off for images i and j.

    Any activation counts as on where its input is positive.
    """

    needs = ("images",)

    def measure(self, trial: Trial) -> dict[str, float]:
        return {name: value.item() for name, value in self.started(trial).items()}

    def started(self, trial: Trial) -> dict[str, Tensor]:
        count = len(trial.inputs)
        kernel = torch.zeros(count, count, dtype=torch.float64, device=trial.inputs.device)

        def see(values: Tensor) -> None:
            if len(values) == count:
                signs = torch.where(rows_of(values) > 0, 1.0, -1.0)  # s s^T: agreeing minus differing
                kernel.add_((signs @ signs.T + signs.shape[1]) / 2)

        with Activations(see):
            trial.forward()
        return {"nwot": torch.linalg.eigvalsh(kernel).clamp(min=_SMALLEST).log().sum()}
