"""ONNX Runtime on the CPU."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from edgekd.backends import Array, Coverage, Feeds, Shapes, in_order, processor_name
from edgekd.backends.executed import coverage_of
from edgekd.backends.feeds import Feed, random_feeds, shapes_of
from edgekd.errors import BackendError, missing_extra

_RUNS = 30  # timed runs a layer
_WARM_UP = 5


class OnnxRuntimeSession:
    """One loaded model."""

    def __init__(self, session: Any, batch: int | None) -> None:
        self._session = session
        self._batch = batch
        self.names = tuple(described.name for described in session.get_inputs())
        self._input = self.names[0] if self.names else ""
        self._outputs = [session.get_outputs()[0].name]
        self._errors = _runtime_errors()

    def run(self, images: Array | Feeds) -> Array:
        """Logits, float32 (N, classes), of float32 (N, C, H, W); the first output, of inputs by name.

        Raises:
            BackendError: the images do not fit the model.
        """
        feeds = {self._input: images} if isinstance(images, np.ndarray) else images
        if self._batch is not None and isinstance(images, np.ndarray) and len(images) != self._batch:
            raise BackendError(f"the session was opened for batch {self._batch}, got {len(images)} images")
        try:
            logits: Array = self._session.run(self._outputs, feeds)[0]
        except self._errors as error:
            raise BackendError(f"onnxruntime: {error}") from error
        return logits


class GraphSession:
    """A graph of any inputs, run as written, that gives every tensor named as one of its outputs."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self._names = [output.name for output in session.get_outputs()]
        self._errors = _runtime_errors()

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Every output by name; BackendError where the inputs do not fit the graph."""
        try:
            return dict(zip(self._names, self._session.run(None, feeds), strict=True))
        except self._errors as error:
            raise BackendError(f"onnxruntime: {error}") from error


class OnnxRuntimeBackend:
    """The CPU execution provider."""

    name = "onnxruntime"

    def version(self) -> str:
        """Version of the installed package."""
        return str(_engine().__version__)

    def precisions(self) -> tuple[str, ...]:
        """The CPU execution provider computes in float32 and, where the graph is quantized, in int8."""
        _engine()
        return ("f32", "int8")

    def device(self) -> str:
        """The CPU's name."""
        _engine()
        return processor_name()

    def open(
        self,
        model: Path,
        *,
        threads: int = 1,
        precision: str = "f32",
        batch: int | None = None,
        shapes: Shapes | None = None,
        optimize: bool = True,
    ) -> OnnxRuntimeSession:
        """Load an ONNX file; ``optimize=False`` runs the graph node by node as written (the reference).

        Raises:
            BackendError: the runtime refuses the graph, or `precision` is not "f32".
        """
        if precision != "f32":
            raise BackendError(
                f"onnxruntime runs operators that are not quantized in 'f32', got '{precision}'",
                "quantize the graph for int8, or use the backend 'openvino' for bf16",
            )
        engine = _engine()
        options = _options(threads)
        if not optimize:
            options.graph_optimization_level = engine.GraphOptimizationLevel.ORT_DISABLE_ALL
        return OnnxRuntimeSession(_load(model, options, batch, shapes), batch)

    def open_graph(self, model: bytes, *, threads: int = 1, optimize: bool = False) -> GraphSession:
        """Load a serialised ONNX model with all its outputs; BackendError where the runtime refuses it."""
        engine = _engine()
        options = _options(threads)
        if not optimize:
            options.graph_optimization_level = engine.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            return GraphSession(engine.InferenceSession(model, options, providers=["CPUExecutionProvider"]))
        except _runtime_errors() as error:
            raise BackendError(f"onnxruntime refuses the graph: {error}") from error

    def simplify(self, model: Path, to: Path) -> None:
        """Write the model with constants folded and batch norm in its convolutions; standard operators only.
        Products stay apart from their sums: as a Gemm between Reshapes they have no integer kernel.
        BackendError where the runtime refuses the model.
        """
        options = _options(threads=1)
        options.graph_optimization_level = _engine().GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(to)
        options.add_session_config_entry("optimization.disable_specified_optimizers", "MatMulAddFusion")
        _load(model, options, batch=None)

    def coverage(
        self,
        model: Path,
        *,
        precision: str = "f32",
        time_layers: bool = False,
        feeds: Sequence[Feed] | None = None,
    ) -> Coverage:
        """The optimised graph at batch 1; times are medians of 30 runs with a resolution of 1 µs.

        The runtime's own profiler adds some microseconds to each node: the sum exceeds the latency.

        Raises:
            BackendError: the runtime refuses the graph, or `precision` is not "f32".
            MissingExtraError: the package onnx, which reads the optimised graph, is not installed.
        """
        if precision != "f32":
            raise BackendError(f"onnxruntime knows no float precision but 'f32', got '{precision}'")
        with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
            optimised = Path(folder) / "executed.onnx"
            self.optimise(model, optimised, feeds)
            times = _layer_times(optimised, Path(folder), feeds) if time_layers else ()
            return coverage_of(model, optimised, times)

    def optimise(self, model: Path, to: Path, feeds: Sequence[Feed] | None = None) -> None:
        """Write the graph that is executed here at batch 1; BackendError where the runtime refuses it."""
        options = _options(threads=1)
        options.optimized_model_filepath = str(to)
        _load(model, options, batch=1, shapes=shapes_of(feeds))


def quantize_static(model: Path, to: Path, batches: Iterable[Feeds], kinds: list[str] | None) -> None:
    """The package's own static quantization: QDQ, uint8 activations, int8 weights per channel, min-max.

    Args:
        kinds: operators to quantize; None is all that it knows.
    """
    _engine()
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc] # the package has no types
        def __init__(self) -> None:
            self._feeds = iter(batches)

        def get_next(self) -> Feeds | None:
            return next(self._feeds, None)

    quantization.quantize_static(
        str(model),
        str(to),
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=kinds,
    )


def _layer_times(optimised: Path, folder: Path, feeds: Sequence[Feed] | None) -> list[float | None]:
    """Median milliseconds of each node of the optimised graph, which runs once more exactly as it stands."""
    import onnx

    executed = onnx.load(optimised)
    for index, node in enumerate(executed.graph.node):
        node.name = f"node{index}"
    path = folder / "named.onnx"
    onnx.save(executed, path)
    options = _options(threads=1)
    options.graph_optimization_level = _engine().GraphOptimizationLevel.ORT_DISABLE_ALL
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = _load(path, options, batch=1)
    fed = _image(session) if feeds is None else random_feeds(feeds, seed=0)
    for _ in range(_WARM_UP + _RUNS):
        session.run(None, fed)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    durations: dict[str, list[float]] = {}
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            durations.setdefault(event["name"].removesuffix("_kernel_time"), []).append(event["dur"] / 1000)
    found = [durations.get(node.name, [])[-_RUNS:] for node in executed.graph.node]
    return [round(statistics.median(calls), 4) if calls else None for calls in found]


def _image(session: Any) -> dict[str, Array]:
    """A fixed random batch of 1 for the session's input."""
    described = session.get_inputs()[0]
    shape = [size if isinstance(size, int) else 1 for size in described.shape]
    return {described.name: np.random.default_rng(0).standard_normal(shape, dtype=np.float32)}


def _engine() -> Any:
    """The package, with the log level at errors.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise missing_extra("onnxruntime", "onnxruntime", "the backend 'onnxruntime'") from error
    return onnxruntime


def _runtime_errors() -> tuple[type[Exception], ...]:
    """The runtime's own exceptions; they have no common base class."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (
        state.EPFail, state.EngineError, state.Fail, state.InvalidArgument, state.InvalidGraph,
        state.InvalidProtobuf, state.ModelLoaded, state.NoModel, state.NoSuchFile, state.NotImplemented,
        state.RuntimeException, RuntimeError, ValueError,
    )  # fmt: skip


def _options(threads: int) -> Any:
    options = _engine().SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


def _load(model: Path, options: Any, batch: int | None, shapes: Shapes | None = None) -> Any:
    """A session; symbolic axes that a batch or shapes give a size are fixed before the graph is optimised."""
    engine = _engine()

    def refuse(error: Exception) -> NoReturn:
        raise BackendError(f"onnxruntime refuses {model}: {error}") from error

    if batch is not None or shapes is not None:
        plain = _options(threads=1)
        plain.graph_optimization_level = engine.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            described = engine.InferenceSession(
                str(model), plain, providers=["CPUExecutionProvider"]
            ).get_inputs()
        except _runtime_errors() as error:
            refuse(error)
        wanted = [(batch,)] if shapes is None else in_order([one.name for one in described], shapes)
        sizes = {
            axis: size
            for one, shape in zip(described, wanted, strict=False)
            for axis, size in zip(one.shape, shape, strict=False)
            if isinstance(axis, str)
        }
        for axis, size in sizes.items():
            options.add_free_dimension_override_by_name(axis, size)
    try:
        return engine.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except _runtime_errors() as error:
        refuse(error)
