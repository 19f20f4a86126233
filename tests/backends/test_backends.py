"""One contract for every runtime that can execute on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

from edgekd.backends import Layer, backend, backend_names, processor_name
from edgekd.backends.macs import Compute, Executed, assign, compute_nodes
from edgekd.backends.onnxruntime import OnnxRuntimeBackend
from edgekd.errors import BackendError, UsageError

from .small_models import MACS, SHAPE, residual_net

pytestmark = pytest.mark.backends
RUNTIMES = ("onnxruntime", "openvino")
Models = Callable[..., Path]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")

    def path(activations: str = "float", zero_point: int = 0) -> Path:
        file = folder / f"{activations}{zero_point}.onnx"
        return file if file.exists() else residual_net(file, activations, zero_point=zero_point)

    return path


def images(count: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, *SHAPE), dtype=np.float32)


def compute(layers: tuple[Layer, ...]) -> list[Layer]:
    return [layer for layer in layers if layer.macs]


@pytest.mark.parametrize("name", RUNTIMES)
def test_tells_version_device_and_precisions(name: str) -> None:
    engine = backend(name)
    assert engine.name == name
    assert engine.version()[0].isdigit()
    assert engine.device()
    assert {"f32", "int8"} <= set(engine.precisions()) <= {"f32", "bf16", "f16", "int8"}


@pytest.mark.parametrize("name", RUNTIMES)
def test_runs_any_batch_and_each_image_alone_gives_the_same(name: str, models: Models) -> None:
    batch = images(5)
    session = backend(name).open(models())
    together = session.run(batch)
    assert together.shape == (5, 10)
    assert together.dtype == np.float32
    for position in range(5):
        alone = session.run(batch[position : position + 1])
        np.testing.assert_allclose(alone, together[position : position + 1], atol=1e-5)


@pytest.mark.parametrize("name", RUNTIMES)
def test_results_of_earlier_calls_stay(name: str, models: Models) -> None:
    session = backend(name).open(models())
    first = session.run(images(1))
    kept = first.copy()
    session.run(-images(1))
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("name", RUNTIMES)
def test_read_only_and_strided_images_are_taken(name: str, models: Models) -> None:
    batch = images(2)
    session = backend(name).open(models())
    expected = session.run(batch[:, :, ::-1].copy())
    np.testing.assert_allclose(session.run(batch[:, :, ::-1]), expected, atol=1e-6)
    frozen = batch.copy()
    frozen.setflags(write=False)
    np.testing.assert_allclose(session.run(frozen), session.run(batch), atol=1e-6)


@pytest.mark.parametrize("activations", ["float", "s8"])
def test_float_and_reference_executors_agree(activations: str, models: Models) -> None:
    model = models(activations)
    reference = OnnxRuntimeBackend().open(model, optimize=False).run(images(4))
    for name in RUNTIMES:
        logits = backend(name).open(model).run(images(4))
        limit = 1e-4 if activations == "float" else 0.1  # one step of the output's grid is 0.03
        assert np.abs(logits - reference).max() <= limit, name


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_fixed_batch_takes_only_that_batch(name: str, models: Models) -> None:
    session = backend(name).open(models("u8"), batch=2)
    assert session.run(images(2)).shape == (2, 10)
    with pytest.raises(BackendError, match="batch 2, got 3"):
        session.run(images(3))


@pytest.mark.parametrize("name", RUNTIMES)
def test_wrong_images_are_a_backend_error(name: str, models: Models) -> None:
    session = backend(name).open(models())
    wrongs: tuple[Any, ...] = (images(1)[:, :2], images(1).astype(np.float64))
    for wrong in wrongs:
        with pytest.raises(BackendError, match=name):
            session.run(wrong)


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("content", [None, b"", b"garbage" * 20])
def test_a_broken_file_is_a_backend_error(name: str, content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "broken.onnx"
    if content is not None:
        file.write_bytes(content)
    for use in (backend(name).open, backend(name).coverage):
        with pytest.raises(BackendError, match=r"broken\.onnx"):
            use(file)


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("precision", ["int8", "f16", "fp32"])
def test_a_precision_that_float_operators_cannot_have_is_refused(
    name: str, precision: str, models: Models
) -> None:
    for use in (backend(name).open, backend(name).coverage):
        with pytest.raises(BackendError, match=precision):
            use(models(), precision=precision)


def test_unknown_backend_names_the_nearest() -> None:
    with pytest.raises(UsageError) as caught:
        backend("onnxruntim")
    assert "onnxruntime" in caught.value.hint
    assert set(RUNTIMES) < set(backend_names())


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("activations", ["float", "u8", "s8"])
def test_coverage_counts_every_product_once(name: str, activations: str, models: Models) -> None:
    layers = compute(backend(name).coverage(models(activations)).layers)
    assert sorted(layer.macs for layer in layers) == sorted(MACS)


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_fully_quantized_u8_graph_runs_in_integers(name: str, models: Models) -> None:
    coverage = backend(name).coverage(models("u8"))
    assert coverage.int8_nodes == 1.0
    assert coverage.int8_macs == 1.0
    assert not any(layer.reason for layer in coverage.layers)


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_float_graph_has_no_integer_kernel(name: str, models: Models) -> None:
    coverage = backend(name).coverage(models())
    assert {layer.precision for layer in coverage.layers} == {"f32"}
    assert coverage.int8_nodes == coverage.int8_macs == 0.0


@pytest.mark.parametrize("name", RUNTIMES)
def test_layer_times_are_there_when_asked_for(name: str, models: Models) -> None:
    engine = backend(name)
    timed = compute(engine.coverage(models("u8"), time_layers=True).layers)
    assert all(layer.ms is not None for layer in timed)
    assert sum(layer.ms or 0.0 for layer in timed) > 0
    assert all(layer.ms is None for layer in engine.coverage(models("u8")).layers)


def test_onnxruntime_tells_why_signed_activations_stay_in_float(models: Models) -> None:
    coverage = backend("onnxruntime").coverage(models("s8"))
    reasons = {layer.name: layer.reason for layer in compute(coverage.layers) if layer.precision == "f32"}
    assert reasons == {
        "conv1": "signed s8 activation after Relu (output)",
        "conv2": "signed s8 activation after Relu (input)",
    }
    assert coverage.int8_nodes == pytest.approx(1 / 3)
    assert coverage.int8_macs == pytest.approx(MACS[2] / sum(MACS))


def test_openvino_runs_symmetric_signed_activations_in_integers(models: Models) -> None:
    assert backend("openvino").coverage(models("s8")).int8_nodes == 1.0


def test_openvino_float_kernel_with_integer_output_is_not_called_integer(models: Models) -> None:
    coverage = backend("openvino").coverage(models("s8", 3))
    floats = [layer for layer in compute(coverage.layers) if layer.precision == "f32"]
    assert [layer.name for layer in floats] == ["conv1", "conv2"]
    assert all("float input" in layer.reason for layer in floats)


def test_openvino_bf16_is_executed_where_the_cpu_has_it(models: Models) -> None:
    engine = backend("openvino")
    if "bf16" not in engine.precisions():
        pytest.skip("this CPU has no bf16")
    assert {layer.precision for layer in compute(engine.coverage(models(), precision="bf16").layers)} == {
        "bf16"
    }
    plain, short = (engine.open(models(), precision=name).run(images(1)) for name in ("f32", "bf16"))
    assert 0 < np.abs(plain - short).max() < 0.05


def test_products_of_the_file_are_counted_at_batch_one(models: Models) -> None:
    nodes = compute_nodes(models("u8"))
    assert [(node.name, node.kind, node.macs, node.weight) for node in nodes] == [
        ("conv1", "conv", MACS[0], "w1_q"),
        ("conv2", "conv", MACS[1], "w2_q"),
        ("fc", "matmul", MACS[2], "w3_q"),
    ]


def test_products_find_their_node_by_weight_name_output_then_order() -> None:
    originals = [
        Compute("a", "conv", 1, "wa", ("oa",)),
        Compute("b", "conv", 2, "wb", ("ob", "relu_b")),
        Compute("c", "matmul", 4, "", ("oc",)),
        Compute("d", "matmul", 8, "wd", ("od",)),
        Compute("q", "matmul", 16, "", ("oq",)),
        Compute("k", "matmul", 32, "", ("ok",)),
    ]
    executed = [
        Executed("conv", "renamed", ("relu_b_nchwc",)),  # by the output of the Relu fused into it
        Executed("conv", "wa", ("x",)),
        Executed("fused", "", ("attention", "q", "k")),  # two products in one kernel
        Executed("matmul", "", ("c/WithoutBiases",)),
        Executed("matmul", "", ("unknown",)),  # what is left
    ]
    assert assign(originals, executed) == [2, 1, 48, 4, 8]


def test_processor_has_a_name() -> None:
    assert processor_name()
