"""Markdown tables of what `quantize.py` measured: means over seeds, and differences seed by seed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """Mean and sample standard deviation."""
    middle = f"{statistics.mean(values):{form}}"
    return f"{middle} ± {statistics.stdev(values):.2f}" if len(values) > 1 else middle


def _groups(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of `keys`, in their order."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found


def models_table(rows: list[Row]) -> str:
    """Accuracy of each trained network."""
    lines = ["| set | network | epochs | top-1, % |", "|---|---|---|---|"]
    lines += [
        f"| {row['images']} | {row['network']} | {row['epochs']} | {100 * row['accuracy']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines)


def engines_table(rows: list[Row]) -> str:
    """CPU time is that of a call over fp32's, and over that of the fastest int8 file, on the same runtime in
    the same session (all candidates interleaved in one process): the median over sessions. The last column is
    edgekd's file over this engine's, the two alone in a process: mean and standard error over sessions."""
    lines = [
        "| set | network | candidate | points lost | CPU time / fp32 | / fastest int8 | int8 MACs | seeds "
        "| edgekd / it |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    reasons = []
    for (images, network), mine in _groups(rows, "images", "network").items():
        timed = [row for row in mine if row.get("cpu_p50_ms") and row["drop"] is not None]
        sessions = _groups(timed, "seed", "runtime")
        for (name,), same in _groups(timed, "id").items():
            lost = spread([row["drop"] for row in same])
            plain = _median(same, sessions, lambda row: row["form"] == "fp32")
            best = _median(same, sessions, lambda row: row["form"] in ("int8", "mixed"))
            known = [row["int8_coverage_macs"] for row in same if row["int8_coverage_macs"] is not None]
            covered = f"{100 * statistics.mean(known):.0f} %" if known else "not known"
            facts = (images, network, name, lost, plain, best, covered, len(same), _alone(same))
            lines.append(f"| {' | '.join(map(str, facts))} |")
        for row in mine:
            if row not in timed:
                told = str(row["reason"]).splitlines()[0]
                reasons.append(f"- {images}, {network}, seed {row['seed']}, {row['id']}: {told}")
    return "\n".join([*lines, "", *dict.fromkeys(reasons)])


def _alone(rows: list[Row]) -> str:
    found = [ratio for row in rows for ratio in row.get("pairs", ())]
    if len(found) < 2:
        return ""
    return f"{statistics.mean(found):.3f} ± {statistics.stdev(found) / len(found) ** 0.5:.3f}"


def _median(
    rows: list[Row], sessions: dict[tuple[Any, ...], list[Row]], against: Callable[[Row], bool]
) -> str:
    """CPU time over the least of the rows `against` in the same session."""
    ratios = []
    for row in rows:
        others = [one["cpu_p50_ms"] for one in sessions[row["seed"], row["runtime"]] if against(one)]
        if others:
            ratios.append(row["cpu_p50_ms"] / min(others))
    return f"{statistics.median(ratios):.2f}" if ratios else "-"


def collapse_table(rows: list[Row]) -> str:
    """Means ± sample standard deviations over seeds: accuracy in float, points lost (negative: gained) by
    each form, seed by seed, and the ranges that make int8 hard."""
    forms = [name for name in rows[0] if " bits" in name]
    told = ("tail", "weights", "logits")
    lines = [
        f"| network | trained by | float, % | {' | '.join(f'lost: {form}' for form in forms)} | largest "
        "activation / 99.9th percentile | largest channel / median | range of logits | seeds |",
        "|---" * (7 + len(forms)) + "|",
    ]
    for (network, way), same in _groups(rows, "network", "way").items():
        exact = spread([100 * row["float"] for row in same])
        lost = [spread([100 * (row["float"] - row[form]) for row in same]) for form in forms]
        reach = [spread([row[name] for row in same], ".1f") for name in told]
        lines.append(f"| {network} | {way} | {exact} | {' | '.join([*lost, *reach])} | {len(same)} |")
    return "\n".join(lines)


def bits_table(rows: list[Row]) -> str:
    """Accuracy in %, mean ± sample standard deviation over seeds; the gain of the teacher over labels, seed
    by seed; and how much of what quantization lost each training wins back."""
    exact = statistics.mean(row["accuracy"] for row in rows if row["way"] == "float")
    lines = [
        f"Float: {100 * exact:.2f} %.",
        "",
        "| weight bits | without training | on labels | by the teacher | teacher - labels "
        "| won back: labels, teacher | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for (count,), mine in _groups(rows, "bits").items():
        if count == 32:
            continue
        ways = {way: {row["seed"]: 100 * row["accuracy"] for row in found}
                for (way,), found in _groups(mine, "way").items()}  # fmt: skip
        ptq, labels, teacher = (ways[way] for way in ("ptq", "qat, labels", "qat, teacher"))
        seeds = sorted(set(ptq) & set(labels) & set(teacher))
        gap = spread([teacher[seed] - labels[seed] for seed in seeds], "+.2f")
        lost = 100 * exact - statistics.mean(ptq.values())
        back = [
            f"{100 * (statistics.mean(way.values()) - statistics.mean(ptq.values())) / lost:.0f} %"
            if lost > 0
            else "-"
            for way in (labels, teacher)
        ]
        means = " | ".join(spread(list(way.values())) for way in (ptq, labels, teacher))
        lines.append(f"| {count} | {means} | {gap} | {', '.join(back)} | {len(seeds)} |")
    return "\n".join(lines)
