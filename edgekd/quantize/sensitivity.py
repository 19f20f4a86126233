"""Which operators a network cannot bear in integers, and the shortest list of them to leave in float."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Sensitivity:
    """`damage`: divergence from the float outputs when this operator alone runs in integers."""

    name: str
    kind: str
    damage: float
    macs: int = 0


def rank(rows: Sequence[Sensitivity]) -> list[str]:
    """Names, those first whose float form heals most for what it costs.

    An operator that does no products costs little in float; of two layers of like damage the smaller one
    goes first. The order is by ``damage / (macs + one thousandth of all macs)``.
    """
    base = max(sum(row.macs for row in rows) / 1000, 1)
    return [row.name for row in sorted(rows, key=lambda row: -row.damage / (row.macs + base))]


def shortest_prefix(ordered: Sequence[str], good_enough: Callable[[Sequence[str]], bool]) -> int | None:
    """The smallest number of names from the front for which `good_enough` holds, assuming that more float
    never harms: doubled until it holds, then halved in between. None where not even all of them suffice."""
    low, high = 0, 1
    while not good_enough(ordered[: min(high, len(ordered))]):
        if high >= len(ordered):
            return None
        low, high = high, 2 * high
    high = min(high, len(ordered))
    while high - low > 1:
        middle = (low + high) // 2
        if good_enough(ordered[:middle]):
            high = middle
        else:
            low = middle
    return high
