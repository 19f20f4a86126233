"""The page of `edgekd quantize MODEL.onnx`: the candidates, why one was kept, and what each operator does."""

from __future__ import annotations

from edgekd.report import facts
from edgekd.report.facts import Record, dig, number, rows, tables, text
from edgekd.report.markup import Markup, embedded_json, join, table, tag
from edgekd.report.sensitivity import file_sensitivity
from edgekd.report.style import CSS, SCRIPT


def file_page(record: Record) -> str:
    """One self-contained HTML file from the record of the command (docs/quantize.md)."""
    shown = [
        ("candidates", "Candidates", _candidates(record)),
        ("sensitivity", "Sensitivity of the operators", file_sensitivity(record)),
        ("kernels", "What ran in integers", _kernels(record)),
        ("parity", "The same file on every executor", _parity(record)),
    ]
    name = text(record, "model", "path")
    head = tag(
        "head",
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", f"edgekd quantize: {name}"),
        tag("style", Markup(CSS)),
    )
    kept = tag("p", tag("strong", f"Kept: {text(record, 'chosen')}. "), text(record, "reason"))
    body = tag(
        "body",
        tag("header", tag("h1", "edgekd quantize"), tag("p", _sentence(record)), kept),
        tag(
            "main",
            *(tag("section", tag("h2", title), content, id=key) for key, title, content in shown if content),
        ),
        tag("footer", "Written from quantize.json, which is embedded in this file. It needs no network."),
        embedded_json(record, "record"),
        tag("script", Markup(SCRIPT)),
    )
    return "<!doctype html>\n" + join((Markup('<html lang="en">'), head, body, Markup("</html>\n")))


def _sentence(record: Record) -> str:
    counts = [f"{text(record, 'calibration', key)} {word}" for key, word in
              (("calibration", "calibrate"), ("deciding", "decide"), ("reporting", "report"))]  # fmt: skip
    environment = tables(record).get("environment", {})
    return (
        f"{text(record, 'model', 'path')} for {text(record, 'target', 'id')}; samples: {', '.join(counts)}; "
        f"limit {facts.significant(number(record, 'quality', 'max_drop_points'))} points of "
        f"{text(record, 'quality', 'kind')}. Measured on {text(environment, 'cpu') or 'this machine'}, load "
        f"average {facts.load_average(environment) or 'not recorded'}."
    )


def _candidates(record: Record) -> Markup:
    found = rows(record, "candidates")
    body = [
        (
            text(row, "id"),
            facts.significant(number(row, "drop")),
            facts.percent(number(row, "int8_coverage_macs"), 0),
            text(row, "float_operators"),
            facts.milliseconds(number(row, "cpu_p50_ms")),
            facts.size(number(row, "size_mib")),
            join((text(row, "how"), tag("small", text(row, "reason")) if text(row, "reason") else "")),
        )
        for row in found
    ]
    heads = (
        "candidate",
        "points lost",
        "int8 of MACs",
        "left in float",
        "CPU time of a call",
        "size",
        "made by",
    )
    chosen = text(record, "chosen")
    failed = dig(record, "engines_failed") or {}
    notes = [tag("p", f"Engine {name} has no row: {why}", class_="note") for name, why in failed.items()]
    marked = ["target" if text(row, "id") == chosen else "" for row in found]
    return join((table(heads, body, numeric=(1, 2, 3, 4, 5), row_classes=marked), *notes))


def _kernels(record: Record) -> Markup:
    """Of each quantized candidate: kernels with products by name, and layers in float with the reason."""
    body = []
    for row in rows(record, "candidates"):
        if text(row, "form") in ("fp32", "bf16") or not dig(row, "kernels"):
            continue
        kernels = ", ".join(f"{count} {name}" for name, count in (dig(row, "kernels") or {}).items())
        by_reason: dict[str, list[str]] = {}
        for layer in rows(row, "float_layers"):
            why = text(layer, "reason") or "reason not known"
            by_reason.setdefault(why, []).append(text(layer, "name"))
        floats = "; ".join(
            f"{why}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
            for why, names in by_reason.items()
        )
        covered = facts.percent(number(row, "int8_coverage_nodes"), 0)
        body.append((text(row, "id"), covered, kernels, tag("small", floats or "none")))
    build = dig(record, "build")
    verdict = {True: "built", False: "refused", None: "not built"}.get(dig(build, "ok"), "")
    built = tag("p", f"TensorRT, {verdict}: {text(build, 'message')}", class_="note") if build else Markup()
    if not body:
        return built
    note = "On the runtimes of this machine; another processor has other kernels."
    heads = ("candidate", "int8 of layers", "kernels of layers", "layers in float, by reason")
    return join((tag("p", note, class_="note"), table(heads, body, numeric=(1,)), built))


def _parity(record: Record) -> Markup:
    body = [
        (
            f"{text(row, 'file')}, {text(row, 'executor')}",
            facts.percent(number(row, "top1_agreement")),
            facts.significant(number(row, "mean_steps"), 2),
            facts.significant(number(row, "max_steps"), 2),
            facts.significant(number(row, "max_abs"), 2),
            tag("small", text(row, "reason")) if text(row, "reason") else "",
        )
        for row in rows(record, "parity")
    ]
    if not body:
        return Markup()
    note = "Against ONNX Runtime without optimisation, over one batch; a step is one of the output's grid."
    heads = ("file and executor", "top-1 agreement", "mean steps", "most steps", "max abs diff", "note")
    return join((tag("p", note, class_="note"), table(heads, body, numeric=(1, 2, 3, 4))))
