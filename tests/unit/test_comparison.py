"""Two runs side by side: what changed, what is not a comparison, and a page that a browser can sort."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
import sample_record

from edgekd import cli
from edgekd.report import comparison_markdown, comparison_page, html_report
from edgekd.report.comparison import sections

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def _changed() -> tuple[dict[str, Any], dict[str, Any]]:
    first = json.loads(json.dumps(sample_record.full_record(), default=str))
    second = copy.deepcopy(first)
    second["recipe"]["seed"] = 77
    second["verdict"] = "FAIL"
    second["gate"]["checks"][0]["verdict"] = "FAIL"
    second["metrics"]["student_float"]["accuracy"] -= 0.2
    second["environment"]["packages"]["torch"] = "9.9"
    return first, second


def _part(first: dict[str, Any], second: dict[str, Any], heading: str) -> dict[str, tuple[str, ...]]:
    found = next(rows for name, _, rows in sections(first, second) if name.startswith(heading))
    return {row[0]: row for row in found}


def test_what_changed_is_told_and_what_did_not_is_not() -> None:
    first, second = _changed()
    result = _part(first, second, "Result")
    assert result["verdict"][2:] == ("FAIL", "differs")
    assert result["accuracy, float student"][3].startswith("-20.00 points, the same images")
    assert "overlap" not in result["accuracy, float student"][3]
    assert result["accuracy, teacher"][3] == "+0.00 points, the same images; the intervals overlap"
    assert result["parameters"][3] == "the same"
    assert list(_part(first, second, "Recipe")) == ["seed"]
    assert list(_part(first, second, "Environment")) == ["packages.torch"]
    checks = _part(first, second, "Checks")
    assert [row[3] for row in checks.values()].count("the verdict differs") == 1
    second["gate"]["checks"][0]["name"] = "another check"
    assert _part(first, second, "Checks")["another check"][1:] == ("not checked", ANY, "in one run only")


def test_accuracies_on_other_images_are_not_called_a_comparison() -> None:
    first, second = _changed()
    second["metrics"]["data"]["sha256"] = "other"
    assert "not a comparison" in _part(first, second, "Result")["accuracy, teacher"][3]


def test_a_run_that_stopped_early_is_compared_as_far_as_it_went() -> None:
    first, _ = _changed()
    stopped = {"stages": {}, "metrics": {}, "recipe": first["recipe"]}
    text = comparison_markdown(first, stopped, ("a", "b"))
    assert "NO VERDICT" in text
    assert comparison_page(stopped, stopped, ("a", "b"))


def test_names_cannot_break_the_page_or_the_table() -> None:
    first, second = _changed()
    second["gate"]["checks"][0]["name"] = "</script><script>alert(1)</script>|x"
    page = comparison_page(first, second, ("a<b", 'c"d|e'))
    assert page.count("<script") == 2
    assert not re.search(r"(?:src|href)=\"?https?:", page)
    for line in comparison_markdown(first, second, ("a|b", "c")).splitlines():
        if line.startswith("|"):
            assert line.replace("\\|", "").count("|") == 5


def test_the_command_writes_a_page_and_prints_markdown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, record in zip(("one", "two"), _changed(), strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(json.dumps(record))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["edgekd", "report", "one", "two", "--out", "change.html"])
    cli.main()
    assert capsys.readouterr().out.startswith("# one and two\n")
    assert (tmp_path / "change.html").stat().st_size > 5000
    (tmp_path / "other.json").write_text("[1]")
    monkeypatch.setattr(sys, "argv", ["edgekd", "report", "one", "other.json"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 18
    assert "is not the record of a run" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("# no record")
    for wrong, message in (("empty", "it has no record.json"), ("notes.md", "cannot read notes.md")):
        monkeypatch.setattr(sys, "argv", ["edgekd", "report", wrong])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 18
        told = capsys.readouterr().err
        assert message in told
        assert "delete" not in told  # it may be anything


# What a visitor does: click a head of the table, look at the first column; click again.
_VISIT = """
<script>
const grid = document.querySelector("table.sortable");
const cells = (column) => [...grid.tBodies[0].rows].map((row) => row.cells[column].dataset.sort ?? row.cells[column].textContent);
const seen = {before: cells(COLUMN)};
grid.tHead.rows[0].cells[COLUMN].querySelector("button").click();
seen.once = cells(COLUMN);
grid.tHead.rows[0].cells[COLUMN].querySelector("button").click();
seen.twice = cells(COLUMN);
document.title = "visited " + btoa(unescape(encodeURIComponent(JSON.stringify(seen))));
</script>
"""  # noqa: E501


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium binary on this machine")
def test_a_visitor_sorts_the_layers_by_a_click(tmp_path: Path) -> None:
    import base64

    page = tmp_path / "report.html"
    visit = _VISIT.replace("COLUMN", "4")  # the time of a layer
    page.write_text(html_report(sample_record.full_record()).replace("</body>", visit + "</body>"))
    names = ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
             "disable-background-networking", "disable-component-update", "dump-dom",
             f"user-data-dir={tmp_path / 'profile'}")  # fmt: skip
    words = [str(CHROMIUM), *(f"--{name}" for name in names), page.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"<title>visited ([^<]+)</title>", done.stdout)
    assert found, done.stderr[-2000:]
    seen = json.loads(base64.b64decode(found[1]))
    numbers = {when: [float(value) for value in values] for when, values in seen.items()}
    assert sorted(numbers["before"]) in (numbers["once"], numbers["twice"])
    assert numbers["once"] == numbers["twice"][::-1] != numbers["before"]
