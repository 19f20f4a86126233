"""A table whose layers another device lent: networks alone are measured, and the line leads to them."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from edgekd.calibrated import StoredTable, Subject, lent_table, store_table
from edgekd.cli import cli
from edgekd.cost import cost_model, layer_key, sum_of_layers
from edgekd.errors import UsageError
from edgekd.layer_files import one_layer
from edgekd.profiler import HERE
from edgekd.spaces import search_space
from edgekd.spec import LayerShape, ModelSpec, Preprocessing
from edgekd.stages.calibrate import Wanted, calibrate, drawn
from edgekd.target import find_target

pytestmark = [pytest.mark.backends, pytest.mark.slow]
SPEC = ModelSpec(Preprocessing(16, 16, "rgb", (0.5,) * 3, (0.5,) * 3), ("a", "b"))
SUBJECT = Subject("mobile-cnn", (3, 16, 16), 2)
TARGET, LENDER = find_target("avx2"), find_target("rpi5")
COUNT = 14


@pytest.fixture(autouse=True)
def lent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StoredTable:
    """Layers take a millisecond for each million of multiply-accumulates on the lender."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("edgekd.stages.calibrate.is_this_machine", lambda target: True)
    space = search_space("mobile-cnn", SPEC, 8, (3, 5))
    layers = (layer for genome in drawn(space.choices, 40, 0) for layer in space.layers(genome))
    header = {"format": 3, "target": LENDER.id, "precision": "fp32", "runtime": "onnxruntime 1.0"}
    of = {"device": "a Pi", "clock": "cpu", "space": "mobile-cnn", "input": [3, 16, 16], "classes": 2}
    entries = {layer_key(layer): 1e-3 + 1e-6 * layer.macs for layer in layers if layer.op != "add"}
    table = {"header": header | of, "line": {}, "validation": {}, "entries_ms": {"empty": 0.01} | entries}
    store_table(LENDER, SUBJECT, table)
    return lent_table(LENDER, "fp32", SUBJECT)


def networks(folder: Path) -> None:
    """Stand in for students of the space: wider ones take longer."""
    for number in range(COUNT):
        layer = LayerShape("conv", 3, 8 * (1 + number), kernel=5, size_in=16)
        (folder / f"mobile-cnn-fp32-{number}.onnx").write_bytes(one_layer(layer, None))


def test_networks_alone_are_measured_and_the_layers_are_the_lenders(
    lent: StoredTable, tmp_path: Path
) -> None:
    networks(tmp_path)
    said: list[str] = []
    wanted = Wanted("mobile-cnn", SPEC, "fp32", candidates=40, networks=COUNT, lent=lent)
    table = calibrate(TARGET, [HERE], wanted, said.append, tmp_path)
    assert said[-1] == f"{COUNT} of {COUNT} layers and networks measured"
    assert table["entries_ms"] == lent.entries_ms
    model = cost_model(TARGET, "fp32", SUBJECT)
    assert model.table is not None
    assert model.table.header.layers_of == "a Pi with onnxruntime 1.0"
    assert "on a Pi with onnxruntime 1.0" in model.note
    assert f"moved to {model.device} with {table['header']['runtime']}" in model.note
    assert len(table["validation"]["predicted_ms"]) == COUNT
    space = search_space("mobile-cnn", SPEC, 8, (3, 5))
    layers = space.layers(drawn(space.choices, 40, 0)[0])
    assert model.predict(layers).latency_ms != sum_of_layers(lent.entries_ms, layers)
    shown = CliRunner().invoke(cli, ["targets", "show", "avx2"]).output
    assert "layers of a Pi with onnxruntime 1.0" in shown


def test_layers_are_lent_by_those_that_measured_them_and_too_few_networks_refused(lent: StoredTable) -> None:
    moved = msgspec.structs.replace(lent.header, target=TARGET.id, layers_of="a Pi")
    table = {"line": {}, "validation": {}, "entries_ms": lent.entries_ms}
    store_table(TARGET, SUBJECT, table | {"header": msgspec.to_builtins(moved)})
    for target in (TARGET, find_target("jetson")):
        with pytest.raises(UsageError, match="no table of fp32 layers for mobile-cnn") as caught:
            lent_table(target, "fp32", SUBJECT)
        assert caught.value.hint.startswith(f"edgekd targets calibrate {target.id} --precision fp32")
    few = msgspec.structs.replace(lent, entries_ms=dict(list(lent.entries_ms.items())[:60]))
    for lender, count, told in (
        (lent, 3, "3 networks do not show"),
        (few, COUNT, "of 40 students consist of"),
    ):
        wanted = Wanted("mobile-cnn", SPEC, "fp32", candidates=40, networks=count, lent=lender)
        with pytest.raises(UsageError, match=told):
            calibrate(TARGET, [HERE], wanted, print)
    with pytest.raises(UsageError, match="cannot lend its layers to itself"):
        calibrate(LENDER, [HERE], Wanted("mobile-cnn", SPEC, "fp32", lent=lent), print)
