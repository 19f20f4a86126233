"""SNIP: connection sensitivity, Lee et al. 2019 (arXiv:1810.02340), summed as in arXiv:2101.08134."""

from __future__ import annotations

from edgekd.probing import weights_of
from edgekd.proxies import Proxy, Trial


class Snip(Proxy):
    """``sum |dL/dW * W|`` over weights of convolutions and linear layers, L the cross-entropy."""

    needs = ("images", "labels")

    def measure(self, trial: Trial) -> dict[str, float]:
        pairs = zip(weights_of(trial.student), trial.gradients, strict=True)
        return {"snip": sum((weight.detach() * gradient).abs().sum().item() for weight, gradient in pairs)}
