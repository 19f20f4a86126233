"""Post-training quantization of one float graph for one dialect: what is tried, and which try is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from edgekd.backends.macs import compute_nodes
from edgekd.files import write_bytes
from edgekd.quantize.observe import Batches, Calibration, Observation, grids_of, observe
from edgekd.quantize.onnx_file import FloatModel
from edgekd.quantize.places import (
    JOINS,
    Places,
    find_places,
    weight_codes,
    weight_scales,
    with_float_sums,
    without_uneven_joins,
)
from edgekd.quantize.reconstruct import Step, reconstruct
from edgekd.quantize.scheme import QuantScheme
from edgekd.quantize.sensitivity import Sensitivity, rank, shortest_prefix
from edgekd.quantize.smooth import smoothed
from edgekd.quantize.writing import Codes, Numbers, write_quantized

SIGNED = ("trt-s8sym", "arm-s8")
_BIAS_STEPS = 2.0**30
Reporting = tuple[Callable[[str], None], Step]


@dataclass(frozen=True)
class Judges:
    """`damage`: a smooth distance of a graph's outputs to the float ones on the samples that choose;
    `rough` the same on fewer samples; `drop` what the budget limits, on the runtime of the dialect."""

    damage: Callable[[onnx.ModelProto], float]
    rough: Callable[[onnx.ModelProto], float]
    drop: Callable[[onnx.ModelProto], float]


@dataclass(frozen=True)
class Quantized:
    """A graph of one dialect. `how`: what it was made with; `floats`: the operators left in float, with what
    they do alone in `sensitivity`; `tried`: damage of every try by its name; `float_sums`: see
    `with_float_sums`."""

    model: onnx.ModelProto
    dialect: str
    how: str
    tried: dict[str, float]
    floats: tuple[str, ...] = ()
    sensitivity: tuple[Sensitivity, ...] = ()
    trained: bool = False
    float_sums: bool = False
    work: PostTraining | None = None
    numbers: Numbers | None = None


class PostTraining:
    """All numbers of one graph and one dialect. Trying is cheap once the ranges are known."""

    def __init__(
        self,
        model: FloatModel,
        scheme: QuantScheme,
        batches: Batches,
        seen: dict[str, Observation] | None = None,
    ) -> None:
        """`seen`: of this float model on these batches; gets what is looked at in addition."""
        self.model, self.scheme, self._batches = model, scheme, batches
        self.places: Places = find_places(model, scheme)
        self._observed = {} if seen is None else seen
        needed = {self.places.root(tensor) for tensor in self.places.tensors()}
        if unseen := sorted(needed - self._observed.keys()):
            self._observed |= observe(model.model, unseen, batches)
        reach = {name: max(-self._observed[name].low, self._observed[name].high) for name in needed}
        self.places = without_uneven_joins(self.places, reach)
        self._values = model.values
        self._signed = scheme.dialect in SIGNED

    def numbers(self, calibrator: str) -> Numbers:
        """Grids by this calibrator, weights rounded to the nearest code."""
        weights = {}
        grids = grids_of(self._observed, self.places, self.scheme, calibrator)
        biases = {node.name: node.input[2] for node in self.model.model.graph.node if len(node.input) > 2}
        for layer in self.places.layers:
            scales = weight_scales(self._values[layer.weight], layer, self.scheme.weight_max)
            bias = self._values.get(biases.get(layer.name, ""))
            if bias is not None and bias.size == scales.size:  # must fit into the int32 of a runtime
                smallest = np.abs(bias.ravel()) / (grids[layer.reads[0]].scale * _BIAS_STEPS)
                scales = np.maximum(scales, smallest).astype(np.float32)
            codes = weight_codes(self._values[layer.weight], scales, layer, self.scheme.weight_max)
            weights[layer.weight] = Codes(codes, scales)
        return Numbers(grids, weights)

    def reconstructed(self, numbers: Numbers, step: Step = lambda *_: None) -> Numbers:
        """The same grids; weights and biases that make up for each other's rounding on the samples."""
        calls = max(seen.calls for seen in self._observed.values())
        largest = self.scheme.weight_max
        return reconstruct(self.model, self.places, numbers, self._batches, largest, calls, step)

    def write(self, numbers: Numbers, only: Sequence[str] | None = None) -> onnx.ModelProto:
        """The graph with the operations `only`, or all, in integers."""
        return write_quantized(self.model.model, self.places, numbers, signed=self._signed, only=only)

    def best(
        self, judges: Judges, calibrators: Sequence[str], reporter: Reporting
    ) -> tuple[Numbers, str, dict[str, float]]:
        """The numbers with the least damage: a calibrator, with or without reconstruction."""
        made = {name: self.numbers(name) for name in calibrators}
        tried = {name: judges.damage(self.write(numbers)) for name, numbers in made.items()}
        first = min(tried, key=lambda name: tried[name])
        name = f"{first} + reconstruction"
        made[name] = self.reconstructed(made[first], reporter[1])
        tried[name] = judges.damage(self.write(made[name]))
        kept = min(tried, key=lambda one: tried[one])
        told = ", ".join(f"{one} {damage:.4g}" for one, damage in tried.items())
        reporter[0](f"  {told}: {kept} kept")
        return made[kept], kept, tried

    def sensitivity(self, numbers: Numbers, judges: Judges, step: Step) -> tuple[Sensitivity, ...]:
        """Damage of each operation alone, in the order of the graph."""
        macs = self._macs()
        found = []
        for number, operation in enumerate(self.places.operations.values()):
            step("sensitivity", number, len(self.places.operations))
            alone = judges.rough(self.write(numbers, [operation.name]))
            found.append(Sensitivity(operation.name, operation.kind, alone, macs.get(operation.name, 0)))
        step("sensitivity", len(found), len(found))
        return tuple(found)

    def _macs(self) -> dict[str, int]:
        import tempfile
        from pathlib import Path

        with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
            path = Path(folder) / "float.onnx"
            write_bytes(path, self.model.model.SerializeToString())
            return {node.name: node.macs for node in compute_nodes(path)}

    def mixed(
        self, numbers: Numbers, judges: Judges, limit: float, sensitivity: Sequence[Sensitivity]
    ) -> tuple[onnx.ModelProto, tuple[str, ...]] | None:
        """The graph with the fewest operators in float whose drop is within `limit`; None if none is."""
        ordered = rank(sensitivity)

        def without(floats: Sequence[str]) -> onnx.ModelProto:
            left = set(floats)
            return self.write(numbers, [name for name in self.places.operations if name not in left])

        count = shortest_prefix(ordered[:-1], lambda floats: judges.drop(without(floats)) <= limit)
        return None if count is None else (without(ordered[:count]), tuple(ordered[:count]))


def quantize_graph(
    model: FloatModel,
    scheme: QuantScheme,
    calibration: Calibration,
    judges: Judges,
    limit: float,
    *,
    calibrators: Sequence[str],
    reporter: Reporting,
) -> list[Quantized]:
    """All in integers; and, where that loses more than `limit`, the same with the worst operators in float.

    Raises:
        DataError: a tensor of the float model is not finite on the samples.
        UnsupportedModelError: nothing in the graph can be quantized.
    """
    work = PostTraining(model, scheme, calibration.batches, calibration.seen)
    numbers, how, tried = work.best(judges, calibrators, reporter)
    whole = work.write(numbers)
    drop = judges.drop(whole)
    even = smoothed(model.model, calibration.batches) if drop > limit else None
    if even is not None:
        reporter[0](f"  {scheme.dialect}: {drop:.2f} points lost; the same with ranges moved")
        other = PostTraining(replace(model, model=even), scheme, calibration.batches)
        theirs, name, damage = other.best(judges, calibrators, reporter)
        tried |= {f"smoothed, {one}": value for one, value in damage.items()}
        if damage[name] < tried[how]:
            work, numbers, how = other, theirs, f"smoothed, {name}"
            whole = work.write(numbers)
            drop = judges.drop(whole)
    made = Quantized(whole, scheme.dialect, how, tried, work=work, numbers=numbers)
    return [made] if drop <= limit else with_floats(made, drop, judges, limit, reporter)


def sums_in_float(whole: Quantized) -> list[Quantized]:
    """`whole` with what layers make for an addition alone in float: on OpenVINO faster or slower, by the
    network. Nothing where there is no such addition."""
    work, numbers = whole.work, whole.numbers
    assert work is not None and numbers is not None
    places = with_float_sums(work.model.model, work.places)
    if places is None:
        return []
    made = write_quantized(work.model.model, places, numbers, signed=whole.dialect in SIGNED)
    return [replace(whole, model=made, how=f"{whole.how}, sums in float", float_sums=True)]


def with_sensitivity(made: Quantized, judges: Judges, progress: Step) -> Quantized:
    """`made` with what each of its operators does alone, where that is not known yet."""
    if made.sensitivity or made.work is None or made.numbers is None:
        return made
    return replace(made, sensitivity=made.work.sensitivity(made.numbers, judges, progress))


def with_floats(
    whole: Quantized, drop: float, judges: Judges, limit: float, reporter: Reporting
) -> list[Quantized]:
    """`whole`, which loses `drop` points, more than `limit`; and, where it can be had, the same numbers with
    the fewest operators in float that keep within."""
    work, numbers = whole.work, whole.numbers
    assert work is not None and numbers is not None
    dialect = whole.dialect
    if dialect == "openvino-u8":
        for kinds in (("Concat",), JOINS["openvino-u8"]):
            floats = [name for name, one in work.places.operations.items() if one.kind in kinds]
            less = work.write(numbers, [name for name in work.places.operations if name not in floats])
            if floats and judges.drop(less) <= limit:
                reporter[0](f"  {dialect}: all in int8 loses {drop:.2f} points on that runtime "
                            f"(limit {limit:g}); {', '.join(kinds)} stay float")  # fmt: skip
                return [whole, replace(whole, model=less, floats=tuple(floats))]
    rows = work.sensitivity(numbers, judges, reporter[1])
    mixed = work.mixed(numbers, judges, limit, rows)
    if mixed is None:
        reporter[0](f"  {dialect}: no choice of float operators keeps within {limit:g} points")
        return [replace(whole, sensitivity=rows)]
    reporter[0](
        f"  {dialect}: all in int8 loses {drop:.2f} points (limit {limit:g}); "
        f"{len(mixed[1])} of {len(rows)} operators stay float: {', '.join(mixed[1][:6])}"
        + (" ..." if len(mixed[1]) > 6 else "")
    )
    return [whole, replace(whole, model=mixed[0], floats=mixed[1], sensitivity=rows)]
