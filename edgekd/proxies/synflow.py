"""SynFlow: synaptic saliency without data, Tanaka et al. 2020 (arXiv:2006.05467)."""

from __future__ import annotations

import math

from edgekd.probing import linear_saliency
from edgekd.proxies import Proxy, Trial

_SMALLEST = 1e-300  # of a network through which nothing flows


class SynFlow(Proxy):
    """Logarithm of ``sum dR/dW * W``: the sum itself spans a hundred orders of magnitude. Works on a copy."""

    needs = ()

    def measure(self, trial: Trial) -> dict[str, float]:
        found = linear_saliency(trial.student, trial.inputs.shape[1:])
        return {"synflow": math.log(max(sum(found.values()), _SMALLEST))}
