"""Number of trainable values: the baseline that every other score has to beat."""

from __future__ import annotations

from edgekd.nets import count_parameters
from edgekd.proxies import Proxy, Trial


class Parameters(Proxy):
    """The count."""

    needs = ()

    def measure(self, trial: Trial) -> dict[str, float]:
        return {"params": float(count_parameters(trial.student))}
