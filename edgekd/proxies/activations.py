"""Activations: values that all layers make of one image, Radosavovic et al. 2020 (arXiv:2003.13678)."""

from __future__ import annotations

from edgekd.probing import layer_values
from edgekd.proxies import Proxy, Trial


class LayerValues(Proxy):
    """Of every convolution and linear layer that runs: a baseline beside the sizes."""

    needs = ()

    def measure(self, trial: Trial) -> dict[str, float]:
        return {"activations": float(sum(layer_values(trial.student, trial.inputs.shape[1:]).values()))}
