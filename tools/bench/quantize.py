"""Quantizers on the same networks, data and runtimes; and what a teacher adds to training at few bits.

    python tools/bench/quantize.py train --models models --epochs 60
    python tools/bench/quantize.py engines --models models --networks depthwise --images cifar10 --seed-list 0
    python tools/bench/quantize.py engines --merge runs/bench-quantize/engines-*.json
    python tools/bench/quantize.py bits --bits 4 3 --seed-list 0 1 2
    python tools/bench/quantize.py collapse --networks depthwise --epochs 20 --seed-list 0

`train`: networks for each set, as ONNX files beside the test samples; on a CUDA device where there is one.
`engines`: `edgekd quantize MODEL.onnx --compare-engines` for each set, network and seed, which draws the
samples that calibrate, decide and report; and edgekd's file against each engine's alone, as quantize_pairs.py
does and says why. `bits`: of the residual network, without training, with training on labels alone, and with
the float network as a teacher; same images, order, rate and epochs; the seed draws the calibration images and
the order. `collapse`: the same student trained on labels, by `kd` and by `dkd`, and what quantization takes
from each (quantize_collapse.py).

Each call writes one JSON file named after what it ran, so that processes for several networks, sets and seeds
may run side by side into one --out; --merge makes one table of their files. Expects the sets and the weights
of akamaster's ResNet-20 in --shared. An engine that is not installed, or fails, is a line.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from quantize_collapse import collapse
from quantize_networks import DEVICE, SETS, accuracy, given_residual, read, stage, write_models
from quantize_pairs import ratios
from quantize_tables import bits_table, collapse_table, engines_table, models_table

from edgekd.quantize.capture import capture
from edgekd.quantize.fakequant import calibrate, find_sites, insert, largest_codes
from edgekd.quantize.samples import Pixels
from edgekd.quantize.scheme import scheme_for
from edgekd.run import Silent
from edgekd.stages.onnx_choice import Training, Wanted
from edgekd.stages.quantize_file import quantize_file
from edgekd.target import find_target
from edgekd.tasks.classification import normalise
from edgekd.train import evaluate, fit
from edgekd.views import CachedTeacher, Views

_OURS = {"onnxruntime": "int8-x86-u8-relu0.onnx", "openvino": "int8-openvino-u8.onnx"}


def engines(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a set, network, seed, engine and runtime."""
    rows = []
    for images_of in arguments.images:
        for name in arguments.networks:
            path = arguments.models / images_of / f"{name}.onnx"
            if (name == "text") != (images_of == "sst2"):
                continue
            if not path.exists():
                sys.exit(f"{path}: no such file; make it: quantize.py train --models {arguments.models}")
            for seed in arguments.seed_list:
                rows += _engines_of(arguments, path, {"images": images_of, "network": name, "seed": seed})
    return rows


def _engines_of(arguments: argparse.Namespace, path: Path, key: dict[str, Any]) -> list[dict[str, Any]]:
    samples = path.with_name("test.npz")
    wanted = Wanted(
        path,
        find_target("x86"),
        str(samples),
        arguments.out / "-".join(map(str, key.values())),
        Pixels(),
        calibration_images=arguments.calibration_images,
        compare_engines=True,
        seed=key["seed"],
        training=Training(arguments.qat) if arguments.qat else None,
    )
    record = quantize_file(wanted, Silent())
    print(f"{key}: kept {record['chosen']}; failed {record['engines_failed']}", file=sys.stderr)
    reported, load = record["calibration"]["reporting"], os.getloadavg()[0]
    facts = key | {"reported": reported, "load": load, "kept": record["chosen"]}
    rows = [facts | row for row in record["candidates"]]
    for row in rows:
        ours = arguments.out / "-".join(map(str, key.values())) / "candidates" / _OURS[row["runtime"]]
        if row["engine"] != "edgekd" and row["cpu_p50_ms"] and ours.exists():
            row["pairs"] = ratios(row["runtime"], Path(row["file"]), ours, arguments.pairs, 60)
    failed = [
        facts | {"id": name, "engine": name, "drop": None, "reason": reason}
        for name, reason in record["engines_failed"].items()
    ]
    return rows + failed


def bits(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Accuracy of the residual network at each number of weight bits, three ways, for each seed."""
    data = read(arguments.shared, arguments.train, arguments.test)
    preprocessing = data.spec.preprocessing
    graph = capture(given_residual(arguments.shared), data.spec.input_shape)
    scheme = scheme_for(find_target("x86"))
    sites = find_sites(graph, scheme)
    views = Views(data.images, preprocessing, "none", 1, 0, DEVICE)
    answers = capture(given_residual(arguments.shared), data.spec.input_shape).to(DEVICE)
    teacher = CachedTeacher(lambda inputs: evaluate(answers, inputs), views)
    rows = [
        {"seed": seed, "bits": 32, "way": "float", "accuracy": accuracy(graph, data)}
        for seed in arguments.seed_list
    ]
    for seed in arguments.seed_list:
        drawn = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(seed))[:512]
        inputs = normalise(data.images[drawn], preprocessing)
        grids = calibrate(graph, sites, list(inputs.split(128)), scheme, "mse")
        for count in arguments.bits:
            largest = largest_codes(graph, sites, scheme, count, {})
            for way, taught in (("ptq", None), ("qat, labels", None), ("qat, teacher", teacher)):
                model = insert(graph, sites, grids, scheme, largest)
                if way != "ptq":
                    changed = {"epochs": arguments.epochs, "learning_rate": arguments.rate, "seed": seed}
                    fit(stage(model, views, data.labels, taught, **changed), lambda *_: None)
                rows.append({"seed": seed, "bits": count, "way": way, "accuracy": accuracy(model, data)})
                print(rows[-1], file=sys.stderr)
    return rows


_COMMANDS = {
    "train": (write_models, models_table),
    "engines": (engines, engines_table),
    "bits": (bits, bits_table),
    "collapse": (collapse, collapse_table),
}


def main() -> None:
    """Run one of them, or merge what several runs left, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=_COMMANDS)
    parser.add_argument(
        "--merge", type=Path, nargs="+", default=[], help="files of earlier runs: only tables"
    )
    parser.add_argument("--shared", type=Path, default=Path("shared"), help="folder with data/ and models/")
    parser.add_argument("--models", type=Path, default=Path("runs/bench-quantize/models"), help="of `train`")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-quantize"))
    parser.add_argument("--networks", nargs="+", default=["residual", "depthwise", "vit", "text"])
    parser.add_argument("--images", nargs="+", choices=SETS, default=list(SETS), help="sets of samples")
    parser.add_argument("--seed-list", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3])
    parser.add_argument("--train", type=int, default=0, help="training images; 0 is all")
    parser.add_argument("--test", type=int, default=0, help="test images; 0 is all")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--calibration-images", type=int, default=512)
    parser.add_argument("--pairs", type=int, default=4, help="sessions of each engine against edgekd alone")
    parser.add_argument("--qat", type=int, default=0, help="passes of `edgekd quantize --qat`; 0 is none")
    parser.add_argument("--rate", type=float, default=5e-4, help="rate of quantization-aware training")
    parser.add_argument("--threads", type=int, default=1, help="of torch, where there is no CUDA device")
    arguments = parser.parse_args()
    run, table = _COMMANDS[arguments.what]
    if arguments.merge:
        print(table([row for path in arguments.merge for row in json.loads(path.read_text())["rows"]]))
        return
    torch.set_num_threads(arguments.threads)
    started, cpu = time.time(), time.process_time()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = run(arguments)
    what = [] if arguments.what in ("bits", "collapse") else arguments.images
    what = [*what, *(arguments.networks if arguments.what != "bits" else [])]
    parts = [arguments.what, *what, *map(str, [] if arguments.what == "train" else arguments.seed_list)]
    written = arguments.out / f"{'-'.join(parts)}.json"
    written.write_text(json.dumps({"argv": sys.argv[1:], "rows": rows}, indent=1, default=str) + "\n")
    print(table(rows))
    spent = f"{time.time() - started:.0f} s, {time.process_time() - cpu:.0f} CPU-s"
    print(f"\n{written}; {spent} without the measuring processes, load average {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
