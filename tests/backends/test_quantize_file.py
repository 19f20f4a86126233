"""`edgekd quantize MODEL.onnx`: any float file in, measured candidates out, and errors that help."""

from __future__ import annotations

import json
import os
import platform
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from edgekd.backends import backend
from edgekd.backends import onnxruntime as onnxruntime_backend
from edgekd.cli import cli
from edgekd.errors import (
    BackendError,
    DataError,
    EdgekdError,
    InfeasibleBudgetError,
    UnsupportedModelError,
    UsageError,
)
from edgekd.quantize import engines
from edgekd.quantize.onnx_file import load_float
from edgekd.quantize.post_training import PostTraining
from edgekd.quantize.quality import divergence, judge
from edgekd.quantize.samples import Pixels, digest, load_samples
from edgekd.quantize.scheme import scheme_for
from edgekd.quantize.smooth import smoothed
from edgekd.quantize.weight_only import write_weight_only
from edgekd.run import Silent
from edgekd.stages.onnx_choice import Wanted, choose
from edgekd.stages.onnx_job import Job
from edgekd.stages.onnx_parity import overflows, parity_rows
from edgekd.stages.quantize_file import PAGE, RECORD, quantize_file
from edgekd.target import find_target

from .file_models import CLASSES, SIZE, attention, cnn, pictures, save_model, store_pictures

pytestmark = pytest.mark.backends
RUNTIMES = ("onnxruntime", "openvino")


def floats(path: Path, rows: int = 64) -> np.ndarray:
    images = pictures(rows).transpose(0, 3, 1, 2).astype(np.float32) / 255
    return backend("onnxruntime").open(path).run(np.ascontiguousarray(images))


def wanted(folder: Path, model: Path, data: Path, target: str = "x86", **more: Any) -> Wanted:
    return Wanted(model, find_target(target), str(data), folder / "out", **more)


# ---------------------------------------------------------------- what is refused


def _broken(folder: Path, what: str) -> Path:
    good = cnn(folder / "good.onnx")
    model = onnx.load(good)
    path = folder / "bad.onnx"
    if what == "missing":
        return folder / "nowhere.onnx"
    if what == "text":
        path.write_text("this is no model")
        return path
    if what == "huge":
        path.touch()
        os.truncate(path, 2**31)  # sparse: nothing of it is read
        return path
    if what == "quantized":
        model.graph.node.append(helper.make_node("QuantizeLinear", ["y", "fc.b"], ["z"], "late_q"))
    if what == "invalid":
        model.graph.node.append(helper.make_node("Unheard", ["y"], ["z"], "late"))
    if what == "half":
        model.graph.initializer[0].CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(model.graph.initializer[0]).astype("f2"), "stem.w")
        )
    if what == "external":
        onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
        (folder / "weights.bin").unlink()
        return path
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("what", "error", "told"),
    [
        ("missing", UsageError, "no such file"),
        ("text", UnsupportedModelError, "not an ONNX model"),
        ("huge", UnsupportedModelError, "has 2147483648 bytes; an ONNX file has less than"),
        ("quantized", UnsupportedModelError, "already quantized: 1 nodes of QuantizeLinear.*late_q"),
        ("half", UnsupportedModelError, "float16"),
        ("external", UnsupportedModelError, "further files"),
        ("invalid", UnsupportedModelError, r"onnxruntime refuses .*bad\.onnx.*Unheard"),
    ],
)
def test_a_file_that_cannot_be_quantized_says_why_and_what_to_do(
    tmp_path: Path, what: str, error: type[EdgekdError], told: str
) -> None:
    with pytest.raises(error, match=told) as caught:
        load_float(_broken(tmp_path, what))
    assert caught.value.hint


def test_a_graph_without_layers_names_what_it_holds(tmp_path: Path) -> None:
    path = save_model([helper.make_node("Sigmoid", ["x"], ["y"], "only")], {}, tmp_path / "m.onnx")
    with pytest.raises(UnsupportedModelError, match="it holds Sigmoid"):
        PostTraining(load_float(path), scheme_for(find_target("x86")), lambda: iter(()))


def test_external_weights_are_read(tmp_path: Path) -> None:
    model = onnx.load(cnn(tmp_path / "good.onnx"))
    onnx.save(model, tmp_path / "ext.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
    got, exact = load_float(tmp_path / "ext.onnx").values, load_float(tmp_path / "good.onnx").values
    assert all(np.array_equal(got[name], exact[name]) for name in exact)


@pytest.mark.parametrize("opset", [11, 24])
def test_an_opset_outside_is_brought_inside_with_the_same_outputs(tmp_path: Path, opset: int) -> None:
    loaded = load_float(cnn(tmp_path / "m.onnx", opset=opset))
    assert 13 <= loaded.model.opset_import[0].version <= 22
    assert loaded.notes == (f"opset {opset} became {13 if opset == 11 else 22}",)
    onnx.save(loaded.model, tmp_path / "in.onnx")
    np.testing.assert_allclose(floats(tmp_path / "in.onnx"), floats(tmp_path / "m.onnx"), atol=1e-5)


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"z": np.zeros((4, 2), "f4")}, "the model reads x float32"),
        ({"x": np.zeros((1, 3, SIZE, SIZE), "f4")}, "needs at least two"),
        ({"x": np.zeros((8, 1, SIZE, SIZE), "f4")}, "the model reads float32"),
        ({"images": np.zeros((8, 5, 5, 3), np.uint8)}, "images of shape"),
        ({"x": np.zeros((8, 3, SIZE, SIZE), "f4"), "labels": np.zeros(3, np.int64)}, "one integer for each"),
    ],
)
def test_samples_that_do_not_fit_say_what_the_model_reads(
    tmp_path: Path, arrays: dict[str, np.ndarray], told: str
) -> None:
    np.savez(tmp_path / "d.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=told):
        load_samples(str(tmp_path / "d.npz"), load_float(cnn(tmp_path / "m.onnx")), Pixels())


def test_nan_in_calibration_names_the_operator_that_makes_it(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Sqrt", ["x"], ["r"], "root"),
        helper.make_node("Conv", ["r", "w"], ["y"], "conv"),
    ]
    weights = {"w": np.ones((2, 3, 1, 1), "f4")}
    model = load_float(save_model(nodes, weights, tmp_path / "m.onnx"))
    batch = {"x": np.full((2, 3, SIZE, SIZE), -1, "f4")}
    with pytest.raises(DataError, match="made by Sqrt 'root', holds NaN"):
        PostTraining(model, scheme_for(find_target("x86")), lambda: iter([batch]))
    batch["x"][:] = np.inf
    with pytest.raises(DataError, match="the input 'x' holds NaN or infinity"):
        PostTraining(model, scheme_for(find_target("x86")), lambda: iter([batch]))


@pytest.mark.parametrize(
    ("bad", "told"), [("network", "made by Log 'log'"), ("samples", "the input 'x' holds")]
)
def test_the_command_names_what_makes_nan(tmp_path: Path, bad: str, told: str) -> None:
    nodes = [
        helper.make_node("Log" if bad == "network" else "Relu", ["x"], ["r"], "log"),
        helper.make_node("Conv", ["r", "w"], ["y"], "conv"),
    ]
    path = save_model(nodes, {"w": np.ones((2, 3, 1, 1), "f4")}, tmp_path / "m.onnx")
    samples = np.ones((64, 3, SIZE, SIZE), "f4")
    samples[40:44] = -1 if bad == "network" else np.nan
    np.savez(tmp_path / "d.npz", x=samples)
    with pytest.raises(DataError, match=told):
        quantize_file(wanted(tmp_path, path, tmp_path / "d.npz"), Silent())


# ---------------------------------------------------------------- what comes out


def _post_training(path: Path, target: str = "x86") -> PostTraining:
    model = load_float(path)
    images = pictures(64, seed=3).transpose(0, 3, 1, 2).astype(np.float32) / 255
    return PostTraining(model, scheme_for(find_target(target)), lambda: iter([{"x": images}]))


@pytest.mark.parametrize(
    ("target", "runtime"),
    [
        ("x86", "onnxruntime"),
        ("x86", "openvino"),
        ("jetson", "onnxruntime"),
        ("jetson", "openvino"),
        ("rpi5", "onnxruntime"),  # OpenVINO does not take int8 with other zero points (docs/quantize.md)
    ],
)
def test_every_dialect_computes_the_float_model(tmp_path: Path, target: str, runtime: str) -> None:
    work = _post_training(cnn(tmp_path / "m.onnx"), target)
    onnx.save(work.write(work.numbers("mse")), tmp_path / "q.onnx")
    images = pictures(64).transpose(0, 3, 1, 2).astype(np.float32) / 255
    got = backend(runtime).open(tmp_path / "q.onnx").run(np.ascontiguousarray(images))
    assert judge(floats(tmp_path / "m.onnx"), got, None).signal_to_noise_db > 25


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_all_layers_of_a_cnn_run_in_integer_kernels(tmp_path: Path, runtime: str) -> None:
    work = _post_training(cnn(tmp_path / "m.onnx"))
    onnx.save(work.write(work.numbers("mse")), tmp_path / "q.onnx")
    coverage = backend(runtime).coverage(tmp_path / "q.onnx")
    assert (coverage.int8_nodes, coverage.int8_macs) == (1.0, 1.0)


def test_a_dead_channel_and_a_constant_tensor_get_a_scale_above_zero(tmp_path: Path) -> None:
    model = onnx.load(cnn(tmp_path / "m.onnx"))
    for tensor in model.graph.initializer:
        if tensor.name in ("body1.w", "body1.b"):
            values = numpy_helper.to_array(tensor).copy()
            values[:] = 0 if tensor.name == "body1.w" else -1  # its ReLU gives 0 everywhere
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, tmp_path / "dead.onnx")
    work = _post_training(tmp_path / "dead.onnx")
    numbers = work.reconstructed(work.numbers("mse"))
    assert all(grid.scale > 0 for grid in numbers.grids.values())
    assert all((codes.scales > 0).all() for codes in numbers.weights.values())
    onnx.save(work.write(numbers), tmp_path / "q.onnx")
    assert judge(floats(tmp_path / "dead.onnx"), floats(tmp_path / "q.onnx"), None).signal_to_noise_db > 20


def test_reconstruction_beats_rounding_to_the_nearest_at_four_bits(tmp_path: Path) -> None:
    model = load_float(cnn(tmp_path / "m.onnx"))
    images = pictures(64, seed=3).transpose(0, 3, 1, 2).astype(np.float32) / 255
    scheme = replace(scheme_for(find_target("x86")), weight_max=7)
    work = PostTraining(model, scheme, lambda: iter([{"x": images}]))
    nearest = work.numbers("min-max")
    damage = []
    for numbers in (nearest, work.reconstructed(nearest)):
        onnx.save(work.write(numbers), tmp_path / "q.onnx")
        damage.append(divergence(floats(tmp_path / "m.onnx"), floats(tmp_path / "q.onnx")))
    assert damage[1] < 0.5 * damage[0]


def test_one_layer_that_breaks_accuracy_is_found_and_left_in_float(tmp_path: Path) -> None:
    """Values of 1 to 1000000 beside values around 1 cannot share a grid of 256 steps."""
    draw = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["x", "a.w"], ["a"], "good", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["ar"], "relu"),
        helper.make_node("Mul", ["ar", "spread"], ["wide"], "spread"),
        helper.make_node("Conv", ["wide", "b.w"], ["b"], "hard"),
        helper.make_node("GlobalAveragePool", ["b"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "c.w"], ["y"], "head"),
    ]
    spread = np.ones((1, 8, 1, 1), "f4")
    spread[0, 0] = 1e6
    weights = {
        "a.w": draw.standard_normal((8, 3, 3, 3)).astype("f4"), "spread": spread,
        "b.w": (draw.standard_normal((8, 8, 1, 1)) / spread).astype("f4"),
        "c.w": draw.standard_normal((8, CLASSES)).astype("f4"),
    }  # fmt: skip
    path = save_model(nodes, weights, tmp_path / "m.onnx")
    # Constant folding would merge the factor into the first convolution, as it should: keep it apart.
    model = onnx.load(path)
    model.graph.output.append(helper.make_tensor_value_info("ar", TensorProto.FLOAT, None))
    onnx.save(model, path)
    record = quantize_file(wanted(tmp_path, path, store_pictures(tmp_path / "d.npz")), Silent())
    alone = {row["name"]: row["damage"] for row in record["sensitivity"]["x86-u8-relu0"]}
    assert max(alone, key=lambda name: alone[name]) == "hard"
    assert "hard" in record["float_operators"]["x86-u8-relu0"]
    assert "head" not in record["float_operators"]["x86-u8-relu0"]
    drops = {row["id"]: row["drop"] for row in record["candidates"]}
    assert drops["onnxruntime-mixed-x86-u8-relu0"] <= 3 < drops["onnxruntime-int8-x86-u8-relu0"]
    page = Path(record["kept"]).with_name(PAGE).read_text()
    bars = page[page.index("<h3>x86-u8-relu0</h3>") :]
    assert re.findall(r'<tr class="spared"><th[^>]*>(\w+)', bars[: bars.index("</table>")])[0] == "hard"


def test_the_record_tells_what_was_measured_and_the_kept_file_is_the_chosen_one(tmp_path: Path) -> None:
    job = wanted(tmp_path, cnn(tmp_path / "m.onnx"), store_pictures(tmp_path / "d.npz"))
    record = quantize_file(job, Silent())
    assert record == json.loads((job.folder / RECORD).read_text())
    chosen = next(row for row in record["candidates"] if row["id"] == record["chosen"])
    assert Path(record["kept"]).read_bytes() == Path(chosen["file"]).read_bytes()
    assert {row["form"] for row in record["candidates"]} >= {"fp32", "int8"}
    assert all(row["cpu_p50_ms"] > 0 for row in record["candidates"])
    integer = next(row for row in record["candidates"] if row["id"] == "onnxruntime-int8-x86-u8-relu0")
    assert integer["kernels"] == {"QLinearConv int8": 3, "QGemm int8": 1}
    again = load_samples(str(tmp_path / "d.npz"), load_float(job.model), Pixels())
    assert again.count == record["calibration"]["samples"] == 120


def test_a_file_that_a_runtime_refuses_for_one_sample_leaves_the_others_their_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime 1.31 refuses some graphs with signed codes at batch 1 alone, after its own fusions."""
    load, refused = onnxruntime_backend._load, "int8-openvino-u8.onnx"

    def picky(model: Path, options: Any, batch: int | None, *rest: Any) -> Any:
        if batch == 1 and model.name == refused:
            raise BackendError(f"onnxruntime refuses {model}")
        return load(model, options, batch, *rest)

    monkeypatch.setattr(
        onnxruntime_backend, "_load", lambda m, o, batch, shapes=None: picky(m, o, batch, shapes)
    )
    job = wanted(tmp_path, cnn(tmp_path / "m.onnx"), store_pictures(tmp_path / "d.npz"))
    rows = {row["id"]: row for row in quantize_file(job, Silent())["candidates"]}
    alone = rows.pop("onnxruntime-int8-openvino-u8")
    assert (alone["cpu_p50_ms"], alone["drop"] is None) == (None, False)
    assert refused in alone["reason"]
    assert all(row["cpu_p50_ms"] > 0 and not row["reason"] for row in rows.values())


def test_the_digest_knows_the_pixels_and_the_preprocessing(tmp_path: Path) -> None:
    model, data = load_float(cnn(tmp_path / "m.onnx")), str(store_pictures(tmp_path / "d.npz"))
    rows = np.arange(20)
    plain, same, shifted = (
        digest(load_samples(data, model, Pixels(mean=mean)), rows, size)
        for mean, size in (((), 7), ((), 20), ((0.5, 0.5, 0.5), 7))
    )
    assert plain == same != shifted


def test_no_candidate_within_the_budget_names_the_nearest(tmp_path: Path) -> None:
    job = wanted(tmp_path, cnn(tmp_path / "m.onnx"), store_pictures(tmp_path / "d.npz"), max_size_mib=0.0001)
    with pytest.raises(InfeasibleBudgetError, match=r"MiB, at most 0\.0001"):
        quantize_file(job, Silent())
    assert not (job.folder / "model.onnx").exists()


def test_a_fixed_batch_is_kept_and_filled(tmp_path: Path) -> None:
    path = cnn(tmp_path / "m.onnx", shape=(8, 3, SIZE, SIZE))
    model = load_float(path)
    samples = load_samples(str(store_pictures(tmp_path / "d.npz")), model, Pixels())
    job = Job(model, samples, tmp_path / "out", Silent(), 0, 64)
    sizes = {len(feeds["x"]) for feeds in job.batches(np.arange(30))}
    assert sizes == {8}
    assert len(job.exact["report"]) % 8 == 0


@pytest.mark.parametrize("choice", ["random", "stratified", "coverage"])
def test_the_three_parts_share_no_sample_and_a_seed_repeats_them(tmp_path: Path, choice: str) -> None:
    labels = np.arange(120) % CLASSES
    model = load_float(cnn(tmp_path / "m.onnx"))
    samples = load_samples(str(store_pictures(tmp_path / "d.npz", labels=labels)), model, Pixels())
    first, again = (Job(model, samples, tmp_path, Silent(), 5, 40, choice).parts for _ in range(2))
    parts = (first.calibration, first.choice, first.report)
    assert sum(map(len, parts)) == len(np.unique(np.concatenate(parts)))
    assert np.array_equal(first.calibration, again.calibration) and len(first.calibration) >= 20
    if choice == "stratified":
        assert set(np.bincount(labels[first.calibration])) == {10}


# ---------------------------------------------------------------- transformers and weights alone


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_transformer_keeps_norms_softmax_and_residuals_in_float(tmp_path: Path, runtime: str) -> None:
    model = load_float(attention(tmp_path / "m.onnx"))
    tokens = np.random.default_rng(0).standard_normal((64, 8, 32)).astype("f4")
    work = PostTraining(model, scheme_for(find_target("x86")), lambda: iter([{"x": tokens}]))
    assert {operation.kind for operation in work.places.operations.values()} == {"MatMul"}
    onnx.save(work.write(work.numbers("mse")), tmp_path / "q.onnx")
    exact = backend("onnxruntime").open(tmp_path / "m.onnx").run(tokens)
    got = backend(runtime).open(tmp_path / "q.onnx").run(tokens)
    assert judge(exact, got, None).signal_to_noise_db > 25
    coverage = backend(runtime).coverage(tmp_path / "q.onnx")
    assert sum(layer.precision == "int8" for layer in coverage.layers if layer.macs) >= 7  # all seven weights


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize(("bits", "least_db"), [(8, 35), (4, 12)])
def test_weights_alone_run_in_eight_and_four_bits(
    tmp_path: Path, runtime: str, bits: int, least_db: float
) -> None:
    model = load_float(attention(tmp_path / "m.onnx"))
    onnx.save(write_weight_only(model, bits), tmp_path / "w.onnx")
    tokens = np.random.default_rng(0).standard_normal((32, 8, 32)).astype("f4")
    exact = backend("onnxruntime").open(tmp_path / "m.onnx").run(tokens)
    got = backend(runtime).open(tmp_path / "w.onnx").run(tokens)
    assert judge(exact, got, None).signal_to_noise_db > least_db


def test_weights_alone_of_a_network_without_matrix_products_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], "conv")]
    path = save_model(nodes, {"w": np.ones((2, 3, 1, 1), "f4")}, tmp_path / "m.onnx")
    with pytest.raises(UnsupportedModelError, match="no matrix product"):
        write_weight_only(load_float(path), 4)


# ---------------------------------------------------------------- the command


def test_the_command_prints_its_record(tmp_path: Path) -> None:
    arguments = ["quantize", str(cnn(tmp_path / "m.onnx")), "--target", "x86", "--data",
                 str(store_pictures(tmp_path / "d.npz")), "--out", str(tmp_path / "o"), "--json"]  # fmt: skip
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    assert json.loads(done.stdout)["chosen"] in done.stderr


@pytest.mark.parametrize(
    ("more", "told"),
    [([], "--data"), (["--data", "d.npz", "--teacher", "t"], "--teacher: not an option")],
)
def test_a_file_without_samples_or_with_options_of_a_run_is_refused(
    tmp_path: Path, more: list[str], told: str
) -> None:
    done = CliRunner().invoke(cli, ["quantize", str(cnn(tmp_path / "m.onnx")), *more])
    assert isinstance(done.exception, UsageError)
    assert told in done.exception.message + done.exception.hint


# ---------------------------------------------------------------- ranges that are moved, other engines


def test_smoothing_keeps_the_function_and_saves_a_transformer_with_outliers(tmp_path: Path) -> None:
    model = load_float(attention(tmp_path / "m.onnx", outlier=60.0))
    tokens = np.random.default_rng(0).standard_normal((64, 8, 32)).astype("f4")
    even = smoothed(model.model, lambda: iter([{"x": tokens}]))
    assert even is not None
    onnx.save(even, tmp_path / "even.onnx")
    exact = backend("onnxruntime").open(tmp_path / "m.onnx").run(tokens)
    same = backend("onnxruntime").open(tmp_path / "even.onnx").run(tokens)
    np.testing.assert_allclose(same, exact, rtol=1e-3, atol=1e-4)
    decibel = []
    for graph in (model.model, even):
        work = PostTraining(
            replace(model, model=graph), scheme_for(find_target("x86")), lambda: iter([{"x": tokens}])
        )
        onnx.save(work.write(work.numbers("min-max")), tmp_path / "q.onnx")
        got = backend("onnxruntime").open(tmp_path / "q.onnx").run(tokens)
        decibel.append(judge(exact, got, None).signal_to_noise_db)
    assert decibel[1] > decibel[0] + 6


@pytest.mark.parametrize("depthwise", [False, True])
def test_equalised_convolutions_compute_the_same_with_even_ranges(tmp_path: Path, depthwise: bool) -> None:
    draw = np.random.default_rng(0)
    spread = (10.0 ** draw.uniform(-1.5, 1.5, 8)).astype("f4")
    first = draw.standard_normal((8, 3, 3, 3)).astype("f4") * spread.reshape(-1, 1, 1, 1)
    second = draw.standard_normal((8, 1 if depthwise else 8, 3, 3)).astype("f4")
    nodes = [
        helper.make_node("Conv", ["x", "a.w", "a.b"], ["a"], "a"),
        helper.make_node("Relu", ["a"], ["r"], "r"),
        helper.make_node("Conv", ["r", "b.w"], ["y"], "b", group=8 if depthwise else 1),
    ]
    weights = {"a.w": first, "a.b": draw.standard_normal(8).astype("f4"), "b.w": second}
    model = load_float(save_model(nodes, weights, tmp_path / "m.onnx"))
    even = smoothed(model.model, lambda: iter(()))
    assert even is not None
    onnx.save(even, tmp_path / "even.onnx")
    np.testing.assert_allclose(
        floats(tmp_path / "even.onnx"), floats(tmp_path / "m.onnx"), rtol=1e-3, atol=1e-3
    )
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in even.graph.initializer}
    reach = np.abs(stored["a.w"]).reshape(8, -1).max(1)
    assert (
        reach.max() / reach.min()
        < 0.2 * np.abs(first).reshape(8, -1).max(1).max() / np.abs(first).reshape(8, -1).max(1).min()
    )


def test_another_engine_is_a_row_and_a_failing_one_a_line(tmp_path: Path) -> None:
    job = wanted(tmp_path, cnn(tmp_path / "m.onnx"), store_pictures(tmp_path / "d.npz"), compare_engines=True)
    record = quantize_file(job, Silent())
    theirs = {row["id"]: row for row in record["candidates"] if row["engine"] == "onnxruntime"}
    assert theirs.keys() == {"onnxruntime-int8-by-onnxruntime", "openvino-int8-by-onnxruntime"}
    assert all(row["drop"] is not None and row["cpu_p50_ms"] > 0 for row in theirs.values())
    made = {row["engine"] for row in record["candidates"]}
    for name in ("nncf", "torchao", "neural-compressor"):
        assert (name in record["engines_failed"]) != (name in made)


def test_another_engine_alone_makes_the_int8_candidates_of_this_machines_kind(tmp_path: Path) -> None:
    given = cnn(tmp_path / "m.onnx"), store_pictures(tmp_path / "d.npz")
    record = quantize_file(wanted(tmp_path, *given, engine="onnxruntime"), Silent())
    forms = {(row["form"], row["engine"]) for row in record["candidates"]} - {("bf16", "edgekd")}
    assert forms == {("fp32", "edgekd"), ("int8", "onnxruntime")}
    with pytest.raises(UsageError, match="in no dialect of jetson"):
        quantize_file(wanted(tmp_path, *given, "jetson", engine="onnxruntime"), Silent())


@pytest.mark.parametrize("name", ["torchao", "neural-compressor"])
def test_an_engine_for_torch_quantizes_the_graph_under_its_own_names(name: str, tmp_path: Path) -> None:
    pytest.importorskip(name.replace("-", "_"))
    model = load_float(cnn(tmp_path / "m.onnx"))
    samples = load_samples(str(store_pictures(tmp_path / "d.npz")), model, Pixels())
    made = engines.run_engine(name, model, lambda: samples.batches(np.arange(64), 16))
    onnx.save(made, tmp_path / "q.onnx")
    assert backend("openvino").coverage(tmp_path / "q.onnx").int8_macs == 1
    assert (floats(tmp_path / "q.onnx").argmax(1) == floats(tmp_path / "m.onnx").argmax(1)).mean() > 0.9


def test_a_graph_without_a_torch_form_is_a_line_for_engines_of_torch(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], "c"),
        helper.make_node("Round", ["a"], ["y"], "round"),
    ]
    path = save_model(nodes, {"w": np.ones((2, 3, 1, 1), "f4")}, tmp_path / "m.onnx")
    feeds = {"x": np.ones((2, 3, SIZE, SIZE), "f4")}
    with pytest.raises(UnsupportedModelError, match=r"no torch form: .*Round"):
        engines.run_engine("torchao", load_float(path), lambda: iter([feeds]))


def test_an_engine_that_raises_anything_is_told_by_its_own_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: object, batches: object) -> onnx.ModelProto:
        raise KeyError("no such node")

    monkeypatch.setitem(engines._TABLE, "nncf", broken)
    with pytest.raises(BackendError, match="nncf: KeyError: 'no such node'"):
        engines.run_engine("nncf", load_float(cnn(tmp_path / "m.onnx")), lambda: iter(()))
    with pytest.raises(UsageError, match="unknown engine 'ncf'"):
        engines.run_engine("ncf", load_float(tmp_path / "m.onnx"), lambda: iter(()))


# ---------------------------------------------------------------- executors and processors


def test_executors_agree_and_the_names_of_the_kernels_prove_the_old_processor(tmp_path: Path) -> None:
    """Weights of 7 bits, which a processor without VNNI adds without overflow."""
    work = _post_training(cnn(tmp_path / "m.onnx"), "x86-avx2")
    onnx.save(work.write(work.numbers("min-max")), tmp_path / "q.onnx")
    np.savez(tmp_path / "x.npz", x=pictures(32).transpose(0, 3, 1, 2).astype(np.float32) / 255)
    rows = {row["executor"]: row for row in parity_rows(tmp_path / "q.onnx", tmp_path / "x.npz")}
    assert not any(row["reason"] for row in rows.values())
    assert all(row["max_steps"] <= 6 and row["top1_agreement"] > 0.9 for row in rows.values())
    old = [name for name in rows["openvino AVX2"]["kernels"] if "conv" in name.lower()]
    assert old and all("avx512" not in name and "amx" not in name for name in old)


def test_products_that_overflow_sixteen_bits_are_seen_only_with_weights_of_eight(tmp_path: Path) -> None:
    """255 * 127 + 255 * 127 is beyond 32767: such a layer differs on AVX2 unless its weights have 7 bits."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv"),
        helper.make_node("GlobalAveragePool", ["c"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["y"], "flat"),
    ]
    weights = {"w": np.ones((8, 64, 1, 1), "f4")}
    weights["w"][::2] = -1
    shape = ("N", 64, 8, 8)
    model = load_float(save_model(nodes, weights, tmp_path / "m.onnx", shape=shape))
    full = np.ones((4, 64, 8, 8), "f4")
    np.savez(tmp_path / "x.npz", x=full)
    differs = {}
    for target in ("x86", "x86-avx2"):
        work = PostTraining(model, scheme_for(find_target(target)), lambda: iter([{"x": full}]))
        onnx.save(work.write(work.numbers("min-max")), tmp_path / "q.onnx")
        rows = {row["executor"]: row for row in parity_rows(tmp_path / "q.onnx", tmp_path / "x.npz")}
        differs[target] = rows["openvino AVX2"]["max_abs"]
        assert bool(overflows(list(rows.values()))) == (target == "x86")
    assert differs["x86-avx2"] < 1.0
    assert differs["x86"] > 20


@pytest.mark.parametrize("target", ["rpi5", "jetson"])
def test_for_a_target_of_another_kind_times_here_decide_nothing(target: str, tmp_path: Path) -> None:
    job = wanted(tmp_path, tmp_path / "m.onnx", tmp_path / "d.npz", target, max_latency_ms=1e-6)
    rows: list[dict[str, Any]] = [
        {
            "id": "fp32",
            "form": "fp32",
            "engine": "edgekd",
            "drop": 0.0,
            "cpu_p50_ms": 1.0,
            "latency_p50_ms": 1.0,
            "size_mib": 4.0,
        },
        {
            "id": "int8",
            "form": "int8",
            "engine": "edgekd",
            "drop": 0.4,
            "cpu_p50_ms": 3.0,
            "latency_p50_ms": 3.0,
            "size_mib": 1.0,
        },
    ]
    chosen, reason = choose(rows, 1.0, job, quantized=True)
    assert chosen["id"] == "int8" and "not known" in reason
    assert choose(rows, 0.1, job, quantized=True)[0]["id"] == "fp32"
    if platform.machine() == "x86_64":
        here = replace(job, target=find_target("x86"), max_latency_ms=None)
        chosen, reason = choose(rows, 1.0, here, quantized=True)
        assert chosen["id"] == "fp32" and "int8 does not pay here" in reason
