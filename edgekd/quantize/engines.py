"""Other quantizers through their own public interface, for a comparison on the same model and samples.

Each takes the simplified float graph and the calibration batches, and gives a QDQ graph. They are optional
packages, imported when asked for; what one of them cannot do is told, and stops nothing else.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from edgekd.errors import BackendError, EdgekdError, UsageError, missing_extra, unknown_name
from edgekd.quantize.observe import Batches
from edgekd.quantize.onnx_file import FloatModel

SAMPLES = 300  # that each engine calibrates with at most, its own default where it has one


def _onnxruntime(model: FloatModel, batches: Batches) -> onnx.ModelProto:
    """`quantize_static` as its documentation advises for x86: QDQ, u8 activations, s8 weights per channel; a
    transformer only in its products."""
    from edgekd.backends.onnxruntime import quantize_static

    attention = any(node.op_type == "LayerNormalization" for node in model.model.graph.node)
    kinds = ["Conv", "MatMul", "Gemm"] if attention else None
    with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "quantized.onnx"
        onnx.save(model.model, source)
        quantize_static(source, target, batches(), kinds)
        return onnx.load(target)


def _nncf(model: FloatModel, batches: Batches) -> onnx.ModelProto:
    """`nncf.quantize` on the ONNX graph: its defaults, or its transformer mode where there is attention."""
    try:
        import nncf
    except ImportError as error:
        raise missing_extra("nncf", "nncf", "the engine 'nncf'") from error
    attention = any(node.op_type == "LayerNormalization" for node in model.model.graph.node)
    logging.getLogger("nncf").setLevel(logging.ERROR)
    feeds = list(batches())
    made: onnx.ModelProto = nncf.quantize(
        model.model,
        nncf.Dataset(feeds),
        subset_size=len(feeds),
        model_type=nncf.ModelType.TRANSFORMER if attention else None,
    )
    return made


def _torchao(model: FloatModel, batches: Batches) -> onnx.ModelProto:
    made: onnx.ModelProto = _torch_engines().torchao(model, batches)
    return made


def _neural_compressor(model: FloatModel, batches: Batches) -> onnx.ModelProto:
    made: onnx.ModelProto = _torch_engines().neural_compressor(model, batches)
    return made


def _torch_engines() -> ModuleType:
    try:
        from edgekd.quantize import torch_engines
    except ImportError as error:
        raise missing_extra("torch", "train", "an engine that quantizes torch modules") from error
    return torch_engines


_TABLE: dict[str, Callable[[FloatModel, Batches], onnx.ModelProto]] = {
    "onnxruntime": _onnxruntime,
    "nncf": _nncf,
    "torchao": _torchao,
    "neural-compressor": _neural_compressor,
}


def engine_names() -> tuple[str, ...]:
    """Names of the other engines."""
    return tuple(_TABLE)


def run_engine(name: str, model: FloatModel, batches: Batches) -> onnx.ModelProto:
    """The QDQ graph that this engine makes.

    Raises:
        UsageError: no such engine.
        MissingExtraError: its package is not installed.
        UnsupportedModelError: the graph has no torch form, which an engine for torch reads.
        BackendError: it failed on this model; the message is its own.
    """
    if name not in _TABLE:
        raise UsageError(*unknown_name("engine", name, _TABLE))
    quiet = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
        warnings.simplefilter("ignore")
        try:
            return _TABLE[name](model, lambda: _few(batches, model))
        except EdgekdError:
            raise
        except Exception as error:  # another package's failure on a model is a row, no crash
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise BackendError(f"{name}: {type(error).__name__}: {lines[0][:300]}") from error


def _few(batches: Batches, model: FloatModel) -> Iterator[Any]:
    seen = 0
    for feeds in batches():
        yield feeds
        seen += len(feeds[model.inputs[0].name])
        if seen >= SAMPLES:
            return
