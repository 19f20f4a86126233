"""How well do training-free scores rank architectures whose trained accuracy is known?

    python tools/bench/search_rank.py --truth resnets --table diswot_s0.csv --data DATA --models MODELS
    python tools/bench/search_rank.py --truth nb201 --table nb201_test_acc_200ep.npz --data DATA \
        --models MODELS --limit 240
    python tools/bench/search_rank.py --truth autoformer --table autoprox_vit_kd.json --data DATA
    python tools/bench/search_rank.py --truth nb201 ... --part 0/8 --out part0.jsonl    # seven more, then
    python tools/bench/search_rank.py --truth nb201 --table ... --data DATA --read part*.jsonl

DATA holds cifar100_test.npz and load_shared.py; MODELS, which only scores with a teacher need, holds
cifar100_resnet56_fp16.safetensors. All networks see the same CIFAR-100 images and have 100 classes, whatever
they were trained for. `--teachers` are the teacher's states: trained, or random with Kaiming or N(0, 1)
weights; students have weights of `--init`. Writes one JSON line an architecture and one a score, and prints
a Markdown table: Kendall's tau on each ground truth; on the first one Spearman's rho, the share of pairs
within 10 % of parameters and more than 0.3 points apart whose winner the score names, and rho with the
parameters taken out. ms is CPU time of one thread for one architecture. Transformers see enlarged images, and
no score with a teacher, which is a network for 32 pixels. `--plot` draws tau with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from cifar_resnet import CifarResNet
from numpy.typing import NDArray
from safetensors.torch import load_file
from search_plot import write
from search_truth import CLASSES, VITS, Truth, images, nb201, resnets, vits
from search_vits import enlarged
from torch import Tensor, nn

from edgekd.nets import Outputs, count_parameters, tapped_forward
from edgekd.probing import Initialisation, initialise, layer_macs, randomised
from edgekd.proxies import Trial, proxy, proxy_class, proxy_names
from edgekd.ranking import (
    deviations,
    kendall_tau,
    log_ranks,
    pair_accuracy,
    partial_rho,
    rank_sum,
    ranks,
    spearman_rho,
)

Row = dict[str, Any]
_TEACHERS = ("trained", "random-kaiming", "random-normal")
_SUMS = ("nwot+synflow", "nwot+synflow+live-macs", "diswot-sum@trained+nwot+synflow")


def teachers(folder: Path | None, states: Sequence[str], inputs: Tensor, seed: int) -> dict[str, Outputs]:
    """The outputs on the batch of a CIFAR-100 ResNet-56 in each state."""
    if folder is None:
        return {}
    model = CifarResNet("resnet56", CLASSES)
    state = load_file(folder / "cifar100_resnet56_fp16.safetensors")
    model.load_state_dict({key: value.float() for key, value in state.items()})
    model.to(inputs.device)
    made: dict[str, nn.Module] = {
        "trained": model.eval(),
        "random-kaiming": randomised(model.cpu(), seed + 1, "kaiming").to(inputs.device),
        "random-normal": randomised(model, seed + 1, "normal").to(inputs.device),
    }
    model.to(inputs.device)
    with torch.no_grad():
        return {name: tapped_forward(made[name], inputs, CLASSES) for name in states}


def scores_of(names: Sequence[str], states: Sequence[str]) -> list[tuple[str, str]]:
    """(score, teacher's state or "") of all that is measured for an architecture."""
    found = []
    for name in names:
        needs_teacher = "teacher" in proxy_class(name).needs
        found += [(name, state) for state in states] if needs_teacher else [(name, "")]
    return found


def measure(trial: Trial, scores: list[tuple[str, str]], seen: dict[str, Outputs]) -> Row:
    """Terms and CPU milliseconds by score. What scores of one trial share is measured once; each pays it."""
    terms: dict[str, dict[str, float]] = {}
    cost: dict[str, float] = {}
    shared = dict.fromkeys(("outputs", "gradients"), 0.0)
    for name, state in scores:
        key = f"{name}@{state}" if state else name
        part = "outputs" if state else "gradients" if name in ("gradnorm", "snip") else ""
        if part and part not in trial.__dict__:
            begin = time.process_time()
            getattr(trial, part)
            shared[part] = 1e3 * (time.process_time() - begin)
        trial.teacher = seen[state] if state else None
        begin = time.process_time()
        terms[key] = proxy(name).measure(trial)
        cost[key] = 1e3 * (time.process_time() - begin) + shared.get(part, 0.0)
    return {"terms": terms, "ms": cost}


def combined(rows: list[Row], key: str) -> dict[str, NDArray[np.float64]]:
    """The score of each architecture; of several terms, under each way to combine them."""
    parts = [row["terms"][key] for row in rows]
    names = list(parts[0])
    if len(names) == 1:
        return {key: np.array([part[names[0]] for part in parts])}
    columns = {name: [part[name] for part in parts] for name in names}
    if key == "az-nas":
        published = np.sum([log_ranks(column) for column in columns.values()], 0)
        return {"az-nas": published, "az-nas, ranks": rank_sum(parts)}
    return {
        f"{key}, z": np.sum([deviations(column) for column in columns.values()], 0),
        f"{key}, ranks": rank_sum(parts),
    }


def agreement(score: NDArray[np.float64], truth: NDArray[np.float64], rows: list[Row]) -> dict[str, float]:
    """How the score orders the architectures that it is finite for."""
    known = np.isfinite(score)
    s, t = score[known], truth[known]
    size = np.array([row["parameters"] for row in rows], dtype=np.float64)[known]
    share, pairs = pair_accuracy(s, t, size)
    return {
        "tau": kendall_tau(s, t),
        "rho": spearman_rho(s, t),
        "partial_rho": partial_rho(s, t, size),
        "pair_accuracy": share,
        "pairs": pairs,
        "dropped": int((~known).sum()),
    }


def columns_of(rows: list[Row], sums: Sequence[str]) -> dict[str, tuple[NDArray[np.float64], float]]:
    """Each score, and each sum of scores as ranks: its value for each architecture, and its mean ms."""
    columns: dict[str, tuple[NDArray[np.float64], float]] = {}
    for key in rows[0]["terms"]:
        cost = float(np.mean([row["ms"][key] for row in rows]))
        columns |= {name: (values, cost) for name, values in combined(rows, key).items()}
    for text in sums:
        names = text.split("+")
        if all(name in columns for name in names):
            total = np.mean([ranks(columns[name][0]) for name in names], 0)
            columns[text] = (total, sum(columns[name][1] for name in names))
    return columns


def summarise(rows: list[Row], name_of_truth: str, sums: Sequence[str]) -> list[Row]:
    """One row for each score, and each sum of scores as ranks, against every ground truth."""
    accuracy = {on: np.array([row["accuracy"][on] for row in rows]) for on in rows[0]["accuracy"]}
    return [
        {"truth": name_of_truth, "score": name, "ms": cost}
        | {on: agreement(values, each, rows) for on, each in accuracy.items()}
        for name, (values, cost) in columns_of(rows, sums).items()
    ]


def markdown(found: list[Row], on: Sequence[str]) -> str:
    """Sorted by tau on the first ground truth."""
    head = [f"tau {name}" for name in on] + ["Spearman", "pairs", "partial rho", "ms"]
    lines = ["| score | " + " | ".join(head) + " |", "|---" * (len(head) + 1) + "|"]
    for row in sorted(found, key=lambda row: -row[on[0]]["tau"]):
        first = row[on[0]]
        cells = [f"{row[name]['tau']:.3f}" for name in on]
        share = first["pair_accuracy"]
        cells += [f"{first['rho']:.3f}", "—" if math.isnan(share) else f"{100 * share:.0f} %"]
        cells += [f"{first['partial_rho']:.2f}", f"{row['ms']:.0f}"]
        lines.append(f"| {row['score']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--truth", choices=("resnets", "nb201", *VITS), required=True)
    parser.add_argument("--table", type=Path, required=True, help="diswot_s0.csv or nb201_test_acc_200ep.npz")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", type=Path, help="without it, scores that need a teacher are left out")
    parser.add_argument("--proxies", nargs="+", default=list(proxy_names()))
    parser.add_argument("--sums", nargs="*", default=list(_SUMS), help="such as nwot+synflow, added as ranks")
    parser.add_argument("--teachers", nargs="+", choices=_TEACHERS, default=list(_TEACHERS))
    parser.add_argument("--init", choices=get_args(Initialisation), default="kaiming")
    parser.add_argument("--limit", type=int, default=240, help="architectures at most")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="where networks run; ms is CPU time all the same")
    parser.add_argument("--part", default="0/1", help="k/n: of every n architectures the k-th, from 0")
    parser.add_argument("--read", type=Path, nargs="+", help="measure nothing, summarise these files")
    parser.add_argument(
        "--plot", type=Path, help="an SVG file: tau on the first ground truth, with intervals"
    )
    parser.add_argument("--out", type=Path, default=Path("search_rank.jsonl"))
    return parser.parse_args()


def load(arguments: argparse.Namespace) -> Truth:
    if arguments.truth in VITS:
        return vits(arguments.table, arguments.truth, arguments.limit)
    if arguments.truth == "nb201":
        return nb201(arguments.table, arguments.limit, arguments.seed)
    found = resnets(arguments.table)
    chosen = {name: values[: arguments.limit] for name, values in found.accuracy.items()}
    return Truth(found.name, found.architectures[: arguments.limit], found.build, chosen)


def conditions(arguments: argparse.Namespace) -> Mapping[str, Any]:
    return {
        "arguments": {key: str(value) for key, value in vars(arguments).items()},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load_average": os.getloadavg(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def measured(arguments: argparse.Namespace, truth: Truth) -> Iterator[Row]:
    """What the scores say of each architecture of this part."""
    inputs, labels = images(arguments.data, "cifar100_test", arguments.batch, arguments.seed)
    inputs, labels = inputs.to(arguments.device), labels.to(arguments.device)
    if truth.name in VITS:
        inputs = enlarged(inputs)
    seen = (
        {} if truth.name in VITS else teachers(arguments.models, arguments.teachers, inputs, arguments.seed)
    )
    scores = scores_of(arguments.proxies, list(seen))
    own, parts = map(int, arguments.part.split("/"))
    for number in range(own, len(truth.architectures), parts):
        arch = truth.architectures[number]
        generator = torch.Generator().manual_seed(arguments.seed)
        student = initialise(truth.build(arch), generator, arguments.init).to(arguments.device)
        trial = Trial(student, inputs, labels, None, CLASSES, arguments.seed)
        yield {
            "number": number,
            "architecture": arch,
            "accuracy": {name: float(values[number]) for name, values in truth.accuracy.items()},
            "parameters": count_parameters(student),
            "macs": sum(layer_macs(student, inputs.shape[1:]).values()),
            **measure(trial, scores, seen),
        }


def read(paths: Sequence[Path]) -> list[Row]:
    """The architectures of several files, each once, in their order."""
    lines = [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").splitlines()]
    rows = {line["architecture"]: line for line in lines if "architecture" in line}
    return sorted(rows.values(), key=lambda row: row.get("number", 0))


def main() -> None:
    arguments = parse()
    torch.set_num_threads(1)
    truth = load(arguments)
    with arguments.out.open("w", encoding="utf-8") as file:
        file.write(json.dumps(conditions(arguments)) + "\n")
        rows = []
        for row in read(arguments.read) if arguments.read else measured(arguments, truth):
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
        found = summarise(rows, truth.name, arguments.sums)
        for line in found:
            file.write(json.dumps(line) + "\n")
        file.write(json.dumps({"load_average_at_end": os.getloadavg()}) + "\n")
    print(f"{len(rows)} architectures, seed {arguments.seed}, load {os.getloadavg()[0]:.1f}\n")
    print(markdown(found, list(truth.accuracy)))
    if arguments.plot:
        on = next(iter(truth.accuracy))
        columns = {name: values for name, (values, _) in columns_of(rows, arguments.sums).items()}
        accuracy = np.array([row["accuracy"][on] for row in rows])
        write(columns, accuracy, f"{len(rows)} {truth.name}, accuracy: {on}", arguments.seed, arguments.plot)


if __name__ == "__main__":
    main()
