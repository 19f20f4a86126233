"""Is there a combination of training-free scores that beats size on spaces that it was not chosen on?

    python tools/bench/search_score.py --tables zc_nasbench101.json zc_nasbench201.json zc_nasbench301.json

The tables are NASLib's (Krishnakumar et al. 2022, arXiv:2210.03230): about 500 architectures a space with
their accuracy and 11 scores. Every sum of up to three scores as ranks is judged by Kendall's tau. Leave one
space out: the sum with the best worst case on all others is what the left-out space is judged with (the three
data sets of NAS-Bench-201 are one space). Beside it: #params, FLOPs, the best single score and best sum in
hindsight, and a ridge on all scores fitted on 20 architectures of the space, mean of 20 draws. "Like pairs":
the share of pairs within 10 % of parameters, or of FLOPs, and more than 0.3 points apart, whose better one is
named.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import numpy as np

from edgekd.ranking import Values, kendall_tau, pair_accuracy, ranks
from edgekd.shortlist import fit_ridge

_ROWS = 300  # architectures of each table that are judged
_TRUTH = "val_accuracy"
_LOGARITHMS = ("synflow", "snip", "grad_norm", "fisher", "l2_norm", "params", "flops")

Space = dict[str, Values]


def read(path: Path, seed: int) -> dict[str, Space]:
    """Columns of random architectures by data set."""
    (by_set,) = json.loads(path.read_text()).values()
    found = {}
    for name, rows in by_set.items():
        columns = sorted(next(iter(rows.values())))
        values = np.array([[_number(row[key]) for key in columns] for row in rows.values()])
        values = values[np.isfinite(values).all(1)]
        chosen = np.random.default_rng(seed).permutation(len(values))[:_ROWS]
        label = path.stem.removeprefix("zc_nasbench") + ("" if len(by_set) == 1 else f" {name}")
        found[f"NB{label}"] = dict(zip(columns, values[chosen].T, strict=True))
    return found


def _number(value: object) -> float:
    """Some tables keep a score beside the time that it took."""
    return float(value["score"] if isinstance(value, dict) else value)  # type: ignore[arg-type]


def kind(space: str) -> str:
    """Data sets of one space belong together."""
    return space.partition(" ")[0]


def agreement(score: Values, space: Space) -> str:
    """Tau, and the share of like pairs by parameters and by FLOPs, as the cells of a table."""
    truth = space[_TRUTH]
    pairs = [pair_accuracy(score, truth, space[size])[0] for size in ("params", "flops")]
    return f"{kendall_tau(score, truth):.3f} | {100 * pairs[0]:.0f} % | {100 * pairs[1]:.0f} %"


def ridge_after(space: Space, names: list[str], count: int, draws: int) -> str:
    """Means over draws of a ridge fitted on `count` architectures and judged on the others."""
    columns = [np.log(np.maximum(np.abs(space[n]), 1e-12)) if n in _LOGARITHMS else space[n] for n in names]
    features, truth = np.stack([np.clip(c, *np.quantile(c, (0.01, 0.99))) for c in columns], 1), space[_TRUTH]
    found = []
    for seed in range(draws):
        order = np.random.default_rng(seed).permutation(len(truth))
        fitted, rest = order[:count], order[count:]
        score = fit_ridge(features[fitted], truth[fitted]).predict(features[rest])
        pairs = [pair_accuracy(score, truth[rest], space[s][rest])[0] for s in ("params", "flops")]
        found.append([kendall_tau(score, truth[rest]), *pairs])
    tau, by_parameters, by_flops = np.mean(found, 0)
    return f"{tau:.3f} | {100 * by_parameters:.0f} % | {100 * by_flops:.0f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tables", type=Path, nargs="+", required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    spaces = {name: space for path in arguments.tables for name, space in read(path, arguments.seed).items()}
    names = sorted(set.intersection(*(set(space) for space in spaces.values())) - {_TRUTH})
    sums = [part for size in (1, 2, 3) for part in itertools.combinations(names, size)]
    ranked = {name: {key: ranks(space[key]) for key in names} for name, space in spaces.items()}
    tau = {
        name: {part: kendall_tau(sum(ranked[name][key] for key in part), space[_TRUTH]) for part in sums}  # type: ignore[arg-type]
        for name, space in spaces.items()
    }
    print("| space | score | τ | like pairs, parameters | like pairs, FLOPs |\n|---|---|---|---|---|")
    for name, space in spaces.items():
        others = [other for other in spaces if kind(other) != kind(name)]
        chosen = max(sums, key=lambda part: min(tau[other][part] for other in others))
        single = max(((key,) for key in names), key=lambda part: tau[name][part])
        best = max(sums, key=lambda part: tau[name][part])
        shown = {
            "#params": ("params",),
            "FLOPs": ("flops",),
            f"left out: {'+'.join(chosen)}": chosen,
            f"best single in hindsight: {single[0]}": single,
            f"best sum in hindsight: {'+'.join(best)}": best,
        }
        for label, part in shown.items():
            print(f"| {name} | {label} | {agreement(sum(ranked[name][key] for key in part), space)} |")  # type: ignore[arg-type]
        print(f"| {name} | ridge after 20 trainings | {ridge_after(space, names, 20, 20)} |", flush=True)


if __name__ == "__main__":
    main()
