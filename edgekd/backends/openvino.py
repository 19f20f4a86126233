"""OpenVINO on the CPU."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.backends import Array, Coverage, Feeds, Layer, Shapes, in_order
from edgekd.backends.feeds import Feed, random_feeds, shapes_of
from edgekd.backends.macs import Executed, assign, compute_nodes, kind_of, plain_name
from edgekd.errors import BackendError, missing_extra

_FLOATS = {"FP32": "f32", "BF16": "bf16"}  # capabilities of the device that a precision hint can ask for
_COMPUTE = re.compile(r"Convolution|Deconvolution|BinaryConvolution|FullyConnected|.*MatMul")
_FUSED = {"Subgraph", "ScaledDotProductAttention"}  # may hold the products of an attention block
_NOT_EXECUTED = {"Const", "Input", "Output"}
_PRECISIONS = {"i8": "int8", "u8": "int8", "i4": "int8", "u4": "int8"}
_RUNS = 30  # timed runs a layer
_WARM_UP = 5


class OpenVinoSession:
    """One compiled model with one infer request."""

    def __init__(self, compiled: Any, batch: int | None) -> None:
        self._tensor = _engine().Tensor
        self._request = compiled.create_infer_request()
        self._batch = batch
        self.names = tuple(map(_name, compiled.inputs))
        size, *sides = compiled.input(0).get_partial_shape()
        alone = len(compiled.inputs) == 1
        if alone and size.is_dynamic and all(side.is_static for side in sides):
            # A large first batch packs int8 weights for AMX. The AVX-512 kernel of a smaller batch then reads
            # them without the sums that signed activations need, and gives garbage (seen with 2026.4.1).
            # After one image, which packs them for both, every order of batches is right.
            kind = compiled.input(0).get_element_type().to_dtype()
            self._request.infer([np.zeros((1, *(side.get_length() for side in sides)), kind)])

    def run(self, images: Array | Feeds) -> Array:
        """Logits, float32 (N, classes), of float32 (N, C, H, W); the first output, of inputs by name.

        Raises:
            BackendError: the images do not fit the model.
        """
        if not isinstance(images, np.ndarray):
            return self._run_named(images)
        if self._batch is not None and len(images) != self._batch:
            raise BackendError(f"the session was opened for batch {self._batch}, got {len(images)} images")
        held = np.require(images, requirements=["C", "W"])  # the tensor below only points into it
        try:
            # Half the overhead of infer([images]), which copies the images.
            self._request.set_input_tensor(self._tensor(held, shared_memory=True))
            self._request.infer(share_outputs=True)
        except RuntimeError as error:
            raise BackendError(f"openvino: {_told(error)}") from error
        logits: Array = self._request.get_output_tensor(0).data.copy()
        return logits

    def _run_named(self, feeds: Feeds) -> Array:
        try:
            self._request.infer(dict(feeds))
        except RuntimeError as error:
            raise BackendError(f"openvino: {_told(error)}") from error
        made: Array = self._request.get_output_tensor(0).data.copy()
        return made


class OpenVinoBackend:
    """The CPU plugin."""

    name = "openvino"

    def version(self) -> str:
        """Version of the installed package, without the build's hash."""
        return str(_engine().__version__).partition("-")[0]

    def precisions(self) -> tuple[str, ...]:
        """float32, int8 and, on a CPU that has it, bf16."""
        capabilities = _engine().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        floats = tuple(name for capability, name in _FLOATS.items() if capability in capabilities)
        return (*floats, "int8") if "INT8" in capabilities else floats

    def device(self) -> str:
        """The CPU's name."""
        return str(_engine().Core().get_property("CPU", "FULL_DEVICE_NAME"))

    def open(
        self,
        model: Path,
        *,
        threads: int = 1,
        precision: str = "f32",
        batch: int | None = None,
        shapes: Shapes | None = None,
    ) -> OpenVinoSession:
        """Load an ONNX file; see `edgekd.backends.Backend.open`.

        Raises:
            BackendError: the runtime refuses the graph, or this CPU does not have `precision`.
        """
        return OpenVinoSession(self._compile(model, threads, precision, batch, shapes=shapes), batch)

    def coverage(
        self,
        model: Path,
        *,
        precision: str = "f32",
        time_layers: bool = False,
        feeds: Sequence[Feed] | None = None,
    ) -> Coverage:
        """The runtime model at batch 1; times are medians of 30 runs with a resolution of 1 µs.

        A layer's precision is that of the kernel's input (the suffix of ``primitiveType``). The property
        ``runtimePrecision`` is not used: it says "i8" also of a float kernel that quantizes its output.

        Raises:
            BackendError: the runtime refuses the graph, or this CPU does not have `precision`.
            MissingExtraError: the package onnx, which reads the file's shapes, is not installed.
        """
        originals = compute_nodes(model)
        compiled = self._compile(model, 1, precision, 1, shapes=shapes_of(feeds), timed=time_layers)
        nodes = [node for node in compiled.get_runtime_model().get_ordered_ops() if _info(node, "layerType")]
        nodes = [node for node in nodes if _info(node, "layerType") not in _NOT_EXECUTED]
        compute = [node for node in nodes if _kind(node)]
        names = [node.get_friendly_name() for node in compute]
        macs = dict(zip(names, assign(originals, [_key(node) for node in compute]), strict=True))
        times = _layer_times(compiled, feeds) if time_layers else {}
        layers = (
            Layer(
                name=plain_name(node.get_friendly_name()),
                op=f"{_info(node, 'layerType')} {_info(node, 'primitiveType')}",
                precision=_precision(node),
                macs=macs.get(node.get_friendly_name(), 0),
                ms=times.get(node.get_friendly_name()),
                reason=_reason(node) if macs.get(node.get_friendly_name()) else "",
            )
            for node in nodes
        )
        return Coverage(tuple(layers))

    def _compile(
        self,
        model: Path,
        threads: int,
        precision: str,
        batch: int | None,
        *,
        shapes: Shapes | None = None,
        timed: bool = False,
    ) -> Any:
        core = _engine().Core()
        floats = [name for name in self.precisions() if name != "int8"]
        if precision not in floats:
            raise BackendError(
                f"openvino here computes float operators in {' or '.join(floats)}, got '{precision}'",
                "int8 comes from a quantized graph, not from the precision hint",
            )
        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(threads),
            "PERF_COUNT": "YES" if timed else "NO",
        }
        if not model.is_file():
            raise BackendError(f"openvino: no such file: {model}")
        try:
            graph = core.read_model(str(model))
            if shapes is not None:
                names = [_name(port) for port in graph.inputs]
                graph.reshape(dict(zip(graph.inputs, in_order(names, shapes), strict=True)))
            elif batch is not None:
                fixed = {}
                for port in graph.inputs:
                    shape = port.partial_shape
                    if len(graph.inputs) == 1 or (shape.rank.get_length() and shape[0].is_dynamic):
                        shape[0] = batch
                        fixed[port] = shape
                graph.reshape(fixed)
            return core.compile_model(graph, "CPU", options)
        except RuntimeError as error:
            raise BackendError(f"openvino refuses {model}: {_told(error)}") from error


def _name(port: Any) -> str:
    """The name of an input."""
    return str(min(port.get_names(), default=port.get_node().get_friendly_name()))


def _info(node: Any, key: str) -> str:
    """A property of a node of the runtime model, as text; "" when it has none."""
    properties = node.get_rt_info()
    return str(properties[key].astype(str)) if key in properties else ""


def _precision(node: Any) -> str:
    """Precision of the kernel's input: "int8", "f32", "bf16", "f16", or the runtime's own name of another."""
    suffix = _info(node, "primitiveType").rpartition("_")[2].lower()
    return _PRECISIONS.get(suffix, suffix)


def _kind(node: Any) -> str:
    """The kind of an `Executed`; "" for a layer that holds no convolution or matrix product."""
    layer = _info(node, "layerType")
    if layer in _FUSED:
        return "fused"
    return kind_of(layer) if _COMPUTE.fullmatch(layer) else ""


def _weight(node: Any) -> Any:
    """The constant that a layer reads, through layout changes; None for a product of two activations."""
    if node.get_input_size() < 2:
        return None
    source = node.input_value(1).get_node()
    while (
        _info(source, "layerType") in {"Reorder", "Transpose", "Reshape", "Convert"}
        and source.get_input_size()
    ):
        source = source.input_value(0).get_node()
    return source if _info(source, "layerType") == "Const" else None


def _key(node: Any) -> Executed:
    """What `assign` needs to find the layer's original."""
    weight = _weight(node)
    return Executed(
        kind=_kind(node),
        weight="" if weight is None else weight.get_friendly_name(),
        names=(node.get_friendly_name(), *_info(node, "originalLayersNames").split(",")),
    )


def _reason(node: Any) -> str:
    """Why a layer with integer weights or a quantized output stayed in float; "" otherwise."""
    if _precision(node) == "int8":
        return ""
    weight = _weight(node)
    if weight is not None and _PRECISIONS.get(_info(weight, "runtimePrecision")) == "int8":
        return (
            "integer weight but float input: the input is not quantized, or its zero point is not supported"
        )
    if _PRECISIONS.get(_info(node, "runtimePrecision")) == "int8":
        return "float kernel with a quantized output"
    return ""


def _layer_times(compiled: Any, feeds: Sequence[Feed] | None) -> dict[str, float]:
    """Median milliseconds of each executed layer by name."""
    request = compiled.create_infer_request()
    if feeds is None:
        shape = list(compiled.input(0).shape)
        fed: Any = [np.random.default_rng(0).standard_normal(shape, dtype=np.float32)]
    else:
        arrays = in_order([_name(port) for port in compiled.inputs], random_feeds(feeds, seed=0))
        fed = dict(enumerate(arrays))
    durations: dict[str, list[float]] = {}
    for call in range(_WARM_UP + _RUNS):
        request.infer(fed)
        if call >= _WARM_UP:
            for layer in request.profiling_info:
                durations.setdefault(layer.node_name, []).append(layer.real_time.total_seconds() * 1000)
    return {name: round(statistics.median(calls), 4) for name, calls in durations.items()}


def _told(error: RuntimeError) -> str:
    """The runtime's message without its lines about its own source files."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith("Exception from ")]
    return " ".join(told) or str(error).strip()


def _engine() -> Any:
    """The package.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import openvino
    except ModuleNotFoundError as error:
        raise missing_extra("openvino", "openvino", "the backend 'openvino'") from error
    return openvino
