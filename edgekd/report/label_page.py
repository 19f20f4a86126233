"""The page of `edgekd label`: what was labelled, how it agrees with people, and the learning curve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgekd.report.markup import Markup, embedded_json, join, table, tag
from edgekd.report.style import CSS, SCRIPT
from edgekd.report.svg import Axis, Intervals, Lines, Series, Whisker, fit_axis, responsive

_WIDTH = 760.0


def label_page(report: Mapping[str, Any]) -> str:
    """One self-contained HTML file from the report of `edgekd label`."""
    shown = [("images", "Images", _images(report))]
    if report["agreement"]:
        shown += [
            ("agreement", "Agreement with people", _agreement(report["agreement"])),
            ("confusion", "Confusion", _confusion(report["agreement"], report["classes"])),
        ]
    if report["curve"]:
        shown.append(("curve", "Learning curve", _curve(report["curve"])))
    head = tag(
        "head",
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", f"edgekd label: {report['images']['source']}"),
        tag("style", Markup(CSS)),
    )
    body = tag(
        "body",
        tag("header", tag("h1", "edgekd label"), tag("p", _sentence(report))),
        tag(
            "main", *(tag("section", tag("h2", heading), content, id=key) for key, heading, content in shown)
        ),
        tag("footer", f"Written by edgekd {report['edgekd_version']}. The file needs no network."),
        embedded_json(report, "report"),
        tag("script", Markup(SCRIPT)),
    )
    return "<!doctype html>\n" + join((Markup('<html lang="en">'), head, body, Markup("</html>\n")))


def percent(share: float | None) -> str:
    """A share as text; a dash where there is none."""
    return "—" if share is None else f"{100 * share:.1f} %"


def _sentence(report: Mapping[str, Any]) -> str:
    images, teacher = report["images"], report["teacher"]
    said = (
        f"The teacher {teacher['name']} ({teacher['runtime']}, SHA-256 {teacher['sha256'][:12]}…) labelled "
        f"{images['kept']} of {images['found']} images of {images['source']}"
    )
    if images["min_confidence"]:
        said += f"; {images['below_min_confidence']} stay below a confidence of {images['min_confidence']:g}"
    return f"{said}. The labels are the teacher's, not those of people."


def _images(report: Mapping[str, Any]) -> Markup:
    rows = [(row["class"], row["found"], row["kept"]) for row in report["images"]["by_class"]]
    empty = [row["class"] for row in report["images"]["by_class"] if not row["kept"]]
    note = tag("p", f"Classes without an image: {', '.join(empty)}", class_="note") if empty else ""
    return join((table(("class", "named by the teacher", "kept"), rows, numeric=(1, 2)), note))


def _agreement(found: Mapping[str, Any]) -> Markup:
    pairs = (
        ("images with human labels", str(found["images"])),
        ("accuracy", percent(found["accuracy"])),
        ("Cohen's kappa", f"{found['cohen_kappa']:.3f}"),
        ("Krippendorff's alpha", f"{found['krippendorff_alpha']:.3f}"),
        ("macro F1", f"{found['macro_f1']:.3f}"),
    )
    by_class = [
        (row["class"], row["gold"], *(percent(row[key]) for key in ("precision", "recall", "f1")))
        for row in found["classes"]
    ]
    steps = [
        (f"{row['min_confidence']:g}", percent(row["share"]), percent(row["accuracy"]))
        for row in found["by_confidence"]
    ]
    return join(
        (
            table(("measure", "value"), pairs, numeric=(1,)),
            tag("h3", "By class"),
            table(("class", "images", "precision", "recall", "F1"), by_class, numeric=(1, 2, 3, 4)),
            tag("h3", "What a threshold on the confidence would keep"),
            table(("confidence at least", "kept", "accuracy of these"), steps, numeric=(1, 2)),
        )
    )


def _confusion(found: Mapping[str, Any], classes: list[str]) -> Markup:
    rows = [(name, *counts) for name, counts in zip(classes, found["confusion"], strict=True)]
    heads = ("people say", *(f"teacher: {name}" for name in classes))
    return table(heads, rows, numeric=tuple(range(1, len(heads))), class_="wide-table")


def _curve(curve: Mapping[str, Any]) -> Markup:
    points = curve["points"]
    x = fit_axis("automatic labels", [row["labels"] for row in points], log=True)
    y = fit_axis("accuracy on the gold set, %", [100 * bound for row in points for bound in row["interval"]])
    y = Axis(y.title, max(0.0, y.low), min(100.0, y.high))
    series = Series(
        "student",
        [
            (row["labels"], 100 * row["accuracy"], f"{row['labels']} labels: {percent(row['accuracy'])}")
            for row in points
        ],
        0,
    )
    whiskers = [
        Whisker(
            f"{row['labels']} labels",
            100 * row["accuracy"],
            (100 * row["interval"][0], 100 * row["interval"][1]),
            0,
            percent(row["accuracy"]),
        )
        for row in points
    ]
    note = (
        f"One student of {curve['parameters']:,} parameters ({curve['student']}), trained anew for about "
        f"{curve['steps']} steps on each number of labels with {curve['method']}; 95 % intervals of "
        f"{curve['gold']} gold images, without the spread of a second seed."
    )
    return join(
        (
            tag("figure", responsive(Lines(x, y, [series], "accuracy by number of labels"), _WIDTH)),
            tag("figure", responsive(Intervals(y, whiskers, "accuracy with intervals"), _WIDTH)),
            tag("p", note, class_="note"),
        )
    )
