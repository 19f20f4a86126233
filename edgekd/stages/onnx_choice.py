"""What is asked of the quantization of a file, and which measured candidate answers it."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgekd.errors import InfeasibleBudgetError, UnsupportedModelError, UsageError
from edgekd.quantize.samples import Pixels
from edgekd.target import Target

_FORMS = ("int8", "mixed", "w8", "w4", "bf16", "fp32")  # as a card of another machine prefers them
_TIE = 0.03  # candidates this close in latency are told apart by accuracy, then by size


@dataclass(frozen=True)
class Training:
    """Quantization-aware training of a file: `method` and its `options` read nothing but logits."""

    epochs: int = 5
    learning_rate: float = 2e-4
    batch_size: int = 32
    method: str = "kd"
    options: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Wanted:
    """What the caller asks for; a budget that is None is no limit, a drop that is None the kind's default."""

    model: Path
    target: Target
    data: str
    folder: Path
    pixels: Pixels = field(default_factory=Pixels)
    calibrators: tuple[str, ...] = ("mse", "min-max", "percentile")
    calibration_images: int = 512
    calibration_choice: str = "stratified"
    max_drop: float | None = None
    max_latency_ms: float | None = None
    max_size_mib: float | None = None
    weights_only: int = 0
    compare_engines: bool = False
    threads: int = 1
    seed: int = 0
    training: Training | None = None
    sensitivity: bool = False
    engine: str = "edgekd"  # whose int8 files are candidates


def choose(
    rows: list[dict[str, Any]], limit: float, wanted: Wanted, *, quantized: bool
) -> tuple[dict[str, Any], str]:
    """The fastest candidate (CPU time of a call) within the budget; of those within 3 % of it the one with
    the smallest drop, then the smallest file. For a target of another kind than this machine times here say
    nothing: int8 as its card has it. And why, in words.

    Raises:
        InfeasibleBudgetError: none is within the budget; names the nearest.
    """
    timed = [row for row in rows if row["cpu_p50_ms"] is not None]
    if not timed:
        raise UnsupportedModelError(
            "no runtime here could run and time the model: "
            + "; ".join(f"{row['id']}: {row['reason']}" for row in rows)
        )
    fits = [row for row in timed if not excess(row, limit, wanted)]
    if not fits:
        nearest = min(timed, key=lambda row: _times_over(row, limit, wanted))
        raise InfeasibleBudgetError(
            f"no candidate is within the budget; the nearest is {nearest['id']}: "
            + ", ".join(excess(nearest, limit, wanted)),
            f"all candidates are in {wanted.folder / 'candidates'}; relax the limit that is named",
        )
    if not timed_like_target(wanted.target):
        return _by_card(timed, fits, limit, wanted, quantized)
    fastest = min(row["cpu_p50_ms"] for row in fits)
    close = [row for row in fits if row["cpu_p50_ms"] <= fastest * (1 + _TIE)]
    best = min(close, key=lambda row: (round(row["drop"], 2), row["size_mib"], row["cpu_p50_ms"]))
    plain = min((row["cpu_p50_ms"] for row in timed if row["form"] == "fp32"), default=None)
    reason = f"{best['cpu_p50_ms']:.3g} ms of CPU a call, {best['drop']:.2f} points lost (limit {limit:g})"
    if plain is not None and best["form"] != "fp32":
        reason += f", {plain / best['cpu_p50_ms']:.2f} times as fast as the faster fp32"
    if best["form"] in ("fp32", "bf16") and quantized:
        reason += "; " + _why_not_int8(timed, limit, wanted, best)
    return best, reason


def _by_card(
    timed: list[dict[str, Any]], fits: list[dict[str, Any]], limit: float, wanted: Wanted, quantized: bool
) -> tuple[dict[str, Any], str]:
    """Of a target that times here tell nothing of. Files by other engines are in no card's dialect."""
    ours = [row for row in fits if row["engine"] == "edgekd"]
    best = min(ours or fits, key=lambda row: (_FORMS.index(row["form"]), row["drop"], row["size_mib"]))
    reason = (
        f"{best['drop']:.2f} points lost (limit {limit:g}); its latency there is not known: times are of "
        "this machine"
    )
    integer = [row for row in timed if row["form"] not in ("fp32", "bf16") and row["engine"] == "edgekd"]
    if best["form"] not in ("fp32", "bf16") or not quantized or not integer:
        return best, f"{best['form']}, as the card of {wanted.target.id} has it; {reason}"
    nearest = min(integer, key=lambda row: _times_over(row, limit, wanted))
    broken = ", ".join(excess(nearest, limit, wanted))
    return best, f"{best['form']}, because {nearest['id']} is outside: {broken}; {reason}"


def _times_over(row: dict[str, Any], limit: float, wanted: Wanted) -> tuple[int, float]:
    """How far from the budget: broken limits, and the largest share by which one of them is."""
    pairs: list[tuple[float, float | None]] = [
        (row["drop"], limit),
        (row["size_mib"], wanted.max_size_mib),
    ]
    if timed_like_target(wanted.target):
        pairs.append((row["latency_p50_ms"], wanted.max_latency_ms))
    over = [got / max(most, 1e-9) for got, most in pairs if most is not None and got > most]
    return len(over), max(over, default=0.0)


def _why_not_int8(timed: list[dict[str, Any]], limit: float, wanted: Wanted, best: dict[str, Any]) -> str:
    integer = [row for row in timed if row["form"] not in ("fp32", "bf16")]
    if not integer:
        return "no int8 candidate ran"
    quick = min(integer, key=lambda row: row["cpu_p50_ms"])
    if quick["cpu_p50_ms"] >= best["cpu_p50_ms"]:
        return f"int8 does not pay here: the fastest, {quick['id']}, takes {quick['cpu_p50_ms']:.3g} ms"
    return (
        f"the fastest int8, {quick['id']}, is outside: {', '.join(excess(quick, limit, wanted)) or 'a tie'}"
    )


def check_engine(wanted: Wanted) -> None:
    """Refuse another engine for a target whose graphs it does not write.

    Raises:
        UsageError: this machine is not the target, and the engines write graphs for runtimes on x86.
    """
    if wanted.engine != "edgekd" and not timed_like_target(wanted.target):
        raise UsageError(
            f"quantize.engine={wanted.engine}: its files are in no dialect of {wanted.target.id}, not "
            "of this machine's kind",
            "leave it out, or name this machine's kind: --target x86",
        )


def timed_like_target(target: Target) -> bool:
    """Whether this machine's processor is of the target's kind, so that times here tell something of it."""
    machines = {"x86-cpu": ("x86_64", "AMD64"), "arm-cpu": ("aarch64", "arm64")}
    return platform.machine() in machines.get(target.device_class, ())


def excess(row: dict[str, Any], limit: float, wanted: Wanted) -> list[str]:
    """Which limits a measured candidate breaks, in words."""
    found = []
    if row["drop"] > limit:
        found.append(f"{row['drop']:.2f} points lost, at most {limit:g}")
    latency = row["latency_p50_ms"] if timed_like_target(wanted.target) else None
    if wanted.max_latency_ms is not None and latency is not None and latency > wanted.max_latency_ms:
        found.append(f"{latency:.3g} ms, at most {wanted.max_latency_ms:g}")
    if wanted.max_size_mib is not None and row["size_mib"] > wanted.max_size_mib:
        found.append(f"{row['size_mib']:.3g} MiB, at most {wanted.max_size_mib:g}")
    return found
