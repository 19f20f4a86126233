"""What AZ-NAS's rank correlation on NAS-Bench-201 hangs on: weights, images, and how its terms are added.

    python tools/bench/search_az_nas.py --table nb201_test_acc_200ep.npz --data DATA --limit 100

The terms are those of `edgekd.proxies.az_nas`: expressivity, progressivity and trainability of the maps that
cells leave, and multiply-accumulates. Variants: ``published``, Kaiming weights of fan in and N(0, 1) images;
``torch``, the weights that torch's layers draw themselves; ``normal``, N(0, 1) weights; ``images``, of
CIFAR-100, in place of noise. Each is added up as published (logarithms of ranks), as ranks, as z-scores, and
without the multiply-accumulates. Prints Kendall's tau with each ground truth as a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from search_truth import CLASSES, images, nb201
from torch import Tensor, nn

from edgekd.probing import Initialisation, initialise
from edgekd.proxies import Trial, proxy
from edgekd.ranking import deviations, kendall_tau, log_ranks, ranks

Column = NDArray[np.float64]
_DEAD = -1e3  # for z-scores, which a dead block's -1e6 would fill alone
_SUMS: dict[str, Callable[[Column], Column]] = {
    "logarithms of ranks, as published": log_ranks,
    "ranks": ranks,
    "z-scores": lambda column: deviations(np.clip(column, _DEAD, None)),
}


class _Shown(Trial):
    """A trial whose noise is the images themselves."""

    def noise(self) -> Tensor:
        return self.inputs.clone()


def _torchs(network: nn.Module, seed: int) -> None:
    """The weights that torch's layers draw themselves; those of `edgekd.blocks` draw none."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.Conv2d.reset_parameters(module)
            elif isinstance(module, nn.Linear):
                nn.Linear.reset_parameters(module)


def _drawn(how: Initialisation, network: nn.Module, seed: int) -> None:
    initialise(network, torch.Generator().manual_seed(seed), how)


_VARIANTS: dict[str, tuple[Callable[[nn.Module, int], None], type[Trial]]] = {
    "published": (partial(_drawn, "kaiming"), Trial),
    "images": (partial(_drawn, "kaiming"), _Shown),
    "normal": (partial(_drawn, "normal"), Trial),
    "torch": (_torchs, Trial),
}


def measured(name: str, network: nn.Module, inputs: Tensor, seed: int) -> dict[str, float]:
    """The terms under a variant."""
    draw, trial = _VARIANTS[name]
    draw(network, seed)
    return proxy("az-nas").measure(trial(network, inputs, seed=seed))


def table(rows: list[dict[str, Any]], accuracy: dict[str, Column]) -> str:
    """Tau of each variant and sum."""
    lines = [f"| variant | sum | {' | '.join(accuracy)} |", "|---" * (2 + len(accuracy)) + "|"]
    for variant in rows[0]:
        terms = {name: np.array([row[variant][name] for row in rows]) for name in rows[0][variant]}
        sums = {name: [scale(column) for column in terms.values()] for name, scale in _SUMS.items()}
        sums["logarithms of ranks, without multiply-accumulates"] = [
            log_ranks(column) for name, column in terms.items() if name != "complexity"
        ]
        sums |= {name: [column] for name, column in terms.items()}
        for name, columns in sums.items():
            taus = (f"{kendall_tau(np.sum(columns, 0), truth):.3f}" for truth in accuracy.values())
            lines.append(f"| {variant} | {name} | {' | '.join(taus)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the weights, the noise and the draw of images"
    )
    parser.add_argument("--variants", nargs="+", choices=tuple(_VARIANTS), default=list(_VARIANTS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    truth = nb201(arguments.table, arguments.limit, 0)
    inputs, _ = images(arguments.data, "cifar100_test", arguments.batch, arguments.seed)
    rows = []
    for text in truth.architectures:
        network = truth.build(text)
        rows.append({name: measured(name, network, inputs, arguments.seed) for name in arguments.variants})
    print(table(rows, truth.accuracy))
    print(json.dumps({"architectures": len(rows), "classes": CLASSES, "load_average": os.getloadavg()}))


if __name__ == "__main__":
    main()
