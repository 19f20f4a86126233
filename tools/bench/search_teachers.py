"""Does another teacher of the same task lead to another student?

    OMP_NUM_THREADS=1 python tools/bench/search_teachers.py --data DATA --models MODELS --students 40

Random students of the space are scored beside two trained CIFAR-100 teachers, and beside the first one with
another batch and with other weights of the students. Prints Kendall's tau between the scores of the first
teacher and each of these, term by term, and how many students both fronts (score against MACs) share. A score
that hears the teacher differs more between teachers than between batches or weights.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import numpy as np
import torch
from cifar_resnet import CifarResNet
from safetensors.torch import load_file
from search_truth import CIFAR, CLASSES, images
from torch import Tensor

from edgekd.nets import Outputs, tapped_forward
from edgekd.proxies.diswot import DisWot
from edgekd.ranking import Values, kendall_tau, rank_sum
from edgekd.spaces import Genome, SearchSpace, search_space
from edgekd.spec import ModelSpec

_TEACHERS = ("resnet56", "resnet32x4")


def taught(folder: Path, name: str, inputs: Tensor) -> Outputs:
    """What a trained teacher answers."""
    model = CifarResNet(name, CLASSES)
    state = load_file(folder / f"cifar100_{name}_fp16.safetensors")
    model.load_state_dict({key: value.float() for key, value in state.items()})
    with torch.no_grad():
        return tapped_forward(model.eval(), inputs, CLASSES)


def terms(
    space: SearchSpace,
    genomes: list[Genome],
    batch: tuple[Tensor, Tensor],
    teachers: list[Outputs],
    seed: int,
) -> list[list[dict[str, float]]]:
    """Of each teacher, of each student with weights of `seed`."""
    rows: list[list[dict[str, float]]] = [[] for _ in teachers]
    inputs, labels = batch
    for genome in genomes:
        student = space.build(genome, torch.Generator().manual_seed(seed)).train()
        with torch.no_grad():
            outputs = tapped_forward(student, inputs, CLASSES)
        for row, teacher in zip(rows, teachers, strict=True):
            row.append(DisWot().terms(outputs, teacher, labels))
    return rows


def front(score: Values, macs: list[int]) -> set[int]:
    """Students that no other beats in both."""
    return {
        i for i in range(len(macs))
        if not any(macs[j] <= macs[i] and score[j] > score[i] for j in range(len(macs)))
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--space", default="mobile-cnn")
    parser.add_argument("--students", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    seed, folder = arguments.seed, arguments.models
    space = search_space(arguments.space, ModelSpec(CIFAR, tuple(map(str, range(CLASSES)))), 8, (3, 5))
    rng = np.random.default_rng(seed)
    genomes = [tuple(int(rng.integers(n)) for n in space.choices) for _ in range(arguments.students)]
    batch, other = (images(arguments.data, "cifar100_test", 64, seed + n) for n in (0, 1))
    pair = [taught(folder, name, batch[0]) for name in _TEACHERS]
    base, second = terms(space, genomes, batch, pair, seed)
    (rebatched,) = terms(space, genomes, other, [taught(folder, _TEACHERS[0], other[0])], seed)
    (reseeded,) = terms(space, genomes, batch, pair[:1], seed + 1)
    macs = [sum(layer.macs for layer in space.layers(genome)) for genome in genomes]
    score = rank_sum(base)
    own = front(score, macs)
    print(json.dumps({"students": len(genomes), "front": len(own), "load_average": os.getloadavg()}))
    for name, rows in (("other teacher", second), ("other batch", rebatched), ("other weights", reseeded)):
        taus = {t: round(kendall_tau([r[t] for r in base], [r[t] for r in rows]), 3) for t in base[0]}
        combined = rank_sum(rows)
        shared = len(own & front(combined, macs))
        found = {
            "against": name,
            "tau": taus | {"rank sum": round(kendall_tau(score, combined), 3)},
            "shared_of_the_front": shared,
            "same_best": int(score.argmax()) == int(combined.argmax()),
        }
        print(json.dumps(found))


if __name__ == "__main__":
    main()
