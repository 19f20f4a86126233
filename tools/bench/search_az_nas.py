"""What AZ-NAS's rank correlation on NAS-Bench-201 hangs on: weights, images, and how its terms are added.

    python tools/bench/search_az_nas.py --table nb201_test_acc_200ep.npz --data DATA --limit 100

The terms are those of `edgekd.proxies.az_nas`: expressivity, progressivity and trainability of the maps that
cells leave, and multiply-accumulates. Variants: Kaiming weights of fan in and N(0, 1) images, as published;
the weights that torch's layers draw themselves; N(0, 1) weights; CIFAR-100 images in place of noise. Each is
added up as published (logarithms of ranks), as ranks, as z-scores, and without the multiply-accumulates.
Prints Kendall's tau with each ground truth as a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from search_truth import CLASSES, images, nb201
from torch import Tensor, nn

from edgekd.probing import initialise
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


def own_weights(network: nn.Module, seed: int) -> nn.Module:
    """Those that torch's layers draw."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
                module.reset_parameters()
    return network


def variants(network: nn.Module, inputs: Tensor, seed: int) -> dict[str, dict[str, float]]:
    """The terms by the name of the variant."""
    az_nas, generator = proxy("az-nas"), torch.Generator()
    initialise(network, generator.manual_seed(seed), "kaiming")
    found = {"Kaiming weights, noise (published)": az_nas.measure(Trial(network, inputs, seed=seed))}
    found["Kaiming weights, images"] = az_nas.measure(_Shown(network, inputs, seed=seed))
    initialise(network, generator.manual_seed(seed), "normal")
    found["N(0, 1) weights, noise"] = az_nas.measure(Trial(network, inputs, seed=seed))
    own_weights(network, seed)
    found["torch's own weights, noise"] = az_nas.measure(Trial(network, inputs, seed=seed))
    return found


def table(rows: list[dict[str, Any]], accuracy: dict[str, Column]) -> str:
    """Tau of each variant and sum."""
    lines = [f"| weights and input | sum | {' | '.join(accuracy)} |", "|---" * (2 + len(accuracy)) + "|"]
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
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    truth = nb201(arguments.table, arguments.limit, arguments.seed)
    inputs, _ = images(arguments.data, "cifar100_test", arguments.batch, arguments.seed)
    rows = [variants(truth.build(text), inputs, arguments.seed) for text in truth.architectures]
    print(table(rows, truth.accuracy))
    print(json.dumps({"architectures": len(rows), "classes": CLASSES, "load_average": os.getloadavg()}))


if __name__ == "__main__":
    main()
