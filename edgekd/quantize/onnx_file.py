"""A float ONNX file of any origin, checked and simplified: where quantization of a file starts."""

from __future__ import annotations

import importlib
import math
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper, shape_inference, version_converter

from edgekd.backends.feeds import TO_SHRINK, too_large
from edgekd.backends.onnxruntime import OnnxRuntimeBackend
from edgekd.errors import BackendError, StorageError, UnsupportedModelError, UsageError
from edgekd.files import sha256_file
from edgekd.quantize.means import pool_in_one_node

LOWEST_OPSET, HIGHEST_OPSET = 13, 22  # DequantizeLinear with an axis; the last that all runtimes parse
_QUANTIZED = (
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger",
    "MatMulNBits", "QGemm", "QAttention", "DynamicQuantizeMatMul", "FakeQuantize",
)  # fmt: skip
_TYPES = {
    TensorProto.FLOAT: "float32", TensorProto.INT64: "int64", TensorProto.INT32: "int32",
    TensorProto.BOOL: "bool", TensorProto.UINT8: "uint8", TensorProto.DOUBLE: "float64",
}  # fmt: skip


@dataclass(frozen=True)
class Port:
    """An input or output of a graph; an axis without a fixed size is None."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class FloatModel:
    """`model`: standard operators, constants folded, opset 13 to 22. `notes`: what was changed."""

    model: onnx.ModelProto
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    sha256: str
    notes: tuple[str, ...] = ()

    @property
    def batch(self) -> int | None:
        """The fixed number of samples of one call; None where the file leaves it free."""
        return self.inputs[0].shape[0] if self.inputs[0].shape else 1

    @cached_property
    def values(self) -> dict[str, NDArray[Any]]:
        """Every stored tensor by name, not to be written to."""
        return {tensor.name: numpy_helper.to_array(tensor) for tensor in self.model.graph.initializer}

    @property
    def stated(self) -> dict[str, str]:
        """The file's own metadata."""
        return {entry.key: entry.value for entry in self.model.metadata_props}


def load_float(path: Path) -> FloatModel:
    """Read, check and simplify a float model.

    Raises:
        UsageError: no such file.
        UnsupportedModelError: not an ONNX model, already quantized, in half precision, too large, of an
            opset that cannot be brought to 13 to 22, without anything to compute, or refused by ONNX Runtime.
    """
    if not path.is_file():
        raise UsageError(f"model {path}: no such file", "give the path of a float .onnx file")
    model = _read(path)
    _refuse_quantized(model, path)
    if any(tensor.data_type == TensorProto.FLOAT16 for tensor in model.graph.initializer):
        raise UnsupportedModelError(
            f"{path}: its weights are float16; int8 is calibrated on the float32 model",
            "export it in float32",
        )
    notes: list[str] = []
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    stated = {entry.key: entry.value for entry in model.metadata_props}
    simple = _at_opset(_read_by_runtime(model, path, notes), path, notes)
    helper.set_model_props(simple, stated)
    fed = {tensor.name for tensor in simple.graph.initializer}
    inputs = tuple(_port(value, path) for value in simple.graph.input if value.name not in fed)
    if not inputs:
        raise UnsupportedModelError(f"{path}: the graph has no input")
    return FloatModel(
        simple, inputs, tuple(_port(v, path) for v in simple.graph.output), sha256_file(path), tuple(notes)
    )


def _read(path: Path) -> onnx.ModelProto:
    undecodable = importlib.import_module("google.protobuf.message").DecodeError
    if problem := too_large(path):
        raise UnsupportedModelError(problem, TO_SHRINK)
    try:
        model = onnx.load(path)
    except undecodable as error:
        raise UnsupportedModelError(f"{path}: not an ONNX model: {error}", "export it again") from error
    except (FileNotFoundError, onnx.checker.ValidationError) as error:
        raise UnsupportedModelError(
            f"{path}: its weights are stored in further files, and one of them is missing: {error}",
            "copy the files that were written beside the .onnx file into the same folder",
        ) from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error}") from error
    if not model.graph.node:
        raise UnsupportedModelError(f"{path}: not an ONNX model, or one without nodes", "export it again")
    if sum(tensor.ByteSize() for tensor in model.graph.initializer) > 1900 * 2**20:
        raise UnsupportedModelError(f"{path}: more than 1.9 GiB of weights", "edgekd is for small networks")
    return model


def _refuse_quantized(model: onnx.ModelProto, path: Path) -> None:
    found = [n for n in model.graph.node if n.op_type in _QUANTIZED or n.op_type.startswith("QLinear")]
    if found:
        kinds = sorted({node.op_type for node in found})
        raise UnsupportedModelError(
            f"{path}: already quantized: {len(found)} nodes of {', '.join(kinds)}, the first is "
            f"'{found[0].name}'",
            "give the float model it was made from; `edgekd profile FILE` tells what runs in int8",
        )


def _read_by_runtime(model: onnx.ModelProto, path: Path, notes: list[str]) -> onnx.ModelProto:
    """Simplified; an opset that is too new for ONNX Runtime is lowered first."""
    try:
        return _simplified(model, path)
    except UnsupportedModelError:
        if _opset(model) <= HIGHEST_OPSET:
            raise
    return _simplified(_at_opset(model, path, notes), path)


def _opset(model: onnx.ModelProto) -> int:
    """Of the standard operators; the highest that is worked with where the model states none."""
    return next((entry.version for entry in model.opset_import if not entry.domain), HIGHEST_OPSET)


def _simplified(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "simple.onnx"
        onnx.save(model, source)  # one file, whatever the original was
        try:
            OnnxRuntimeBackend().simplify(source, target)
        except BackendError as error:
            raise UnsupportedModelError(
                error.message.replace(str(source), str(path)),
                f"onnx.checker tells whether it is valid; export it again with an opset from {LOWEST_OPSET} "
                f"to {HIGHEST_OPSET} and standard operators",
            ) from error
        simple = onnx.load(target)
    for number, node in enumerate(simple.graph.node):
        node.name = node.name or f"{node.op_type}_{number}"
        del node.metadata_props[:]
        node.doc_string = ""
    pool_in_one_node(simple)
    used = {node.domain for node in simple.graph.node} | {""}
    kept = [entry for entry in simple.opset_import if entry.domain in used]
    del simple.opset_import[:]
    simple.opset_import.extend(kept)
    return simple


def _at_opset(model: onnx.ModelProto, path: Path, notes: list[str]) -> onnx.ModelProto:
    version = _opset(model)
    if LOWEST_OPSET <= version <= HIGHEST_OPSET:
        return model
    wanted = LOWEST_OPSET if version < LOWEST_OPSET else HIGHEST_OPSET
    try:
        converted = version_converter.convert_version(model, wanted)
        OnnxRuntimeBackend().open_graph(converted.SerializeToString())
    except (RuntimeError, BackendError) as error:
        raise UnsupportedModelError(
            f"{path}: opset {version} cannot be brought to {wanted}: {str(error).splitlines()[0]}",
            f"export it again with an opset from {LOWEST_OPSET} to {HIGHEST_OPSET}",
        ) from error
    notes.append(f"opset {version} became {wanted}")
    return converted


def _port(value: onnx.ValueInfoProto, path: Path) -> Port:
    kind = value.type.tensor_type
    if kind.elem_type not in _TYPES:
        raise UnsupportedModelError(
            f"{path}: '{value.name}' is of type {TensorProto.DataType.Name(kind.elem_type)}; "
            f"known: {', '.join(_TYPES.values())}"
        )
    shape = tuple(dim.dim_value if dim.dim_value > 0 else None for dim in kind.shape.dim)
    return Port(value.name, _TYPES[kind.elem_type], shape)


def activation_bytes(model: FloatModel) -> int:
    """Of all float tensors between operators, for one sample; an axis without a fixed size counts as 1."""
    inferred = shape_inference.infer_shapes(model.model).graph.value_info
    shapes = [[d.dim_value or 1 for d in value.type.tensor_type.shape.dim] for value in inferred]
    batch = model.batch or 1
    return sum(4 * math.prod(shape) for shape in shapes) // batch


def element_types(model: onnx.ModelProto) -> dict[str, tuple[int, int | None]]:
    """Element type and rank (None: not known) of each tensor that shape inference knows."""
    inferred = shape_inference.infer_shapes(model)
    found: dict[str, tuple[int, int | None]] = {}
    for value in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        kind = value.type.tensor_type
        found[value.name] = (kind.elem_type, len(kind.shape.dim) if kind.HasField("shape") else None)
    return found
