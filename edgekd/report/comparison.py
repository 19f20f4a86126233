"""Two runs side by side: one HTML page, and the same as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgekd.report import facts
from edgekd.report.facts import Record, dig, number, rows, text
from edgekd.report.markup import Markup, embedded_json, join, table, tag, verdict_chip
from edgekd.report.style import CSS, SCRIPT

Row = tuple[str, str, str, str]  # what, first run, second run, what follows
_HEADS = ("", "first", "second", "change")


def comparison_page(first: Record, second: Record, names: tuple[str, str]) -> str:
    """One offline HTML file; the folders' names head the columns."""
    parts = [
        tag("section", tag("h2", heading), _grid(found, names), tag("p", note, class_="note") if note else "")
        for heading, note, found in sections(first, second)
        if found
    ]
    title = f"edgekd: {names[0]} and {names[1]}"
    head = tag(
        "head",
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", Markup(CSS)),
    )
    chips = join((verdict_chip(facts.verdict(record)) for record in (first, second)), " and ")
    body = tag(
        "body",
        tag("header", tag("h1", "edgekd: two runs"), tag("p", f"{names[0]} and {names[1]}: ", chips)),
        tag("main", *parts),
        tag("footer", "Both records are embedded in this file. It needs no network."),
        embedded_json({"first": first, "second": second}, "records"),
        tag("script", Markup(SCRIPT)),
    )
    return "<!doctype html>\n" + join((Markup('<html lang="en">'), head, body, Markup("</html>\n")))


def comparison_markdown(first: Record, second: Record, names: tuple[str, str]) -> str:
    """The same tables for a terminal or a pull request."""
    lines = [f"# {_cell(names[0])} and {_cell(names[1])}"]
    for heading, note, found in sections(first, second):
        if not found:
            continue
        lines += ["", f"## {heading}", "", f"| | {_cell(names[0])} | {_cell(names[1])} | change |"]
        lines.append("|---|---|---|---|")
        lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in found]
        lines += ["", note] if note else []
    return "\n".join(lines) + "\n"


def _cell(value: str) -> str:
    return value.replace("|", "\\|").replace("\n", " ")


def _grid(found: Sequence[Row], names: tuple[str, str]) -> Markup:
    return table((_HEADS[0], *names, _HEADS[3]), found, class_="stack sortable")


def sections(first: Record, second: Record) -> list[tuple[str, str, list[Row]]]:
    """Heading, note and rows of each part; a part in which nothing is known or differs has no row."""
    note = (
        "Milliseconds of two runs are no comparison: between two processes they differ more than models do. "
        "edgekd gate SECOND/6-bundle --reference FIRST/6-bundle measures both in turns."
    )
    return [
        ("Result", "", _result(first, second)),
        ("Latency of the shipped variant", note, _latency(first, second)),
        ("Checks of the gate", "", _checks(first, second)),
        ("Recipe: keys that differ", "", _differences(dig(first, "recipe"), dig(second, "recipe"))),
        ("Environment: what differs", "", _differences(_machine(first), _machine(second))),
    ]


def _result(first: Record, second: Record) -> list[Row]:
    found = [_row("verdict", facts.verdict(first), facts.verdict(second))]
    found.append(_row("target", text(first, "target", "id"), text(second, "target", "id")))
    same = text(first, "metrics", "data", "sha256") == text(second, "metrics", "data", "sha256") != ""
    kind = "the same images" if same else "other images: not a comparison"
    for name, path in (("teacher", ("metrics", "teacher", "accuracy")),
                       ("float student", ("metrics", "student_float", "accuracy"))):  # fmt: skip
        found.append(_accuracy(name, (first, number(first, *path)), (second, number(second, *path)), kind))
    shipped = [facts.shipped_accuracy(record) for record in (first, second)]
    found.append(_row("shipped", shipped[0][0], shipped[1][0]))
    found.append(_accuracy("shipped", (first, shipped[0][1]), (second, shipped[1][1]), kind))
    figures = (
        ("size of the shipped file", facts.shipped_size(first), facts.shipped_size(second), facts.size),
        *(
            (label, number(first, *path), number(second, *path), facts.count)
            for label, path in (
                ("parameters", ("metrics", "student_float", "parameters")),
                ("multiply-accumulates", ("metrics", "student_float", "macs")),
            )
        ),
        ("time of all stages", _seconds(first), _seconds(second), facts.duration),
    )
    for label, one, other, show in figures:
        found.append((label, show(one), show(other), _ratio(one, other)))
    return [row for row in found if row[1] not in ("", facts.NONE) or row[2] not in ("", facts.NONE)]


def _row(label: str, one: str, other: str) -> Row:
    return label, one, other, "" if one == other else "differs"


def _accuracy(
    name: str, one: tuple[Record, float | None], other: tuple[Record, float | None], kind: str
) -> Row:
    """Accuracies with their intervals; a change within both intervals is called so."""
    shown, intervals = [], []
    for record, value in (one, other):
        pair = facts.accuracy_interval(record, value)
        intervals.append(pair)
        shown.append(facts.percent(value) + (f" {facts.bounds(pair, 100)}" if pair else ""))
    change = ""
    if one[1] is not None and other[1] is not None:
        change = f"{100 * (other[1] - one[1]):+.2f} points, {kind}"
        if intervals[0] and intervals[1] and _overlap(intervals[0], intervals[1]):
            change += "; the intervals overlap"
    return f"accuracy, {name}", shown[0], shown[1], change


def _overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


def _ratio(one: float | None, other: float | None) -> str:
    if one is None or other is None or one <= 0:
        return ""
    return "the same" if one == other else f"x {other / one:.3g}"


def _seconds(record: Record) -> float | None:
    found = [number(stage, "seconds") for stage in facts.tables(record, "stages").values()]
    known = [seconds for seconds in found if seconds is not None]
    return sum(known) if known else None


def _latency(first: Record, second: Record) -> list[Row]:
    """p50 and p90 of what is shipped, and whether the two numbers come from one kind of place."""
    sides = [_shipped_row(record) for record in (first, second)]
    found: list[Row] = []
    for label, key in (("p50, wall clock", "latency_p50_ms"), ("p90, wall clock", "latency_p90_ms"),
                       ("p50, CPU clock", "cpu_p50_ms")):  # fmt: skip
        one, other = (number(side, key) for side in sides)
        if one is not None or other is not None:
            found.append((label, facts.milliseconds(one), facts.milliseconds(other), _ratio(one, other)))
    if found:
        for label, key in (
            ("variant", "id"),
            ("device", "latency_device"),
            ("version of its runtime", "version"),
        ):
            found.append(_row(label, text(sides[0], key), text(sides[1], key)))
    return found


def _shipped_row(record: Record) -> Record:
    wanted = text(record, "gate", "shipped")
    return next((row for row in facts.variants(record) if text(row, "id") == wanted), {})


def _checks(first: Record, second: Record) -> list[Row]:
    """Checks of either run by name, with verdict and measured value."""
    sides = [{text(check, "name"): check for check in rows(record, "gate", "checks")}
             for record in (first, second)]  # fmt: skip
    found = []
    for name in [*sides[0], *(key for key in sides[1] if key not in sides[0])]:
        shown = []
        for side in sides:
            check = side.get(name)
            known = check is not None and number(check, "measured") is not None
            value = facts.quantity(number(check, "measured"), text(check, "unit")) if known else ""
            shown.append("not checked" if check is None else f"{text(check, 'verdict')} {value}".strip())
        verdicts = [text(side.get(name, {}), "verdict") for side in sides]
        told = (
            ""
            if verdicts[0] == verdicts[1]
            else "the verdict differs"
            if all(verdicts)
            else "in one run only"
        )
        found.append((name, shown[0], shown[1], told))
    return found


def _machine(record: Record) -> dict[str, Any]:
    told = dig(record, "environment")
    return {key: told[key] for key in ("cpu", "cores", "python", "packages") if key in told} if told else {}


def _differences(one: Any, other: Any, path: str = "") -> list[Row]:
    """Leaves of two trees that are not the same."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        found: list[Row] = []
        for key in [*one, *(key for key in other if key not in one)]:
            found += _differences(one.get(key), other.get(key), f"{path}.{key}".lstrip("."))
        return found
    return [] if one == other else [(path, _shown(one), _shown(other), "")]


def _shown(value: Any) -> str:
    return "none" if value is None else str(value)
