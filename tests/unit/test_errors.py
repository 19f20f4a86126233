"""Every error that a user can meet is documented with its own exit code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgekd import cli, errors
from edgekd.errors import EXIT_GATE, EXIT_INTERNAL, EXIT_INTERRUPTED, EdgekdError

PAGE = (Path(__file__).parents[2] / "docs" / "exit-codes.md").read_text(encoding="utf-8")
ROWS = {int(code): cells for code, cells in re.findall(r"^\| (\d+) \| (.+) \|$", PAGE, flags=re.MULTILINE)}
LEAVES = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, EdgekdError) and kind is not EdgekdError
]


@pytest.mark.parametrize("leaf", LEAVES, ids=lambda kind: kind.__name__)
def test_every_leaf_stands_in_the_page_under_its_code(leaf: type[EdgekdError]) -> None:
    assert f"`{leaf.__name__}`" in ROWS[leaf.exit_code]


def test_codes_are_unique_and_do_not_mean_a_verdict() -> None:
    codes = [leaf.exit_code for leaf in LEAVES]
    assert len(set(codes)) == len(codes)
    assert not {*codes, EXIT_INTERNAL, EXIT_INTERRUPTED} & set(EXIT_GATE.values())


@pytest.mark.parametrize("verdict", EXIT_GATE)
def test_every_verdict_stands_in_the_page(verdict: str) -> None:
    assert f"verdict is {verdict}" in ROWS[EXIT_GATE[verdict]]


def test_the_page_lists_no_other_code() -> None:
    codes = {leaf.exit_code for leaf in LEAVES} | set(EXIT_GATE.values())
    assert set(ROWS) == codes | {EXIT_INTERNAL, EXIT_INTERRUPTED}


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (errors.DataError("no images", "look into x"), 11, "edgekd: no images\nhint: look into x\n"),
        (KeyboardInterrupt(), EXIT_INTERRUPTED, "edgekd: interrupted"),
        (ZeroDivisionError("a mistake of ours"), EXIT_INTERNAL, "ZeroDivisionError: a mistake of ours"),
    ],
    ids=["user", "interrupt", "internal"],
)
def test_the_command_line_leaves_with_the_code(
    raised: BaseException,
    code: int,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(**_: object) -> None:
        raise raised

    monkeypatch.setattr(cli, "cli", refuse)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == code
    assert said in capsys.readouterr().err
