"""Training an ONNX file: the torch form computes the same, what is learnt is what the file holds, and what
cannot be trained is refused before any work."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import helper

from edgekd.backends import backend
from edgekd.backends.onnxruntime import OnnxRuntimeBackend
from edgekd.cli import cli
from edgekd.errors import UnsupportedModelError, UsageError
from edgekd.quantize.onnx_file import load_float
from edgekd.quantize.post_training import Judges, PostTraining, Quantized, with_floats
from edgekd.quantize.samples import Pixels, load_samples
from edgekd.quantize.scheme import scheme_for
from edgekd.quantize.twin import Twin
from edgekd.run import Silent
from edgekd.stages.onnx_choice import Training, Wanted
from edgekd.stages.onnx_job import Job
from edgekd.stages.qat_file import train_file
from edgekd.stages.quantize_file import quantize_file
from edgekd.target import find_target

from .file_models import CLASSES, SIZE, attention, cnn, pictures, save_model, store_pictures

pytestmark = pytest.mark.backends
make = helper.make_node


def odd(path: Path) -> Path:
    """Depthwise and transposed convolutions, uneven padding, pools, a resize, a split, a concatenation."""
    draw = np.random.default_rng(3)
    nodes = [
        make("Conv", ["x", "a.w", "a.b"], ["a"], "a", pads=[0, 0, 1, 1], strides=[2, 2]),
        make("Clip", ["a", "zero", "six"], ["ar"], "relu6"),
        make("Conv", ["ar", "d.w"], ["d"], "depthwise", pads=[1] * 4, group=8),
        make("HardSwish", ["d"], ["dh"], "swish"),
        make("MaxPool", ["dh"], ["m"], "pool", kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4),
        make("ConvTranspose", ["m", "t.w", "t.b"], ["t"], "up", strides=[2, 2], kernel_shape=[2, 2]),
        make("Resize", ["m", "", "scales"], ["r"], "resize", mode="nearest"),
        make("Concat", ["t", "r"], ["c"], "join", axis=1),
        make("Split", ["c"], ["c1", "c2"], "split", axis=1, num_outputs=2),
        make("Add", ["c1", "c2"], ["s"], "add"),
        make("AveragePool", ["s"], ["p"], "mean", kernel_shape=[2, 2], strides=[2, 2]),
        make("ReduceMean", ["p", "axes"], ["g"], "reduce", keepdims=0),
        make("Gemm", ["g", "h.w", "h.b"], ["l"], "head", transB=1),
        make("Softmax", ["l"], ["y"], "soft", axis=1),
    ]
    shapes = {"a.w": (8, 3, 3, 3), "a.b": (8,), "d.w": (8, 1, 3, 3), "t.w": (8, 8, 2, 2), "t.b": (8,),
              "h.w": (CLASSES, 8), "h.b": (CLASSES,)}  # fmt: skip
    weights: dict[str, Any] = {
        name: draw.standard_normal(shape).astype("f4") for name, shape in shapes.items()
    }
    weights |= {"zero": np.array(0, "f4"), "six": np.array(6, "f4"), "axes": np.array([2, 3])}
    weights["scales"] = np.array([1, 1, 2, 2], "f4")
    return save_model(nodes, weights, path, opset=18)


def training(tmp_path: Path, model: Path, **more: Any) -> Wanted:
    return Wanted(
        model, find_target("x86"), str(tmp_path / "d.npz"), tmp_path / "out", training=Training(**more)
    )


@pytest.mark.parametrize("build", [cnn, odd, attention])
def test_the_torch_form_computes_what_onnx_runtime_computes(build: Any, tmp_path: Path) -> None:
    model = load_float(build(tmp_path / "m.onnx"))
    shape = (5, 8, 32) if build is attention else (5, 3, SIZE, SIZE)
    inputs = np.random.default_rng(0).standard_normal(shape).astype("f4")
    path = tmp_path / "simple.onnx"
    onnx.save(model.model, path)
    with torch.no_grad():
        got = Twin(model.model).eval()(torch.from_numpy(inputs)).numpy()
    np.testing.assert_allclose(got, backend("onnxruntime").open(path).run(inputs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("build", [cnn, odd])
def test_what_the_fake_quantized_form_computes_is_what_its_file_computes(build: Any, tmp_path: Path) -> None:
    model = load_float(build(tmp_path / "m.onnx"))
    samples = load_samples(str(store_pictures(tmp_path / "d.npz")), model, Pixels())
    job = Job(model, samples, tmp_path / "job", Silent(), 0, 64)
    scheme = scheme_for(find_target("x86"))
    work = PostTraining(model, scheme, lambda: job.batches(job.parts.calibration))
    numbers = work.numbers("mse")
    twin = Twin(model.model)
    twin.quantize(work.places, numbers, scheme.weight_max)
    twin.eval()
    for name, held in twin.numbers().weights.items():  # nothing is learnt yet
        np.testing.assert_array_equal(held.codes, numbers.weights[name].codes)
    with torch.no_grad():
        for value in twin.trained:
            value.mul_(1.01)
    path = tmp_path / "q.onnx"
    onnx.save(work.write(twin.numbers()), path)
    inputs = (pictures(40).transpose(0, 3, 1, 2) / 255).astype(np.float32)
    with torch.no_grad():
        expected = twin(torch.from_numpy(inputs)).numpy()
    got = OnnxRuntimeBackend().open(path, optimize=False).run(inputs)
    # Values on the edge of two codes may round either way, by one step of the output's grid.
    assert np.median(np.abs(got - expected)) < 1e-3 * np.ptp(expected)
    assert (got.argmax(1) == expected.argmax(1)).mean() >= 0.9


@pytest.mark.slow
def test_training_brings_a_damaged_start_nearer_to_the_float_graph(tmp_path: Path) -> None:
    store_pictures(tmp_path / "d.npz")
    wanted = training(tmp_path, cnn(tmp_path / "m.onnx"), epochs=3, learning_rate=1e-3, batch_size=8)
    record = quantize_file(wanted, Silent())
    rows = {row["id"]: row for row in record["candidates"]}
    trained = rows["onnxruntime-int8-x86-u8-relu0-qat"]
    assert "3 epochs of training by the float graph (kd)" in trained["how"]
    assert trained["int8_coverage_macs"] == rows["onnxruntime-int8-x86-u8-relu0"]["int8_coverage_macs"]
    assert trained["drop"] <= 3
    assert record["calibration"]["training"] >= 2 * record["calibration"]["samples"] // 3
    stored = {t.name: t for t in onnx.load(trained["file"]).graph.initializer}
    before = {t.name: t for t in onnx.load(rows["onnxruntime-int8-x86-u8-relu0"]["file"]).graph.initializer}
    assert stored["fc.b"].raw_data != before["fc.b"].raw_data


def test_a_graph_with_operators_that_torch_has_not_is_refused_with_their_names(tmp_path: Path) -> None:
    weights = {"w": np.ones((4, 3 * SIZE * SIZE), "f4")}
    nodes = [
        make("Flatten", ["x"], ["f"], "flat"),
        make("Gemm", ["f", "w"], ["g"], "fc", transB=1),
        make("Celu", ["g"], ["c"], "celu"),
        make("Round", ["c"], ["y"], "round"),
    ]
    path = save_model(nodes, weights, tmp_path / "m.onnx")
    store_pictures(tmp_path / "d.npz")
    with pytest.raises(UnsupportedModelError, match=r"no torch form: .*Round"):
        quantize_file(training(tmp_path, path), Silent())
    assert not (tmp_path / "out" / "model.onnx").exists()


def test_a_torch_form_that_computes_something_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(
        __import__("edgekd.quantize.twin_operators", fromlist=["OPERATORS"]).OPERATORS,
        "Relu",
        lambda a, i: i[0],
    )
    store_pictures(tmp_path / "d.npz")
    with pytest.raises(UnsupportedModelError, match="in torch its output differs by"):
        quantize_file(training(tmp_path, cnn(tmp_path / "m.onnx")), Silent())


def test_a_method_that_needs_more_than_logits_is_refused(tmp_path: Path) -> None:
    store_pictures(tmp_path / "d.npz")
    with pytest.raises(UsageError, match="'fitnet' needs the teacher's"):
        quantize_file(training(tmp_path, cnn(tmp_path / "m.onnx"), method="fitnet"), Silent())


@pytest.mark.parametrize("options", [["--qat"], ["--epochs", "3"], ["--compare-engines", "--qat"]])
def test_options_of_a_file_need_a_file(options: list[str]) -> None:
    result = CliRunner().invoke(cli, ["quantize", *options])
    assert result.exit_code == 2 and options[0] in result.output and "MODEL.onnx" in result.output


class _Killed(Silent):
    """Ends this process, as a machine that is switched off does, in the middle of the third epoch."""

    def step(self, what: str, done: int, total: int, note: str = "") -> None:
        if what == "quantize" and done == 2 * total // 4 + 1:
            os.kill(os.getpid(), signal.SIGKILL)


class _Heard(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.steps: list[int] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def step(self, what: str, done: int, total: int, note: str = "") -> None:
        if what == "quantize":
            self.steps.append(done)


def _run(folder: Path, reporter: Silent) -> None:
    quantize_file(training(folder, folder / "m.onnx", epochs=4, batch_size=8), reporter)


def _die(folder: Path) -> None:
    torch.set_num_threads(1)
    _run(folder, _Killed())


def _trained_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "out" / "candidates").glob("*-qat.onnx")}


@pytest.mark.slow
def test_a_killed_training_goes_on_where_it_was_and_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        cnn(tmp_path / name / "m.onnx")
        store_pictures(tmp_path / name / "d.npz")
    _run(tmp_path / "whole", _Heard())
    process = multiprocessing.get_context("spawn").Process(target=_die, args=(tmp_path / "cut",))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    assert not _trained_files(tmp_path / "cut")
    heard = _Heard()
    _run(tmp_path / "cut", heard)
    assert any("training goes on after epoch 2" in line for line in heard.said), heard.said
    assert heard.steps[0] == max(heard.steps) // 2 + 1
    assert _trained_files(tmp_path / "cut") == _trained_files(tmp_path / "whole")


def test_layers_left_in_float_after_training_have_the_trained_weights(tmp_path: Path) -> None:
    model = load_float(cnn(tmp_path / "m.onnx"))
    samples = load_samples(str(store_pictures(tmp_path / "d.npz")), model, Pixels())
    job = Job(model, samples, tmp_path / "job", Silent(), 0, 64)
    scheme = scheme_for(find_target("x86"))
    work = PostTraining(model, scheme, lambda: job.batches(job.parts.calibration))
    numbers = work.numbers("mse")
    base = Quantized(work.write(numbers), scheme.dialect, "mse", {}, work=work, numbers=numbers)
    trained = train_file(job, base, Training(epochs=1, batch_size=8, learning_rate=1e-2), 0)
    judges = Judges(job.damage, job.damage, lambda made: 0.0 if _has_float(made, "body1.w") else 9.0)
    whole, mixed = with_floats(trained, 9.0, judges, 1.0, (lambda text: None, lambda *_: None))
    assert whole is trained
    assert "body1" in mixed.floats
    assert mixed.trained
    assert trained.numbers is not None
    left = next(t for t in mixed.model.graph.initializer if t.name == "body1.w")
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(left), trained.numbers.floats["body1.w"])
    assert not np.array_equal(onnx.numpy_helper.to_array(left), model.values["body1.w"])


def _has_float(made: onnx.ModelProto, name: str) -> bool:
    return any(tensor.name == name for tensor in made.graph.initializer)
