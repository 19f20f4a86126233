"""ZiCo: inverse coefficient of variation of gradients, Li et al. 2023 (arXiv:2301.11300)."""

from __future__ import annotations

import torch

from edgekd.probing import loss_gradients, untouched
from edgekd.proxies import Proxy, Trial


class Zico(Proxy):
    """``sum_l log sum_w mean_t |g| / std_t g``: g the gradient of each weight of layer l on batch t.

    The two batches are the halves of the one given. Weights and layers without a varying gradient add 0.
    """

    needs = ("images", "labels")

    def measure(self, trial: Trial) -> dict[str, float]:
        halves = zip(trial.inputs.chunk(2), trial.known_labels().chunk(2), strict=True)
        with untouched(trial.student, trial.seed) as student:
            parts = [loss_gradients(student, images, labels) for images, labels in halves]
        total = 0.0
        for layer in zip(*parts, strict=True):
            found = torch.stack(layer).double()
            spread = found.std(0, unbiased=False)
            varying = spread > 0
            ratio = (found.abs().mean(0)[varying] / spread[varying]).sum()
            total += ratio.log().item() if ratio > 0 else 0.0
        return {"zico": total}
