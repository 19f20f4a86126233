"""What the runtime of a bundle costs beside its engine: a call, a start, the import.

    OMP_NUM_THREADS=1 python tools/bench/runtime_overhead.py

A call: `Model.__call__` and a plain ONNX Runtime session of the same file take turns in one process, 200
rounds of 5 calls, CPU time; the ratio of their round medians with a 99 % bootstrap interval over rounds.
Import: fresh processes in turns, CPU time, with and without the runtime.
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
from gate_power import stack

from edgekd.bundle import Golden, VariantFile, write_bundle
from edgekd.gate import log_ratios
from edgekd.runtime import load
from edgekd.spec import ModelSpec, Preprocessing


def paired(folder: Path, blocks: int, size: int, rounds: int) -> tuple[float, float, float, float]:
    """Milliseconds of a plain call; ratio of the bundle's call to it, and its interval."""
    side = 2 * size
    source = stack(folder / f"{blocks}-{size}.onnx", blocks, size=size)
    spec = ModelSpec(Preprocessing(side, side, "rgb", (0.5,) * 3, (0.25,) * 3), tuple(map(str, range(10))))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).standard_normal((1, 3, side, side), dtype=np.float32)
    logits = session.run(None, {"image": images})[0]
    target = folder / f"{blocks}-{size}.ekd"
    write_bundle(
        target,
        name="overhead",
        spec=spec,
        variants=[VariantFile("ort", source, ("onnxruntime",))],
        golden=Golden(images, {"ort": logits}, {"ort": 1e-4}),
        provenance={},
        evidence={},
    )
    model = load(target)
    ways: dict[str, Callable[[], object]] = {
        "plain": lambda: session.run(None, {"image": images}),
        "bundle": lambda: model(images),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for turn in range(-10, rounds):
        random.shuffle(order)
        for name in order:
            calls = []
            for _ in range(5):
                begin = time.process_time_ns()
                ways[name]()
                calls.append((time.process_time_ns() - begin) / 1e6)
            if turn >= 0:
                times[name].append(statistics.median(calls))
    kept = log_ratios(np.array(times["bundle"]), np.array(times["plain"]))
    drawn = np.random.default_rng(0).choice(kept, (4000, len(kept)))
    lo, hi = np.exp(np.quantile(np.median(drawn, axis=1), [0.005, 0.995]))
    return statistics.median(times["plain"]), float(np.exp(np.median(kept))), float(lo), float(hi)


def import_seconds(code: str) -> float:
    """CPU seconds of a fresh process that runs the code."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--starts", type=int, default=15)
    arguments = parser.parse_args()
    random.seed(0)
    print("| blocks | plain call, ms CPU | bundle over plain | 99 % interval |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for blocks, size in ((2, 8), (20, 8), (20, 16), (20, 32)):
            plain, ratio, lo, hi = paired(Path(folder), blocks, size, arguments.rounds)
            print(f"| {blocks}, map {size} | {plain:.3f} | {ratio:.4f} | {lo:.4f} to {hi:.4f} |")
    codes = {"engine": "import numpy, onnxruntime", "both": "import numpy, onnxruntime, edgekd.runtime"}
    seconds: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(arguments.starts):
        for name, code in codes.items():
            seconds[name].append(import_seconds(code))
    engine, both = (statistics.median(seconds[name]) for name in codes)
    extra = statistics.median(b - a for a, b in zip(seconds["engine"], seconds["both"], strict=True))
    print(f"\nimport: numpy and onnxruntime {engine * 1e3:.0f} ms CPU, with edgekd.runtime {both * 1e3:.0f}; "
          f"median difference {extra * 1e3:.0f} ms over {arguments.starts} pairs")  # fmt: skip


if __name__ == "__main__":
    main()
