"""What each layer does to the outputs when it alone changes its precision, as bars."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from edgekd.report import facts
from edgekd.report.facts import Record, dig, number, rows, strings, text
from edgekd.report.markup import Markup, join, table, tag

_SHOWN = 40  # bars; the rest of a large network lies near zero


def sensitivity_bars(damage: Mapping[str, float], floats: Collection[str], what: str) -> Markup:
    """One bar a layer, the most sensitive first; those of `floats`, kept in float, stand out. Empty without
    layers.

    Args:
        damage: by the layer's name.
        what: heading of the column of numbers.
    """
    ordered = sorted(damage, key=lambda name: -damage[name])
    if not ordered:
        return Markup()
    longest = max(damage[ordered[0]], 0.0) or 1.0
    shown = [name for place, name in enumerate(ordered) if place < _SHOWN or name in floats]
    body = [
        (
            name,
            (damage[name], facts.significant(damage[name])),
            (
                damage[name],
                tag("span", class_="bar", style=f"width:{100 * max(damage[name], 0) / longest:.1f}%"),
            ),
            tag("b", "float", class_="float") if name in floats else "integers",
        )
        for name in shown
    ]
    grid = table(
        ("layer", what, "", "runs in"), body, numeric=(1,), bars=2, class_="sortable layers",
        row_classes=["spared" if name in floats else "" for name in shown],
    )  # fmt: skip
    left_out = len(ordered) - len(shown)
    kept = sum(name in floats for name in ordered)
    note = f"{kept} of {len(ordered)} layers stay in float." + (
        f" The {left_out} least sensitive are not drawn." if left_out else ""
    )
    return join((grid, tag("p", note, class_="note")))


def sensitivity_section(record: Record) -> Markup:
    """Of a run: what leaving each layer alone in float heals."""
    quantize = dig(record, "metrics", "quantize")
    damage = {name: value for name in (dig(quantize, "sensitivity") or {})
              if (value := number(quantize, "sensitivity", name)) is not None}  # fmt: skip
    bars = sensitivity_bars(damage, strings(quantize, "float_layers"), "healed by float, squared logits")
    note = (
        "Squared difference of the logits to the float student, on the held-out images, that goes away when "
        "this layer alone stays in float."
    )
    return join((tag("p", note, class_="note"), bars)) if bars else Markup()


def file_sensitivity(record: Record) -> Markup:
    """Of one ONNX file: what each operator alone in integers does, by dialect."""
    parts = []
    for dialect in dig(record, "sensitivity") or {}:
        found = rows(record, "sensitivity", dialect)
        damage = {text(row, "name"): value for row in found if (value := number(row, "damage")) is not None}
        bars = sensitivity_bars(damage, strings(record, "float_operators", dialect), "damage alone")
        parts += [tag("h3", dialect), bars]
    note = tag(
        "p", "Divergence from the float outputs when this operator alone runs in integers. Measured where "
        "all in integers loses more than the limit, or where `quantize.sensitivity` asks for it.",
        class_="note",
    )  # fmt: skip
    return join((note, *parts)) if parts else Markup()
