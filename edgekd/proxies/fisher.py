"""Fisher: saliency of channels, Theis et al. 2018 (arXiv:1801.05787), summed as in arXiv:2101.08134."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.probing import gradients, untouched, watching, weighted_modules
from edgekd.proxies import Proxy, Trial


class Fisher(Proxy):
    """``sum_c 1/2 mean_n (sum_x a_ncx dL/da_ncx)^2`` over the outputs a of convolutions and linear layers."""

    needs = ("images", "labels")

    def measure(self, trial: Trial) -> dict[str, float]:
        kept: list[tuple[Tensor, bool]] = []

        def keep(module: nn.Module, _: tuple[Any, ...], output: Tensor) -> Tensor:
            kept.append((output, isinstance(module, nn.Linear)))
            return output.clone()  # what follows may work in place

        with untouched(trial.student, trial.seed) as student:
            with watching(weighted_modules(student), keep):
                logits = student(trial.inputs)
            loss = F.cross_entropy(logits, trial.known_labels())
            found = gradients(loss, [activation for activation, _ in kept])
        total = 0.0
        for (activation, last), gradient in zip(kept, found, strict=True):
            product = (activation.detach() * gradient).float()
            channels = product.movedim(-1, 1) if last else product  # of tokens, channels come last
            saliency = channels.reshape(*channels.shape[:2], -1).sum(2).square().mean(0) / 2
            total += saliency.sum().item()
        return {"fisher": total}
