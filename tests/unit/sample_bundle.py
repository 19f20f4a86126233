"""A small ONNX classifier and a bundle of it, for the tests of the bundle and of the runtime."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from edgekd.bundle import Golden, VariantFile, write_bundle
from edgekd.spec import ModelSpec, Preprocessing

Array = NDArray[np.float32]
GREY = Preprocessing(8, 10, "grey", (0.3,), (0.25,))
RGB = Preprocessing(8, 10, "rgb", (0.3, 0.4, 0.5), (0.25, 0.2, 0.3))
CLASSES = ("ankle boot", "bag", "coat")


def write_classifier(path: Path, spec: ModelSpec, seed: int = 0) -> Path:
    """Convolution, ReLU, global average, linear: (N, C, H, W) to (N, classes)."""
    rng = np.random.default_rng(seed)
    weights = {
        "kernel": rng.normal(size=(4, spec.input_shape[0], 3, 3)),
        "linear": rng.normal(size=(4, len(spec.classes))),
        "bias": rng.normal(size=len(spec.classes)),
    }
    nodes = [
        helper.make_node("Conv", [spec.input_name, "kernel"], ["conv"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv"], ["relu"]),
        helper.make_node("GlobalAveragePool", ["relu"], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["flat"]),
        helper.make_node("Gemm", ["flat", "linear", "bias"], [spec.output_name]),
    ]
    graph = helper.make_graph(
        nodes,
        "classifier",
        [helper.make_tensor_value_info(spec.input_name, TensorProto.FLOAT, ["N", *spec.input_shape])],
        [helper.make_tensor_value_info(spec.output_name, TensorProto.FLOAT, ["N", len(spec.classes)])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    path.write_bytes(model.SerializeToString())
    return path


def raw_logits(model: Path, array: Array) -> Array:
    """What a plain ONNX Runtime session gives."""
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: array})[0])


def sample_parts(work: Path, preprocessing: Preprocessing = GREY) -> dict[str, Any]:
    """Keyword arguments of `write_bundle`: an ONNX Runtime variant `ort`, then an OpenVINO variant `ov`."""
    work.mkdir(parents=True, exist_ok=True)
    spec = ModelSpec(preprocessing, CLASSES)
    source = write_classifier(work / "model.onnx", spec)
    golden_input = np.random.default_rng(1).normal(size=(4, *spec.input_shape)).astype(np.float32)
    logits = raw_logits(source, golden_input)
    ort = VariantFile("ort", source, ("onnxruntime",), accuracy=0.9)
    ov = replace(ort, id="ov", runtime=("openvino",))
    return {
        "name": "sample",
        "spec": spec,
        "variants": (ort, ov),
        "golden": Golden(golden_input, {"ort": logits, "ov": logits}, {"ort": 1e-4, "ov": 1e-4}),
        "provenance": {"tool": "edgekd", "seed": 0},
        "evidence": {"accuracy": {"teacher": 0.93, "student": None}},
    }


def sample_bundle(work: Path, preprocessing: Preprocessing = GREY) -> Path:
    """A bundle folder in ``work``."""
    folder = work / "model.ekd"
    write_bundle(folder, **sample_parts(work, preprocessing))
    return folder


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Let ``edit`` change the parsed manifest in place."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def set_variant(folder: Path, index: int, changes: Mapping[str, Any]) -> None:
    """Change keys of one variant in the manifest."""
    edit_manifest(folder, lambda manifest: manifest["variants"][index].update(changes))
