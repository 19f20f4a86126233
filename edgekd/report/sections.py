"""The sections below the verdict; each is empty when the record has nothing for it."""

from __future__ import annotations

import json

from edgekd.report import charts, facts
from edgekd.report.facts import Record, dig, number, rows, tables, text
from edgekd.report.markup import Markup, clean, figure_cell, join, kind_chip, pairs, table, tag, verdict_chip


def ladder_section(record: Record) -> Markup:
    """Accuracy from the teacher to the shipped files."""
    return charts.accuracy_ladder(record)


def runtimes_section(record: Record) -> Markup:
    """One row a variant."""
    found = facts.variants(record)
    if not found:
        return Markup()
    heads = ("variant", "accuracy", "agreement with torch", "max abs diff", "int8 of nodes", "int8 of MACs",
             "latency p50 / p90", "size")  # fmt: skip
    body, classes = [], []
    runtime = text(record, "target", "runtime")
    for row in found:
        accuracy = number(row, "accuracy")
        name = text(row, "id") or text(row, "backend") or "unnamed"
        body.append(
            (
                name,
                facts.percent(accuracy),
                facts.percent(number(row, "top1_agreement")),
                facts.significant(number(row, "max_abs_diff"), 2),
                facts.percent(number(row, "int8_coverage_nodes"), 0),
                facts.percent(number(row, "int8_coverage_macs"), 0),
                figure_cell(facts.latency(row)),
                facts.size(number(row, "size_mib")),
            )
        )
        classes.append("target" if runtime and text(row, "backend") == runtime else "")
    devices = list(dict.fromkeys(text(row, "latency_device") for row in found if text(row, "latency_device")))
    legend = tag(
        "p",
        "Latency: ", kind_chip(facts.MEASURED), " on the named device, ", kind_chip(facts.PREDICTED),
        " by a model, — unknown, with the reason. ",
        f"Devices: {'; '.join(devices)}. " if devices else "",
        f"The marked rows belong to the target's runtime, {runtime}." if any(classes) else "",
        class_="note",
    )  # fmt: skip
    return join((table(heads, body, numeric=(1, 2, 3, 4, 5, 7), row_classes=classes), legend,
                 charts.variant_scatter(record)))  # fmt: skip


def training_section(record: Record) -> Markup:
    """Distillation and quantization-aware training."""
    distill = dig(record, "metrics", "distill")
    drawing = charts.training_curves(record)
    if not distill and not drawing:
        return Markup()
    student = dig(record, "metrics", "student_float")
    described: list[tuple[str, object]] = [
        ("distillation method", text(distill, "method")),
        ("weights", f"given, not trained: {given}" if (given := text(distill, "weights", "source")) else ""),
        ("training ran as", text(distill, "probe", "chosen")),
        ("student", f"{facts.count(number(student, 'parameters'))} parameters, "
            f"{facts.count(number(student, 'macs'))} MACs, {facts.size(number(student, 'size_mib'))} in "
            "float; agrees with the teacher on "
            f"{facts.percent(number(student, 'top1_agreement'))} of the samples" if student else ""),
    ]  # fmt: skip
    return join((pairs(described), drawing))


def gate_section(record: Record) -> Markup:
    """Each check with its verdict, measured value, limit and interval."""
    checks = rows(record, "gate", "checks")
    if not checks:
        return charts.gate_latency(record)
    body = [
        (name, verdict_chip(verdict), measured, limit, interval, tag("small", note) if note else "")
        for name, verdict, measured, limit, interval, note in map(facts.check_cells, checks)
    ]
    heads = ("check", "verdict", "measured", "limit", "interval", "note")
    return join((table(heads, body, numeric=(2, 3, 4), class_="stack checks"), charts.gate_latency(record)))


def parity_section(record: Record) -> Markup:
    """How far each runtime is from the torch model."""
    found = facts.backends(record)
    if not found:
        return Markup()
    body = [
        (
            name,
            facts.significant(number(row, "max_abs_diff"), 2),
            facts.percent(number(row, "top1_agreement")),
            text(row, "version") or facts.NONE,
            tag("small", text(row, "reason")) if text(row, "reason") else "",
        )
        for name, row in found.items()
    ]
    teacher = number(record, "metrics", "teacher", "logits_max_abs_diff")
    note = (
        f"Logits of the teacher differ by {facts.significant(teacher, 2)} at most between "
        f"{text(record, 'metrics', 'teacher', 'runtime') or 'its runtime'} and torch."
        if teacher is not None else ""
    )  # fmt: skip
    heads = ("runtime", "max abs diff of logits", "top-1 agreement", "version", "note")
    return join((table(heads, body, numeric=(1, 2)), tag("p", note, class_="note") if note else ""))


def precision_section(record: Record) -> Markup:
    """The dialect of quantization and what each runtime really executed."""
    quantize = dig(record, "metrics", "quantize")
    found = facts.backends(record)
    if not quantize and not found:
        return Markup()
    ptq, qat = number(quantize, "ptq_selection_accuracy"), number(quantize, "qat_selection_accuracy")
    described: list[tuple[str, object]] = [
        ("mode", f"{text(quantize, 'mode')}; chosen: {text(quantize, 'chosen') or 'not recorded'}"
            if quantize else ""),
        ("why", text(quantize, "reason")),
        ("shipped", text(record, "gate", "reason")),
        ("dialect", text(quantize, "dialect") or text(record, "target", "dialect")),
        ("left in float", ", ".join(facts.strings(quantize, "float_layers"))),
        ("calibrator", text(quantize, "calibrator")),
        ("selection accuracy", f"PTQ {facts.percent(ptq)}, QAT {facts.percent(qat)}"
            if ptq is not None or qat is not None else ""),
    ]  # fmt: skip
    body = [
        (
            name,
            text(row, "precision") or facts.NONE,
            facts.percent(number(row, "int8_coverage_nodes"), 1),
            facts.percent(number(row, "int8_coverage_macs"), 1),
            _executed(row),
        )
        for name, row in found.items()
    ]
    heads = ("runtime", "asked for", "int8 of nodes", "int8 of MACs", "really executed, by node")
    return join((pairs(described), table(heads, body, numeric=(2, 3)) if body else ""))


def _executed(row: Record) -> str:
    totals: dict[str, int] = {}
    for layer in rows(row, "layers"):
        name = text(layer, "precision") or "unknown"
        totals[name] = totals.get(name, 0) + 1
    return (
        ", ".join(f"{many} {name}" for name, many in totals.items()) or text(row, "reason") or "not reported"
    )


def unverified_section(record: Record) -> Markup:
    """Numbers of the target card that were used and that nobody has verified."""
    used = facts.strings(record, "target", "unverified")
    if not used:
        return Markup()
    return join(
        (
            tag("p", "This run used these numbers of the target card. They come from a secondary source or "
                "were derived; check them before relying on what follows from them."),
            tag("ul", *(tag("li", tag("code", name)) for name in used)),
        )
    )  # fmt: skip


def environment_section(record: Record) -> Markup:
    """Machine, packages, data, recipe, stage times."""
    environment, data = tables(record).get("environment", {}), dig(record, "metrics", "data")
    loads = facts.load_average(environment)
    packages = tables(record, "environment").get("packages", {})
    classes = facts.strings(data, "classes")
    shape = " × ".join(facts.strings(data, "shape"))
    described: list[tuple[str, object]] = [
        ("processor", text(environment, "cpu")),
        ("instruction sets", ", ".join(facts.strings(environment, "isa"))),
        ("cores", text(environment, "cores")),
        ("load average", loads),
        ("platform", text(environment, "platform")),
        ("Python", text(environment, "python")),
        ("packages", ", ".join(f"{name} {version}" for name, version in packages.items())),
        ("data", text(data, "source")),
        ("images", ", ".join(f"{text(data, part)} {part}" for part in ("train", "selection", "validation")
            if text(data, part))),
        ("shape and classes", f"{shape}; {len(classes)} classes: {', '.join(classes)}" if classes else shape),
        ("digest of the data", text(data, "sha256")),
        ("teacher", text(record, "metrics", "teacher", "name")),
        ("digest of the teacher", text(record, "metrics", "teacher", "sha256")),
        ("bundle", text(record, "bundle")),
        ("edgekd", text(record, "edgekd_version")),
        ("created", text(record, "created")),
    ]  # fmt: skip
    recipe = tables(record).get("recipe", {})
    shown = clean(json.dumps(recipe, indent=2, default=str, ensure_ascii=False)) if recipe else ""
    block = tag("details", tag("summary", "Resolved recipe"), tag("pre", shown)) if shown else ""
    return join((pairs(described), block))


def stages_section(record: Record) -> Markup:
    """Seconds of each stage."""
    done = tables(record, "stages")
    if not done:
        return Markup()
    seconds = {name: number(row, "seconds") for name, row in done.items()}
    longest = max((value for value in seconds.values() if value is not None), default=0.0) or 1.0
    total = sum(value for value in seconds.values() if value is not None)
    ordered = [
        *(name for name in facts.STAGES if name in done),
        *(name for name in done if name not in facts.STAGES),
    ]
    body = [
        (
            name,
            facts.duration(seconds[name]),
            tag("span", class_="bar", style=f"width:{100 * (seconds[name] or 0) / longest:.1f}%"),
            "resumed from an earlier run" if dig(done[name], "resumed") is True else "",
        )
        for name in ordered
    ]
    note = f"Total {facts.duration(total)}. Not run: {', '.join(facts.missing_stages(record)) or 'none'}."
    return join(
        (
            table(("stage", "time", "", ""), body, numeric=(1,), bars=2, class_="stages"),
            tag("p", note, class_="note"),
        )
    )


def layers_section(record: Record) -> Markup:
    """Time of each layer on each runtime; layers that fell back to float stand out, with their reason."""
    parts = [_layer_table(name, row) for name, row in facts.backends(record).items() if rows(row, "layers")]
    if not parts:
        return Markup()
    without = [name for name, row in facts.backends(record).items() if not rows(row, "layers")]
    note = f"No layers reported by: {', '.join(without)}." if without else ""
    return join((*parts, tag("p", note, class_="note") if note else ""))


def _layer_table(name: str, variant: Record) -> Markup:
    layers = rows(variant, "layers")
    times = [number(layer, "ms") for layer in layers]
    known = [ms for ms in times if ms is not None]
    total, longest = sum(known), max(known, default=0.0)
    fallen = [facts.is_fallback(layer, variant) for layer in layers]
    body = [
        (
            (index, text(layer, "name") or "unnamed"),
            text(layer, "op"),
            tag("b", text(layer, "precision"), class_="float")
            if facts.runs_in_float(layer, variant)
            else text(layer, "precision") or facts.NONE,
            (number(layer, "macs") or 0, facts.count(number(layer, "macs"))),
            (-1 if ms is None else ms, facts.NONE if ms is None else f"{1000 * ms:.2f}"),
            (-1 if ms is None else ms, _bar(ms, longest)),
            join((tag("strong", "float fall-back: "), text(layer, "reason") or facts.NO_REASON))
            if fell
            else text(layer, "reason"),
        )
        for index, (layer, ms, fell) in enumerate(zip(layers, times, fallen, strict=True))
    ]
    heads = ("layer", "op", "precision", "MACs", "time, µs", "", "reason")
    with_reasons = any(text(layer, "reason") for layer in layers) or any(fallen)
    grid = table(
        heads if with_reasons else heads[:-1],
        body if with_reasons else [row[:-1] for row in body],
        numeric=(3, 4),
        bars=5,
        class_="sortable layers",
        row_classes=["fallback" if fell else "" for fell in fallen],
    )
    spent = sum(ms for ms, fell in zip(times, fallen, strict=True) if fell and ms is not None)
    if not any(fallen):
        summary = f"{len(layers)} layers, no float fall-back"
    else:
        share = f", {100 * spent / total:.0f} % of the time" if total > 0 else ""
        summary = f"{sum(fallen)} of {len(layers)} layers fell back to float{share}"
    reasons = [
        tag("li", tag("code", text(layer, "name")), f" ({text(layer, 'op')}, {text(layer, 'precision')}): "
            f"{text(layer, 'reason') or facts.NO_REASON}")
        for layer, fell in zip(layers, fallen, strict=True) if fell
    ]  # fmt: skip
    callout = (
        tag("div", tag("p", f"{name}: {summary}"), tag("ul", *reasons), class_="callout") if reasons else ""
    )
    other = [ms or 0.0 for layer, ms, fell in zip(layers, times, fallen, strict=True)
             if facts.runs_in_float(layer, variant) and not fell]  # fmt: skip
    if other:
        share = f", {100 * sum(other) / total:.0f} % of the time" if total > 0 else ""
        summary += f"; {len(other)} conversions and activations in float{share}"
    shown = tag("summary", name, " ", tag("small", f"{summary}; {_protocol(variant, total)}"))
    return join((callout, tag("details", shown, grid, open="open")))


def _bar(ms: float | None, longest: float) -> Markup:
    if ms is None or longest <= 0:
        return Markup()
    return tag("span", class_="bar", style=f"width:{100 * max(0.0, ms) / longest:.1f}%")


def _protocol(variant: Record, total: float) -> str:
    protocol = dig(variant, "protocol")
    parts = [f"{facts.milliseconds(total)} in sum" if total > 0 else "no layer times"]
    for key, unit in (("threads", "threads"), ("calls", "calls"), ("batch", "batch"), ("clock", "clock")):
        if text(protocol, key):
            value = text(protocol, key)
            named = unit.removesuffix("s") if value == "1" else unit
            parts.append(f"batch {value}" if key == "batch" else f"{value} {named}")
    return ", ".join(parts)
