"""Which operators stay float: an order, and the shortest part of it that is enough."""

from __future__ import annotations

import pytest

from edgekd.quantize.sensitivity import Sensitivity, rank, shortest_prefix

NAMES = [f"op{number}" for number in range(37)]


@pytest.mark.parametrize("needed", [1, 2, 3, 7, 8, 20, 37])
def test_the_shortest_prefix_is_found_with_few_looks(needed: int) -> None:
    looks = 0

    def enough(names: object) -> bool:
        nonlocal looks
        looks += 1
        return set(NAMES[:needed]) <= set(names)  # type: ignore[call-overload, no-any-return]

    assert shortest_prefix(NAMES, enough) == needed
    assert looks <= 12


def test_no_prefix_is_none() -> None:
    assert shortest_prefix(NAMES, lambda names: False) is None


def test_of_like_damage_the_cheaper_operator_goes_first() -> None:
    rows = [
        Sensitivity("large", "Conv", 0.5, 1_000_000),
        Sensitivity("small", "Conv", 0.4, 10_000),
        Sensitivity("harmless", "Conv", 1e-9, 10),
        Sensitivity("join", "Add", 0.3),
    ]
    assert rank(rows) == ["join", "small", "large", "harmless"]
