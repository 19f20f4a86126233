"""Predicted costs: a roofline that can be checked by hand, and a table of measured layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgekd import cost
from edgekd.backends import backend
from edgekd.calibrated import Subject, store_table
from edgekd.cost import LayerTable, Line, Roofline, cost_model, layer_key, size_mib
from edgekd.errors import MissingExtraError, StorageError
from edgekd.layer_files import codes_of, input_of, one_layer
from edgekd.spec import LayerShape
from edgekd.target import Quantity, Target, all_targets, find_target

CONV = LayerShape("conv", 8, 16, 3, 2, 1, 16, relu=True)
LAYERS = {
    "dense": CONV,
    "pointwise": LayerShape("conv", 8, 16, size_in=16),
    "depthwise": LayerShape("conv", 16, 16, 5, 1, 16, 8, relu=True),
    "linear": LayerShape("linear", 16, 4),
    "add": LayerShape("add", 16, 16, size_in=8, relu=True),
    "pool": LayerShape("pool", 16, 16, size_in=8),
    "avgpool": LayerShape("avgpool", 16, 16, 3, size_in=8),
    "attention": LayerShape("attention", 16, 16, groups=2, size_in=8),
}


def quantity(value: float, confidence: Any = "measured") -> Quantity:
    return Quantity(value=value, source="this test", confidence=confidence)


def card(peak: dict[str, Quantity], bandwidth: dict[str, Quantity], achieved: Any = None) -> Target:
    target = find_target("jetson")
    unit = msgspec.structs.replace(target.compute[0], peak=peak, bandwidth=bandwidth, achieved=achieved or {})
    return msgspec.structs.replace(target, compute=(unit,))


# ---------------------------------------------------------------- layers


def test_a_convolution_counts_what_it_computes_and_moves() -> None:
    assert CONV.size_out == 8
    assert CONV.macs == 16 * 8 * 3 * 3 * 8 * 8
    assert CONV.parameters == 16 * 8 * 9 + 16
    assert CONV.values_moved == 8 * 16 * 16 + 16 * 8 * 8 + CONV.parameters


def test_a_depthwise_convolution_has_one_filter_a_channel() -> None:
    assert LAYERS["depthwise"].macs == 16 * 25 * 64
    assert LAYERS["depthwise"].parameters == 16 * 25 + 16


def test_additions_and_pools_have_no_weights() -> None:
    for name in ("add", "pool", "avgpool"):
        assert LAYERS[name].macs == LAYERS[name].parameters == 0
    assert LAYERS["attention"].parameters == 0


def test_attention_multiplies_all_pixels_with_all_pixels_twice() -> None:
    assert LAYERS["attention"].macs == 2 * 64 * 64 * 16
    assert LAYERS["attention"].values_moved == 4 * 16 * 64 + 2 * 2 * 64 * 64


def test_additions_read_two_maps() -> None:
    assert LAYERS["add"].values_moved == 3 * 16 * 64


@pytest.mark.parametrize(("precision", "size"), [("int8", 1), ("fp16", 2), ("bf16", 2), ("fp32", 4)])
def test_size_is_that_of_the_weights_at_their_precision(precision: str, size: int) -> None:
    assert size_mib((CONV, LAYERS["linear"]), precision) == pytest.approx((1168 + 68) * size / 2**20)


# ---------------------------------------------------------------- roofline


def test_a_layer_bound_by_memory_takes_its_bytes_over_the_bandwidth() -> None:
    """4240 bytes at 10 GB/s are 0.424 us; 73,728 MACs at 1 TOPS are 0.147 us; a launch is 3 us."""
    model = Roofline(card({"int8_tops": quantity(1.0)}, {"dram_gbs": quantity(10.0)}), "int8")
    assert CONV.values_moved == 4240
    assert model.predict((CONV,)).latency_ms == pytest.approx(0.000424 + 0.003)
    assert model.predict((CONV, CONV)).latency_ms == pytest.approx(2 * (0.000424 + 0.003))


def test_a_layer_bound_by_compute_takes_its_operations_over_the_rate() -> None:
    """147,456 operations at 0.1 TOPS are 1.47456 us."""
    model = Roofline(card({"int8_tops": quantity(0.1)}, {"dram_gbs": quantity(10.0)}), "int8")
    assert model.predict((CONV,)).latency_ms == pytest.approx(0.00147456 + 0.003)


def test_an_achieved_rate_replaces_the_peak_for_its_kind_of_layer() -> None:
    peak, bandwidth = {"fp32_gflops": quantity(100.0)}, {"copy_gbs": quantity(1e6)}
    achieved = {"conv3x3_gflops": quantity(10.0), "depthwise3x3_gflops": quantity(1.0)}
    model = Roofline(card(peak, bandwidth, achieved), "fp32")
    for name, gflops in (("dense", 10), ("depthwise", 1), ("pointwise", 100)):
        exact = 2 * LAYERS[name].macs / gflops / 1e6 + 0.003
        assert model.predict((LAYERS[name],)).latency_ms == pytest.approx(exact)


def test_an_addition_is_fused_and_costs_nothing() -> None:
    model = Roofline(card({"int8_tops": quantity(1.0)}, {"dram_gbs": quantity(10.0)}), "int8")
    assert model.predict((CONV, LAYERS["add"])) == model.predict((CONV,))


def test_float_values_move_four_times_the_bytes() -> None:
    target = card({"int8_tops": quantity(100.0), "fp32_gflops": quantity(1e5)}, {"dram_gbs": quantity(1.0)})
    times = [Roofline(target, precision).predict((CONV,)).latency_ms for precision in ("int8", "fp32")]
    assert times[0] is not None
    assert times[1] is not None
    assert times[1] - 0.003 == pytest.approx(4 * (times[0] - 0.003))


def test_without_numbers_the_latency_is_unknown_and_the_size_is_not() -> None:
    for peak, bandwidth in (({}, {"dram_gbs": quantity(1.0)}), ({"int8_tops": quantity(1.0)}, {})):
        model = Roofline(card(peak, bandwidth), "int8")
        found = model.predict((CONV,))
        assert found.latency_ms is None
        assert found.size_mib > 0
        assert model.error_percent is None
        assert "latency is unknown, a limit on it is not checked" in model.note


def test_unverified_numbers_are_named_when_they_are_used() -> None:
    peak = {"int8_tops": quantity(1.0, "unverified"), "fp32_gflops": quantity(1.0, "unverified")}
    model = Roofline(card(peak, {"dram_gbs": quantity(1.0)}), "int8")
    assert model.unverified == ("compute[0].peak.int8_tops",)


@pytest.mark.slow
@pytest.mark.parametrize("name", all_targets())
@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_every_card_gives_a_prediction_or_none(name: str, precision: str) -> None:
    found = Roofline(all_targets()[name], precision).predict(tuple(LAYERS.values()))
    assert found.latency_ms is None or 0 < found.latency_ms < 1e3
    assert found.size_mib > 0


# ---------------------------------------------------------------- measured table


class _Engine:
    """A runtime that runs nothing."""

    name = "openvino"

    def __init__(self, version: str = "1.0") -> None:
        self._version, self.opened = version, 0

    def version(self) -> str:
        return self._version

    def device(self) -> str:
        return "a test"

    def open(self, path: Path, threads: int) -> Any:
        self.opened += 1
        return path.stat().st_size


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> _Engine:
    made = _Engine()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cost, "backend", lambda name: made)
    sizes = lambda loaded: [{"cpu": images.size * 1e-3} for _, images in loaded]  # noqa: E731
    monkeypatch.setattr(cost, "in_turns", sizes)
    return made


def table(precision: str = "int8") -> LayerTable:
    return LayerTable(find_target("x86"), precision)


def test_a_table_sums_its_layers_above_an_empty_call(engine: _Engine) -> None:
    found = table().predict((CONV, LAYERS["pointwise"], CONV))
    assert found.latency_ms == pytest.approx(0.001 + 3 * (8 * 16 * 16 - 1) * 1e-3)
    assert engine.opened == 3  # an empty call and two different layers


def test_an_addition_is_part_of_the_convolution_before_it(engine: _Engine) -> None:
    assert table().predict((CONV, LAYERS["add"])).latency_ms == table().predict((CONV,)).latency_ms


def test_a_line_takes_off_borders_and_adds_cold_weights() -> None:
    """The convolution reads and writes 3072 values and has 1168 parameters; an addition counts nothing."""
    entries = {"empty": 0.25, layer_key(CONV): 0.75}
    line = Line(offset_ms=0.5, slope=2.0, border_ms=1e-5, weight_ms=1e-4, attention=3.0)
    exact = 0.5 + 2 * 1.0 - 3072e-5 + 1168e-4
    assert line.predict(entries, (CONV, LAYERS["add"])) == pytest.approx(exact)
    assert Line().predict(entries, (CONV,)) == 1.0
    assert Line(border_ms=1.0).predict(entries, (CONV,)) == pytest.approx(0.1)


def test_attention_has_a_further_slope_of_its_own() -> None:
    layer = LAYERS["attention"]
    entries = {"empty": 0.25, layer_key(CONV): 0.75, layer_key(layer): 0.5}
    assert Line(attention=0.6).predict(entries, (CONV, layer, layer)) == pytest.approx(2.0 + 0.6 * 1.0)


def test_codes_are_those_that_a_target_has_after_a_relu() -> None:
    found = {name: codes_of(find_target(name)) for name in ("x86", "rpi5", "jetson")}
    assert {name: (code.dtype.name, int(code)) for name, code in found.items()} == {
        "x86": ("uint8", 0), "rpi5": ("int8", -128), "jetson": ("int8", 0)
    }  # fmt: skip


def test_a_stored_table_measures_nothing_again(engine: _Engine) -> None:
    first = table()
    exact = first.predict(tuple(LAYERS.values()))
    first.close()
    opened = engine.opened
    assert table().predict(tuple(LAYERS.values())) == exact
    assert engine.opened == opened


def test_a_table_of_another_runtime_or_precision_is_not_used(engine: _Engine) -> None:
    first = table()
    first.predict((CONV,))
    first.close()
    opened = engine.opened
    table("fp32").predict((CONV,))
    assert engine.opened == opened + 2
    engine._version = "2.0"
    table().predict((CONV,))
    assert engine.opened == opened + 4


def test_a_file_with_another_header_is_not_used(engine: _Engine, tmp_path: Path) -> None:
    first = table()
    first.predict((CONV,))
    first.close()
    (path,) = (tmp_path / "edgekd").iterdir()
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"header": stored["header"] | {"device": "another"}}))
    opened = engine.opened
    table().predict((CONV,))
    assert engine.opened == opened + 2


def test_a_cache_that_cannot_be_written_costs_time_and_no_result(
    engine: _Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/x")
    first = table()
    assert first.predict((CONV,)).latency_ms
    first.close()


def test_a_damaged_cache_is_named(engine: _Engine, tmp_path: Path) -> None:
    first = table()
    first.predict((CONV,))
    first.close()
    (path,) = (tmp_path / "edgekd").iterdir()
    path.write_text("{")
    with pytest.raises(StorageError, match=path.name):
        table()


@pytest.mark.parametrize("runtime", ["openvino 1.0", "openvino 0.9"])
def test_a_layer_that_a_calibration_lacks_is_measured_where_it_was_made(
    engine: _Engine, monkeypatch: pytest.MonkeyPatch, runtime: str
) -> None:
    monkeypatch.setattr(cost, "is_this_machine", lambda target: True)
    target, pointwise = find_target("x86"), LAYERS["pointwise"]
    header = {"format": 3, "target": target.id, "precision": "int8", "runtime": runtime, "device": "a test",
              "clock": "cpu", "space": "mobile-cnn", "input": [3, 16, 16], "classes": 2}  # fmt: skip
    line = {"offset_ms": 0.0, "slope": 2.0, "border_ms": 0.0, "weight_ms": 0.0}
    table = {
        "header": header,
        "line": line,
        "validation": {},
        "entries_ms": {"empty": 0.5, layer_key(CONV): 1.0},
    }
    store_table(target, Subject("mobile-cnn", (3, 16, 16), 2), table)
    model = cost_model(target, "int8")
    found = model.predict((CONV, pointwise)).latency_ms
    same = runtime.endswith(f" {engine.version()}")
    alone = (8 * 16 * 16 - 1) * 1e-3
    assert (found == pytest.approx(2 * (0.5 + 1.0 + alone))) == same
    assert ("1 layers that the table lacks were measured" in model.note) == same
    assert engine.opened == (2 if same else 0)
    model.close()
    assert cost_model(target, "int8").predict((CONV, pointwise)).latency_ms == found
    assert engine.opened == (2 if same else 0)


def test_a_machine_without_runtime_falls_back_to_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise MissingExtraError("no runtime")

    monkeypatch.setattr(cost, "backend", missing)
    monkeypatch.setattr(cost, "is_this_machine", lambda target: True)
    assert cost_model(find_target("x86"), "int8").kind == "roofline"


def test_another_machines_target_uses_its_card() -> None:
    assert cost_model(find_target("jetson"), "int8").kind == "roofline"


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "add"])
@pytest.mark.parametrize("codes", [np.uint8(0), np.int8(-128), None])
def test_every_kind_of_layer_becomes_a_file_that_runs(
    name: str, codes: np.generic | None, tmp_path: Path
) -> None:
    layer = LAYERS[name]
    (tmp_path / "layer.onnx").write_bytes(one_layer(layer, codes))
    session = backend("onnxruntime").open(tmp_path / "layer.onnx")
    dtype, shape = input_of(layer, codes)
    out = np.asarray(session.run(np.zeros(shape, dtype)))
    size = (layer.size_out,) * 2 if layer.op != "linear" else ()
    assert out.shape == (1, layer.channels_out, *size)
    assert out.dtype == dtype
