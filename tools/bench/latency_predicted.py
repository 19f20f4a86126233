"""Predicted against measured latency of random students on this machine.

    OMP_NUM_THREADS=1 python tools/bench/latency_predicted.py --target x86 --spaces mobile-cnn --students 50

For each space, runtime and precision: students from small to large, exported with fresh weights and, for
int8, quantized on random images; the layer table's sum against the 25th percentile of the CPU time of whole
calls, the students taking turns. Prints Kendall's tau, the median error, and that after one factor for all; a
JSON line each.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np
import torch

from edgekd import export
from edgekd.backends import backend
from edgekd.blocks import deployed
from edgekd.cost import LayerTable
from edgekd.nets import evaluate
from edgekd.quantize.capture import capture
from edgekd.quantize.fakequant import calibrate, find_sites, insert, parameters_of
from edgekd.quantize.lower import lower
from edgekd.quantize.scheme import scheme_for
from edgekd.ranking import Values, kendall_tau
from edgekd.spaces import Genome, search_space
from edgekd.spec import ModelSpec, Preprocessing
from edgekd.target import Target, find_target

SPEC = ModelSpec(Preprocessing(28, 28, "grey", (0.3,), (0.35,)), tuple("abcdefghij"))


def drawn(choices: tuple[int, ...], count: int, seed: int) -> list[Genome]:
    """Genomes that scatter around a level of size, drawn for each: even draws are nearly all of one size."""
    rng = np.random.default_rng(seed)
    levels = rng.random((count, 1)) + rng.normal(0, 0.2, (count, len(choices)))
    return [
        tuple(int(g) for g in row) for row in (np.clip(levels, 0, 0.999) * np.asarray(choices)).astype(int)
    ]


def write(space: str, genome: Genome, target: Target, folder: Path) -> dict[str, Path]:
    """The student's file by precision."""
    card = target.space
    multiple = int(float(card.channel_multiple.value))
    students = search_space(space, SPEC, multiple, tuple(card.kernels), tuple(card.forbidden_ops))
    model = students.build(genome, torch.Generator().manual_seed(0)).train()
    images = torch.randn(16, *SPEC.input_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # offsets as after training: exporters drop those that are exactly zero
        model(images)
        for bias in (value for name, value in model.named_parameters() if name.endswith("bias")):
            bias.add_(0.01)
    model = deployed(model.eval())
    graph = capture(model, SPEC.input_shape)
    plain = export.to_onnx(graph, SPEC)
    scheme = scheme_for(target)
    sites = find_sites(graph, scheme)
    quantized = insert(graph, sites, calibrate(graph, sites, [images], scheme, "min-max"), scheme).eval()
    evaluate(quantized, images)
    found = {"fp32": plain, "int8": lower(plain, parameters_of(quantized, sites), sites, "uint8")}
    paths = {name: folder / f"{space}-{'-'.join(map(str, genome))}-{name}.onnx" for name in found}
    for name, made in found.items():
        export.save(made, paths[name])
    return paths


def measured(paths: list[Path], runtime: str, rounds: int) -> list[float]:
    """CPU milliseconds of one call of each, in turns: the 25th percentile over rounds of 5 calls."""
    engine = backend(runtime)
    sessions = [engine.open(path, threads=1) for path in paths]
    image = np.zeros((1, *SPEC.input_shape), np.float32)
    for session in sessions:
        session.run(image)
    times = np.zeros((rounds, len(sessions)))
    for row in times:
        for index, session in enumerate(sessions):
            begin = time.process_time_ns()
            for _ in range(5):
                session.run(image)
            row[index] = (time.process_time_ns() - begin) / 5e6
    return [float(value) for value in np.percentile(times, 25, axis=0)]


def _error(ratio: Values) -> float:
    """The median distance from 1."""
    return float(np.median(np.abs(ratio - 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--target", default="x86")
    parser.add_argument("--spaces", nargs="+", default=["mobile-cnn"])
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--students", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    target = find_target(arguments.target)
    card = target.space
    for space in arguments.spaces:
        multiple = int(float(card.channel_multiple.value))
        students = search_space(space, SPEC, multiple, tuple(card.kernels), tuple(card.forbidden_ops))
        genomes = list(dict.fromkeys(drawn(students.choices, arguments.students, arguments.seed)))
        with tempfile.TemporaryDirectory() as folder:
            files = [write(space, genome, target, Path(folder)) for genome in genomes]
            for runtime in arguments.runtimes:
                unit = msgspec.structs.replace(target.compute[0], runtime=runtime)
                own = msgspec.structs.replace(target, compute=(unit, *target.compute[1:]))
                for precision in ("fp32", "int8"):
                    table = LayerTable(own, precision)
                    costs = [table.predict(students.layers(genome)).latency_ms or 0.0 for genome in genomes]
                    got = np.array(measured([each[precision] for each in files], runtime, arguments.rounds))
                    table.close()
                    ratio = np.array(costs) / got
                    row = {
                        "space": space, "runtime": runtime, "precision": precision, "students": len(genomes),
                        "tau": round(kendall_tau(costs, got), 3),
                        "median_error_percent": round(100 * _error(ratio), 1),
                        "after_one_factor_percent": round(100 * _error(ratio / np.median(ratio)), 1),
                        "measured_ms": [round(float(got.min()), 4), round(float(got.max()), 4)],
                        "load_average": os.getloadavg(),
                    }  # fmt: skip
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
