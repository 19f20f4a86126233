"""Tables of layer times side by side: which one a search takes, what it says, what is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from edgekd.calibrated import Subject, nearest_table, store_table, told_tables
from edgekd.cli import cli
from edgekd.cost import cost_model, layer_key
from edgekd.errors import StorageError
from edgekd.spec import LayerShape
from edgekd.target import find_target

TARGET = find_target("rpi5")
SMALL = Subject("mobile-cnn", (3, 32, 32), 10)
LARGE = Subject("mobile-cnn", (3, 64, 64), 10)
CONV = LayerShape("conv", 8, 16, kernel=3, size_in=16)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "edgekd"


def table(subject: Subject, slope: float = 1.0, **header: Any) -> dict[str, Any]:
    of = {"space": subject.space, "input": list(subject.input_shape), "classes": subject.classes}
    named = {
        "format": 3,
        "target": TARGET.id,
        "precision": "int8",
        "runtime": "onnxruntime 1.31",
        "device": "Pi",
    }
    return {
        "header": named | of | {"device": "Pi", "clock": "cpu"} | header,
        "line": {"offset_ms": 0.0, "slope": slope, "border_ms": 0.0, "weight_ms": 0.0},
        "validation": {"networks": 18, "kendall_tau": 0.95, "median_error_percent": 4.0},
        "entries_ms": {"empty": 0.5, layer_key(CONV): 1.0},
    }


def single(cache: Path, stored: dict[str, Any]) -> Path:
    """The file of versions that kept one table for each precision."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"calibrated-{TARGET.id}-int8.json"
    path.write_text(json.dumps(stored))
    return path


def test_a_second_calibration_leaves_the_first_ones_line_to_its_searches() -> None:
    for slope, subject in enumerate((SMALL, LARGE), 1):
        store_table(TARGET, subject, table(subject, slope))
    for slope, subject in enumerate((SMALL, LARGE), 1):
        model = cost_model(TARGET, "int8", subject)
        assert model.predict((CONV,)).latency_ms == slope * 1.5
        assert model.error_percent == 4.0
        assert "measured" in model.note
        assert subject.words in model.note


@pytest.mark.parametrize(
    ("wanted", "taken"),
    [
        (Subject("residual", (3, 64, 64), 10), LARGE),  # input before space
        (Subject("mobile-cnn", (3, 32, 32), 7), SMALL),
        (Subject("mobile-cnn", (1, 28, 28), 10), LARGE),  # the newest of equals
        (Subject("", (3, 32, 32), 10), SMALL),  # a student that was given
    ],
)
def test_the_nearest_table_is_taken(wanted: Subject, taken: Subject) -> None:
    for age, subject in enumerate((LARGE, SMALL)):
        path = store_table(TARGET, subject, table(subject))
        os.utime(path, (1e9 - age, 1e9 - age))
    found = nearest_table(TARGET, "int8", wanted)
    assert found is not None
    assert found.subject == taken


def test_the_error_of_a_table_is_not_that_of_other_students() -> None:
    store_table(TARGET, SMALL, table(SMALL))
    model = cost_model(TARGET, "int8", LARGE)
    assert model.error_percent is None
    said = told_tables(TARGET, "rpi5", "int8", LARGE, model.table)
    assert "by the table of mobile-cnn, 3x32x32, 10 classes" in said
    command = "edgekd targets calibrate rpi5 --precision int8 --image-size 64"
    assert said.endswith(f"; {command} --space mobile-cnn --classes 10 measures it")
    own = told_tables(TARGET, "rpi5", "int8", SMALL, model.table)
    assert "median error 4 %" in own
    assert "edgekd targets calibrate" not in own


def test_tables_of_another_precision_or_runtime_are_named_and_not_used() -> None:
    store_table(TARGET, SMALL, table(SMALL, precision="fp32"))
    model = cost_model(TARGET, "int8", SMALL)
    assert (model.kind, model.table) == ("roofline", None)
    said = told_tables(TARGET, "rpi5", "int8", SMALL, None)
    assert said.startswith("no table of layers is for int8 on onnxruntime, only for fp32 on onnxruntime; ")
    unit = msgspec.structs.replace(TARGET.primary, runtime="openvino")
    other = msgspec.structs.replace(TARGET, compute=(unit,))
    assert cost_model(other, "fp32", SMALL).table is None
    assert told_tables(find_target("rpi4"), "rpi4", "int8", SMALL, None) == ""


def test_the_single_table_of_an_earlier_version_is_read(cache: Path) -> None:
    old = table(SMALL)
    del old["header"]["classes"]
    path = single(cache, old)
    model = cost_model(TARGET, "int8", SMALL)
    assert model.table is not None
    assert (model.table.path, model.error_percent) == (path, 4.0)
    store_table(TARGET, LARGE, table(LARGE))
    assert path.exists()
    store_table(TARGET, SMALL, table(SMALL))
    assert not path.exists()  # measured anew


@pytest.mark.parametrize(
    "change", [{"format": 2}, {"target": "rpi4-4gb"}, {"input": None}, {"runtime": None}]
)
def test_a_table_that_cannot_be_used_is_refused_by_name(cache: Path, change: dict[str, Any]) -> None:
    path = single(cache, table(SMALL, **change))
    with pytest.raises(StorageError, match=path.name) as caught:
        cost_model(TARGET, "int8", SMALL)
    assert "edgekd targets calibrate rpi5-8gb" in caught.value.hint
    shown = CliRunner().invoke(cli, ["targets", "show", "rpi5"])
    assert shown.exit_code == 0
    assert f"unreadable: {path}" in shown.output
    store_table(TARGET, LARGE, table(LARGE))
    assert cost_model(TARGET, "int8", LARGE).error_percent == 4.0


def test_the_tables_of_a_target_are_listed() -> None:
    for subject in (SMALL, LARGE):
        store_table(TARGET, subject, table(subject))
    lines = CliRunner().invoke(cli, ["targets", "show", "rpi5"]).output.splitlines()
    listed = [line for line in lines if line.startswith("  calibrated ")]
    assert len(listed) == 2
    assert any(
        "int8, mobile-cnn, 3x32x32, 10 classes: 1 layers (median error 4 %, tau 0.95)" in x for x in listed
    )
    shown = json.loads(CliRunner().invoke(cli, ["targets", "show", "rpi5", "--json"]).output)
    assert len(shown["calibrated_tables"]) == 2
