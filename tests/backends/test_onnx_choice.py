"""Which candidate of an ONNX file is kept, in which words, and what a failed run leaves behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from edgekd.cli import cli
from edgekd.errors import EdgekdError, InfeasibleBudgetError, UnsupportedModelError, UsageError
from edgekd.quantize.onnx_file import load_float
from edgekd.quantize.samples import Pixels
from edgekd.run import Silent
from edgekd.stages.onnx_choice import Wanted, choose
from edgekd.stages.onnx_parity import NOT_TAKEN, overflows, parity_rows
from edgekd.stages.quantize_file import KEPT, PAGE, RECORD, quantize_file
from edgekd.target import find_target

from .file_models import SIZE, cnn, pictures, store_pictures

pytestmark = pytest.mark.backends


def row(
    name: str, form: str, drop: float, cpu: float, size: float = 1.0, by: str = "edgekd"
) -> dict[str, Any]:
    measured = {"drop": drop, "cpu_p50_ms": cpu, "latency_p50_ms": cpu, "size_mib": size}
    return {"id": name, "form": form, "engine": by, "reason": ""} | measured


def wanted(target: str = "x86", **more: Any) -> Wanted:
    return Wanted(Path("m.onnx"), find_target(target), "d.npz", Path("out"), **more)


def test_float_for_another_device_is_said_to_be_kept_because_int8_loses_too_much() -> None:
    rows = [row("fp32", "fp32", 0, 1), row("int8-a", "int8", 12.7, 1), row("mixed-a", "mixed", 6.8, 1)]
    chosen, reason = choose(rows, 3.0, wanted("rpi5"), quantized=True)
    assert chosen["id"] == "fp32"
    assert "because mixed-a is outside: 6.80 points lost, at most 3" in reason and "card" not in reason


def test_a_file_of_another_engine_is_not_kept_for_a_device_whose_dialect_it_does_not_follow() -> None:
    rows = [row("fp32", "fp32", 0, 1), row("ours", "int8", 0.4, 1), row("nncf", "int8", 0.1, 1, by="nncf")]
    assert choose(rows, 1.0, wanted("jetson"), quantized=True)[0]["id"] == "ours"
    assert choose(rows[::2], 1.0, wanted("jetson"), quantized=True)[0]["id"] == "fp32"


def test_the_nearest_candidate_is_the_one_that_is_least_over() -> None:
    rows = [row("fp32", "fp32", 0.0, 1.0, 4.0), row("int8", "int8", 0.1, 0.9, 1.0)]
    with pytest.raises(InfeasibleBudgetError, match=r"the nearest is int8: 1 MiB, at most 0\.5"):
        choose(rows, 1.0, wanted(max_size_mib=0.5), quantized=True)


def test_differences_that_are_next_to_nothing_are_no_overflow() -> None:
    def rows(old: float, largest: float = 20.0) -> list[dict[str, Any]]:
        shared = {"file": "q.onnx", "reason": "", "top1_agreement": 1.0, "largest": largest}
        return [shared | {"executor": "openvino", "max_abs": 0.0},
                shared | {"executor": "openvino AVX2", "max_abs": old}]  # fmt: skip

    assert overflows(rows(0.1)) == []
    assert overflows(rows(6.0)) == ["q.onnx: 300 times the difference, the same class on 100 % of a batch"]
    assert overflows(rows(6.0, largest=0.0)) == [
        "q.onnx: other outputs than 0, the same class on 100 % of a batch"
    ]


def test_a_dialect_that_openvino_does_not_take_says_so_beside_the_numbers(tmp_path: Path) -> None:
    path = cnn(tmp_path / "m.onnx")
    inputs = tmp_path / "x.npz"
    np.savez(inputs, x=pictures(8).transpose(0, 3, 1, 2).astype(np.float32) / 255)
    found = {one["executor"]: one["reason"] for one in parity_rows(path, inputs, "arm-s8")}
    assert found["onnxruntime"] == "" and found["openvino"] == NOT_TAKEN["arm-s8"]


def test_a_run_that_fails_leaves_no_result_of_an_earlier_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    good = Wanted(
        cnn(tmp_path / "m.onnx"), find_target("x86"), str(store_pictures(tmp_path / "d.npz")), out,
        calibrators=("min-max",), calibration_images=16,
    )  # fmt: skip
    quantize_file(good, Silent())
    assert all((out / name).exists() for name in (RECORD, PAGE, KEPT))
    with pytest.raises(InfeasibleBudgetError):
        quantize_file(replace(good, max_size_mib=1e-4), Silent())
    assert not any((out / name).exists() for name in (RECORD, PAGE, KEPT))
    inside = cnn(out / KEPT)
    with pytest.raises(UsageError, match="would replace"):
        quantize_file(replace(good, model=inside), Silent())
    assert inside.exists()


@pytest.mark.parametrize(
    ("opset", "error", "told"),
    [
        (99, UnsupportedModelError, r"bad\.onnx: opset 99 cannot be brought to 22"),
        (12, UnsupportedModelError, r"Load model from .*/bad\.onnx"),
    ],
)
def test_an_opset_that_no_runtime_reads_names_the_file(
    opset: int, error: type[EdgekdError], told: str, tmp_path: Path
) -> None:
    model = onnx.load(cnn(tmp_path / "m.onnx"))
    model.opset_import[0].version = opset
    if opset == 12:  # a graph of another opset than it states
        model.graph.node.append(onnx.helper.make_node("ReduceMean", ["a", "axes"], ["unused"], "late"))
        model.graph.initializer.append(onnx.helper.make_tensor("axes", onnx.TensorProto.INT64, [1], [2]))
    onnx.save(model, tmp_path / "bad.onnx")
    with pytest.raises(error, match=told) as caught:
        load_float(tmp_path / "bad.onnx")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--set", "quantize.weight_bits=4"], "quantize.weight_bits: of a student"),
        (["--quantize", "none"], "--quantize: not an option"),
        (["--set", "quantize.calibrator=magic"], "unknown calibrator 'magic'"),
    ],
)
def test_what_would_do_nothing_for_a_file_is_refused_before_any_work(
    more: list[str], told: str, tmp_path: Path
) -> None:
    done = CliRunner().invoke(
        cli,
        ["quantize", str(cnn(tmp_path / "m.onnx")), "--data", "d.npz", "--out", str(tmp_path / "o"), *more],
    )
    assert isinstance(done.exception, UsageError)
    assert told in done.exception.message
    assert not (tmp_path / "o").exists()


def test_sensitivity_is_measured_when_asked_and_the_page_names_kernels(tmp_path: Path) -> None:
    job = Wanted(
        cnn(tmp_path / "m.onnx"), find_target("x86"), str(store_pictures(tmp_path / "d.npz")),
        tmp_path / "out", calibrators=("min-max",), calibration_images=16, sensitivity=True,
    )  # fmt: skip
    record = quantize_file(job, Silent())
    assert len(record["sensitivity"]["x86-u8-relu0"]) >= 4
    page = (job.folder / PAGE).read_text()
    assert "Sensitivity of the operators" in page and "3 QLinearConv int8" in page


def test_open_height_and_width_are_built_for_the_shape_of_the_samples(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    job = Wanted(
        cnn(tmp_path / "m.onnx", shape=("N", 3, "H", "W")), find_target("jetson"),
        str(store_pictures(tmp_path / "d.npz")), tmp_path / "out",
        Pixels(size=SIZE), calibrators=("min-max",), calibration_images=16,
    )  # fmt: skip
    record = quantize_file(job, Silent())
    assert record["build"]["ok"] is True, record["build"]
    assert "TensorRT, built: " in (job.folder / PAGE).read_text()
