"""How well do additive tables predict latencies that others measured, and how few measurements move one to
another device?

    python tools/bench/latency_rank.py --tables nb201_latency_ms_help.npz fbnet_latency_ms_help.npz

The tables are those of HELP (Lee et al. 2021, arXiv:2106.08630): NAS-Bench-201 and the FBNet space on many
devices. For each device an additive table, fitted on 50 and on 1,000 random architectures, is judged on 300
others by Kendall's tau and the median error; on NAS-Bench-201 also without edges that nothing needs, which
eager runtimes execute all the same, and beside the MACs of a cell. Then `fit_transfer`: a table of another
device that a few measurements correct, against one factor for all, and against a table fitted on those few
alone; medians of 5 draws. Columns that are themselves sums of a table are left out: they prove nothing.
Prints a JSON line a device, then Markdown: medians over the devices of a space, and the worst.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from edgekd.ranking import Values, kendall_tau
from edgekd.spaces.nb201 import OPERATIONS, edges_of, live
from edgekd.transfer import fit_transfer

_SUMS = ("raspi4", "pixel3", "fpga", "eyeriss")  # of FBNet: sums of a table
_COUNTS, _JUDGED = (5, 10, 30), 300
_MACS = {"nor_conv_3x3": 9, "nor_conv_1x1": 1}


def nb201_parts(texts: Values, *, dead: bool) -> Values:
    """(architectures, operations + 1): how often each operation runs in a cell, and 1."""
    rows = np.ones((len(texts), len(OPERATIONS)))
    for row, text in zip(rows, texts, strict=True):
        edges = edges_of(str(text)) if dead else live(edges_of(str(text)))
        for index, name in enumerate(OPERATIONS[1:]):
            row[index] = sum(edge[2] == name for edge in edges)
    return rows


def fbnet_parts(arch: Values) -> Values:
    """(architectures, layers x operations + 1): which operation each layer is, and 1."""
    layers, kinds = arch.shape[1], int(arch.max()) + 1
    made = np.zeros((len(arch), layers * kinds + 1))
    for layer in range(layers):
        made[np.arange(len(arch)), layer * kinds + arch[:, layer].astype(int)] = 1
    made[:, -1] = 1
    return made


def additive(parts: Values, measured: Values) -> Values:
    """Weights of the table with the smallest relative error (a little ridge where columns depend)."""
    x = parts / measured[:, None]
    found: Values = np.linalg.solve(x.T @ x + 1e-6 * np.eye(x.shape[1]), x.sum(0))
    return found


def judged(predicted: Values, measured: Values) -> tuple[float, float]:
    """Kendall's tau and the median error in %."""
    return kendall_tau(predicted, measured), float(100 * np.median(np.abs(predicted / measured - 1)))


def by_kind(parts: Values, table: Values, space: str) -> Values:
    """(architectures, kinds) milliseconds of a table: of each operation, in all layers together."""
    each = parts * table
    if space == "nb201":
        return each
    kinds = (each.shape[1] - 1) // 22
    summed = each[:, :-1].reshape(len(each), 22, kinds).sum(1)
    return np.hstack([summed, each[:, -1:]])


def few_shot(
    parts: Values, base: Values, measured: Values, space: str, rng: np.random.Generator
) -> dict[str, list[float]]:
    """[tau, error] of three ways by the number of measurements; `base`: the other device's latencies."""
    kinds = by_kind(parts, additive(parts[:1000], base[:1000]), space)
    test, rest = slice(1000, 1000 + _JUDGED), np.arange(1000 + _JUDGED, len(parts))
    found: dict[str, list[float]] = {}
    for count in _COUNTS:
        scores: dict[str, list[tuple[float, float]]] = {"one factor": [], "transfer": [], "alone": []}
        for _ in range(5):
            rows = rng.choice(rest, count, replace=False)
            y = measured[rows]
            predicted = {
                "one factor": kinds[test].sum(1) * np.median(y / kinds[rows].sum(1)),
                "transfer": fit_transfer(kinds[rows], y).predict(kinds[test]),
                "alone": parts[test] @ additive(parts[rows], y),
            }
            for name, values in predicted.items():
                scores[name].append(judged(values, measured[test]))
        for name, pairs in scores.items():
            found[f"{name}, {count}"] = [float(value) for value in np.median(pairs, 0)]
    return found


def of_device(space: str, parts: Values, fewer: Values, measured: Values) -> dict[str, list[float]]:
    """[tau, error] of tables of the device's own, and of MACs."""
    test, found = slice(1000, 1000 + _JUDGED), {}
    for count in (50, 1000):
        table = additive(parts[:count], measured[:count])
        found[f"own table of {count}"] = list(judged(parts[test] @ table, measured[test]))
    if space == "nb201":
        table = additive(fewer[:1000], measured[:1000])
        found["own table of 1000, live edges"] = list(judged(fewer[test] @ table, measured[test]))
        columns = [fewer[test, OPERATIONS.index(name) - 1] * cost for name, cost in _MACS.items()]
        macs = np.sum(columns, 0)
        found["MACs"] = list(judged(macs * np.median(measured[test] / np.maximum(macs, 1)), measured[test]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tables", type=Path, nargs="+", required=True)
    parser.add_argument("--source", default="gold_6226", help="the device whose table is moved")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    text = [
        "| space | prediction | median τ | worst τ | median error | worst error |",
        "|---|---|---|---|---|---|",
    ]
    for path in arguments.tables:
        with np.load(path) as file:
            arch = file["arch"]
            known = {name: file[name].astype(np.float64) for name in file.files if name != "arch"}
        space, rng = "nb201" if arch.ndim == 1 else "fbnet", np.random.default_rng(arguments.seed)
        some = rng.permutation(len(arch))[:3000]
        devices = [device for device in known if not (space == "fbnet" and device in _SUMS)]
        parts = nb201_parts(arch[some], dead=True) if space == "nb201" else fbnet_parts(arch[some])
        fewer = nb201_parts(arch[some], dead=False) if space == "nb201" else parts
        rows = []
        for device in devices:
            measured = known[device][some]
            row = of_device(space, parts, fewer, measured)
            if device != arguments.source:
                row |= few_shot(parts, known[arguments.source][some], measured, space, rng)
            rows.append(row)
            print(json.dumps({"space": space, "device": device} | row), flush=True)
        for name in max(rows, key=len):
            tau, error = np.array([row[name] for row in rows if name in row]).T
            text.append(
                f"| {space} | {name} | {np.median(tau):.3f} | {tau.min():.3f} | {np.median(error):.1f} % | "
                f"{error.max():.1f} % |"
            )
    print("\n" + "\n".join(text))


if __name__ == "__main__":
    main()
