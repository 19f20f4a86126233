"""What the gate writes for continuous integration: one verdict vocabulary in every form, names escaped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest

from edgekd.checks import Check, Verdict
from edgekd.errors import StorageError
from edgekd.gating.outputs import append_step_summary, junit, sarif, summary, workflow_commands, write_outputs

VERDICTS: tuple[Verdict, ...] = ("PASS", "FAIL", "INCONCLUSIVE", "UNUSABLE", "NOT_MEASURED")
NAMES = ("latency over reference", "accuracy drop", "agreement", "size", "int8 coverage")
NASTY = 'models/<new> & "old"|\x01.onnx'


def _result(verdicts: tuple[Verdict, ...] = VERDICTS) -> dict[str, Any]:
    checks = []
    for name, verdict in zip(NAMES, verdicts, strict=False):
        measured = None if verdict == "NOT_MEASURED" else 1.5
        checks.append(Check(name, measured, 1.05, (1.4, 1.6), verdict, "ratio", "a <note>\n100%"))
    times = {"wall_p50_ms": 1.0, "wall_p90_ms": 1.1, "wall_p99_ms": None, "cpu_p50_ms": 0.9, "calls": 240}
    model = {"file": NASTY, "backend": "onnxruntime", "precision": "f32"}
    return {
        "verdict": "FAIL", "seconds": 3.2, "level": 0.9975, "restarts": 3, "clock": "cpu",
        "device": "this machine",
        "checks": [check.record() for check in checks],
        "control": {"ratio": 1.0, "lo": 0.99, "hi": 1.01, "dropped": 0},
        "models": {"candidate": model, "reference": {**model, "file": "old.onnx"}},
        "times": {"ref": times, "aa": times, "cand": times},
        "sessions": [{"load_average_before": [0.5, 0.4, 0.3]}],
    }  # fmt: skip


def test_each_verdict_has_its_junit_element() -> None:
    suite = ElementTree.fromstring(junit(_result()))[0]
    counts = {key: suite.get(key) for key in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "5", "failures": "1", "errors": "1", "skipped": "2"}
    kinds = [case[0].tag for case in suite.iter("testcase")]
    assert kinds == ["system-out", "failure", "skipped", "error", "skipped"]
    names = {entry.get("name"): entry.get("value") for entry in suite.iter("property")}
    assert names["candidate"] == NASTY.replace("\x01", "?")


def test_sarif_has_one_result_for_each_check_that_did_not_pass() -> None:
    log = json.loads(json.dumps(sarif(_result())))
    run = log["runs"][0]
    found = [(one["ruleId"], one["level"]) for one in run["results"]]
    assert log["version"] == "2.1.0"
    assert found == [("EKD002", "error"), ("EKD003", "warning"), ("EKD005", "warning")]
    for one in run["results"]:
        assert run["tool"]["driver"]["rules"][one["ruleIndex"]]["id"] == one["ruleId"]
        place = one["locations"][0]["physicalLocation"]
        assert unquote(place["artifactLocation"]["uri"]) == NASTY
        assert " " not in place["artifactLocation"]["uri"]
        assert place["region"] == {"startLine": 1}


def test_a_pass_has_no_sarif_result_and_no_annotation() -> None:
    result = _result(("PASS",))
    assert sarif(result)["runs"][0]["results"] == []
    assert workflow_commands(result) == []


def test_annotations_escape_what_the_runner_would_read() -> None:
    first = workflow_commands(_result())[0]
    assert first.startswith("::error title=accuracy gate::accuracy drop 1.5")
    assert "100%25" in first
    assert "\n" not in first


def test_the_summary_is_a_table_that_names_cannot_break() -> None:
    text = summary(_result())
    rows = [line for line in text.splitlines() if line.startswith("| latency")]
    assert rows[0].replace("\\|", "").count("|") == 5
    assert "99.75 %" in text
    assert "not enough calls" in text
    assert "does not see waiting for memory" in text


def test_the_step_summary_is_appended_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    assert not append_step_summary(_result())
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "absent" / "summary.md"))
    with pytest.raises(StorageError, match="GITHUB_STEP_SUMMARY"):
        append_step_summary(_result())


def test_all_files_are_written(tmp_path: Path) -> None:
    written = write_outputs(_result(), tmp_path / "new" / "folder")
    assert [path.name for path in written] == ["gate.json", "junit.xml", "gate.sarif", "summary.md"]
    assert all(path.stat().st_size for path in written)
