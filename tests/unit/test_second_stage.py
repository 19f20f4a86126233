"""Where a search has a second stage without being asked for one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from edgekd.recipe import load_recipe, parse_override
from edgekd.stages.refine import second_stage


def recipe(**given: Any) -> Any:
    return load_recipe(None, {key.replace("__", "."): value for key, value in given.items()})


@pytest.mark.parametrize(
    ("given", "cuda", "expected"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"device": "cpu"}, True, False),
        ({"search__refine": False}, True, False),
        ({"search__refine": True}, False, True),
        ({"search__student": "a.b:c"}, True, False),
        ({"distill__prepare": "mcmi"}, True, False),
        ({"distill__prepare": "mcmi", "search__refine_finalists": 1}, True, True),
    ],
)
def test_it_is_there_where_a_cuda_device_makes_it_cheap(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], cuda: bool, expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert second_stage(recipe(**given)) is expected
    assert second_stage(recipe(**given), {"metrics": {}}) is expected


@pytest.mark.parametrize("had", [True, False])
def test_a_search_stays_what_it_was_when_the_run_goes_on_elsewhere(
    monkeypatch: pytest.MonkeyPatch, had: bool
) -> None:
    record: dict[str, Any] = {"metrics": {"search": {"chosen": 3} | ({"refine": {}} if had else {})}}
    for cuda in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        assert second_stage(recipe(), record) is had
        assert second_stage(recipe(search__refine=True), record)


def test_the_command_line_takes_all_three() -> None:
    told = [dict([parse_override(f"search.refine={word}")]) for word in ("auto", "true", "false")]
    assert [load_recipe(None, given).search.refine for given in told] == ["auto", True, False]
