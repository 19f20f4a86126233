"""GradNorm: sum of gradient norms, in Abdelfattah et al. 2021 (arXiv:2101.08134, section 3.2)."""

from __future__ import annotations

from edgekd.proxies import Proxy, Trial


class GradNorm(Proxy):
    """``sum_l ||dL/dW_l||_2`` over weights of convolutions and linear layers, L the cross-entropy."""

    needs = ("images", "labels")

    def measure(self, trial: Trial) -> dict[str, float]:
        return {"gradnorm": sum(gradient.norm().item() for gradient in trial.gradients)}
