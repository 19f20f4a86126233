"""Multiply-accumulates of one image, of all layers or of those on a path from the image to the logits."""

from __future__ import annotations

from edgekd.probing import layer_macs, linear_saliency
from edgekd.proxies import Proxy, Trial


class Macs(Proxy):
    """Of every convolution and linear layer that runs."""

    needs = ()

    def measure(self, trial: Trial) -> dict[str, float]:
        return {"macs": float(sum(layer_macs(trial.student, trial.inputs.shape[1:]).values()))}


class LiveMacs(Proxy):
    """Of the layers that reach the logits: cell spaces with a zero operation hold many that do not."""

    needs = ()

    def measure(self, trial: Trial) -> dict[str, float]:
        shape = trial.inputs.shape[1:]
        saliency = linear_saliency(trial.student, shape, through_shares=True)
        macs = layer_macs(trial.student, shape)
        return {"live-macs": float(sum(count for path, count in macs.items() if saliency[path] > 0))}
