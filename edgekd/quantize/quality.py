"""How much a changed graph differs from the float one on real samples."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["accuracy", "agreement", "error"]
# Points that may be lost by default: of accuracy; of agreement with the float model; percent of the signal.
DEFAULT_DROP: dict[Kind, float] = {"accuracy": 1.0, "agreement": 3.0, "error": 10.0}


@dataclass(frozen=True)
class Quality:
    """`drop`, in points, is what budgets limit: lost accuracy where there are labels; else the share of
    samples whose class changed; else, of an output that is no classification, the root mean square error
    over that of the signal, in percent. `standard_error` of the drop, from the samples whose answer changed.
    `signal_to_noise_db`: ``10 log10(sum f^2 / sum (f - q)^2)``."""

    kind: Kind
    drop: float
    standard_error: float
    accuracy: float | None
    agreement: float | None
    signal_to_noise_db: float

    def row(self) -> dict[str, Any]:
        return asdict(self)


def kind_of_output(exact: NDArray[np.float32], labels: NDArray[np.int64] | None) -> Kind:
    """What can be told of the model's first output."""
    if exact.ndim != 2 or exact.shape[1] < 2:
        return "error"
    return "agreement" if labels is None else "accuracy"


def judge(exact: NDArray[np.float32], got: NDArray[np.float32], labels: NDArray[np.int64] | None) -> Quality:
    """Compare the first output of the float model with that of another, sample by sample."""
    kind = kind_of_output(exact, labels)
    if not np.isfinite(got).all():
        return Quality(kind, 100.0, 0.0, None, None, -math.inf)
    signal = float(np.square(exact.astype(np.float64)).sum())
    noise = float(np.square(exact.astype(np.float64) - got).sum())
    decibel = 10 * math.log10(max(signal, 1e-30) / max(noise, 1e-30))
    if kind == "error":
        return Quality(kind, 100 * math.sqrt(noise / max(signal, 1e-30)), 0.0, None, None, decibel)
    agreement = float((exact.argmax(1) == got.argmax(1)).mean())
    if kind == "agreement" or labels is None:
        error = 100 * math.sqrt(agreement * (1 - agreement) / len(exact))
        return Quality(kind, 100 * (1 - agreement), error, None, agreement, decibel)
    before, after = exact.argmax(1) == labels, got.argmax(1) == labels
    error = 100 * math.sqrt(float((before != after).sum())) / len(labels)
    drop = 100 * float(before.mean() - after.mean())
    return Quality(kind, drop, error, float(after.mean()), agreement, decibel)


def divergence(exact: NDArray[np.float32], got: NDArray[np.float32]) -> float:
    """Mean ``KL(softmax(exact) || softmax(got))`` of a classifier, in nats; of another output the squared
    error over the squared signal. Smooth where accuracy on few samples is not."""
    if not np.isfinite(got).all():
        return math.inf
    wide, other = exact.astype(np.float64), got.astype(np.float64)
    if exact.ndim != 2 or exact.shape[1] < 2:
        return float(np.square(wide - other).sum() / max(np.square(wide).sum(), 1e-30))
    if (exact >= 0).all() and np.allclose(exact.sum(1), 1, atol=1e-3):  # the graph ends with a softmax
        wide, other = np.log(np.maximum(wide, 1e-12)), np.log(np.maximum(other, 1e-12))
    logs = [values - values.max(1, keepdims=True) for values in (wide, other)]
    logs = [values - np.log(np.exp(values).sum(1, keepdims=True)) for values in logs]
    return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(1).mean())
