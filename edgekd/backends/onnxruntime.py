"""ONNX Runtime on the CPU."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from edgekd.backends import Array, Coverage, Feeds, Layer, Shapes, in_order, processor_name
from edgekd.backends.macs import Executed, assign, compute_nodes, kind_of, plain_name, weight_name
from edgekd.errors import BackendError, missing_extra

# Integer kernels beside those named QLinear*.
_INTEGER_OPS = {"QGemm", "MatMulInteger", "ConvInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
_COMPUTE = re.compile(
    r"(QLinear|Fused|N[Hh]wc)?Conv(Transpose|Integer)?|(Fused|Q)?Gemm|(QLinear|Fused|DynamicQuantize)?MatMul"
    r"(Integer|IntegerToFloat|NBits)?"
)
_WEIGHT_INPUT = {"QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3}  # of every other operator: 1
# Operators that only move or select values: they run in the type of their input.
_MOVERS = {
    "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "MaxPool", "Concat", "Slice", "Gather",
    "Split", "Identity", "Pad", "Expand", "ReorderInput", "ReorderOutput", "DequantizeLinear",
}  # fmt: skip
_ABSORBED = {"Relu", "Clip"}  # an integer kernel's saturation can do these
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

    def coverage(self, model: Path, *, precision: str = "f32", time_layers: bool = False) -> Coverage:
        """The optimised graph at batch 1; times are medians of 30 runs with a resolution of 1 µs.

        The runtime's own profiler adds some microseconds to each node: the sum exceeds the latency.

        Raises:
            BackendError: the runtime refuses the graph, or `precision` is not "f32".
            MissingExtraError: the package onnx, which reads the optimised graph, is not installed.
        """
        if precision != "f32":
            raise BackendError(f"onnxruntime knows no float precision but 'f32', got '{precision}'")
        originals = compute_nodes(model)
        import onnx

        with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
            optimised = Path(folder) / "executed.onnx"
            options = _options(threads=1)
            options.optimized_model_filepath = str(optimised)
            _load(model, options, batch=1)
            graph = _Graph(onnx.load(optimised).graph)
            times = _layer_times(optimised, Path(folder)) if time_layers else [None] * len(graph.nodes)
        compute = [node for node in graph.nodes if _COMPUTE.fullmatch(node.op_type)]
        counted = assign(originals, [graph.key(node) for node in compute])
        macs = dict(zip(map(id, compute), counted, strict=True))
        layers = (
            Layer(
                name=plain_name(node.name or node.output[0]),
                op=node.op_type,
                precision=graph.precision(node),
                macs=macs.get(id(node), 0),
                ms=ms,
                reason=graph.reason(node) if macs.get(id(node)) else "",
            )
            for node, ms in zip(graph.nodes, times, strict=True)
        )
        return Coverage(tuple(layers))


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


class _Graph:
    """The optimised graph, ready for questions about precision."""

    def __init__(self, graph: Any) -> None:
        self.nodes = list(graph.node)
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.producers = {name: node for node in self.nodes for name in node.output}
        self.consumers: dict[str, list[Any]] = {}
        self.integer_tensors: set[str] = set()
        for node in self.nodes:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)
            makes_integers = node.op_type == "QuantizeLinear" or self.precision(node) == "int8"
            if makes_integers and node.op_type not in {"DequantizeLinear", "MatMulIntegerToFloat"}:
                self.integer_tensors.update(node.output)
        self.quantized = any("Linear" in node.op_type for node in self.nodes)

    def precision(self, node: Any) -> str:
        """ "int8" for an integer kernel and for a node that moves integers; else "f32"."""
        if node.op_type.startswith("QLinear") or node.op_type in _INTEGER_OPS:
            return "int8"
        source = node.input[0] if node.input else ""
        moves_integers = node.op_type in _MOVERS and (
            source in self.integer_tensors or self._holds_int8(source)
        )
        return "int8" if moves_integers else "f32"

    def _holds_int8(self, tensor: str) -> bool:
        return tensor in self.initializers and self.initializers[tensor].data_type in {2, 3}  # UINT8, INT8

    def key(self, node: Any) -> Executed:
        """What `assign` needs to find the node's original."""
        weight = node.input[_WEIGHT_INPUT.get(node.op_type, 1)]
        return Executed(
            kind=kind_of(node.op_type),
            weight=weight_name(weight, self.producers, set(self.initializers)),
            names=(node.name, *node.output),
        )

    def reason(self, node: Any) -> str:
        """Why a convolution or matrix product of a quantized graph stayed in float; "" when not known."""
        if self.precision(node) == "int8" or not self.quantized:
            return ""
        source, weight = (self.producers.get(name) for name in node.input[:2])
        if weight is None or weight.op_type != "DequantizeLinear":
            return "weight not quantized"
        if source is None or source.op_type != "DequantizeLinear":
            return "input not quantized"
        if self._zero_point(source)[0] == "s8":
            quantizer = self.producers.get(source.input[0])
            before = self.producers.get(quantizer.input[0]) if quantizer is not None else None
            after = " after Relu" if before is not None and _has_relu(before) else ""
            return f"signed s8 activation{after} (input)"
        return self._output_reason(node)

    def _output_reason(self, node: Any) -> str:
        if node.op_type == "FusedConv" and len(node.input) > 3:
            return "output not quantized (before the Add that is fused into it)"
        relu = _has_relu(node)
        readers = self.consumers.get(node.output[0], [])
        while len(readers) == 1 and readers[0].op_type in _ABSORBED:
            relu = True
            readers = self.consumers.get(readers[0].output[0], [])
        others = sorted({reader.op_type for reader in readers} - {"QuantizeLinear"})
        if others or not readers:
            return f"output not quantized (read by {', '.join(others) or 'the graph output'})"
        kind, zero_point = self._zero_point(readers[0])
        if kind == "s8":
            return f"signed s8 activation{' after Relu' if relu else ''} (output)"
        if relu and zero_point:
            return f"zero point {zero_point} after Relu, which the integer kernel cannot absorb"
        return ""

    def _zero_point(self, node: Any) -> tuple[str, int]:
        """Type ("u8", "s8") and value of a quantizer's or dequantizer's zero point."""
        import onnx

        tensor = self.initializers.get(node.input[2]) if len(node.input) > 2 else None
        if tensor is None:
            return "u8", 0
        kind = "s8" if tensor.data_type == onnx.TensorProto.INT8 else "u8"
        return kind, int(onnx.numpy_helper.to_array(tensor).flat[0])


def _has_relu(node: Any) -> bool:
    """Whether the node is, or has fused, a Relu."""
    return node.op_type == "Relu" or any(
        attribute.name == "activation" and attribute.s == b"Relu" for attribute in node.attribute
    )


def _layer_times(optimised: Path, folder: Path) -> list[float | None]:
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
    images = _images(session)
    for _ in range(_WARM_UP + _RUNS):
        session.run(None, images)
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    durations: dict[str, list[float]] = {}
    for event in events:
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            durations.setdefault(event["name"].removesuffix("_kernel_time"), []).append(event["dur"] / 1000)
    found = [durations.get(node.name, [])[-_RUNS:] for node in executed.graph.node]
    return [round(statistics.median(calls), 4) if calls else None for calls in found]


def _images(session: Any) -> dict[str, Array]:
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
