"""How the student was taught, where that is more than one training by one teacher; the methods tried."""

from __future__ import annotations

from edgekd.report import facts
from edgekd.report.facts import Record, dig, number, rows, text
from edgekd.report.markup import Markup, join, table, tag


def methods_section(record: Record) -> Markup:
    """The methods that ``suggest`` compared, with their intervals, and what follows from them."""
    found = dig(record, "metrics", "distill", "suggestion")
    tried = rows(found, "methods")
    if not tried:
        return Markup()
    chosen = text(found, "chosen")
    body = [
        (
            text(row, "method"),
            facts.percent(number(row, "accuracy")),
            facts.bounds(facts.interval(row, "interval"), 100) or facts.NONE,
            facts.bounds(facts.interval(row, "lead"), 100) or "the default",
            ", ".join(facts.percent(number({"share": share}, "share")) for share in _values(row)),
            _options(row),
        )
        for row in sorted(tried, key=lambda row: -(number(row, "accuracy") or 0.0))
    ]
    heads = (
        "method",
        "accuracy",
        "95 % interval, %",
        "lead over the default, points",
        "each seed",
        "options",
    )
    classes = ["target" if row[0] == chosen else "" for row in body]
    left_out = [f"{name}: {reason}" for name, reason in (dig(found, "left_out") or {}).items()]
    note = (
        f"{text(found, 'images')} held-out training images, {len(dig(found, 'seeds') or ())} seeds, "
        f"{text(found, 'epochs')} epochs each; validation images took no part. Intervals are bootstrapped "
        "over images and seeds; those of the leads are wider, so that all of them hold together. What leads "
        "after a short training need not lead after a long one."
    )
    return join(
        (
            tag("p", tag("strong", f"Taken: {chosen}. "), text(found, "reason"), "."),
            table(heads, body, numeric=(1, 2, 3), row_classes=classes),
            tag("p", note, class_="note"),
            tag("p", "Left out: ", "; ".join(left_out), class_="note") if left_out else "",
        )
    )


def _values(row: Record) -> list[object]:
    found = dig(row, "accuracy_by_seed")
    return list(found) if isinstance(found, list) else []


def _options(row: Record) -> str:
    named = dig(row, "options") or {}
    return ", ".join(f"{name}.{key} {value}" for name, own in named.items() for key, value in own.items())


def teaching_section(record: Record) -> Markup:
    """Further teachers, the preparation of the teacher, assistants, and phases."""
    distill = dig(record, "metrics", "distill")
    parts = (_others(record), _preparation(distill), _assistants(distill), _phases(distill))
    return join(part for part in parts if part)


def _others(record: Record) -> Markup:
    others = rows(record, "metrics", "teacher", "others")
    body = [
        (
            text(row, "name"),
            facts.percent(number(row, "accuracy")),
            text(row, "classes"),
            text(row, "runtime"),
        )
        for row in others
    ]
    return (
        table(("further teacher", "accuracy", "classes", "runtime"), body, numeric=(1, 2))
        if body
        else Markup()
    )


def _preparation(distill: Record) -> Markup:
    found = dig(distill, "preparation")
    if not found:
        return Markup()
    before, after = (facts.percent(number(found, f"accuracy_{when}")) for when in ("before", "after"))
    spread = [facts.significant(number(found, f"cmi_{when}")) for when in ("before", "after")]
    epochs = len(rows(found, "history"))
    return tag(
        "p",
        f"The teacher was fine-tuned first ({text(found, 'method')}, {epochs} epochs): its accuracy went "
        f"from {before} to {after}, the information within a class (CMI) from {spread[0]} to {spread[1]} "
        "nats. Accuracies elsewhere are compared with the teacher as it was given.",
    )


def _assistants(distill: Record) -> Markup:
    body = [
        (
            f"assistant {index}",
            text(row, "taught_by"),
            facts.count(number(row, "macs")),
            facts.count(number(row, "parameters")),
            facts.percent(number(row, "accuracy")),
            text(row, "found"),
        )
        for index, row in enumerate(rows(distill, "assistants"), 1)
    ]
    heads = ("network", "taught by", "MACs", "parameters", "accuracy", "taken from")
    return table(heads, body, numeric=(2, 3, 4)) if body else Markup()


def _phases(distill: Record) -> Markup:
    phases = rows(distill, "phases")
    body = [
        (
            str(index),
            text(row, "method"),
            text(row, "epochs"),
            facts.significant(number(row, "learning_rate")),
            text(row, "augment"),
            _options(row),
        )
        for index, row in enumerate(phases, 1)
    ]
    heads = ("phase", "method", "epochs", "learning rate", "augmentation", "options")
    return table(heads, body, numeric=(2, 3)) if len(body) > 1 else Markup()
