"""Finalists of the search, measured end to end on this machine before one is chosen."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgekd.errors import InfeasibleBudgetError, MissingExtraError
from edgekd.profiler import HERE, Protocol, Variant, time_layers
from edgekd.search import Found, Limits, merit
from edgekd.stages.bench import Bench
from edgekd.stages.untrained import write_network
from edgekd.target import is_this_machine

_RUNTIMES = ("onnxruntime", "openvino")


@dataclass(frozen=True)
class Measured:
    """Latencies of whole students with fresh weights, ms by row, on `device` by the card's `clock`.

    `limit_ms` is the budget's; one that is a share of the teacher's predicted latency is moved by the median
    ratio of measured over predicted, for the same model predicted the teacher.
    """

    device: str
    clock: str
    precision: str
    limit_ms: float | None
    measured_ms: dict[int, float]

    @property
    def within(self) -> list[int]:
        """Rows that meet the limit."""
        return [row for row, ms in self.measured_ms.items() if self.limit_ms is None or ms <= self.limit_ms]

    def error_percent(self, found: Found) -> float:
        """Median distance of the predicted from the measured latency."""
        pairs = ((found.candidates[row].latency_ms or 0.0, ms) for row, ms in self.measured_ms.items())
        return 100 * float(np.median([abs(predicted / ms - 1) for predicted, ms in pairs]))

    def facts(self, found: Found) -> dict[str, Any]:
        """For the record."""
        rows = [
            {"row": row, "predicted_ms": found.candidates[row].latency_ms, "measured_ms": ms,
             "within": row in self.within}
            for row, ms in self.measured_ms.items()
        ]  # fmt: skip
        named = {"device": self.device, "clock": self.clock, "precision": self.precision}
        return named | {"limit_ms": self.limit_ms, "rows": rows}


def measure_finalists(
    bench: Bench, found: Found, limits: Limits, precision: str
) -> tuple[int, Measured | None]:
    """The row of highest merit whose measured latency is within the budget; the measurements. Where this
    machine is not the target, or has no runtime for it, the row chosen by prediction and None.

    Raises:
        InfeasibleBudgetError: twice as many students as asked for were measured, all beyond the budget.
    """
    target, count = bench.run.target, bench.recipe.search.finalists
    known = found.candidates[found.chosen].latency_ms is not None
    if not count or not known or target.primary.runtime not in _RUNTIMES or not is_this_machine(target):
        return found.chosen, None
    merits = merit(found)
    named = {*found.front, found.chosen, found.by_macs}
    best = sorted(named, key=lambda row: (row != found.chosen, -merits[row]))[:count]
    try:
        first = _measure(bench, found, best, precision, limits)
    except MissingExtraError:  # the runtime is not installed
        return found.chosen, None
    if first.within:
        return max(first.within, key=lambda row: merits[row]), first
    slower = _ratio(found, first.measured_ms)
    limit = first.limit_ms or math.inf
    others = [
        row for row in merits
        if row not in first.measured_ms and (found.candidates[row].latency_ms or 0) * slower <= limit
    ]  # fmt: skip
    others = sorted(others, key=lambda row: -merits[row])[:count]
    if others:
        second = _measure(bench, found, others, precision, limits, first.measured_ms)
        if second.within:
            return max(second.within, key=lambda row: merits[row]), second
        first = second
    fastest = min(first.measured_ms.values())
    raise InfeasibleBudgetError(
        f"{len(first.measured_ms)} students that were predicted to meet {limit:.4g} ms were measured on "
        f"{first.device}: the fastest takes {fastest:.4g} ms",
        f"--max-latency-ms {fastest:.2g} is within reach; edgekd targets calibrate {target.id} corrects the "
        "prediction; --set search.finalists=0 trusts it as it is",
    )


def _ratio(found: Found, measured_ms: dict[int, float]) -> float:
    """Median of measured over predicted latency."""
    return float(
        np.median([ms / (found.candidates[row].latency_ms or ms) for row, ms in measured_ms.items()])
    )


def _measure(
    bench: Bench, found: Found, rows: Sequence[int], precision: str, limits: Limits,
    before: dict[int, float] | None = None,
) -> Measured:  # fmt: skip
    """Whole students in turns in a process of its own, added to those measured before."""
    target, spec = bench.run.target, bench.spec
    clock = "cpu" if target.measure.clock == "cpu" else "wall"
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        variants: list[Variant] = []
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        for done, row in enumerate(rows, 1):
            path = Path(folder) / f"{row}.onnx"
            student = bench.space.build(found.candidates[row].genome, torch.Generator().manual_seed(0))
            write_network(student, target, spec, precision, path)
            variants.append(Variant(str(row), target.primary.runtime, str(path)))
            shapes[str(row)] = ("float32", (1, *spec.input_shape))
            bench.run.reporter.step("measure finalists", done, len(rows))
        answer = time_layers(variants, shapes, protocol=Protocol(), device=HERE)
    machine, runtime = answer["environment"], target.primary.runtime
    measured_ms = (before or {}) | {int(row): times[clock] for row, times in answer["times"].items()}
    limit_ms = limits.latency_ms
    if limit_ms is not None and bench.recipe.budget.max_latency_ms is None:
        limit_ms *= _ratio(found, measured_ms)
    device = f"{machine['devices'][runtime]}, {runtime} {machine['versions'][runtime]}"
    return Measured(device, clock, precision, limit_ms, measured_ms)
