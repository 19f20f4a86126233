"""Predicted against measured latency of random students on this machine.

    OMP_NUM_THREADS=1 python tools/bench/latency_predicted.py --spaces mobile-cnn repvgg --students 30

For each space, runtime and precision: what `edgekd targets calibrate` finds. Students from small to large are
written with fresh weights (int8: quantized on random images); their layers are measured one by one, in turns
with the students; a line is fitted on ten and judged on the others. A JSON line each: the agreement with
networks that the line was not fitted on, and of the plain sum of layers, which a search without calibration
uses, on the same ones; of the second runtime also that of a line from the first one's layers to its networks.
With `--keep FOLDER` networks and tables stay there, and an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from edgekd.cost import Line
from edgekd.profiler import HERE
from edgekd.ranking import kendall_tau
from edgekd.spec import ModelSpec, Preprocessing
from edgekd.stages.calibrate import Wanted, calibrate, drawn, fit, space_of
from edgekd.target import Target, find_target


def moved(table: dict[str, Any], lender: dict[str, Any], target: Target, wanted: Wanted) -> dict[str, Any]:
    """How well the layers of the other runtime predict these networks, as with ``--layers-of``."""
    genomes = drawn(space_of(target, wanted).choices, wanted.candidates, wanted.seed)[: wanted.networks]
    shapes = [space_of(target, wanted).layers(genome) for genome in genomes]
    features = np.array([Line.features(lender["entries_ms"], layers) for layers in shapes])
    measured = np.array(table["validation"]["measured_ms"])
    if len(measured) != len(features):
        return {}  # a network was refused
    first = slice(table["validation"]["fitted_on"])
    held = slice(first.stop, None)
    predicted = (features @ fit(features[first], measured[first]).coefficients)[held]
    return {
        "moved_from": lender["header"]["runtime"],
        "moved_tau": round(kendall_tau(predicted, measured[held]), 3),
        "moved_error_percent": round(100 * float(np.median(np.abs(predicted / measured[held] - 1))), 1),
    }


def row(table: dict[str, Any], wanted: Wanted, seconds: float) -> dict[str, Any]:
    """What is told of one space, runtime and precision."""
    found = table["validation"]
    held = slice(found["fitted_on"], None)
    measured, sums = (np.array(found[key])[held] for key in ("measured_ms", "sums_ms"))
    ratio = sums / measured
    return {
        "space": wanted.space,
        "runtime": table["header"]["runtime"],
        "precision": wanted.precision,
        "fitted_on": found["fitted_on"],
        "judged_on": len(measured),
        "tau": round(found["kendall_tau"], 3),
        "remeasured_tau": round(found["remeasured_tau"], 3),
        "error_percent": round(found["median_error_percent"], 1),
        "sum_tau": round(kendall_tau(sums, measured), 3),
        "sum_error_percent": round(100 * float(np.median(np.abs(ratio - 1))), 1),
        "measured_ms": [round(float(measured.min()), 4), round(float(measured.max()), 4)],
        "line": table["line"],
        "layers": len(table["entries_ms"]) - 1,
        "seconds_of_this_process": round(seconds, 1),
        "load_average": os.getloadavg(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--target", default="x86")
    parser.add_argument("--spaces", nargs="+", default=["mobile-cnn"])
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "int8"])
    parser.add_argument("--students", type=int, default=30)
    parser.add_argument("--image-size", type=int, default=28)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--keep", type=Path, help="for networks and tables; by default a folder that is deleted"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    target, side = find_target(arguments.target), arguments.image_size
    spec = ModelSpec(Preprocessing(side, side, "grey", (0.3,), (0.35,)), tuple("abcdefghij"))
    with tempfile.TemporaryDirectory() if arguments.keep is None else nullcontext(arguments.keep) as folder:
        os.environ["XDG_CACHE_HOME"] = str(folder)
        networks = Path(folder) / f"{side}-{arguments.seed}"  # what their names do not tell
        networks.mkdir(parents=True, exist_ok=True)
        for space in arguments.spaces:
            for precision in arguments.precisions:
                before: dict[str, Any] | None = None
                for runtime in arguments.runtimes:
                    unit = msgspec.structs.replace(target.compute[0], runtime=runtime)
                    own = msgspec.structs.replace(target, compute=(unit, *target.compute[1:]))
                    count, seed = arguments.students, arguments.seed
                    wanted = Wanted(space, spec, precision, count, count, seed)
                    begun = time.process_time()
                    table = calibrate(own, [HERE], wanted, lambda _: None, networks)
                    told = row(table, wanted, time.process_time() - begun)
                    told |= {} if before is None else moved(table, before, own, wanted)
                    before = table
                    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
