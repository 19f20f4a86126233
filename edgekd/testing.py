"""For the tests of a project: assert that a model is not slower than a reference model.

from edgekd.testing import assert_latency_ratio

def test_the_new_model_is_not_slower():
    assert_latency_ratio("models/new.onnx", "models/released.onnx", max_ratio=1.05)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from edgekd.gate import LatencyLimits
from edgekd.gating.compare import How, Limits, compare
from edgekd.gating.subject import resolve
from edgekd.profiler import Protocol

Undecided = Literal["skip", "fail", "pass"]


def assert_latency_ratio(
    candidate: str | Path,
    reference: str | Path,
    max_ratio: float = 1.05,
    *,
    backend: str = "",
    undecided: Undecided = "skip",
    **options: Any,
) -> dict[str, Any]:
    """Measure two ONNX files or bundles in fresh processes and judge the ratio of their latencies.

    Args:
        max_ratio: candidate latency over reference latency that is still accepted.
        backend: "onnxruntime", "openvino", or "" for a bundle's own choice, else ONNX Runtime.
        undecided: what INCONCLUSIVE and UNUSABLE do: skip the test (pytest's own way), fail it, or pass.
        options: `restarts` (3), `max_restarts` (9), `seed` (0), `threads` (1), `clock` ("cpu").

    Returns:
        What ``gate.json`` holds (docs/gate.md).

    Raises:
        AssertionError: the verdict is FAIL, or an undecided one that fails.
        EdgekdError: the models cannot be compared.
    """
    __tracebackhide__ = True  # pytest then shows the line that asserts
    if undecided not in ("skip", "fail", "pass"):
        raise ValueError(f"undecided: expected 'skip', 'fail' or 'pass', got {undecided!r}")
    threads, clock = options.pop("threads", 1), options.pop("clock", "cpu")
    limits = Limits(LatencyLimits(max_ratio=max_ratio, **{"max_restarts": 9, **options}))
    sides = [
        resolve(Path(path), runtime=backend, precision="f32", variant="", shapes={})
        for path in (candidate, reference)
    ]
    result = compare(sides[0], sides[1], limits, How(Protocol(threads=threads, calls=3), clock))
    told = f"{result['verdict']}: {result['reason']}"
    if result["verdict"] == "FAIL" or (result["verdict"] != "PASS" and undecided == "fail"):
        raise AssertionError(told)
    if result["verdict"] != "PASS" and undecided == "skip":
        import pytest

        pytest.skip(told)
    return result
