"""How far the student, and what was made of it, answers like the teacher: one row a model."""

from __future__ import annotations

from edgekd.report import facts
from edgekd.report.facts import Record, dig, number, text
from edgekd.report.markup import Markup, join, table, tag

_COLUMNS = (
    ("top1_agreement", "same class", facts.percent),
    ("negative_flips", "lost", facts.percent),
    ("positive_flips", "won", facts.percent),
    ("cohen_kappa", "kappa of classes", facts.significant),
    ("error_consistency", "kappa of errors", facts.significant),
    ("confidence_correlation", "rank correlation of confidence", facts.significant),
    ("kl_divergence", "KL divergence, nats", facts.significant),
    ("total_variation", "total variation", facts.significant),
    ("negative_log_likelihood", "NLL, nats", facts.significant),
    ("brier_score", "Brier score", facts.significant),
    ("expected_calibration_error", "calibration error", facts.percent),
)
_NOTE = (
    "Against the teacher on the validation images. Lost: the teacher is right and the student wrong; won: "
    "the other way round. A kappa is agreement beyond chance, 1 at most. NLL, Brier score and calibration "
    "error are against the labels, lower is better."
)


def measured(record: Record) -> list[tuple[str, Record]]:
    """Name and figures of every model that has some."""
    metrics = dig(record, "metrics")
    places = [
        ("student, float", dig(metrics, "student_float", "fidelity")),
        ("student, quantized (simulated)", dig(metrics, "quantize", "fidelity")),
        *(
            (text(row, "id") or text(row, "backend") or "unnamed", dig(row, "fidelity"))
            for row in facts.variants(record)
        ),
    ]
    known = [key for key, _, _ in _COLUMNS]
    return [(name, found) for name, found in places if any(number(found, key) is not None for key in known)]


def fidelity_section(record: Record) -> Markup:
    """All figures as a table."""
    found = measured(record)
    if not found:
        return Markup()
    body = [(name, *(show(number(row, key)) for key, _, show in _COLUMNS)) for name, row in found]
    heads = ("model", *(head for _, head, _ in _COLUMNS))
    numbers = table(heads, body, numeric=tuple(range(1, len(heads))))
    return join((numbers, tag("p", _NOTE, class_="note")))


def markdown_rows(record: Record) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of the few figures that fit beside each other; no rows where there are none."""
    heads = ["model", "same class as the teacher", "lost / won", "kappa", "KL, nats", "calibration error"]
    body = [
        [
            name,
            facts.percent(number(row, "top1_agreement")),
            " / ".join(facts.percent(number(row, f"{kind}_flips")) for kind in ("negative", "positive")),
            facts.significant(number(row, "cohen_kappa")),
            facts.significant(number(row, "kl_divergence")),
            facts.percent(number(row, "expected_calibration_error")),
        ]
        for name, row in measured(record)
    ]
    return heads, body
