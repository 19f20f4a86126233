"""The page: one self-contained file, sections in the order a reader asks."""

from __future__ import annotations

from collections.abc import Callable

from edgekd.report import facts, sections
from edgekd.report.facts import Record, text
from edgekd.report.fidelity import fidelity_section
from edgekd.report.headlines import kinds_section, verdict_section
from edgekd.report.markup import Markup, embedded_json, join, tag
from edgekd.report.searching import search_section
from edgekd.report.sensitivity import sensitivity_section
from edgekd.report.style import CSS, SCRIPT
from edgekd.report.teaching import methods_section, teaching_section

_SECTIONS: tuple[tuple[str, str, Callable[[Record], Markup]], ...] = (
    ("accuracy", "Accuracy, step by step", sections.ladder_section),
    ("runtimes", "Runtimes", sections.runtimes_section),
    ("search", "Search", search_section),
    ("training", "Training", sections.training_section),
    ("teaching", "Teachers and phases", teaching_section),
    ("methods", "Methods tried", methods_section),
    ("gate", "Gate", sections.gate_section),
    ("fidelity", "Fidelity to the teacher", fidelity_section),
    ("parity", "Parity with the torch model", sections.parity_section),
    ("layers", "Layers", sections.layers_section),
    ("precision", "Quantization and the precision really executed", sections.precision_section),
    ("sensitivity", "Sensitivity of the layers to int8", sensitivity_section),
    ("kinds", "Measured, predicted, unknown", kinds_section),
    ("unverified", "Unverified numbers of the target card", sections.unverified_section),
    ("environment", "Environment", sections.environment_section),
    ("stages", "Time of each stage", sections.stages_section),
)


def page(record: Record) -> str:
    """The whole document."""
    shown = [(key, heading, content) for key, heading, build in _SECTIONS if (content := build(record))]
    target = text(record, "target", "id") or "no target"
    title = f"edgekd: {facts.verdict(record).replace('_', ' ')}, {target}"
    head = tag(
        "head",
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        tag("title", title),
        tag("style", Markup(CSS)),
    )
    body = tag(
        "body",
        tag(
            "header",
            tag("h1", "edgekd report", f" · {created}" if (created := text(record, "created")) else ""),
            verdict_section(record),
            tag(
                "nav",
                *(tag("a", heading, href=f"#{key}") for key, heading, _ in shown),
                aria_label="Contents",
            ),
        ),
        tag(
            "main", *(tag("section", tag("h2", heading), content, id=key) for key, heading, content in shown)
        ),
        tag(
            "footer",
            f"Written by edgekd {text(record, 'edgekd_version')} from record.json, which is embedded in this "
            "file as the script element with the id 'record'. The file needs no network.",
        ),
        embedded_json(record, "record"),
        tag("script", Markup(SCRIPT)),
    )
    return "<!doctype html>\n" + join((Markup('<html lang="en">'), head, body, Markup("</html>\n")))
