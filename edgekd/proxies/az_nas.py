"""AZ-NAS: four zero-cost views of a network, Lee & Ham 2024 (arXiv:2403.19232)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from edgekd.probing import block_features, layer_macs, untouched
from edgekd.proxies import Proxy, Trial

_SMALLEST = 1e-6
_DEAD = -1e6  # trainability of a block that nothing passes, or that passes everything unchanged


class AzNas(Proxy):
    """Expressivity, progressivity, trainability, complexity, of feature maps X_l that noise leaves after
    block l.

    The paper adds the logarithms of the four ranks over a population (`edgekd.ranking.log_ranks`); the
    search adds the ranks themselves, as of every score.
    """

    needs = ()

    def measure(self, trial: Trial) -> dict[str, float]:
        generator = trial.generator()
        complexity = float(sum(layer_macs(trial.student, trial.inputs.shape[1:]).values()))
        with untouched(trial.student, trial.seed) as student:
            features = block_features(student, trial.noise().requires_grad_(True))
            found = [_trainability(*pair, generator) for pair in pairwise(features)]
        entropies = [_entropy(feature.detach()) for feature in features]
        steps = [after - before for before, after in pairwise(entropies)]
        return {
            "expressivity": sum(entropies),
            "progressivity": min(steps, default=0.0),
            "trainability": sum(found) / len(found) if found else 0.0,
            "complexity": complexity,
        }


def _rows(feature: Tensor) -> Tensor:
    """(positions, channels) of a map (N, C, H, W) or of tokens (N, L, D)."""
    return (feature.movedim(1, -1) if feature.dim() == 4 else feature).flatten(0, -2).float()


def _entropy(feature: Tensor) -> float:
    """Entropy of the normalised principal variances of the channels."""
    rows = _rows(feature)
    centred = rows - rows.mean(0)
    variances = torch.linalg.eigvalsh((centred.T @ centred).double() / len(rows)).clamp(min=0)
    total = variances.sum()
    if total <= 0:
        return 0.0
    share = variances / total
    return float(-(share * share.clamp(min=1e-12).log()).sum())


def _trainability(before: Tensor, after: Tensor, generator: torch.Generator) -> float:
    """``2 - s - 1/s``, s the spectral norm of the Jacobian between two maps.

    The Jacobian between channels is ``E[g v^T]``: v random signs of the later map's shape, g their product
    with the Jacobian by one backward pass; the mean is over images and positions. Positions that a stride
    merges become channels of their own.
    """
    signs = torch.randint(0, 2, after.shape, generator=generator).to(after) * 2 - 1
    if not after.requires_grad:
        return _DEAD
    (pulled,) = torch.autograd.grad(after, before, signs, retain_graph=True, allow_unused=True)
    if pulled is None or (pulled.shape == signs.shape and torch.equal(pulled, signs)):
        return _DEAD
    if pulled.dim() == 4 and after.dim() == 4 and pulled.shape[2] > after.shape[2]:
        stride = pulled.shape[2] // after.shape[2]
        size = [length * stride for length in after.shape[2:]]
        pulled = torch.nn.functional.pixel_unshuffle(pulled[:, :, : size[0], : size[1]], stride)
    g, v = _rows(pulled), _rows(signs)
    if len(g) != len(v):  # a block that changes the number of tokens
        return 0.0
    norm = float(torch.linalg.matrix_norm(g.T @ v / len(v), 2))
    return 2 - norm - 1 / (norm + _SMALLEST)
