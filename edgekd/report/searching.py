"""The search: its candidates, its second stage, and how the chosen student was predicted."""

from __future__ import annotations

from edgekd.report import charts, facts
from edgekd.report.facts import Record, dig, number, rows, text
from edgekd.report.markup import Markup, join, pairs, table, tag

_BUDGET = (
    ("max_latency_ms", "predicted latency", facts.milliseconds),
    ("max_size_mib", "size", facts.size),
    ("max_macs", "MACs", facts.count),
)


def search_section(record: Record) -> Markup:
    """The candidates, and how the chosen one was predicted."""
    search = dig(record, "metrics", "search")
    if not search:
        return Markup()
    model = dig(search, "cost_model")
    error = number(model, "error_percent")
    measured = number(search, "latency_measured_ms")
    budget = [f"{name} ≤ {show(value)}" for key, name, show in _BUDGET
              if (value := number(search, "budget", key)) is not None]  # fmt: skip
    given = dig(search, "given")
    evaluated, dropped = (None, None) if given else (number(search, k) for k in ("evaluated", "dropped"))
    seconds = number(search, "seconds")
    described = [
        ("student", _given(given) if given else ""),
        ("evaluated", f"{facts.count(evaluated)} candidates"
            + (f" in {facts.duration(seconds)}" if seconds is not None else "")
            + (f", {dropped:.0f} dropped" if dropped else "") if evaluated is not None else ""),
        ("cost model", f"{text(model, 'kind') or 'not recorded'}"
            + (f" for {text(model, 'device')}" if text(model, "device") else "")
            + (f", error about {facts.significant(error, 2)} %" if error is not None else ", error not known")
            + (f"; {text(model, 'note')}" if text(model, "note") else "")),
        ("budget", "; ".join(budget) or "none"),
        ("chosen, measured", f"{facts.milliseconds(measured)} on {text(search, 'latency_measured_on')}"
            if measured is not None else ""),
        ("architecture", " → ".join(facts.strings(record, "metrics", "student_float", "architecture"))),
    ]  # fmt: skip
    parts = (pairs(described), charts.search_scatter(record), _second_stage(search))
    return join(part for part in parts if part)


def _second_stage(search: Record) -> Markup:
    """What the short trainings made of the candidates that they compared, the best first."""
    found, known = dig(search, "refine"), dict(enumerate(rows(search, "candidates")))
    tried = [row for row in rows(found, "trained") if number(row, "row") in known]
    if not tried:
        return Markup()
    full = {number(row, "row"): number(row, "selection_accuracy") for row in rows(found, "finalists")}
    measured = {number(row, "row"): number(row, "measured_ms") for row in rows(search, "finalists", "rows")}

    def cells(row: Record) -> tuple[str, ...]:
        index = int(number(row, "row") or 0)
        candidate = known[index]
        return (
            text(row, "why"),
            facts.percent(number(row, "accuracy")),
            facts.percent(number(row, "predicted")),
            facts.percent(full.get(index)),
            facts.count(number(candidate, "parameters")),
            facts.count(number(candidate, "macs")),
            facts.milliseconds(number(candidate, "latency_ms")),
            facts.milliseconds(measured.get(index)),
        )

    heads = ("candidate", "short training", "by the ridge", "full training", "parameters", "MACs",
             "latency, predicted", "measured")  # fmt: skip
    classes = ["target" if number(row, "row") == number(found, "chosen") else "" for row in tried]
    tau = number(found, "ridge", "left_out_tau")
    note = (
        f"Epochs: {text(found, 'epochs')}, on {text(found, 'images')} training images; accuracy on "
        f"{text(found, 'held_out')} others by {text(found, 'compared_by')}. The chosen one is marked. By the "
        f"ridge: predicted from scores and sizes{'' if tau is None else f', τ {tau:.2f} for those left out'}."
    )
    shown = table(heads, map(cells, tried), numeric=range(1, len(heads)), row_classes=classes)
    return join((tag("h3", "Second stage: short trainings"), shown, tag("p", note, class_="note")))


def _given(given: Record) -> str:
    """A student that was not searched: from where, what it costs, and how far that is beyond the budget."""
    excess = dig(given, "excess")
    beyond = ", ".join(f"{name} by {facts.percent(number(excess, name), 0)}" for name in excess or {})
    latency, reason = number(given, "latency_ms"), text(given, "reason") or facts.NO_REASON
    parts = (
        f"given, not searched: {text(given, 'source')}",
        f"{facts.count(number(given, 'parameters'))} parameters, {facts.count(number(given, 'macs'))} MACs, "
        f"{facts.size(number(given, 'size_mib'))}",
        f"latency not predicted: {reason}"
        if latency is None
        else f"predicted latency {facts.milliseconds(latency)}",
        f"beyond the budget of a search: {beyond}" if beyond else "",
    )
    return "; ".join(part for part in parts if part)
