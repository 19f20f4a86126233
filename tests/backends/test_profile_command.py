"""`edgekd profile` on files and bundles: what it prints, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from edgekd.cli import cli
from edgekd.errors import BundleError, UsageError
from edgekd.stages import files

from .small_models import residual_net, small_bundle

ONE = ("--backend", "onnxruntime", "--calls", "64")


def told(*words: object) -> str:
    result = CliRunner().invoke(cli, ["profile", *map(str, words)])
    assert result.exit_code == 0, result.output
    return result.stdout


def numbers(*words: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(told(*words, "--json"))
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return residual_net(folder / "float.onnx"), residual_net(folder / "u8.onnx", "u8")


def test_each_file_tells_the_precision_that_really_runs_and_the_time_of_its_layers(
    models: tuple[Path, Path],
) -> None:
    rows = numbers(*models, "--layers", "--calls", 64)
    for runtime in ("onnxruntime", "openvino"):
        plain, quantized = rows[f"{runtime}:float.onnx"], rows[f"{runtime}:u8.onnx"]
        assert plain["executed"] == {"f32": 1.0}
        assert quantized["executed"] == {"int8": 1.0}
        for row in (plain, quantized):
            assert row["calls"] == 80  # 40 rounds of 2
            assert row["latency_p50_ms"] > 0
            assert row["latency_p99_ms"] is None  # of 662 calls at least
            assert sum(layer["ms"] is not None for layer in row["layers"] if layer["macs"]) == 3
    assert rows["environment"]["inputs"] == [{"name": "images", "dtype": "float32", "shape": [1, 3, 16, 16]}]


def test_memory_does_not_depend_on_what_was_loaded_before(models: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.onnx").write_bytes(models[0].read_bytes())
    rows = numbers(*sorted(tmp_path.glob("*.onnx")), *ONE)
    found = [rows[f"onnxruntime:{name}.onnx"]["memory_mib"] for name in ("a", "b", "c")]
    assert min(found) > 1
    assert max(found) < min(found) + 2


def test_people_read_a_table_with_units_and_the_missing_percentile(models: tuple[Path, Path]) -> None:
    lines = told(models[1], "--layers", *ONE).splitlines()
    assert lines[0].split()[:4] == ["model", "executed", "in", "p50"]
    assert lines[1].startswith("onnxruntime:u8.onnx  int8")
    assert any("a p99 needs --calls 662" in line for line in lines)
    assert any(line.split()[1:3] == ["QLinearConv", "int8"] for line in lines)


def test_of_a_bundle_every_variant_that_runs_here_is_measured(tmp_path: Path) -> None:
    rows = numbers(small_bundle(tmp_path), *ONE)
    assert len(rows) > 1
    assert all(name == "environment" or row["latency_p50_ms"] > 0 for name, row in rows.items())


def test_sizes_that_a_file_leaves_open_are_given(tmp_path: Path) -> None:
    """Token ids and a mask, of an open length, through an embedding and a product."""
    names = ("ids", "mask")
    inputs = [helper.make_tensor_value_info(name, TensorProto.INT64, ["N", "L"]) for name in names]
    table = helper.make_tensor("table", TensorProto.FLOAT, [2, 8], [0.1] * 16)
    weight = helper.make_tensor("weight", TensorProto.FLOAT, [8, 4], [0.2] * 32)
    nodes = [
        helper.make_node("Mul", ["ids", "mask"], ["kept"]),
        helper.make_node("Gather", ["table", "kept"], ["embedded"]),
        helper.make_node("MatMul", ["embedded", "weight"], ["out"]),
    ]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["N", "L", 4])
    graph = helper.make_graph(nodes, "tokens", inputs, [out], [table, weight])
    path = tmp_path / "tokens.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    refused = CliRunner().invoke(cli, ["profile", str(path)])
    assert isinstance(refused.exception, UsageError)
    assert refused.exception.hint == "say which: --shape ids=1,64"
    rows = numbers(path, "--shape", "ids=1,16", "--shape", "mask=1,16", "--layers", "--calls", 64)
    for runtime in ("onnxruntime", "openvino"):
        row = rows[f"{runtime}:tokens.onnx"]
        assert row["executed"] == {"f32": 1.0}
        assert any(layer["ms"] is not None for layer in row["layers"])


def test_what_cannot_be_profiled_is_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    bundle = small_bundle(tmp_path)
    for words, kind, text in (
        ((models[0], "--backend", "onnxruntim"), UsageError, "unknown backend 'onnxruntim'"),
        ((models[0], "--shape", "images=1,x"), UsageError, "expected NAME=1,3,224,224"),
        ((bundle, "--on", "ssh://nobody@127.0.0.1:1"), UsageError, "on a device a file is profiled"),
        ((bundle, "--backend", "tensorrt"), BundleError, "no variant can be measured"),
    ):
        result = CliRunner().invoke(cli, ["profile", *map(str, words)])
        assert isinstance(result.exception, kind), result.output
        assert text in result.exception.message
    (bundle / "models" / "ort.onnx").write_bytes(b"")
    result = CliRunner().invoke(cli, ["profile", str(bundle)])
    assert isinstance(result.exception, BundleError)


def test_a_file_runs_on_the_runtimes_that_are_installed(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "find_spec", lambda name: None if name == "openvino" else object())
    rows = numbers(models[0], "--calls", 64)
    assert set(rows) == {"onnxruntime:float.onnx", "environment"}
