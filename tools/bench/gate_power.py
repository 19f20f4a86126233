"""How often the shipped latency gate is right: false alarms on equal models, power on slower ones.

    OMP_NUM_THREADS=1 python tools/bench/gate_power.py --save sessions.jsonl
    python tools/bench/gate_power.py --read sessions.jsonl          # judge stored sessions again

The models are stacks of equal depthwise-separable residual blocks: 20 in the reference, and 20, 21, 22 and 24
in the candidates. One run is what `edgekd gate` does: sessions in fresh processes until `run_latency_gate`
has a verdict. All candidates of a run share its sessions, in which they take turns with the reference and
its control; that is the one difference from the command, which times one candidate.

The same calls are then judged by two other rules, with the reference of the run before as stored baseline:
pytest-benchmark's `--benchmark-compare-fail`, and github-action-benchmark's alert threshold.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import comb
from pathlib import Path

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgekd.backends.feeds import image_feed
from edgekd.gate import LatencyLimits, LatencySession, run_latency_gate
from edgekd.gating.compare import round_values
from edgekd.profiler import Protocol, SessionResult, Variant, run_session

CANDIDATES = {"equal": 20, "+1 block": 21, "+2 blocks": 22, "+4 blocks": 24}
# Each candidate is judged against limits on one side of it: at the limit itself no answer is right.
JUDGED = (("equal", 1.05), ("equal", 1.02), ("+1 block", 1.02), ("+2 blocks", 1.05), ("+4 blocks", 1.05))
_BURN = "import random, time\nwhile True:\n    end = time.time() + random.random()\n" \
        "    while time.time() < end: pass\n    time.sleep(random.random() / 2)\n"  # fmt: skip


def stack(path: Path, blocks: int, channels: int = 48, size: int = 48) -> Path:
    """An ONNX file: stem, `blocks` times (depthwise 3x3, pointwise, add), pool, 10 logits; ReLU between."""
    rng = np.random.default_rng(0)
    weights: dict[str, NDArray[np.float32]] = {
        "stem": rng.normal(0, 0.2, (channels, 3, 3, 3)).astype(np.float32),
        "deep": rng.normal(0, 0.3, (channels, 1, 3, 3)).astype(np.float32),
        "point": rng.normal(0, 0.1, (channels, channels, 1, 1)).astype(np.float32),
        "linear": rng.normal(0, 0.1, (channels, 10)).astype(np.float32),
    }
    nodes = [helper.make_node("Conv", ["image", "stem"], ["x0"], strides=[2, 2], pads=[1, 1, 1, 1])]
    constants = []
    for block in range(blocks):  # own copies of the weights: blocks that share them would share caches
        x = f"x{block}"
        for name in ("deep", "point"):
            constants.append(numpy_helper.from_array(weights[name] / (block + 1), f"{name}{block}"))
        nodes += [
            helper.make_node("Conv", [x, f"deep{block}"], [f"{x}d"], pads=[1] * 4, group=channels),
            helper.make_node("Relu", [f"{x}d"], [f"{x}r"]),
            helper.make_node("Conv", [f"{x}r", f"point{block}"], [f"{x}p"]),
            helper.make_node("Add", [f"{x}p", x], [f"x{block + 1}"]),
        ]
    nodes += [
        helper.make_node("GlobalAveragePool", [f"x{blocks}"], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["flat"]),
        helper.make_node("MatMul", ["flat", "linear"], ["logits"]),
    ]
    constants += [numpy_helper.from_array(weights[name], name) for name in ("stem", "linear")]
    ends = [("image", [1, 3, 2 * size, 2 * size]), ("logits", [1, 10])]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in ends]
    graph = helper.make_graph(nodes, "stack", values[:1], values[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


@dataclass(frozen=True)
class Condition:
    """A runtime, with or without other programs on the machine, and what is timed in its sessions."""

    runtime: str
    loaded: bool
    candidates: tuple[str, ...]

    @property
    def judged(self) -> list[tuple[str, float]]:
        """Candidates and limits; of equal models alone the default limit."""
        if self.candidates == ("equal",):
            return [("equal", 1.05)]
        return [pair for pair in JUDGED if pair[0] in self.candidates]

    def __str__(self) -> str:
        what = "equal models only" if len(self.candidates) == 1 else "all candidates"
        return f"{self.runtime}, {what}, {'loaded' if self.loaded else 'as it was'}"


@contextmanager
def _load(burners: int) -> Iterator[None]:
    """Programs that compute and pause in turns."""
    running = [subprocess.Popen([sys.executable, "-c", _BURN]) for _ in range(burners)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


class Runs:
    """Sessions by condition, run and number, measured when they are asked for, or read from a file."""

    def __init__(self, folder: Path, size: int, save: Path | None) -> None:
        self._models = {name: stack(folder / f"{n}.onnx", n, size=size) for name, n in CANDIDATES.items()}
        self._size, self._save = size, save
        self.stored: dict[tuple[str, int], list[SessionResult]] = {}

    def read(self, path: Path) -> None:
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            session = msgspec.convert(row["session"], SessionResult)
            self.stored.setdefault((row["condition"], row["run"]), []).append(session)

    def session(self, condition: Condition, run: int, number: int) -> SessionResult:
        """The number-th session of a run."""
        have = self.stored.setdefault((str(condition), run), [])
        while len(have) <= number:
            have.append(self._measure(condition, run, len(have)))
        return have[number]

    def _measure(self, condition: Condition, run: int, number: int) -> SessionResult:
        runtime, reference = condition.runtime, str(self._models["equal"])
        variants = [Variant("ref", runtime, reference), Variant("aa", runtime, reference)]
        variants += [Variant(name, runtime, str(self._models[name])) for name in condition.candidates]
        feeds = image_feed((3, 2 * self._size, 2 * self._size))
        protocol = Protocol(rounds=40, calls=3, seed=1000 * run + number)
        session = run_session(variants, protocol=protocol, inputs=feeds)
        if self._save is not None:
            row = {"condition": str(condition), "run": run, "session": msgspec.to_builtins(session)}
            with self._save.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return session


def judge(runs: Runs, condition: Condition, run: int) -> dict[tuple[str, float], str]:
    """The shipped gate's verdict of each candidate and limit."""
    verdicts: dict[tuple[str, float], str] = {}
    for name, limit in condition.judged:
        numbers = iter(range(99))

        def session(_: int, name: str = name, numbers: Iterator[int] = numbers) -> LatencySession:
            done = runs.session(condition, run, next(numbers))
            return LatencySession(*(round_values(done, one, "cpu") for one in ("ref", "aa", name)))

        limits = LatencyLimits(max_ratio=limit, max_restarts=9, seed=run)
        verdicts[name, limit] = run_latency_gate(session, limits).verdict
    return verdicts


def _calls(session: SessionResult, name: str, clock: str) -> NDArray[np.float64]:
    times = session.variants[name]
    return np.asarray(times.wall_ms if clock == "wall" else times.cpu_ms).ravel()


# Other rules: clock, statistic of the calls, and the ratio to the stored baseline above which they fail.
RULES: dict[str, tuple[str, Callable[[NDArray[np.float64]], float], float]] = {
    "pytest-benchmark, min:5%": ("wall", lambda calls: float(calls.min()), 1.05),
    "pytest-benchmark, mean:5%": ("wall", lambda calls: float(calls.mean()), 1.05),
    "pytest-benchmark, min:5%, process_time": ("cpu", lambda calls: float(calls.min()), 1.05),
    "github-action-benchmark, 200%": ("wall", lambda calls: float(calls.mean()), 2.0),
    "github-action-benchmark, 105%": ("wall", lambda calls: float(calls.mean()), 1.05),
}


def other_rules(runs: Runs, condition: Condition, count: int) -> dict[str, dict[str, float]]:
    """Share of runs that each rule fails, by candidate; the baseline is the reference of the run before."""
    table: dict[str, dict[str, float]] = {}
    for rule, (clock, statistic, limit) in RULES.items():
        table[rule] = {}
        for name in condition.candidates:
            failed = [
                statistic(_calls(runs.session(condition, run, 0), name, clock))
                > limit * statistic(_calls(runs.session(condition, run - 1, 0), "ref", clock))
                for run in range(1, count)
            ]
            table[rule][name] = float(np.mean(failed))
    return table


def upper_bound(failures: int, runs: int, confidence: float = 0.95) -> float:
    """One-sided Clopper-Pearson bound of a rate: the p at which so few failures have a chance of 5 %."""
    low, high = failures / runs, 1.0
    for _ in range(60):
        p = (low + high) / 2
        chance = sum(comb(runs, k) * p**k * (1 - p) ** (runs - k) for k in range(failures + 1))
        low, high = (p, high) if chance > 1 - confidence else (low, p)
    return high


def true_ratio(runs: Runs, condition: Condition, count: int, name: str) -> float:
    """Geometric mean over all first sessions of the ratio of CPU-time medians."""
    logs = []
    for run in range(count):
        session = runs.session(condition, run, 0)
        rounds = round_values(session, name, "cpu") / round_values(session, "ref", "cpu")
        logs.append(np.median(np.log(rounds)))
    return float(np.exp(np.mean(logs)))


def report(
    runs: Runs, condition: Condition, count: int, verdicts: list[dict[tuple[str, float], str]]
) -> None:
    """Markdown on stdout."""
    loads = [s.environment["load_average_before"][0] for run in range(count)
             for s in runs.stored[str(condition), run]]  # fmt: skip
    sessions = [len(runs.stored[str(condition), run]) for run in range(count)]
    print(f"\n### {condition}: {count} runs, load {min(loads):.1f} to {max(loads):.1f}, "
          f"{np.mean(sessions):.1f} sessions a run\n")  # fmt: skip
    print("| candidate | measured ratio | limit | PASS | FAIL | INCONCLUSIVE | UNUSABLE |")
    print("|---|---|---|---|---|---|---|")
    for name, limit in condition.judged:
        got = Counter(verdict[name, limit] for verdict in verdicts)
        cells = [f"{got[kind]}" for kind in ("PASS", "FAIL", "INCONCLUSIVE", "UNUSABLE")]
        print(f"| {name} | {true_ratio(runs, condition, count, name):.3f} | {limit} | {' | '.join(cells)} |")
    if count < 2:
        return
    names = condition.candidates
    print("\n| rule, failed runs in % | " + " | ".join(names) + " |\n|---|" + "---|" * len(names))
    for rule, shares in other_rules(runs, condition, count).items():
        print(f"| {rule} | " + " | ".join(f"{100 * share:.0f}" for share in shares.values()) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--equal-runs", type=int, default=25, help="of each runtime, equal models only")
    parser.add_argument("--runs", type=int, default=8, help="of each runtime, all candidates")
    parser.add_argument("--loaded-runs", type=int, default=6, help="likewise, with a load besides")
    parser.add_argument("--burners", type=int, default=2, help="programs that make the load")
    parser.add_argument("--size", type=int, default=16, help="side of the blocks' maps")
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--save", type=Path, help="file to add every session to")
    parser.add_argument("--read", type=Path, help="sessions of an earlier --save")
    arguments = parser.parse_args()
    begin = time.time()
    os.environ["OMP_NUM_THREADS"] = "1"
    random.seed(0)
    alarms = equal = 0
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder), arguments.size, arguments.save)
        if arguments.read is not None:
            runs.read(arguments.read)
        every = tuple(CANDIDATES)
        for count, loaded, candidates in (
            (arguments.equal_runs, False, ("equal",)),
            (arguments.runs, False, every),
            (arguments.loaded_runs, True, every),
        ):
            for runtime in arguments.runtimes if count else []:
                condition = Condition(runtime, loaded, candidates)
                with _load(arguments.burners if loaded else 0):
                    verdicts = [judge(runs, condition, run) for run in range(count)]
                report(runs, condition, count, verdicts)
                alarms += sum(verdict["equal", 1.05] == "FAIL" for verdict in verdicts)
                equal += count
    bound = 100 * upper_bound(alarms, equal)
    print(f"\nFalse alarms at the default limit: {alarms} of {equal} runs on equal models; "
          f"the rate is below {bound:.1f} % (95 %). {time.time() - begin:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
