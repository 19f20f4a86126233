"""NASWOT: neural architecture search without training, Mellor et al. 2021 (arXiv:2006.04647)."""

from __future__ import annotations

import torch
from torch import Tensor

from edgekd.probing import Activations, untouched
from edgekd.proxies import Proxy, Trial

_SMALLEST = 1e-6  # stands in for the zero eigenvalues of images that a network cannot tell apart


class Nwot(Proxy):
    """``log |K|``, ``K_ij`` the number of rectifiers that are both on or both off for images i and j.

    Any activation counts as on where its input is positive.
    """

    needs = ("images",)

    def measure(self, trial: Trial) -> dict[str, float]:
        count = len(trial.inputs)
        kernel = torch.zeros(count, count, dtype=torch.float64, device=trial.inputs.device)

        def see(values: Tensor) -> None:
            if len(values) == count:
                signs = torch.where(values.flatten(1) > 0, 1.0, -1.0)  # s s^T: agreeing minus differing
                kernel.add_((signs @ signs.T + signs.shape[1]) / 2)

        with untouched(trial.student, trial.seed) as student, torch.no_grad(), Activations(see):
            student(trial.inputs)
        return {"nwot": torch.linalg.eigvalsh(kernel).clamp(min=_SMALLEST).log().sum().item()}
