"""GraSP: gradient signal preservation, Wang et al. 2020 (arXiv:2002.07376), as in arXiv:2101.08134."""

from __future__ import annotations

import torch

from edgekd.probing import gradients, loss_gradients, untouched, weights_of
from edgekd.proxies import Proxy, Trial


class Grasp(Proxy):
    """``-sum W * (H g)``: g the gradient of the cross-entropy, H its Hessian; two backward passes."""

    needs = ("images", "labels")

    def measure(self, trial: Trial) -> dict[str, float]:
        with untouched(trial.student, trial.seed) as student:
            weights = weights_of(student)
            found = loss_gradients(student, trial.inputs, trial.known_labels(), create_graph=True)
            product = torch.stack([(gradient.detach() * gradient).sum() for gradient in found]).sum()
            curved = gradients(product, weights)
        pairs = zip(weights, curved, strict=True)
        return {"grasp": -sum((weight.detach() * bent).sum().item() for weight, bent in pairs)}
