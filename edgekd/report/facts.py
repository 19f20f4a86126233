"""Reading a record: nothing in it is trusted to be there, and no number is shown without its kind."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Record = Mapping[str, Any]

STAGES = ("teacher", "search", "distill", "quantize", "export", "profile", "gate", "bundle")
MEASURED, PREDICTED, UNKNOWN = "measured", "predicted", "unknown"
NONE = "—"
NO_REASON = "the record gives no reason"
CPU_CLOCK = (
    "CPU time does not see memory-bandwidth stalls caused by neighbours, input/output, "
    "or imbalance between threads."
)


@dataclass(frozen=True)
class Figure:
    """One figure as it is shown: ``text`` is ``NONE`` when ``kind`` is unknown; ``basis`` says why or how."""

    name: str
    text: str
    kind: str
    basis: str


def dig(node: Any, *path: str) -> Any:
    """The value at ``path``, or ``None`` when any part of the way is missing."""
    for key in path:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def number(node: Any, *path: str) -> float | None:
    """The number at ``path``, else ``None``; what is not finite or beyond 1e100 counts as not known."""
    value = dig(node, *path)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e100:
        return None
    return 0.0 if abs(value) < 1e-100 else float(value)


def text(node: Any, *path: str) -> str:
    """The value at ``path`` as text; empty when it is missing."""
    value = dig(node, *path)
    return "" if value is None else str(value)


def rows(node: Any, *path: str) -> list[Record]:
    """The list of tables at ``path``; empty when it is missing."""
    value = dig(node, *path)
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list | tuple) else []


def tables(node: Any, *path: str) -> dict[str, Record]:
    """The named tables at ``path``; empty when there are none."""
    value = dig(node, *path)
    if not isinstance(value, Mapping):
        return {}
    return {str(name): row for name, row in value.items() if isinstance(row, Mapping)}


def strings(node: Any, *path: str) -> list[str]:
    """The list at ``path`` as texts; empty when it is missing."""
    value = dig(node, *path)
    return [str(item) for item in value] if isinstance(value, list | tuple) else []


def load_average(environment: Record) -> str:
    """Over 1, 5 and 15 minutes; empty when it was not recorded."""
    found = dig(environment, "load_average")
    loads = [value for value in found if isinstance(value, int | float)] if isinstance(found, list) else []
    return " / ".join(f"{load:.1f}" for load in loads)


def interval(node: Any, *path: str) -> tuple[float, float] | None:
    """The pair of finite bounds at ``path``, else ``None``."""
    value = dig(node, *path)
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    low, high = (number({"bound": bound}, "bound") for bound in value)
    return None if low is None or high is None else (low, high)


def wilson(accuracy: float, n: int) -> tuple[float, float]:
    """Wilson score interval of a share, 95 % (Wilson 1927)."""
    z = 1.959963984540054
    middle = accuracy + z * z / (2 * n)
    half = z * math.sqrt(max(0.0, accuracy * (1 - accuracy)) / n + z * z / (4 * n * n))
    return (max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n)))


def significant(value: float | None, digits: int = 3) -> str:
    """``digits`` significant digits, never in exponent form between 1e-4 and 1e6."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4 or magnitude >= 6:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    return f"{value:.{max(0, digits - 1 - magnitude)}f}".replace("-", "−")


def percent(value: float | None, digits: int = 2) -> str:
    """A share as percent."""
    return NONE if value is None else f"{100 * value:.{digits}f} %"


def milliseconds(value: float | None) -> str:
    """A time with three significant digits, in µs below 0.01 ms."""
    if value is None:
        return NONE
    return f"{significant(value * 1000)} µs" if 0 < value < 0.01 else f"{significant(value)} ms"


def size(mib: float | None) -> str:
    """A size in KiB below one MiB, in MiB above."""
    if mib is None:
        return NONE
    return f"{mib:.2f} MiB" if mib >= 1 else f"{significant(mib * 1024)} KiB"


def count(value: float | None) -> str:
    """A count with the suffix k, M or G."""
    if value is None:
        return NONE
    for factor, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return f"{significant(value / factor)}{suffix}"
    return f"{value:.0f}"


def duration(seconds: float | None) -> str:
    """Seconds, or minutes and seconds."""
    if seconds is None:
        return NONE
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if seconds >= 100 else f"{seconds:.1f} s"


def bounds(pair: tuple[float, float] | None, scale: float = 1.0, digits: int = 3) -> str:
    """An interval with one number of decimals for both bounds; empty when there is none."""
    if pair is None:
        return ""
    largest = max(abs(pair[0]), abs(pair[1])) * scale
    decimals = max(0, digits - 1 - math.floor(math.log10(largest))) if largest > 0 else 1
    return "[" + ", ".join(f"{value * scale:.{min(decimals, 6)}f}" for value in pair).replace("-", "−") + "]"


def quantity(value: float | None, unit: str) -> str:
    """A value with its unit: a share as percent, a ratio with the sign ×, no number as a dash."""
    if value is None:
        return NONE
    if unit == "share":
        return percent(value)
    return f"{significant(value)}×" if unit in ("ratio", "×") else f"{significant(value)} {unit}".strip()


def check_cells(check: Record) -> tuple[str, str, str, str, str, str]:
    """Name, verdict, measured, limit, interval and note of a check."""
    unit, ends = text(check, "unit"), interval(check, "interval")
    measured = number(check, "measured")
    return (
        text(check, "name") or "unnamed",
        text(check, "verdict") or "NOT_MEASURED",
        quantity(measured, unit),
        quantity(number(check, "limit"), unit),
        (bounds(ends, 100, 4) + " %" if unit == "share" and ends else bounds(ends)) or NONE,
        text(check, "note") or ("" if measured is not None else NO_REASON),
    )


def validation_count(record: Record) -> int | None:
    """Number of validation samples behind every accuracy."""
    n = number(record, "metrics", "data", "validation")
    return int(n) if n is not None and n >= 1 else None


def accuracy_interval(record: Record, accuracy: float | None) -> tuple[float, float] | None:
    """Wilson interval of an accuracy of this record; ``None`` without a sample count."""
    n = validation_count(record)
    return wilson(accuracy, n) if accuracy is not None and n is not None and 0 <= accuracy <= 1 else None


def latency(row: Record, name: str = "latency") -> Figure:
    """p50 / p90 of a variant; never a number when it was neither measured nor predicted."""
    p50, p90 = number(row, "latency_p50_ms"), number(row, "latency_p90_ms")
    kind, device, reason = text(row, "latency_kind"), text(row, "latency_device"), text(row, "reason")
    if p50 is None:
        return Figure(name, NONE, UNKNOWN, reason or NO_REASON)
    if kind not in (MEASURED, PREDICTED):
        return Figure(name, NONE, UNKNOWN, reason or "the record does not say whether it was measured")
    shown = significant(p50)
    if p90 is not None:
        decimals = max(0, 2 - math.floor(math.log10(abs(p50)))) if p50 else 3
        shown = f"{p50:.{min(decimals, 6)}f} / {p90:.{min(decimals, 6)}f}"
    basis = f"on {device}" if device else f"the record does not name the device ({kind})"
    return Figure(name, f"{shown} ms", kind, f"{basis}; {reason}" if reason else basis)


def variants(record: Record) -> list[Record]:
    """Every variant, then the runtimes that have none (not run: their reason is in ``backends``)."""
    found = rows(record, "metrics", "variants")
    seen = {text(row, "backend") for row in found}
    absent = [
        {"id": name, "backend": name, **row} for name, row in backends(record).items() if name not in seen
    ]
    return [*found, *absent]


def backends(record: Record) -> dict[str, Record]:
    """What each runtime that the target uses did with the model that is shipped to it."""
    unused = f"target '{text(record, 'target', 'id')}' does not use "
    found = tables(record, "metrics", "backends").items()
    return {name: row for name, row in found if row and not text(row, "reason").startswith(unused)}


def runtime_steps(record: Record) -> list[tuple[str, float | None, str]]:
    """(name, accuracy, reason) of each runtime, and of the shipped variant where it is another one."""
    found, shipped = dict(backends(record)), text(record, "gate", "shipped")
    if shipped and shipped not in {text(row, "id") for row in found.values()}:
        found |= {text(row, "backend") + " ": row for row in variants(record) if text(row, "id") == shipped}
    return [
        (
            f"{name.strip()}, {text(row, 'precision') or 'precision unknown'}"
            + (" (shipped)" if shipped and text(row, "id") == shipped else ""),
            number(row, "accuracy"),
            text(row, "reason"),
        )
        for name, row in found.items()
    ]


def primary(record: Record) -> Record:
    """The shipped variant, where the target's own runtime has a latency; else what there is of that runtime,
    of the runtime of the speed-up, or of the first."""
    found = backends(record)
    shipped = [row for row in variants(record) if text(row, "id") == text(record, "gate", "shipped") != ""]
    wanted = (text(record, "target", "runtime"), text(record, "metrics", "speedup_over_teacher", "backend"))
    for name in (*wanted, *found):
        if name in found:
            same = [row for row in shipped if text(row, "backend") == name]
            known = number(found[name], "latency_p50_ms") is not None
            first = same or (shipped if known else [])
            return {"backend": name, **(first[0] if first else found[name])}
    return {}


def _shipped(record: Record) -> list[Record]:
    """Variants, the one nearest to what is shipped first: of the gate, the target, the speed-up, the rest."""
    wanted = text(record, "gate", "shipped")
    named = [row for row in variants(record) if wanted and text(row, "id") == wanted]
    found = backends(record)
    fast = text(record, "metrics", "speedup_over_teacher", "backend")
    return [*named, primary(record), *([found[fast]] if fast in found else []), *found.values()]


def shipped_accuracy(record: Record) -> tuple[str, float | None]:
    """The accuracy nearest to what is shipped, and what it belongs to."""
    places: list[tuple[str, float | None]] = [
        *(
            (text(row, "id") or text(row, "backend") or "shipped model", number(row, "accuracy"))
            for row in _shipped(record)
        ),
        ("quantized model (simulated)", number(record, "metrics", "quantize", "accuracy")),
        ("student in float", number(record, "metrics", "student_float", "accuracy")),
    ]
    return next((place for place in places if place[1] is not None), ("", None))


def shipped_size(record: Record) -> float | None:
    """MiB of the shipped file, or of the file nearest to it that has a size."""
    sizes = (number(row, "size_mib") for row in _shipped(record))
    return next((value for value in sizes if value is not None), None)


def is_fallback(layer: Record, variant: Record) -> bool:
    """Whether a layer of an int8 model really runs in float: it does multiplications, or says why."""
    return runs_in_float(layer, variant) and (bool(text(layer, "reason")) or (number(layer, "macs") or 0) > 0)


def runs_in_float(layer: Record, variant: Record) -> bool:
    """Whether a layer of an int8 model runs in float, be it only an activation or a conversion."""
    precision = text(layer, "precision").lower()
    return text(variant, "precision").lower() == "int8" and precision.startswith(("f", "bf"))


def missing_stages(record: Record) -> list[str]:
    """Stages without an entry, in their order."""
    done = tables(record, "stages")
    return [stage for stage in STAGES if stage not in done]


def verdict(record: Record) -> str:
    """The verdict, or NO VERDICT when the run did not reach the gate."""
    return text(record, "verdict") or "NO VERDICT"


def decision(record: Record) -> str:
    """One sentence: what was decided, from how many checks."""
    checks = rows(record, "gate", "checks")
    if not checks:
        done = [stage for stage in STAGES if stage not in missing_stages(record)]
        after = f"after the stage '{done[-1]}'" if done else "before its first stage"
        return f"The run stopped {after}; nothing was decided."
    totals: dict[str, int] = {}
    for check in checks:
        totals[text(check, "verdict") or "NO VERDICT"] = (
            totals.get(text(check, "verdict") or "NO VERDICT", 0) + 1
        )
    parts = ", ".join(f"{many} {name.replace('_', ' ').lower()}" for name, many in totals.items())
    meaning = {
        "PASS": "The student meets every limit that could be checked here",
        "FAIL": "The student must not be shipped as it is",
        "INCONCLUSIVE": "The measurements cannot decide; more data are needed",
        "UNUSABLE": "The machine was too unsteady to measure; run the gate again",
    }.get(verdict(record), "The record holds no overall verdict")
    named = "".join(
        f" {word}: {'; '.join(found)}."
        for key, word in (("FAIL", "Failed"), ("NOT_MEASURED", "Without a verdict"))
        if (found := [text(check, "name") for check in checks if text(check, "verdict") == key])
    )
    return f"{meaning}. Checks: {parts}.{named}"
