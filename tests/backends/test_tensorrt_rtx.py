"""What can be proved about TensorRT without a GPU: parse and ahead-of-time build."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("onnx")
pytest.importorskip("tensorrt_rtx")

import torch
from torch import nn

from edgekd import export
from edgekd.backends import backend
from edgekd.backends.tensorrt import TensorRtBackend, _has_gpu, prove_build
from edgekd.errors import BackendError
from edgekd.quantize.capture import capture
from edgekd.quantize.fakequant import activation_bits, calibrate, find_sites, insert, parameters_of
from edgekd.quantize.lower import lower
from edgekd.quantize.scheme import scheme_for
from edgekd.spec import ModelSpec, Preprocessing
from edgekd.target import find_target

from .small_models import residual_net, zero_u8_net

pytestmark = pytest.mark.backends


def test_symmetric_signed_graph_builds_for_the_stand_in_of_orin(tmp_path: Path) -> None:
    proof = prove_build(residual_net(tmp_path / "s8.onnx", "s8"), "8.7")
    assert proof.ok is True
    assert (proof.compute_capability_target, proof.compute_capability_built) == ("SM87", "SM86")
    assert proof.substituted
    assert "stands in for SM87" in proof.message
    assert "nothing was executed" in proof.message
    assert proof.runtime.startswith("tensorrt-rtx ")
    assert proof.engine_mib is not None
    assert proof.engine_mib > 0
    assert proof.warnings == ()


def test_a_known_target_is_not_substituted(tmp_path: Path) -> None:
    proof = prove_build(residual_net(tmp_path / "s8.onnx", "s8"), "8.6")
    assert proof.ok is True
    assert not proof.substituted
    assert "stands in" not in proof.message


@pytest.mark.parametrize(("activations", "zero_point"), [("u8", 0), ("s8", 3)])
def test_non_zero_zero_point_is_refused_in_the_parsers_words(
    activations: str, zero_point: int, tmp_path: Path
) -> None:
    proof = prove_build(residual_net(tmp_path / "m.onnx", activations, zero_point=zero_point), "8.7")
    assert proof.ok is False
    assert "Non-zero zero point is not supported" in proof.message
    assert proof.engine_mib is None


def test_unsigned_graph_that_would_silently_become_signed_is_refused(tmp_path: Path) -> None:
    proof = prove_build(zero_u8_net(tmp_path / "u8.onnx"), "8.7")
    assert proof.ok is False
    assert "UINT8" in proof.message
    assert any("UINT8" in warning for warning in proof.warnings)


def test_a_refusal_of_the_compiler_is_told(tmp_path: Path) -> None:
    proof = prove_build(residual_net(tmp_path / "s8.onnx", "s8"), "7.5")
    assert proof.ok is False
    assert proof.compute_capability_built == "SM75"
    assert "Turing" in proof.message


@pytest.mark.parametrize("compute_capability", ["7.2", "6.1", "9.0", "11.0"])
def test_a_target_without_a_stand_in_is_not_judged(compute_capability: str, tmp_path: Path) -> None:
    proof = prove_build(residual_net(tmp_path / "s8.onnx", "s8"), compute_capability)
    assert proof.ok is None
    assert proof.compute_capability_built == ""
    assert "nothing was built" in proof.message


def test_files_that_are_no_graphs(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"garbage" * 20)
    assert prove_build(broken, "8.7").ok is False
    with pytest.raises(BackendError, match="no such file"):
        prove_build(tmp_path / "absent.onnx", "8.7")


def test_backend_tells_its_version() -> None:
    assert TensorRtBackend().version().startswith(("tensorrt ", "tensorrt-rtx "))


@pytest.mark.skipif(_has_gpu(), reason="has a GPU")
def test_without_a_gpu_nothing_runs(tmp_path: Path) -> None:
    engine = backend("tensorrt")
    assert engine.precisions() == ()
    assert engine.device() == "no NVIDIA GPU"
    with pytest.raises(BackendError, match="no NVIDIA GPU here; the engine is built on the device"):
        engine.open(tmp_path / "m.onnx")
    with pytest.raises(BackendError, match="on the device"):
        engine.coverage(tmp_path / "m.onnx")


def test_activations_of_4_bits_in_an_8_bit_container_build(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, 2, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip
    spec = ModelSpec(Preprocessing(16, 16, "rgb", (0.0,) * 3, (1.0,) * 3), ("a", "b", "c", "d"))
    graph, scheme = capture(model, spec.input_shape), scheme_for(find_target("jetson"))
    sites = find_sites(graph, scheme)
    bits = activation_bits(sites, 4, {})
    grids = calibrate(graph, sites, [torch.randn(32, 3, 16, 16)], scheme, "mse", bits)
    assert min(bits.values()) == 4
    parameters = parameters_of(insert(graph, sites, grids, scheme).eval(), sites)
    export.save(lower(export.to_onnx(graph, spec), parameters, sites, "int8"), tmp_path / "int8.onnx")
    proof = prove_build(tmp_path / "int8.onnx", "8.7")
    assert proof.ok is True and proof.warnings == ()
