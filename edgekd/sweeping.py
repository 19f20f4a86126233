"""One teacher for several targets: one search and one training where their cards allow the same students."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edgekd.errors import EdgekdError, UsageError
from edgekd.recipe import Recipe
from edgekd.run import Reporter
from edgekd.target import Target, find_target


@dataclass(frozen=True)
class Swept:
    """What became of one target. `taken_from` names the target whose float student it shares."""

    target: str
    folder: Path
    taken_from: str
    record: dict[str, Any] | None
    error: EdgekdError | None = None

    def row(self) -> dict[str, Any]:
        """For a table and for scripts."""
        found: dict[str, Any] = {
            "target": self.target,
            "folder": str(self.folder),
            "student_of": self.taken_from,
        }
        if self.record is None:
            error = self.error
            return found | {"verdict": "ERROR", "error": None if error is None else error.message}
        shipped = (self.record.get("gate") or {}).get("shipped")
        rows = {row["id"]: row for row in self.record["metrics"].get("variants", [])}
        told = {key: rows.get(shipped, {}).get(key) for key in ("accuracy", "size_mib", "latency_p50_ms")}
        return found | {"verdict": self.record["verdict"], "shipped": shipped, **told}


def sweep(recipe: Recipe, targets: Sequence[str], folder: Path, reporter: Reporter) -> list[Swept]:
    """Compress for each target, in a folder of its own below `folder`; the same call again resumes.

    A target takes the float student of an earlier one of the sweep whose card restricts students alike
    (channel multiple, kernels, forbidden operators); it is then neither searched nor trained again. A target
    that fails is told in its row, and the others go on.

    Raises:
        UsageError: a target is unknown, or named twice.
    """
    from edgekd.pipeline import run_pipeline

    cards = [find_target(name) for name in targets]
    ids = [card.id for card in cards]
    if len(set(ids)) != len(ids) or not ids:
        raise UsageError(f"--targets names a target twice, or none: {', '.join(ids) or 'none'}")
    found: list[Swept] = []
    givers: dict[str, Swept] = {}
    for name, card in zip(targets, cards, strict=True):
        place, giver = folder / card.id, givers.get(_restrictions(card))
        own = msgspec.structs.replace(recipe, target=name)
        if giver is not None:
            own = _with_student_of(own, giver.folder)
            reporter.say(f"target {card.id}: the float student of {giver.target}")
        else:
            reporter.say(f"target {card.id}: a search and a training of its own")
        taken_from = card.id if giver is None else giver.target
        try:
            record = run_pipeline(own, place, reporter)
        except EdgekdError as error:
            reporter.say(f"target {card.id} failed: {error.message}")
            found.append(Swept(card.id, place, taken_from, None, error))
            continue
        found.append(Swept(card.id, place, taken_from, record))
        if giver is None:
            givers[_restrictions(card)] = found[-1]
    return found


def _restrictions(card: Target) -> str:
    """What decides which students a card allows, as a key."""
    space = card.space
    return repr((float(space.channel_multiple.value), sorted(space.kernels), sorted(space.forbidden_ops)))


def _with_student_of(recipe: Recipe, folder: Path) -> Recipe:
    search = msgspec.structs.replace(recipe.search, student=str(folder / "2-student.json"))
    distill = msgspec.structs.replace(recipe.distill, weights=str(folder / "3-distilled.safetensors"))
    return msgspec.structs.replace(recipe, search=search, distill=distill)
