"""The first thing a reader sees: the verdict, three numbers, and what kind each quoted number is."""

from __future__ import annotations

from edgekd.report import facts
from edgekd.report.facts import Figure, Record, dig, number, rows, tables, text
from edgekd.report.markup import Markup, figure_cell, join, kind_chip, table, tag


def _hero(label: str, figure: Figure, detail: str) -> Markup:
    value: object = figure_cell(figure)
    if figure.kind == facts.UNKNOWN:
        value = tag(
            "span",
            tag("span", facts.NONE, class_="value"),
            " ",
            kind_chip(figure.kind),
            class_="fig k-unknown",
        )
        detail = detail if figure.basis in detail else f"{figure.basis}. {detail}".strip()
    return tag(
        "div",
        tag("div", label, class_="label"),
        tag("div", value, class_="big"),
        tag("small", detail),
        class_="hero",
    )


def _heroes(record: Record) -> Markup:
    shown = [hero for hero in (_accuracy_hero(record), _speed_hero(record), _size_hero(record)) if hero]
    return tag("div", *shown, class_="heroes") if shown else Markup()


def _accuracy_hero(record: Record) -> Markup:
    what, accuracy = facts.shipped_accuracy(record)
    teacher = number(record, "metrics", "teacher", "accuracy")
    n = facts.validation_count(record)
    basis = f"on {n} validation samples" if n else "number of samples not recorded"
    if accuracy is None:
        if teacher is None:
            return Markup()
        return _hero(
            "Accuracy of the teacher", Figure("", facts.percent(teacher), facts.MEASURED, basis), basis
        )
    pair = facts.bounds(facts.accuracy_interval(record, accuracy), 100)
    detail = f"{what}; {basis}" + (f", 95 % interval {pair}" if pair else "")
    if teacher is not None:
        change = f"{100 * (accuracy - teacher):+.2f}".replace("-", "−")
        detail = f"{change} points against the teacher ({facts.percent(teacher)}); {detail}"
    return _hero("Accuracy", Figure("", facts.percent(accuracy), facts.MEASURED, basis), detail)


def _speed_hero(record: Record) -> Markup:
    first, speedup = facts.primary(record), tables(record, "metrics").get("speedup_over_teacher", {})
    figure = facts.latency(first)
    ratio, ends = number(speedup, "ratio"), facts.bounds(facts.interval(speedup, "interval"))
    gain = ""
    if ratio is not None:
        where = " on ".join(part for part in (text(speedup, "backend"), text(speedup, "device")) if part)
        clock = text(speedup, "clock").replace("cpu", "CPU")
        gain = f"with {where or 'an unnamed runtime'}" + (f", {clock} clock" if clock else "")
        gain += f"; interval {ends}" if ends else ""
    if not first and ratio is None:
        return Markup()
    runtime = text(first, "id") or text(first, "backend") or "the target's runtime"
    if figure.kind == facts.UNKNOWN and ratio is not None:
        on_target = f"{gain}. Latency with {runtime}: unknown ({figure.basis})"
        measured = Figure("", f"{facts.significant(ratio)}×", facts.MEASURED, gain)
        return _hero("Speed-up over the teacher", measured, on_target)
    if gain and ratio is not None:
        gain = f"{facts.significant(ratio)}× faster than the teacher {gain}"
    return _hero(f"Latency p50 / p90, {runtime}", figure, f"{figure.basis}. {gain}".strip(" ."))


def _size_hero(record: Record) -> Markup:
    size, teacher = facts.shipped_size(record), number(record, "metrics", "teacher", "size_mib")
    if size is None:
        return Markup()
    kind = text(record, "metrics", "teacher", "size_kind")
    detail = f"file of the model; teacher {facts.size(teacher)}" + (f" ({kind})" if kind else "")
    if teacher is not None and size > 0:
        detail = f"{facts.significant(teacher / size)}× smaller: {detail}"
    return _hero("Size", Figure("", facts.size(size), facts.MEASURED, "bytes of the file"), detail)


def verdict_section(record: Record) -> Markup:
    """The verdict, what was decided, for which device, and the three most important numbers."""
    verdict = facts.verdict(record)
    target = text(record, "target", "id") or "no target"
    description = text(record, "target", "description")
    chosen_on = text(record, "gate", "latency", "backend")
    place = text(record, "environment", "cpu")
    decided = (
        f"Decided on {place or 'a machine not recorded'}" + (f" with {chosen_on}" if chosen_on else "") + "."
    )
    known = verdict if verdict in ("PASS", "FAIL", "INCONCLUSIVE", "UNUSABLE") else "UNUSABLE"
    missing = facts.missing_stages(record)
    return join(
        (
            tag(
                "div",
                tag("div", verdict.replace("_", " "), class_="word"),
                tag("div", f"{target}", f" · {description}" if description else "", class_="target"),
                tag("p", facts.decision(record), " ", decided if rows(record, "gate", "checks") else ""),
                tag("p", f"Stages not run: {', '.join(missing)}.") if missing else "",
                class_=f"verdict v-{known}",
                id="verdict",
            ),
            tag(
                "div",
                tag("p", "This run used the built-in demo: its own small teacher and the images shipped with "
                    "the tool. The numbers show that the toolchain works; they say nothing about your "
                    "model."),
                class_="callout",
            ) if dig(record, "demo") is True else "",
            _heroes(record),
        )
    )  # fmt: skip


def kinds_section(record: Record) -> Markup:
    """For each headline figure: measured, predicted or unknown, and on what it rests."""
    body = [
        (figure.name, figure.text, kind_chip(figure.kind), tag("small", figure.basis))
        for figure in headline_figures(record)
    ]
    if not body:
        return Markup()
    return table(("figure", "value", "kind", "on what it rests"), body, numeric=(1,))


def headline_figures(record: Record) -> list[Figure]:
    """The figures a reader will quote, each with its kind."""
    metrics = dig(record, "metrics")
    n = facts.validation_count(record)
    samples = f"{n} validation samples" if n else "number of samples not recorded"
    found: list[Figure] = []

    def add(name: str, value: float | None, shown: str, basis: str, kind: str = facts.MEASURED) -> None:
        if value is not None:
            found.append(Figure(name, shown, kind, basis))

    for name, key in (("accuracy of the teacher", "teacher"),
                      ("accuracy of the student in float", "student_float"),
                      ("accuracy, quantized (simulated)", "quantize")):  # fmt: skip
        value = number(metrics, key, "accuracy")
        add(name, value, facts.percent(value), samples)
    for name, row in facts.backends(record).items():
        value = number(row, "accuracy")
        add(f"accuracy on {name}", value, facts.percent(value), samples)
        if value is None:
            found.append(
                Figure(
                    f"accuracy on {name}", facts.NONE, facts.UNKNOWN, text(row, "reason") or facts.NO_REASON
                )
            )
    for name, row in facts.backends(record).items():
        found.append(facts.latency(row, f"latency p50 / p90 on {name}"))
    search = dig(metrics, "search")
    chosen = number(search, "chosen")
    candidates = rows(search, "candidates")
    given = dig(search, "given")
    if given or (chosen is not None and 0 <= chosen < len(candidates)):
        value = number(given or candidates[int(chosen or 0)], "latency_ms")
        error = number(search, "cost_model", "error_percent")
        basis = f"cost model {text(search, 'cost_model', 'kind')}, " + (
            f"error about {facts.significant(error, 2)} %" if error is not None else "error not known"
        )
        name = "latency of the given student" if given else "latency of the chosen candidate"
        add(name, value, facts.milliseconds(value), basis, facts.PREDICTED)
    value = number(search, "latency_measured_ms")
    add(
        "latency of the chosen candidate, untrained",
        value,
        facts.milliseconds(value),
        f"on {text(search, 'latency_measured_on')}",
    )
    value = number(metrics, "speedup_over_teacher", "ratio")
    if value is not None:
        where = ", ".join(
            v.replace("cpu", "CPU clock").replace("wall", "wall clock") if k == "clock" else v
            for k in ("variant", "device", "clock")
            if (v := text(metrics, "speedup_over_teacher", k))
        )
        add("speed-up over the teacher", value, f"{facts.significant(value)}×", where)
    elif facts.backends(record):
        reason = text(metrics, "speedup_over_teacher", "reason") or facts.NO_REASON
        found.append(Figure("speed-up over the teacher", facts.NONE, facts.UNKNOWN, reason))
    value = facts.shipped_size(record)
    add("size of the model file", value, facts.size(value), "bytes of the file")
    return found
