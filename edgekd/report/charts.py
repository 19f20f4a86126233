"""Which numbers of a record go into which chart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgekd.report import facts
from edgekd.report.facts import Record, dig, number, rows, text
from edgekd.report.markup import Markup, tag
from edgekd.report.svg import (
    Axis,
    Dot,
    Intervals,
    Lines,
    Scatter,
    Series,
    Whisker,
    fit_axis,
    line,
    mark,
    responsive,
)

FULL, HALF = 1040.0, 510.0


def _figure(
    heading: str, drawing: Markup, legend: Sequence[tuple[Markup, str]] = (), note: str = ""
) -> Markup:
    keys = [
        tag("li", tag("svg", sign, viewBox="0 0 16 16", aria_hidden="true"), name) for sign, name in legend
    ]
    return tag(
        "figure",
        tag("h3", heading) if heading else "",
        tag("ul", *keys, class_="legend") if keys else "",
        drawing,
        tag("figcaption", note) if note else "",
    )


def accuracy_ladder(record: Record) -> Markup:
    """Teacher, student, quantized on each runtime: accuracy with its Wilson interval."""
    metrics = dig(record, "metrics")
    steps: list[tuple[str, float | None, int, str]] = [
        ("teacher", number(metrics, "teacher", "accuracy"), 0, ""),
        ("student, float", number(metrics, "student_float", "accuracy"), 2, ""),
        ("student, quantized (simulated)", number(metrics, "quantize", "accuracy"), 3, ""),
    ]
    steps = [step for step in steps if step[1] is not None]
    steps += [(name, value, 1, reason) for name, value, reason in facts.runtime_steps(record)]
    known = [value for _, value, _, _ in steps if value is not None]
    if not known:
        return Markup()
    whiskers, ends = [], [100 * value for value in known]
    for name, value, style, reason in steps:
        pair = facts.accuracy_interval(record, value)
        scaled = (100 * pair[0], 100 * pair[1]) if pair else None
        ends += scaled or ()
        shown = f"{facts.percent(value)}  {facts.bounds(pair, 100)}".rstrip()
        note = shown if value is not None else f"— {reason or facts.NO_REASON}"
        whiskers.append(
            Whisker(name, None if value is None else 100 * value, scaled, style, note, f"{name}: {note}")
        )
    axis = fit_axis("accuracy on the validation images, %", ends)
    axis = Axis(axis.title, axis.low, min(axis.high, max(100.0, *ends) + 0.5))
    n = facts.validation_count(record)
    note = (
        f"n = {n} validation samples, the same for every row; whiskers: Wilson interval, 95 %. "
        if n
        else "The record holds no sample count, so no interval can be given. "
    )
    note += "The axis does not start at zero."
    reference = number(metrics, "teacher", "accuracy")
    lines = [(100 * reference, "teacher", "reference")] if reference is not None and len(steps) > 1 else []
    chart = Intervals(axis, whiskers, "Accuracy of teacher, student and quantized models", lines)
    return _figure("", responsive(chart, FULL), note=note)


@dataclass(frozen=True)
class _Pick:
    """A candidate that is named in the plot."""

    key: str
    label: str
    style: str
    shape: str


_PICKS = (
    _Pick("by_parameters", "by parameters", "c3", "triangle"),
    _Pick("by_macs", "by MACs", "c2", "square"),
    _Pick("chosen", "chosen", "c1", "diamond"),
)


def _candidate_tooltip(candidate: Record, measured_ms: float | None) -> str:
    feasible = dig(candidate, "feasible")
    standing = "within the budget" if feasible else "outside the budget"
    if number(candidate, "score") is None:
        standing += ", without a finite score" if feasible else ", not scored"
    measured = [] if measured_ms is None else [f"measured latency {facts.milliseconds(measured_ms)}"]
    return "\n".join(
        [
            f"genome {dig(candidate, 'genome')}",
            f"score {facts.significant(number(candidate, 'score'), 4)}",
            f"parameters {facts.count(number(candidate, 'parameters'))}",
            f"MACs {facts.count(number(candidate, 'macs'))}",
            f"predicted latency {facts.milliseconds(number(candidate, 'latency_ms'))}",
            *measured,
            f"size {facts.size(number(candidate, 'size_mib'))}",
            standing,
        ]
    )


def _measured_ms(search: Record) -> dict[int, float]:
    """Latency of the finalists by row."""
    return {
        int(row): ms
        for line in rows(dig(search, "finalists"), "rows")
        if (row := number(line, "row")) is not None and (ms := number(line, "measured_ms")) is not None
    }


def search_scatter(record: Record) -> Markup:
    """Every candidate: predicted latency (or, without one, MACs) against its score."""
    search = dig(record, "metrics", "search")
    candidates = rows(search, "candidates")
    with_latency = any(number(c, "latency_ms") is not None for c in candidates)
    key, factor = ("latency_ms", 1.0) if with_latency else ("macs", 1e-6)
    title = "predicted latency, ms" if with_latency else "multiply-accumulates, millions"
    points = {
        index: (x * factor, y)
        for index, c in enumerate(candidates)
        if (x := number(c, key)) is not None and (y := number(c, "score")) is not None
    }
    if not points:
        return Markup()
    most = max((number(candidates[i], "macs") or 0.0 for i in points), default=0.0)
    most = most if most > 0 else 1.0
    measured = _measured_ms(search)
    picks: dict[int, list[_Pick]] = {}
    for pick in _PICKS:
        index = number(search, pick.key)
        if index is not None and int(index) in points:
            picks.setdefault(int(index), []).append(pick)
    dots = []
    for index in sorted(points, key=lambda i: (i in picks, -(number(candidates[i], "macs") or 0.0))):
        candidate, chosen = candidates[index], picks.get(index, [])
        radius = 2.5 + 5.5 * math.sqrt(max(0.0, number(candidate, "macs") or 0.0) / most)
        style, shape = ("dot" if dig(candidate, "feasible") else "hollow"), "circle"
        if chosen:
            radius, style, shape = max(6.5, radius), chosen[-1].style, chosen[-1].shape
        label = " = ".join(pick.label for pick in reversed(chosen))
        tooltip = _candidate_tooltip(candidate, measured.get(index))
        dots.append(Dot(*points[index], radius, style, tooltip, label, shape))
        if index in measured and with_latency:
            dots.append(Dot(measured[index], points[index][1], 4.0, "c0", tooltip))
    unscored = [(x * factor, c) for i, c in enumerate(candidates)
                if i not in points and (x := number(c, key)) is not None]  # fmt: skip
    ends = [*(x for x, _ in points.values()), *(x for x, _ in unscored)]
    ends += measured.values() if with_latency else ()
    x_axis = fit_axis(title, ends, log=True)
    y_axis = fit_axis(
        f"training-free score ({text(search, 'score') or 'unnamed'})", [y for _, y in points.values()]
    )
    budget = (
        number(search, "budget", "max_latency_ms") if with_latency else number(search, "budget", "max_macs")
    )
    limits = [(budget * factor, "budget")] if budget is not None else []
    legend = [
        (mark("circle", 8, 8, 5, "dot"), "within the budget"),
        (mark("circle", 8, 8, 5, "hollow"), "outside the budget"),
        *((mark(pick.shape, 8, 8, 5.5, pick.style), pick.label) for pick in reversed(_PICKS)),
        *([(mark("circle", 8, 8, 4, "c0"), "finalist at its measured latency")] if measured else []),
    ]
    left_out = len(candidates) - len(points) - len(unscored)
    told = dig(search, "front")
    named = told if isinstance(told, list) else []
    front = [points[row] for row in named if isinstance(row, int) and row in points]
    if front:
        legend.append((line(0, 8, 16, 8, "line front"), "front: the best score up to each cost"))
    note = (
        "Dot area grows with MACs. Chosen within the budget: the highest sum of two ranks, of the score and "
        "of the MACs; measured latencies and a second stage, where any, decide among the next best. "
        "Baselines: what the number of MACs or of parameters would have chosen."
    )
    if unscored:
        number_of = "1 candidate was" if len(unscored) == 1 else f"{len(unscored)} candidates were"
        note += f" {number_of} not scored: hollow dots on the lower edge."
        hollow = [Dot(x, y_axis.low, 3.0, "hollow", _candidate_tooltip(c, None)) for x, c in unscored]
        dots = [*hollow, *dots]
    note += f" {left_out} without a score or cost not drawn." if left_out else ""
    chart = Scatter(x_axis, y_axis, dots, "Search candidates: cost against score", limits, front)
    return _figure("Candidates of the search", responsive(chart, FULL), legend, note)


_BACKEND_STYLES = ("c1", "c0", "c2", "c3")


def variant_scatter(record: Record) -> Markup:
    """Every variant with a latency: p50 against accuracy, area is size; unknown ones are named below."""
    known: list[tuple[Record, float, float]] = []
    absent = []
    for row in facts.variants(record):
        figure, accuracy, p50 = facts.latency(row), number(row, "accuracy"), number(row, "latency_p50_ms")
        if figure.kind == facts.UNKNOWN or accuracy is None or p50 is None:
            absent.append(
                f"{text(row, 'id') or 'unnamed'} ({figure.basis if p50 is None else 'no accuracy'})"
            )
        else:
            known.append((row, p50, 100 * accuracy))
    if not known:
        return Markup()
    largest = max((number(row, "size_mib") or 0.0 for row, _, _ in known), default=0.0)
    largest = largest if largest > 0 else 1.0
    names = list(dict.fromkeys(text(row, "backend") for row, _, _ in known))
    dots, predicted = [], False
    for row, p50, accuracy in sorted(known, key=lambda item: -(number(item[0], "size_mib") or 0.0)):
        figure = facts.latency(row)
        hollow = figure.kind == facts.PREDICTED
        predicted |= hollow
        style = (
            "open" if hollow else _BACKEND_STYLES[names.index(text(row, "backend")) % len(_BACKEND_STYLES)]
        )
        radius = 4 + 12 * math.sqrt(max(0.0, number(row, "size_mib") or 0.0) / largest)
        name = text(row, "id") or text(row, "backend") or "unnamed"
        tooltip = (
            f"{name}\naccuracy {accuracy:.2f} %\n"
            f"latency p50 / p90 {figure.text} ({figure.kind} {figure.basis})"
            f"\nsize {facts.size(number(row, 'size_mib'))}"
        )
        dots.append(Dot(p50, accuracy, radius, f"{style} soft", tooltip, name))
    x = fit_axis("latency p50, ms", [x for _, x, _ in known], pad=0.18, log=True)
    y = fit_axis("accuracy, %", [y for _, _, y in known], pad=0.25)
    legend = [
        (mark("circle", 8, 8, 6, f"{_BACKEND_STYLES[i % len(_BACKEND_STYLES)]} soft"), name)
        for i, name in enumerate(names)
    ]
    if predicted:
        legend.append((mark("circle", 8, 8, 6, "open"), "predicted, not measured"))
    devices = list(dict.fromkeys(text(row, "latency_device") or "a device not named" for row, _, _ in known))
    note = f"Dot area is file size. Device: {'; '.join(devices)}."
    note += f" Not drawn, latency unknown: {'; '.join(absent)}." if absent else ""
    chart = Scatter(x, y, dots, "Measured variants: latency against accuracy")
    return _figure("Variants: latency and accuracy", responsive(chart, FULL), legend, note)


def _points(history: list[Record], key: str, first: float, factor: float) -> list[tuple[float, float, str]]:
    found = []
    for index, row in enumerate(history):
        value = number(row, key)
        if value is not None:
            epoch = number(row, "epoch")
            where = first + (index + 1 if epoch is None else epoch)
            rate = number(row, "learning_rate")
            tooltip = f"epoch {where:g}: {facts.significant(value * factor, 4)}"
            tooltip += f", learning rate {facts.significant(rate)}" if rate is not None else ""
            found.append((where, value * factor, tooltip))
    return found


def training_curves(record: Record) -> Markup:
    """Loss and accuracy on the selection images by epoch; quantization-aware epochs follow on."""
    distill = rows(record, "metrics", "distill", "history")
    quantize = rows(record, "metrics", "quantize", "history")
    shift = float(len(distill))
    figures = []
    for key, factor, heading in (
        ("loss", 1.0, "Training loss"),
        ("selection_accuracy", 100.0, "Accuracy on the selection images, %"),
    ):
        series = [
            Series(name, points, style)
            for name, points, style in (
                ("distillation", _points(distill, key, 0.0, factor), 0),
                ("quantization-aware training", _points(quantize, key, shift, factor), 1),
            )
            if points
        ]
        every = [point for one in series for point in one.points]
        if not every:
            continue
        epochs = [x for x, _, _ in every]
        x = Axis("epoch", min(0.0, *epochs), max(*epochs, min(epochs) + 1) + 0.3)
        chart = Lines(x, fit_axis(heading, [y for _, y, _ in every]), series, heading)
        legend = [(mark("circle", 8, 8, 4.5, f"c{one.style}"), one.name) for one in series]
        figures.append(_figure("", responsive(chart, HALF), legend))
    return tag("div", *figures, class_="pair") if figures else Markup()


def latency_limit(record: Record) -> float | None:
    """The limit of the gate's latency ratio: of the first check that is named after latency."""
    for check in rows(record, "gate", "checks"):
        limit = number(check, "limit")
        if (
            "latency" in text(check, "name").lower()
            and limit is not None
            and "ms" not in text(check, "unit").split()
        ):
            return limit
    return None


def gate_latency(record: Record) -> Markup:
    """Ratio of the candidate and of the A/A control to the reference, with the limit."""
    node = dig(record, "gate", "latency")
    whiskers, ends = [], [1.0]
    compared = " / ".join(text(node, key) or key for key in ("shipped", "reference"))
    for key, name, style in (("candidate", compared, 1), ("control", "A/A control", 0)):
        ratio, low, high = (number(node, key, part) for part in ("ratio", "lo", "hi"))
        if ratio is None:
            continue
        pair = (low, high) if low is not None and high is not None else None
        dropped = number(node, key, "dropped")
        note = f"{ratio:.3f}" + (f"  [{pair[0]:.3f}, {pair[1]:.3f}]" if pair else "")
        tooltip = f"{name}: {note}" + (f", {dropped:.0f} rounds dropped" if dropped is not None else "")
        ends += [ratio, *(pair or ())]
        whiskers.append(Whisker(name, ratio, pair, style, note, tooltip))
    if not whiskers:
        return Markup()
    limit = latency_limit(record)
    references = [(1.0, "no change", "reference")]
    if limit is not None:
        references.append((limit, f"limit {limit:g}", "limit"))
        ends.append(limit)
    chart = Intervals(fit_axis("latency ratio (less is faster)", ends), whiskers, "Latency gate", references)
    level, restarts, clock = number(node, "level"), number(node, "restarts"), text(node, "clock")
    parts = [
        f"backend {text(node, 'backend') or 'not recorded'}",
        f"{clock.upper() if clock == 'cpu' else clock or 'unnamed'} clock",
        f"one-sided bounds at {100 * level:g} %" if level is not None else "level of the bounds not recorded",
        f"{restarts:.0f} process restarts" if restarts is not None else "restarts not recorded",
    ]
    note = f"{'; '.join(parts)}. {facts.CPU_CLOCK if clock == 'cpu' else ''}"
    return _figure("Latency, interleaved with an A/A control", responsive(chart, FULL), note=note.strip())
