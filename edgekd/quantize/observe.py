"""What the tensors of an ONNX graph hold on real samples: ranges and histograms, in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from edgekd.backends.onnxruntime import OnnxRuntimeBackend
from edgekd.errors import DataError
from edgekd.quantize.calibrators import BINS, calibrator
from edgekd.quantize.onnx_file import element_types
from edgekd.quantize.places import Places, asymmetric_grid
from edgekd.quantize.samples import Feeds
from edgekd.quantize.scheme import Grid, QuantScheme

_NOTHING = 1e-6  # the narrowest range of a histogram
_VALUES = 2**17  # of one tensor and batch that a histogram takes
Batches = Callable[[], Iterable[Feeds]]


@dataclass(frozen=True)
class Observation:
    """Of one tensor: the range of its values and of 0, which every grid holds, a histogram over it, and the
    number of calls that it was seen in."""

    low: float
    high: float
    histogram: NDArray[np.float64]
    calls: int


@dataclass(frozen=True)
class Calibration:
    """Samples that grids are fitted to; `seen` gathers what they show of one float graph, whatever is made of
    it later."""

    batches: Batches
    seen: dict[str, Observation] = field(default_factory=dict)


def with_outputs(model: onnx.ModelProto, tensors: Iterable[str]) -> onnx.ModelProto:
    """The graph with these tensors, and nothing else, as outputs."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.graph.output[:]
    fed = {value.name for value in made.graph.input}
    made.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in tensors if name not in fed
    )
    if not made.graph.output:  # only inputs were asked for: ONNX Runtime wants one output
        made.graph.output.extend(model.graph.output[:1])
    return made


def observe(model: onnx.ModelProto, tensors: list[str], batches: Batches) -> dict[str, Observation]:
    """Two streaming passes over the batches: ranges, then histograms.

    Raises:
        DataError: a tensor holds NaN or infinity; names the operator that makes it.
    """
    session = OnnxRuntimeBackend().open_graph(with_outputs(model, tensors).SerializeToString())
    low, high = dict.fromkeys(tensors, 0.0), dict.fromkeys(tensors, 0.0)
    for feeds in batches():
        seen = feeds | session.run(feeds)
        for name in tensors:
            values = seen[name]
            if not values.size:
                continue
            first, last = float(values.min()), float(values.max())
            if not np.isfinite((first, last)).all():
                raise DataError(*not_finite(model, feeds))
            low[name], high[name] = min(low[name], first), max(high[name], last)
        del seen  # before the next batch is made
    reach = {name: max(high[name], low[name] + _NOTHING) for name in tensors}
    histograms = {name: np.zeros(BINS) for name in tensors}
    calls = 0
    for feeds in batches():
        calls += 1
        seen = feeds | session.run(feeds)
        for name in tensors:
            histograms[name] += _histogram(seen[name], low[name], reach[name])
        del seen
    return {name: Observation(low[name], reach[name], histograms[name], calls) for name in tensors}


def _histogram(values: NDArray[np.float32], low: float, high: float) -> NDArray[np.int64]:
    """Counts of `BINS` bins of equal width; of a large tensor, of values at a regular distance."""
    flat = values.reshape(-1)
    flat = flat[:: len(flat) // _VALUES | 1]
    bins = ((flat - low) * (BINS / (high - low))).astype(np.int64)
    return np.bincount(np.clip(bins, 0, BINS - 1), minlength=BINS)


def not_finite(model: onnx.ModelProto, feeds: Feeds) -> tuple[str, str]:
    """Where NaN or infinity first comes up in a call, and what to do."""
    bad = [
        name for name, values in feeds.items() if values.dtype.kind == "f" and not np.isfinite(values).all()
    ]
    if bad:
        return f"calibration: the input '{bad[0]}' holds NaN or infinity", "clean the samples"
    types = element_types(model)
    maker = {name: node for node in model.graph.node for name in node.output}
    names = [name for name in maker if types.get(name, (0, None))[0] == TensorProto.FLOAT]
    seen = OnnxRuntimeBackend().open_graph(with_outputs(model, names).SerializeToString()).run(feeds)
    first = next((name for name in names if not np.isfinite(seen[name]).all()), "")
    made = f"made by {maker[first].op_type} '{maker[first].name}'" if first else "which one is not known"
    return (
        f"calibration: the tensor '{first}', {made}, holds NaN or infinity, in the float model",
        "check the preprocessing (--mean, --std, --scale) and the model itself",
    )


def grids_of(
    observed: dict[str, Observation], places: Places, scheme: QuantScheme, method: str
) -> dict[str, Grid]:
    """A grid for each activation that can be quantized. A tensor that is always 0 gets the range 0 to 1: any
    scale holds it, and a tiny one would push the next layer's bias, which runtimes store in steps of input
    scale times weight scale, out of 32 bits."""
    choose = calibrator(method)
    made: dict[str, Grid] = {}
    moved = {places.root(name) for name in places.same_as}
    for name in places.tensors():
        root = places.root(name)
        if root not in made:
            seen = observed[root]
            zero = seen.low == 0 and seen.high <= _NOTHING
            low, high = (0.0, 1.0) if zero else choose(seen.histogram, seen.low, seen.high)
            # OpenVINO computes what zero points add beside the products, at borders pixel by pixel. Integers
            # that are carried on stay uint8: ONNX Runtime 1.31, on which tries are compared, refuses others.
            centred = places.carried and root not in moved
            made[root] = asymmetric_grid(scheme, low, high, centred=centred)
        made[name] = made[root]
    return made
