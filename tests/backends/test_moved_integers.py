"""Operators that only move values, and the mean over a map: integers go through them, converted once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

from edgekd.backends import backend
from edgekd.quantize.onnx_file import load_float
from edgekd.quantize.post_training import PostTraining, Quantized, sums_in_float
from edgekd.quantize.quality import judge
from edgekd.quantize.scheme import scheme_for
from edgekd.target import find_target

from .file_models import CLASSES, SIZE, pictures, save_model

pytestmark = pytest.mark.backends
DIALECTS = (("x86-u8-relu0", "onnxruntime"), ("openvino-u8", "openvino"))


def samples(count: int = 64) -> NDArray[np.float32]:
    """Normalised pixels, so that the input has negative values."""
    pixels = pictures(count).transpose(0, 3, 1, 2).astype(np.float32)
    return np.ascontiguousarray(pixels / 64 - 1.6)


def network(path: Path, mean: list[onnx.NodeProto], opset: int = 17, **more: NDArray[Any]) -> Path:
    """Convolutions behind a pad, a pool, a split, a resize and a slice; `mean` makes ``f`` (N, 16)
    of ``s``."""
    draw, make = np.random.default_rng(0), helper.make_node

    def conv(name: str, source: str, target: str, pad: int = 1) -> onnx.NodeProto:
        return make("Conv", [source, f"{name}.w", f"{name}.b"], [target], name, pads=[pad] * 4)

    nodes = [
        make("Pad", ["x", "pads"], ["xp"], "pad"),
        conv("c1", "xp", "a", 0),
        make("Relu", ["a"], ["ar"], "relu1"),
        make("MaxPool", ["ar"], ["m"], "pool", kernel_shape=[2, 2], strides=[2, 2]),
        make("Split", ["m", "halves"], ["m1", "m2"], "split", axis=1),
        conv("c2", "m1", "b"),
        conv("c3", "m2", "c"),
        make("Concat", ["b", "c"], ["j"], "join", axis=1),
        make("Resize", ["j", "", "scales"], ["r"], "resize", mode="nearest"),
        conv("c4", "r", "d"),
        make("Slice", ["d", "starts", "ends", "axes"], ["e"], "slice"),
        conv("c5", "e", "s"),
        *mean,
        make("Gemm", ["f", "fc.w", "fc.b"], ["y"], "fc", transB=1),
    ]
    weights: dict[str, NDArray[Any]] = {
        "pads": np.array([0, 0, 1, 1, 0, 0, 2, 2]), "halves": np.array([8, 8]),
        "scales": np.array([1, 1, 2, 2], "f4"), "starts": np.array([1, 1]), "ends": np.array([9, 9]),
        "axes": np.array([2, 3]), "fc.w": draw.standard_normal((CLASSES, 16)).astype("f4"),
        "fc.b": np.zeros(CLASSES, "f4"), **more,
    }  # fmt: skip
    for name, inputs, outputs in (
        ("c1", 3, 16), ("c2", 8, 8), ("c3", 8, 8), ("c4", 16, 16), ("c5", 16, 16)
    ):  # fmt: skip
        shape = (outputs, inputs, 3, 3)
        weights[f"{name}.w"] = (draw.standard_normal(shape) / (3 * inputs**0.5)).astype("f4")
        weights[f"{name}.b"] = (0.1 * draw.standard_normal(outputs)).astype("f4")
    return save_model(nodes, weights, path, opset=opset, shape=("N", 3, SIZE, SIZE))


MEANS: dict[str, tuple[int, list[onnx.NodeProto], dict[str, NDArray[Any]]]] = {
    "reduce": (17, [helper.make_node("ReduceMean", ["s"], ["f"], "mean", axes=[2, 3], keepdims=0)], {}),
    "reduce-kept": (
        18,
        [
            helper.make_node("ReduceMean", ["s", "map"], ["p"], "mean"),
            helper.make_node("Reshape", ["p", "rows"], ["f"], "flat"),
        ],
        {"map": np.array([-1, -2]), "rows": np.array([-1, 16])},
    ),
    "pool": (
        17,
        [
            helper.make_node("GlobalAveragePool", ["s"], ["p"], "mean"),
            helper.make_node("Squeeze", ["p", "map"], ["f"], "flat"),
        ],
        {"map": np.array([2, 3])},
    ),
}


@pytest.mark.parametrize(("dialect", "runtime"), DIALECTS)
@pytest.mark.parametrize("mean", MEANS)
def test_every_layer_behind_a_mover_runs_in_integers_and_computes_the_float_network(
    mean: str, dialect: str, runtime: str, tmp_path: Path
) -> None:
    opset, nodes, more = MEANS[mean]
    path = network(tmp_path / "m.onnx", nodes, opset, **more)
    scheme = replace(scheme_for(find_target("x86")), dialect=dialect)
    work = PostTraining(load_float(path), scheme, lambda: iter([{"x": samples()}]))
    onnx.save(work.write(work.numbers("min-max")), tmp_path / "q.onnx")
    exact = backend("onnxruntime").open(path).run(samples())
    got = backend(runtime).open(tmp_path / "q.onnx").run(samples())
    assert judge(exact, got, None).signal_to_noise_db > 25
    coverage = backend(runtime).coverage(tmp_path / "q.onnx")
    assert (coverage.int8_nodes, coverage.int8_macs) == (1.0, 1.0)
    if runtime == "openvino":  # quantized at the input alone; all later codes are made by kernels
        kinds = [layer.op.split()[0] for layer in coverage.layers]
        assert kinds.count("FakeQuantize") <= 1, kinds
        assert "Convert" not in kinds


def test_a_pad_with_another_value_than_zero_has_a_grid_of_its_own(tmp_path: Path) -> None:
    opset, nodes, more = MEANS["reduce"]
    model = onnx.load(network(tmp_path / "m.onnx", nodes, opset, **more))
    model.graph.node[0].input.append("border")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(9, "f4"), "border"))
    onnx.save(model, tmp_path / "m.onnx")
    work = PostTraining(
        load_float(tmp_path / "m.onnx"), scheme_for(find_target("x86")), lambda: iter([{"x": samples()}])
    )
    assert work.numbers("min-max").grids["xp"].scale > 9 / 255  # the picture reaches 2.4


def test_a_tensor_of_both_signs_is_centred_for_openvino_alone(tmp_path: Path) -> None:
    """Without a zero point there is nothing to add beside the products of a convolution."""
    opset, nodes, more = MEANS["reduce"]
    path = network(tmp_path / "m.onnx", nodes, opset, **more)
    points = {}
    for dialect, _ in DIALECTS:
        scheme = replace(scheme_for(find_target("x86")), dialect=dialect)
        work = PostTraining(load_float(path), scheme, lambda: iter([{"x": samples()}]))
        grids = work.numbers("min-max").grids
        points[dialect] = {name: grids[name].zero_point for name in ("b", "c")}
    assert set(points["openvino-u8"].values()) == {0}
    assert 0 not in points["x86-u8-relu0"].values()


@pytest.mark.parametrize("target", ["rpi5", "jetson", "x86"])
def test_signed_integers_behind_a_reshape_load_in_onnx_runtime(target: str, tmp_path: Path) -> None:
    """In opset 21 ONNX Runtime 1.31 writes an operator that it then refuses."""
    draw, make = np.random.default_rng(0), helper.make_node
    nodes = [
        make("Conv", ["x", "c.w"], ["c"], "conv", strides=[4, 4]),
        make("Reshape", ["c", "rows"], ["r"], "tokens"),
        make("Transpose", ["r"], ["t"], "turn", perm=[0, 2, 1]),
        make("LayerNormalization", ["t", "gain"], ["n"], "norm", axis=-1),
        make("MatMul", ["n", "q.w"], ["q"], "query"),
        make("Reshape", ["q", "heads"], ["h"], "split"),
        make("Transpose", ["h"], ["ht"], "turn2", perm=[0, 2, 1, 3]),
        make("Reshape", ["ht", "join"], ["j"], "join"),
        make("MatMul", ["j", "o.w"], ["y"], "out"),
    ]
    weights: dict[str, NDArray[Any]] = {
        "c.w": draw.standard_normal((16, 3, 4, 4)).astype("f4"), "rows": np.array([0, 16, 16]),
        "gain": np.ones(16, "f4"), "q.w": draw.standard_normal((16, 16)).astype("f4"),
        "heads": np.array([0, 16, 4, 4]), "join": np.array([0, 16, 16]),
        "o.w": draw.standard_normal((16, CLASSES)).astype("f4"),
    }  # fmt: skip
    path = save_model(nodes, weights, tmp_path / "m.onnx", opset=21)
    work = PostTraining(load_float(path), scheme_for(find_target(target)), lambda: iter([{"x": samples()}]))
    onnx.save(work.write(work.numbers("min-max")), tmp_path / "q.onnx")
    onnx.checker.check_model(onnx.load(tmp_path / "q.onnx"), full_check=True)
    exact = backend("onnxruntime").open(path).run(samples())
    got = backend("onnxruntime").open(tmp_path / "q.onnx").run(samples())
    assert judge(exact.reshape(64, -1), got.reshape(64, -1), None).signal_to_noise_db > 20


def test_a_file_whose_mean_is_a_pool_already_is_read_as_it_is(tmp_path: Path) -> None:
    """edgekd's own exports are of that form."""
    opset, nodes, more = MEANS["reduce"]
    first = load_float(network(tmp_path / "m.onnx", nodes, opset, **more))
    onnx.save(first.model, tmp_path / "again.onnx")
    again = load_float(tmp_path / "again.onnx")
    assert [node.op_type for node in again.model.graph.node] == [n.op_type for n in first.model.graph.node]
    names = [tensor.name for tensor in again.model.graph.initializer]
    assert len(names) == len(set(names))


def test_sums_in_float_leave_out_the_terms_that_a_layer_makes_for_them_alone(tmp_path: Path) -> None:
    draw, make = np.random.default_rng(0), helper.make_node
    nodes = [
        make("Conv", ["x", "a.w"], ["a"], "first", pads=[1] * 4),
        make("Relu", ["a"], ["ar"], "relu1"),
        make("Conv", ["ar", "b.w"], ["b"], "alone", pads=[1] * 4),
        make("Add", ["b", "ar"], ["s"], "skip"),
        make("Conv", ["s", "b.w"], ["c"], "left", pads=[1] * 4),
        make("Conv", ["s", "d.w"], ["d"], "right", pads=[1] * 4),
        make("Add", ["c", "d"], ["t"], "both"),
        make("Relu", ["t"], ["tr"], "relu2"),
        make("Conv", ["tr", "y.w"], ["y"], "last"),
    ]
    shapes = {"a.w": (16, 3, 3, 3), "b.w": (16, 16, 3, 3), "d.w": (16, 16, 3, 3), "y.w": (4, 16, 1, 1)}
    weights = {name: (0.2 * draw.standard_normal(shape)).astype("f4") for name, shape in shapes.items()}
    path = save_model(nodes, weights, tmp_path / "m.onnx", shape=("N", 3, SIZE, SIZE))
    scheme = replace(scheme_for(find_target("x86")), dialect="openvino-u8")
    work = PostTraining(load_float(path), scheme, lambda: iter([{"x": samples()}]))
    numbers = work.numbers("min-max")
    whole = Quantized(work.write(numbers), "openvino-u8", "min-max", {}, work=work, numbers=numbers)
    (made,) = sums_in_float(whole)
    read = {node.input[0] for node in made.model.graph.node if node.op_type == "QuantizeLinear"}
    assert read == {"x", "ar", "s", "d", "tr"}
    onnx.save(made.model, tmp_path / "q.onnx")
    exact = backend("onnxruntime").open(path).run(samples()).reshape(64, -1)
    got = backend("openvino").open(tmp_path / "q.onnx").run(samples()).reshape(64, -1)
    assert judge(exact, got, None).signal_to_noise_db > 25
    coverage = backend("openvino").coverage(tmp_path / "q.onnx")
    assert (coverage.int8_nodes, coverage.int8_macs) == (1.0, 1.0)


def test_a_network_without_sums_has_no_second_file(tmp_path: Path) -> None:
    opset, nodes, more = MEANS["reduce"]
    path = network(tmp_path / "m.onnx", nodes, opset, **more)
    scheme = replace(scheme_for(find_target("x86")), dialect="openvino-u8")
    work = PostTraining(load_float(path), scheme, lambda: iter([{"x": samples()}]))
    numbers = work.numbers("min-max")
    assert (
        sums_in_float(Quantized(work.write(numbers), "openvino-u8", "", {}, work=work, numbers=numbers)) == []
    )
