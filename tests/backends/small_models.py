"""Small ONNX files with a known number of multiply-accumulates, written node by node."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from edgekd.backends.onnxruntime import OnnxRuntimeBackend
from edgekd.bundle import Golden, VariantFile, write_bundle
from edgekd.spec import ModelSpec, Preprocessing

SHAPE = (3, 16, 16)
MACS = (16 * 16 * 16 * 27, 16 * 16 * 16 * 144, 160)  # conv1, conv2, fc at batch 1


@dataclass
class _Graph:
    """Nodes and initializers in the making. `activations` is "float", "u8" or "s8"."""

    activations: str
    zero_point: int = 0  # of signed activations
    nodes: list[NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def constant(self, name: str, values: NDArray[np.generic]) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(values), name))
        return name

    def weight(self, name: str, *shape: int) -> str:
        """A float tensor, or an int8 initializer behind a per-channel DequantizeLinear."""
        values = (0.2 * self.rng.standard_normal(shape)).astype(np.float32)
        if self.activations == "float":
            return self.constant(name, values)
        scale = np.abs(values.reshape(shape[0], -1)).max(axis=1) / 127
        rounded = np.round(values / scale.reshape(-1, *[1] * (len(shape) - 1))).astype(np.int8)
        parts = [
            self.constant(f"{name}_q", rounded),
            self.constant(f"{name}_scale", scale.astype(np.float32)),
            self.constant(f"{name}_zero", np.zeros(shape[0], np.int8)),
        ]
        self.nodes.append(helper.make_node("DequantizeLinear", parts, [name], axis=0))
        return name

    def bias(self, name: str, size: int) -> str:
        return self.constant(name, (0.1 * self.rng.standard_normal(size)).astype(np.float32))

    def quantized(self, tensor: str, *, signed: bool, out: str = "") -> str:
        """Q/DQ behind a tensor; u8 has zero point 128 for signed values and 0 after a Relu."""
        if self.activations == "float":
            return tensor
        unsigned = self.activations == "u8"
        zero = np.array(128 * signed, np.uint8) if unsigned else np.array(self.zero_point, np.int8)
        grid = [
            self.constant(f"{tensor}_s", np.array(0.03, np.float32)),
            self.constant(f"{tensor}_z", zero),
        ]
        out = out or f"{tensor}_dq"
        self.nodes.append(helper.make_node("QuantizeLinear", [tensor, *grid], [f"{tensor}_q"]))
        self.nodes.append(helper.make_node("DequantizeLinear", [f"{tensor}_q", *grid], [out]))
        return out

    def node(self, op: str, inputs: list[str], out: str, name: str = "", **attributes: object) -> str:
        self.nodes.append(helper.make_node(op, inputs, [out], name=name, **attributes))
        return out

    def save(self, path: Path) -> Path:
        images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["N", *SHAPE])
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])
        graph = helper.make_graph(self.nodes, "small", [images], [logits], self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(model)
        onnx.save(model, path)
        return path


def residual_net(path: Path, activations: str = "float", *, zero_point: int = 0) -> Path:
    """conv+relu, conv, add+relu, global pool, fully connected; every tensor quantized unless "float"."""
    graph = _Graph(activations, zero_point)
    same = {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}
    images = graph.quantized("images", signed=True)
    conv1 = graph.node(
        "Conv", [images, graph.weight("w1", 16, 3, 3, 3), graph.bias("b1", 16)], "c1", "conv1", **same
    )
    skip = graph.quantized(graph.node("Relu", [conv1], "r1"), signed=False)
    conv2 = graph.node(
        "Conv", [skip, graph.weight("w2", 16, 16, 3, 3), graph.bias("b2", 16)], "c2", "conv2", **same
    )
    added = graph.node("Add", [graph.quantized(conv2, signed=True), skip], "sum")
    joined = graph.quantized(graph.node("Relu", [added], "r2"), signed=False)
    pooled = graph.quantized(graph.node("GlobalAveragePool", [joined], "pool"), signed=False)
    flat = graph.quantized(graph.node("Flatten", [pooled], "flat"), signed=False)
    head = "logits" if activations == "float" else "y"
    graph.node("Gemm", [flat, graph.weight("w3", 10, 16), graph.bias("b3", 10)], head, "fc", transB=1)
    if activations != "float":
        graph.quantized(head, signed=True, out="logits")
    return graph.save(path)


def zero_u8_net(path: Path) -> Path:
    """A u8 graph whose zero points are all 0: TensorRT parses it with a warning and reads it as s8."""
    graph = _Graph("u8")
    images = graph.quantized("images", signed=False)
    graph.node(
        "Conv", [images, graph.weight("w1", 10, 3, 16, 16), graph.bias("b1", 10)], "c1", kernel_shape=[16, 16]
    )
    graph.node("Flatten", ["c1"], "logits")
    return graph.save(path)


def small_bundle(work: Path) -> Path:
    """Float variants for both runtimes and for no machine, and int8 ones: u8 and symmetric s8 activations."""
    spec = ModelSpec(Preprocessing(*SHAPE[1:], "rgb", (0.5,) * 3, (0.5,) * 3), tuple("abcdefghij"), "images")
    images = np.random.default_rng(0).normal(size=(4, *SHAPE)).astype(np.float32)
    files, outputs = [], {}
    for name, kind, runtime in (
        ("f32", "float", "onnxruntime"), ("ov", "float", "openvino"), ("u8", "u8", "onnxruntime"),
        ("s8", "s8", "onnxruntime"), ("elsewhere", "float", "onnxruntime"),
    ):  # fmt: skip
        path = residual_net(work / f"{name}.onnx", kind)
        arch = ("riscv64",) if name == "elsewhere" else ()
        precision = "f32" if kind == "float" else "int8"
        files.append(VariantFile(name, path, (runtime,), precision=precision, arch=arch))
        outputs[name] = OnnxRuntimeBackend().open(path, optimize=False).run(images)
    golden = Golden(images, outputs, {f.id: 0.5 if f.precision == "int8" else 1e-4 for f in files})
    folder = work / "model.ekd"
    write_bundle(folder, name="m", spec=spec, variants=files, golden=golden, provenance={}, evidence={})
    return folder
