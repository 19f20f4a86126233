"""Float ONNX files of known content, written without torch, and samples for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

SIZE, CLASSES = 16, 4


def save_model(
    nodes: list[onnx.NodeProto],
    weights: dict[str, NDArray[Any]],
    path: Path,
    *,
    shape: tuple[Any, ...] = ("N", 3, SIZE, SIZE),
    opset: int = 17,
) -> Path:
    """Write a graph from the input ``x`` to the output ``y``."""
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.save(model, path)
    return path


def cnn(path: Path, *, opset: int = 17, seed: int = 0, shape: tuple[Any, ...] | None = None) -> Path:
    """Two branches of convolutions that are added, a pool and a classifier; each class answers to one colour
    or pattern of `pictures`."""
    draw = np.random.default_rng(seed)

    def conv(name: str, source: str, target: str, stride: int = 1) -> onnx.NodeProto:
        return helper.make_node(
            "Conv", [source, f"{name}.w", f"{name}.b"], [target], name, pads=[1] * 4, strides=[stride] * 2
        )

    nodes = [
        conv("stem", "x", "a", 2),
        helper.make_node("Relu", ["a"], ["ar"], "relu1"),
        conv("body1", "ar", "b"),
        helper.make_node("Relu", ["b"], ["br"], "relu2"),
        conv("body2", "br", "c"),
        helper.make_node("Add", ["ar", "c"], ["s"], "add"),
        helper.make_node("Relu", ["s"], ["sr"], "relu3"),
        helper.make_node("GlobalAveragePool", ["sr"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "fc.w", "fc.b"], ["y"], "fc", transB=1),
    ]
    weights: dict[str, NDArray[Any]] = {}
    for name, inputs in (("stem", 3), ("body1", 16), ("body2", 16)):
        weights[f"{name}.w"] = (draw.standard_normal((16, inputs, 3, 3)) / (3 * inputs**0.5)).astype("f4")
        weights[f"{name}.b"] = (0.1 * draw.standard_normal(16)).astype("f4")
    weights["fc.w"] = draw.standard_normal((CLASSES, 16)).astype("f4")
    weights["fc.b"] = np.zeros(CLASSES, "f4")
    return save_model(nodes, weights, path, opset=opset, shape=shape or ("N", 3, SIZE, SIZE))


def pictures(count: int = 120, seed: int = 1) -> NDArray[np.uint8]:
    """uint8 (N, H, W, 3) of four colours with noise."""
    draw = np.random.default_rng(seed)
    colours = np.array([[220, 30, 30], [30, 220, 30], [30, 30, 220], [200, 200, 40]])
    base = colours[np.arange(count) % CLASSES][:, None, None]
    return np.clip(base + draw.normal(0, 40, (count, SIZE, SIZE, 3)), 0, 255).astype(np.uint8)


def store_pictures(path: Path, **more: NDArray[Any]) -> Path:
    """``images`` in a ``.npz`` file."""
    np.savez(path, images=pictures(), **more)  # type: ignore[arg-type]
    return path


def attention(path: Path, width: int = 32, outlier: float = 1.0) -> Path:
    """One transformer block over (N, 8, width) tokens: LayerNorm, self-attention, LayerNorm, feed-forward, a
    classifier of the first token. `outlier` multiplies two channels of both norms."""
    draw = np.random.default_rng(0)
    gain = np.ones(width, "f4")
    gain[:2] = outlier
    weights: dict[str, NDArray[Any]] = {
        "ln1.g": gain, "ln1.b": np.zeros(width, "f4"), "ln2.g": gain, "ln2.b": np.zeros(width, "f4"),
        "scale": np.array(width**-0.5, "f4"), "first": np.array(0, np.int64),
    }  # fmt: skip
    weights["up.b"] = (0.1 * draw.standard_normal(4 * width)).astype("f4")
    for name, rows, columns in (
        ("q", width, width), ("k", width, width), ("v", width, width), ("o", width, width),
        ("up", width, 4 * width), ("down", 4 * width, width), ("head", width, CLASSES),
    ):  # fmt: skip
        weights[f"{name}.w"] = (draw.standard_normal((rows, columns)) / rows**0.5).astype("f4")
        if columns != CLASSES and rows == width:
            weights[f"{name}.w"][:2] /= outlier
    make = helper.make_node
    nodes = [
        make("LayerNormalization", ["x", "ln1.g", "ln1.b"], ["n1"], "ln1", axis=-1),
        *(make("MatMul", ["n1", f"{name}.w"], [name], name) for name in "qkv"),
        make("Transpose", ["k"], ["kt"], "kt", perm=[0, 2, 1]),
        make("MatMul", ["q", "kt"], ["scores"], "scores"),
        make("Mul", ["scores", "scale"], ["scaled"], "scaled"),
        make("Softmax", ["scaled"], ["weights"], "softmax", axis=-1),
        make("MatMul", ["weights", "v"], ["mixed"], "mixed"),
        make("MatMul", ["mixed", "o.w"], ["o"], "o"),
        make("Add", ["x", "o"], ["r1"], "residual1"),
        make("LayerNormalization", ["r1", "ln2.g", "ln2.b"], ["n2"], "ln2", axis=-1),
        make("MatMul", ["n2", "up.w"], ["u0"], "up"),
        make("Add", ["u0", "up.b"], ["u"], "bias"),
        make("Relu", ["u"], ["ur"], "act"),
        make("MatMul", ["ur", "down.w"], ["d"], "down"),
        make("Add", ["r1", "d"], ["r2"], "residual2"),
        make("Gather", ["r2", "first"], ["t"], "token", axis=1),
        make("MatMul", ["t", "head.w"], ["y"], "head"),
    ]
    return save_model(nodes, weights, path, shape=("N", 8, width))
