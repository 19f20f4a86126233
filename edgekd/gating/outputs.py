"""A gate's result for continuous integration: JSON, JUnit, SARIF, Markdown, workflow commands."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote
from xml.etree import ElementTree

from edgekd import __version__
from edgekd.checks import with_unit
from edgekd.errors import StorageError
from edgekd.files import write_bytes, write_json, write_text

_SARIF_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
# Rules by the first words of a check's name; the first that fits.
_RULES = (
    ("EKD001", "latency", "LatencyOverReference", "The candidate is slower than allowed."),
    ("EKD002", "accuracy", "AccuracyDrop", "The candidate loses more accuracy than allowed."),
    ("EKD003", "agreement", "Agreement", "Two models that should answer alike do not."),
    ("EKD004", "int8 coverage", "Coverage", "Too little of the candidate runs in integer kernels."),
    ("EKD005", "size", "Size", "The candidate's file is larger than allowed."),
    ("EKD006", "golden", "GoldenOutputs", "The bundle does not reproduce its golden outputs."),
)
_LEVELS = {"FAIL": "error", "INCONCLUSIVE": "warning", "UNUSABLE": "warning"}
_SHOWN = ("PASS", "FAIL", "INCONCLUSIVE", "UNUSABLE", "NOT_MEASURED")


def write_outputs(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """``gate.json``, ``junit.xml``, ``gate.sarif`` and ``summary.md``, each written in one step.

    Raises:
        StorageError: the folder cannot be written.
    """
    paths = [folder / name for name in ("gate.json", "junit.xml", "gate.sarif", "summary.md")]
    write_json(paths[0], result)
    write_bytes(paths[1], junit(result))
    write_json(paths[2], sarif(result))
    write_text(paths[3], summary(result))
    return paths


def append_step_summary(result: Mapping[str, Any]) -> bool:
    """Adds the Markdown to the file of ``GITHUB_STEP_SUMMARY``; False where there is none.

    Raises:
        StorageError: the file cannot be written.
    """
    path = os.environ.get("GITHUB_STEP_SUMMARY", "")
    if not path:
        return False
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(summary(result) + "\n")
    except OSError as error:
        raise StorageError(f"cannot write GITHUB_STEP_SUMMARY {path}: {error.strerror}") from error
    return True


def junit(result: Mapping[str, Any]) -> bytes:
    """One test case a check: FAIL is a failure, UNUSABLE an error, INCONCLUSIVE and NOT_MEASURED skipped."""
    counts = {kind: sum(check["verdict"] == kind for check in result["checks"]) for kind in _SHOWN}
    attributes = {
        "name": "edgekd gate",
        "tests": str(len(result["checks"])),
        "failures": str(counts["FAIL"]),
        "errors": str(counts["UNUSABLE"]),
        "skipped": str(counts["INCONCLUSIVE"] + counts["NOT_MEASURED"]),
        "time": str(result["seconds"]),
    }
    suites = ElementTree.Element("testsuites")
    suite = ElementTree.SubElement(suites, "testsuite", attributes)
    properties = ElementTree.SubElement(suite, "properties")
    for side, model in result["models"].items():
        ElementTree.SubElement(properties, "property", {"name": side, "value": _clean(model["file"])})
    for check in result["checks"]:
        name = {"classname": "edgekd.gate", "name": _clean(check["name"])}
        case = ElementTree.SubElement(suite, "testcase", name)
        text = _clean(f"{measured(check)}; {check['note']}")
        kind = {"FAIL": "failure", "UNUSABLE": "error", "PASS": ""}.get(check["verdict"], "skipped")
        if kind:
            told = ElementTree.SubElement(case, kind, {"message": f"{check['verdict']}: {text}"})
            told.text = text if kind != "skipped" else None
        else:
            ElementTree.SubElement(case, "system-out").text = text
    ElementTree.indent(suites)
    made: bytes = ElementTree.tostring(suites, encoding="utf-8", xml_declaration=True)
    return made + b"\n"


def _clean(text: str) -> str:
    """Without the control characters that XML 1.0 has no form for."""
    return "".join(sign if sign >= " " or sign in "\t\n" else "?" for sign in text)


def sarif(result: Mapping[str, Any]) -> dict[str, Any]:
    """SARIF 2.1.0 with one result for each check that did not pass, at line 1 of the candidate's file."""
    uri = _uri(Path(result["models"]["candidate"]["file"]))
    place = {"artifactLocation": {"uri": uri}, "region": {"startLine": 1}}
    found = [
        {
            "ruleId": _rule(check["name"])[0],
            "ruleIndex": _RULES.index(_rule(check["name"])),
            "level": _LEVELS[check["verdict"]],
            "message": {"text": f"{check['verdict']}: {check['name']} {measured(check)}; {check['note']}"},
            "locations": [{"physicalLocation": place}],
        }
        for check in result["checks"]
        if check["verdict"] in _LEVELS
    ]
    rules = [{"id": rule, "name": name, "shortDescription": {"text": text}} for rule, _, name, text in _RULES]
    driver = {"name": "edgekd", "version": __version__, "rules": rules}
    return {
        "$schema": _SARIF_SCHEMA,
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": found}],
    }


def _uri(path: Path) -> str:
    """Relative to this folder where the file lies under it, which is what code scanning shows."""
    here = Path.cwd()
    inside = path.is_absolute() and path.is_relative_to(here)
    return quote((path.relative_to(here) if inside else path).as_posix())


def _rule(name: str) -> tuple[str, str, str, str]:
    return next((rule for rule in _RULES if name.startswith(rule[1])), _RULES[0])


def measured(check: Mapping[str, Any]) -> str:
    """The number with its interval and its limit, in words."""
    if check["measured"] is None:
        return "not measured"
    text = with_unit(check["measured"], check["unit"])
    if check["interval"] is not None:
        factor = 100 if check["unit"] == "share" else 1
        text += " [{:.4g}, {:.4g}]".format(*(factor * bound for bound in check["interval"]))
    return text if check["limit"] is None else f"{text}, limit {with_unit(check['limit'], check['unit'])}"


def summary(result: Mapping[str, Any]) -> str:
    """Markdown: verdict, a table of the checks, both clocks, and what disturbed."""
    models = result["models"]
    level = f"{100 * result['level']:.2f} %"
    lines = [
        f"## edgekd gate: {result['verdict']}",
        "",
        f"`{_cell(models['candidate']['file'])}` against `{_cell(models['reference']['file'])}`, "
        f"{models['candidate']['backend']} {models['candidate']['precision']}, {result['device']}",
        "",
        "| check | verdict | measured | note |",
        "|---|---|---|---|",
    ]
    for check in result["checks"]:
        cells = (check["name"], check["verdict"], measured(check), check["note"])
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    if result["control"] is not None:
        control = result["control"]
        lines += [
            "",
            f"Reference against itself: {control['ratio']:.3f} [{control['lo']:.3f}, {control['hi']:.3f}]. "
            f"Bounds are one-sided, each at {level}; {result['restarts']} fresh processes, "
            f"{result['clock']} clock.",
        ]
    lines += ["", "| | wall p50 | wall p90 | wall p99 | CPU p50 |", "|---|---|---|---|---|"]
    for name, label in (("ref", "reference"), ("aa", "reference again"), ("cand", "candidate")):
        times = result["times"][name]
        values = [times[key] for key in ("wall_p50_ms", "wall_p90_ms", "wall_p99_ms", "cpu_p50_ms")]
        lines.append(f"| {label} | " + " | ".join(_ms(value) for value in values) + " |")
    loads = [session["load_average_before"] for session in result["sessions"]]
    lines += ["", f"Load average before each session: {', '.join(f'{load[0]:.1f}' for load in loads)}."]
    if result["clock"] == "cpu":
        lines.append(
            "The CPU clock does not see waiting for memory that neighbours use, I/O, or uneven threads."
        )
    return "\n".join(lines) + "\n"


def _ms(value: float | None) -> str:
    return "not enough calls" if value is None else f"{value:.3f} ms"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("`", "'").replace("\n", " ")


def workflow_commands(result: Mapping[str, Any]) -> list[str]:
    """Annotations of GitHub Actions: an error for each FAIL, a warning for each undecided check."""
    made = []
    for check in result["checks"]:
        if check["verdict"] in _LEVELS:
            text = f"{check['name']} {measured(check)}; {check['note']}"
            title = f"{check['name'].partition(' ')[0]} gate"
            made.append(f"::{_LEVELS[check['verdict']]} title={_data(title, True)}::{_data(text)}")
    return made


def _data(text: str, in_property: bool = False) -> str:
    """Escaped as the runner's command syntax wants it."""
    text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return text.replace(":", "%3A").replace(",", "%2C") if in_property else text
