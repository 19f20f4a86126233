"""Building HTML and SVG so that a text cannot become markup: only ``Markup`` is written as it is."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from edgekd.report.facts import NONE, UNKNOWN, Figure

# What XML forbids even in escaped form.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")
_MARKS = {"PASS": "✓", "FAIL": "✕", "INCONCLUSIVE": "?", "UNUSABLE": "!", "NOT_MEASURED": NONE}


class Markup(str):
    """Text that is already markup."""

    __slots__ = ()


def clean(value: object) -> str:
    """A text without the characters that no document may hold."""
    return _FORBIDDEN.sub("\ufffd", str(value))


def escape(value: object) -> str:
    """A value as markup; ``Markup`` stays as it is."""
    return value if isinstance(value, Markup) else html.escape(clean(value))


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """An element; ``class_`` gives class, ``stroke_width`` gives stroke-width, ``None`` is left out."""
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(clean(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{shown}>{''.join(map(escape, children))}</{name}>")


def join(parts: Iterable[object], between: str = "") -> Markup:
    """Several values one after the other."""
    return Markup(html.escape(between).join(map(escape, parts)))


def pairs(items: Iterable[tuple[str, object]]) -> Markup:
    """A list of names and values; those without a value are left out."""
    shown = [(name, value) for name, value in items if value not in ("", None, NONE)]
    return (
        tag("dl", *(join((tag("dt", name), tag("dd", value))) for name, value in shown))
        if shown
        else Markup()
    )


def verdict_chip(verdict: str) -> Markup:
    """A verdict as word, sign and colour."""
    known = verdict if verdict in _MARKS else "NOT_MEASURED"
    sign = tag("span", _MARKS[known], aria_hidden="true")
    return tag("span", sign, " ", verdict.replace("_", " "), class_=f"chip v-{known}")


def kind_chip(kind: str) -> Markup:
    """measured: solid; predicted: hollow; unknown: a dash."""
    return tag("span", kind, class_=f"kind k-{kind}")


def figure_cell(figure: Figure, *, with_basis: bool = False) -> Markup:
    """A figure with its kind; an unknown one shows its reason in place of a number."""
    if figure.kind == UNKNOWN:
        reason = tag("small", figure.basis, class_="reason")
        return tag("span", tag("span", NONE, class_="value"), " ", reason, class_="fig k-unknown")
    parts: list[object] = [tag("span", figure.text, class_="value"), " ", kind_chip(figure.kind)]
    if with_basis:
        parts += [" ", tag("small", figure.basis, class_="reason")]
    return tag("span", *parts, class_=f"fig k-{figure.kind}", title=figure.basis)


def table(
    heads: Sequence[str],
    body: Iterable[Sequence[object]],
    *,
    numeric: Sequence[int] = (),
    bars: int | None = None,
    class_: str = "stack",
    row_classes: Sequence[str] = (),
) -> Markup:
    """A table that scrolls, or (class ``stack``) becomes one card a row on a narrow screen.

    A cell may be a pair ``(sort key, shown)``.
    """

    def cell(index: int, value: object) -> Markup:
        key, shown = value if isinstance(value, tuple) else (None, value)
        label = heads[index]
        name = "th" if index == 0 else "td"
        return tag(
            name,
            tag("span", shown) if name == "td" else shown,
            class_="num"
            if index in numeric
            else "barcell"
            if index == bars
            else "empty"
            if shown == ""
            else None,
            scope="row" if index == 0 else None,
            data_label=label or None,
            data_sort=key,
        )

    head = tag("tr", *(tag("th", name, scope="col", class_="num" if i in numeric else None)
                       for i, name in enumerate(heads)))  # fmt: skip
    lines = [
        tag(
            "tr",
            *(cell(i, v) for i, v in enumerate(row)),
            class_=row_classes[k] or None if row_classes else None,
        )
        for k, row in enumerate(body)
    ]
    return tag("div", tag("table", tag("thead", head), tag("tbody", *lines), class_=class_), class_="scroll")


def _plain(value: Any) -> Any:
    """A value as JSON knows it; what is not finite becomes null, as browsers refuse NaN."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def embedded_json(value: object, identifier: str) -> Markup:
    """A data block for scripts; no text in it can end the element or open a comment."""
    data = json.dumps(_plain(value), default=str, separators=(",", ":"))
    data = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return tag("script", Markup(data), type="application/json", id=identifier)
