"""Hand-written SVG: axes with ticks, dots, intervals, lines, and labels that avoid each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise

from edgekd.report.markup import Markup, tag

CHARACTER, BOLD = 6.6, 7.5  # px a character of 12 px text takes, on the wide side
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Axis:
    """Values ``low`` to ``high``, shown with a title that holds the unit."""

    title: str
    low: float
    high: float
    log: bool = False

    def ticks(self, about: int) -> list[float]:
        """Round values inside the axis, ``about`` so many."""
        if self.log:
            found = [
                mantissa * 10.0**power
                for power in range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
                for mantissa in (1, 2, 5)
                if self.low <= mantissa * 10.0**power <= self.high
            ]
            if len(found) > 2:
                return found if len(found) <= about + 3 else [v for v in found if f"{v:e}"[0] == "1"]
        step = _round_step((self.high - self.low) / max(1, about))
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]

    def label(self, tick: float, about: int) -> str:
        """A tick as text, with the decimals its step needs."""
        if self.log:
            return f"{tick:.6g}"
        step = _round_step((self.high - self.low) / max(1, about))
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        return f"{tick:.{decimals + (abs(step * 10**decimals - round(step * 10**decimals)) > 1e-6)}f}"

    def share(self, value: float) -> float:
        """Where a value lies between the ends, 0 to 1."""
        if self.log:
            return math.log(max(value, 1e-300) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def _round_step(raw: float) -> float:
    power = 10.0 ** math.floor(math.log10(raw))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= raw * 0.999)


def fit_axis(title: str, values: Sequence[float], *, pad: float = 0.07, log: bool = False) -> Axis:
    """An axis around values; ``log`` is used only where they are positive and span a factor of 12."""
    low, high = min(values), max(values)
    if log and low > 0 and high / low > 12:
        room = (high / low) ** pad
        return Axis(title, low / room, high * room, log=True)
    room = pad * (high - low) or max(abs(high) * 0.05, 1e-6)
    return Axis(title, low - room if low < 0 or low > room else 0.0, high + room)


@dataclass(frozen=True)
class Plane:
    """Two axes laid on a drawing."""

    x: Axis
    y: Axis
    box: Box  # left, top, right, bottom

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Values to pixels."""
        left, top, right, bottom = self.box
        return left + self.x.share(x) * (right - left), bottom - self.y.share(y) * (bottom - top)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return tag("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=class_)


def words(x: float, y: float, text: object, *, anchor: str = "start", class_: str | None = None) -> Markup:
    """A text at its baseline."""
    return tag("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=class_)


def drawing(width: float, height: float, parts: Sequence[Markup], label: str) -> Markup:
    """The outer element; ``label`` is what a screen reader says."""
    return tag(
        "svg",
        tag("title", label) if not parts else "",
        *parts,
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        role="img",
        aria_label=label,
        class_="chart",
    )


def plane(x: Axis, y: Axis, width: float, height: float) -> tuple[Plane, list[Markup]]:
    """Axes with grid, ticks and titles; the title of y stands upright above the axis."""
    about_x, about_y = max(3, int(width / 85)), max(4, int(height / 48))
    y_labels = [(tick, y.label(tick, about_y)) for tick in y.ticks(about_y)]
    left = 12 + CHARACTER * max((len(text) for _, text in y_labels), default=1)
    found = Plane(x, y, (left, 28, width - 14, height - 44))
    _, top, right, bottom = found.box
    parts = [words(0, 13, y.title, class_="strong")]
    for tick, text in y_labels:
        height_px = found.at(x.high, tick)[1]
        parts += [line(left, height_px, right, height_px, "grid")]
        parts += [words(left - 7, height_px + 4, text, anchor="end")]
    for tick in x.ticks(about_x):
        width_px = found.at(tick, y.low)[0]
        parts += [
            line(width_px, top, width_px, bottom, "grid"),
            line(width_px, bottom, width_px, bottom + 5, "axis"),
        ]
        parts += [words(width_px, bottom + 18, x.label(tick, about_x), anchor="middle")]
    parts += [line(left, bottom, right, bottom, "axis")]
    scale = f"{x.title} (log scale)" if x.log else x.title
    parts += [words((left + right) / 2, bottom + 37, scale, anchor="middle", class_="strong")]
    return found, parts


@dataclass(frozen=True)
class Dot:
    """One mark of a scatter plot."""

    x: float
    y: float
    radius: float
    style: str
    tooltip: str
    label: str = ""
    shape: str = "circle"


def mark(shape: str, x: float, y: float, radius: float, class_: str, tooltip: str = "") -> Markup:
    """A circle, square, triangle or diamond of about equal area, with its tooltip."""
    title = tag("title", tooltip) if tooltip else ""
    if shape == "circle":
        return tag("circle", title, cx=f"{x:.1f}", cy=f"{y:.1f}", r=f"{radius:.1f}", class_=class_)
    corners = {
        "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
        "triangle": [(0, -1.25), (1.15, 0.85), (-1.15, 0.85)],
        "diamond": [(0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)],
    }[shape]
    points = " ".join(f"{x + radius * dx:.1f},{y + radius * dy:.1f}" for dx, dy in corners)
    return tag("polygon", title, points=points, class_=class_)


def _overlap(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def place_labels(dots: Sequence[tuple[float, float, float, str]], frame: Box) -> list[Markup]:
    """Labels beside their dots ``(x, y, radius, text)``: near, inside the frame, clear of each other."""
    taken: list[Box] = [(x - r, y - r, x + r, y + r) for x, y, r, _ in dots]
    parts: list[Markup] = []
    for x, y, radius, text in dots:
        if not text:
            continue
        half, best, best_cost = BOLD * len(text) / 2 + 1, (x, y), math.inf
        for reach in (0, 12, 26, 44, 66, 90):
            for dx, dy in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1)):
                middle_x = x + dx * (radius + half + 2 + reach * (0.5 if dy else 1))
                middle_y = y + dy * (radius + 10 + reach)
                box = (middle_x - half, middle_y - 8, middle_x + half, middle_y + 8)
                outside = (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, frame)
                cost = outside * 4 + sum(_overlap(box, other) for other in taken) * 2 + reach
                if cost < best_cost:
                    best, best_cost = (middle_x, middle_y), cost
        taken.append((best[0] - half, best[1] - 8, best[0] + half, best[1] + 8))
        parts += _leader(x, y, radius, best, half)
        parts.append(words(best[0], best[1] + 4, text, anchor="middle", class_="label"))
    return parts


def _leader(x: float, y: float, radius: float, label: tuple[float, float], half: float) -> list[Markup]:
    """A line from a dot to its label, when the label is not beside it."""
    end_x = min(max(x, label[0] - half), label[0] + half)
    end_y = min(max(y, label[1] - 7), label[1] + 7)
    distance = math.hypot(end_x - x, end_y - y)
    if distance < radius + 9:
        return []
    start = radius / distance
    return [line(x + (end_x - x) * start, y + (end_y - y) * start, end_x, end_y, "lead")]


@dataclass(frozen=True)
class Scatter:
    """Dots on two axes; the later ones lie on top. ``limits`` are vertical lines ``(x, text)``, ``steps`` the
    points of a rising staircase, from the left."""

    x: Axis
    y: Axis
    dots: Sequence[Dot]
    title: str
    limits: Sequence[tuple[float, str]] = field(default=())
    steps: Sequence[tuple[float, float]] = field(default=())

    def draw(self, width: float) -> Markup:
        """The plot at a width in px."""
        height = max(300.0, min(440.0, width * 0.62))
        found, parts = plane(self.x, self.y, width, height)
        for value, text in self.limits:
            if self.x.low < value < self.x.high:
                where = found.at(value, self.y.low)[0]
                anchor = "end" if where > width / 2 else "start"
                parts += [line(where, found.box[1], where, found.box[3], "limit")]
                parts += [words(where, found.box[1] - 5, text, anchor=anchor, class_="limit-text")]
        corners = [(x, y) for (_, y), (x, _) in pairwise(self.steps)]
        walked = [*self.steps[:1], *chain.from_iterable(zip(corners, self.steps[1:], strict=True))]
        if walked:
            pixels = (found.at(x, y) for x, y in walked)
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
            parts.append(tag("polyline", points=path, class_="line front"))
        placed = []
        for dot in self.dots:
            x, y = found.at(dot.x, dot.y)
            parts.append(mark(dot.shape, x, y, dot.radius, dot.style, dot.tooltip))
            if dot.label:
                placed.append((x, y, dot.radius, dot.label))
        return drawing(width, height, [*parts, *place_labels(placed, found.box)], self.title)


@dataclass(frozen=True)
class Series:
    """Points ``(x, y, tooltip)`` joined by a line in the style ``l0`` … ``l3``."""

    name: str
    points: Sequence[tuple[float, float, str]]
    style: int


@dataclass(frozen=True)
class Lines:
    """Curves on two axes."""

    x: Axis
    y: Axis
    series: Sequence[Series]
    title: str

    def draw(self, width: float) -> Markup:
        """The plot at a width in px."""
        height = max(230.0, width * 0.55)
        found, parts = plane(self.x, self.y, width, height)
        for series in self.series:
            pixels = [(*found.at(x, y), tooltip) for x, y, tooltip in series.points]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in pixels)
            parts.append(tag("polyline", points=path, class_=f"line l{series.style}"))
            radius = 3 if len(pixels) <= 60 else 1.8
            parts += [mark("circle", x, y, radius, f"c{series.style}", tooltip) for x, y, tooltip in pixels]
        return drawing(width, height, parts, self.title)


@dataclass(frozen=True)
class Whisker:
    """One row: a value with its interval, or (``value`` is ``None``) the reason why there is none."""

    label: str
    value: float | None
    pair: tuple[float, float] | None
    style: int
    note: str
    tooltip: str = ""


@dataclass(frozen=True)
class Intervals:
    """Rows on one axis; ``references`` are vertical lines ``(value, text, class)``."""

    axis: Axis
    whiskers: Sequence[Whisker]
    title: str
    references: Sequence[tuple[float, str, str]] = ()

    def draw(self, width: float) -> Markup:
        """The plot at a width in px: labels and notes beside the rows, or above them when it is narrow."""
        stacked = width < 600
        longest = max((len(row.label) for row in self.whiskers), default=0)
        note = max((len(row.note) for row in self.whiskers if row.value is not None), default=0)
        left = 8.0 if stacked else 14 + BOLD * min(longest, 34)
        right = width - (8 if stacked else 20 + CHARACTER * note)
        step, top = (48 if stacked else 34), 8 + 17 * len(self.references)
        bottom = top + step * len(self.whiskers)
        tracks = [(top + step * index + 24, top + step * (index + 1)) for index in range(len(self.whiskers))]
        parts = self._frame(left, right, (top, bottom), tracks if stacked else [(top, bottom)])
        for index, row in enumerate(self.whiskers):
            middle = top + step * index + (34 if stacked else step / 2)
            if stacked:
                taken = CHARACTER * len(row.note) if row.value is not None else 0.0
                space = int((width - taken) / BOLD)
                parts += [words(0, middle - 16, shorten(row.label, space), class_="label")]
                if row.value is not None:
                    parts += [words(width, middle - 16, row.note, anchor="end", class_="halo")]
            else:
                parts += [words(left - 14, middle + 4, shorten(row.label, 34), anchor="end", class_="strong")]
                if row.value is not None:
                    parts += [words(right + 14, middle + 4, row.note)]
            parts += self._row(row, left, right, middle)
        return drawing(width, bottom + 44, parts, self.title)

    def _frame(
        self, left: float, right: float, ends: tuple[float, float], tracks: Sequence[tuple[float, float]]
    ) -> list[Markup]:
        """Axis and vertical lines; these run only through ``tracks``, so that no text is crossed."""
        (top, bottom), about = ends, max(3, int((right - left) / 85))
        parts: list[Markup] = []
        for tick in self.axis.ticks(about):
            x = left + self.axis.share(tick) * (right - left)
            parts += [line(x, high, x, low, "grid") for high, low in tracks]
            parts += [line(x, bottom, x, bottom + 5, "axis")]
            parts += [words(x, bottom + 18, self.axis.label(tick, about), anchor="middle")]
        parts += [line(left, bottom, right, bottom, "axis")]
        parts += [words((left + right) / 2, bottom + 37, self.axis.title, anchor="middle", class_="strong")]
        for index, (value, text, class_) in enumerate(self.references):
            x = left + self.axis.share(value) * (right - left)
            y = 12 + 17 * index
            room = CHARACTER * len(text) / 2
            parts += [
                line(x, y + 4, x, top, class_),
                *(line(x, high, x, low, class_) for high, low in tracks),
            ]
            text_class = "limit-text" if class_ == "limit" else None
            parts += [
                words(min(max(x, left + room), right - room), y, text, anchor="middle", class_=text_class)
            ]
        return parts

    def _row(self, row: Whisker, left: float, right: float, middle: float) -> list[Markup]:
        if row.value is None:
            return [
                words(left + 4, middle + 4, shorten(row.note, int((right - left) / CHARACTER)), class_="halo")
            ]
        x = left + self.axis.share(row.value) * (right - left)
        parts = []
        if row.pair:
            low, high = (left + self.axis.share(bound) * (right - left) for bound in row.pair)
            style = f"whisker l{row.style}"
            parts = [line(low, middle, high, middle, style)]
            parts += [line(end, middle - 5, end, middle + 5, style) for end in (low, high)]
        return [*parts, mark("circle", x, middle, 6, f"c{row.style}", row.tooltip or row.note)]


def shorten(text: str, characters: int) -> str:
    """A text that fits."""
    return text if len(text) <= characters else text[: max(1, characters - 1)].rstrip() + "…"


def responsive(chart: Scatter | Lines | Intervals, wide: float, narrow: float = 360) -> Markup:
    """A chart drawn twice, so that its text keeps its size on a narrow screen."""
    return Markup(
        tag("div", chart.draw(wide), class_="wide") + tag("div", chart.draw(narrow), class_="narrow")
    )
