"""The record as Markdown (for CI summaries) and as tables in a terminal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.report import facts
from edgekd.report.facts import Figure, Record, number, rows, tables, text
from edgekd.report.fidelity import markdown_rows
from edgekd.report.markup import clean

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_SIGNS = {"PASS": "✅", "FAIL": "❌", "INCONCLUSIVE": "❔", "UNUSABLE": "⚠️", "NOT_MEASURED": "➖"}
_COLOURS = {
    "PASS": "bold green",
    "FAIL": "bold red",
    "INCONCLUSIVE": "bold yellow",
    "UNUSABLE": "bold magenta",
}


def escape_markdown(value: object) -> str:
    """A text that Markdown shows as it is: one line, no HTML, no table cells, no links."""
    line = " ".join(clean(value).split())
    line = line.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#!~])", r"\\\1", line)


def _markdown_table(heads: list[str], body: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    return [*lines, *("| " + " | ".join(map(escape_markdown, row)) + " |" for row in body), ""]


def _latency_text(figure: Figure) -> str:
    if figure.kind == facts.UNKNOWN:
        return f"{facts.NONE} ({figure.basis})"
    return f"{figure.text} ({figure.kind})"


def _ladder(record: Record) -> list[tuple[str, float | None, str]]:
    metrics = tables(record).get("metrics", {})
    steps = [
        ("teacher", number(metrics, "teacher", "accuracy"), ""),
        ("student, float", number(metrics, "student_float", "accuracy"), ""),
        ("student, quantized (simulated)", number(metrics, "quantize", "accuracy"), ""),
    ]
    shown = [step for step in steps if step[1] is not None]
    return shown + facts.runtime_steps(record)


def markdown(record: Record) -> str:
    """Verdict, accuracy ladder, one row a variant, the checks of the gate."""
    verdict = facts.verdict(record)
    sign = f"{_SIGNS[verdict]} " if verdict in _SIGNS else ""
    target = text(record, "target", "id") or "no target"
    lines = [f"## {sign}edgekd: {escape_markdown(verdict)} for {escape_markdown(target)}", ""]
    lines += [escape_markdown(facts.decision(record)), ""]
    if record.get("demo") is True:
        lines += ["Built-in demo: its own teacher and images, not your model.", ""]
    ladder = _ladder(record)
    if ladder:
        n = facts.validation_count(record)
        body = [
            [name,
             facts.percent(value) if value is not None else f"{facts.NONE} ({reason or facts.NO_REASON})",
             facts.bounds(facts.accuracy_interval(record, value), 100) or facts.NONE]
            for name, value, reason in ladder
        ]  # fmt: skip
        lines += _markdown_table(["model", f"accuracy (n = {n or 'unknown'})", "95 % interval"], body)
    found = facts.variants(record)
    if found:
        heads = ["variant", "accuracy", "agreement", "int8 of MACs", "latency p50 / p90", "size"]
        body = [
            [
                text(row, "id") or text(row, "backend") or "unnamed",
                facts.percent(number(row, "accuracy")),
                facts.percent(number(row, "top1_agreement")),
                facts.percent(number(row, "int8_coverage_macs"), 0),
                _latency_text(facts.latency(row)),
                facts.size(number(row, "size_mib")),
            ]
            for row in found
        ]
        lines += _markdown_table(heads, body)
    heads, body = markdown_rows(record)
    if body:
        lines += _markdown_table(heads, body)
    checks = [facts.check_cells(check) for check in rows(record, "gate", "checks")]
    if checks:
        signed = [
            [cells[0], f"{_SIGNS.get(cells[1], '')} {cells[1]}".strip(), *cells[2:]] for cells in checks
        ]
        lines += _markdown_table(["check", "verdict", "measured", "limit", "interval", "note"], signed)
    return "\n".join(lines)


def print_summary(record: Record, console: Console, report: Path | None = None) -> None:
    """Print the models, the checks, the verdict and where bundle and report lie."""
    from rich.text import Text

    for table, notes in (_models_table(record), _checks_table(record)):
        if table.row_count:
            console.print(table)
        for note in notes:
            console.print(_cell(note, "dim"))
    verdict = facts.verdict(record)
    line = Text()
    line.append(clean(verdict).replace("_", " "), style=_COLOURS.get(verdict, "bold"))
    line.append(clean(f" for {text(record, 'target', 'id') or 'no target'}. {facts.decision(record)}"))
    console.print(line)
    bundle = text(record, "bundle")
    for name, path in (("bundle", bundle), ("report", str(report) if report else "")):
        if path:
            console.print(Text(clean(f"{name}: {path}")), soft_wrap=True)


def _rich_table(title: str, heads: list[tuple[str, bool]]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, numeric in heads:
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    return table


def _cell(value: object, style: str = "") -> Text:
    from rich.text import Text

    return Text(clean(value), style=style)


def _models_table(record: Record) -> tuple[Table, list[str]]:
    heads = [("model", False), ("top-1", True), ("size", True), ("latency p50", True),
             ("int8", True), ("agree", True)]  # fmt: skip
    table = _rich_table("Models", heads)
    for column in table.columns:
        column.no_wrap = True
    metrics = tables(record).get("metrics", {})
    for name, row in (
        ("teacher", tables(metrics).get("teacher")),
        ("student, float", tables(metrics).get("student_float")),
    ):
        if row:
            cells = (name, facts.percent(number(row, "accuracy")),
                     facts.size(number(row, "size_mib")), facts.NONE, facts.NONE,
                     facts.percent(number(row, "top1_agreement"), 1))  # fmt: skip
            table.add_row(*map(_cell, cells))
    unknown = []
    for row in facts.variants(record):
        figure, p50 = facts.latency(row), number(row, "latency_p50_ms")
        name = text(row, "id") or text(row, "backend") or "unnamed"
        latency = facts.NONE if figure.kind == facts.UNKNOWN else facts.milliseconds(p50)
        if figure.kind == facts.PREDICTED:
            latency = f"predicted {latency}"
        if figure.kind == facts.UNKNOWN:
            unknown.append(f"{name}: {facts.NONE} {figure.basis}")
        table.add_row(
            _cell(name),
            _cell(facts.percent(number(row, "accuracy"))),
            _cell(facts.size(number(row, "size_mib"))),
            _cell(latency, {facts.PREDICTED: "italic magenta", facts.UNKNOWN: "dim"}.get(figure.kind, "")),
            _cell(facts.percent(number(row, "int8_coverage_macs"), 0)),
            _cell(facts.percent(number(row, "top1_agreement"), 1)),
        )
    return table, [f"latency of {line}" for line in unknown]


def _checks_table(record: Record) -> tuple[Table, list[str]]:
    heads = [("check", False), ("verdict", False), ("measured", True), ("limit", True), ("interval", True)]
    table = _rich_table("Checks that did not pass", heads)
    for column in table.columns[1:]:
        column.no_wrap = True
    notes = []
    for check in rows(record, "gate", "checks"):
        name, verdict, *numbers, note = facts.check_cells(check)
        if verdict == "PASS":
            continue
        table.add_row(_cell(name), _cell(verdict, _COLOURS.get(verdict, "dim")), *map(_cell, numbers))
        if note and verdict != "PASS":
            notes.append(f"{name}: {note}")
    return table, notes
