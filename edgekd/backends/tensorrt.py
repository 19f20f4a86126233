"""TensorRT: builds and runs on an NVIDIA GPU; without one, TensorRT-RTX proves that a graph compiles.

Precision lives in the graph (strongly typed network), never in builder flags. The part that runs an engine
was written against the documented Python API of TensorRT 10 and later and has not been executed yet: no
machine of the project's tests has a GPU with the package ``tensorrt``.
"""

from __future__ import annotations

import functools
import importlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.backends import Array, Coverage, Feeds, Shapes
from edgekd.errors import BackendError, MissingExtraError, missing_extra

_GPU_FILES = ("/dev/nvidia0", "/dev/nvhost-gpu", "/dev/nvgpu/igpu0")  # desktop and server; Jetson
_MAX_BATCH = 64  # upper end of the optimisation profile of a dynamic batch
_FOREIGN_LOGGER = "differs from one already registered"


@dataclass(frozen=True)
class BuildProof:
    """Whether a graph parses and compiles ahead of time; nothing was executed."""

    ok: bool | None  # None: no stand-in for the target exists, nothing was built
    runtime: str  # "tensorrt-rtx 1.7.1.116"
    compute_capability_target: str  # "SM87"
    compute_capability_built: str  # "SM86"; "" when nothing was built
    substituted: bool  # built for another GPU than the target's
    engine_mib: float | None
    seconds: float
    warnings: tuple[str, ...]
    message: str


class TensorRtSession:
    """One engine with device buffers for a single input and a single output."""

    def __init__(self, engine: Any, trt: Any, cuda: Any) -> None:
        self._engine, self._cuda = engine, cuda
        self._context = engine.create_execution_context()
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in inputs]
        if len(inputs) != 1 or len(outputs) != 1:
            raise BackendError(f"tensorrt: expected one input and one output, got {inputs} and {outputs}")
        self._input, self._output = inputs[0], outputs[0]
        self.names = (inputs[0],)
        self._stream = _cuda_call(cuda, cuda.cudaStreamCreate())
        self._buffers: dict[str, tuple[int, int]] = {}  # name -> (address, bytes)

    def run(self, images: Array | Feeds) -> Array:
        """Logits, float32 (N, classes), of float32 (N, C, H, W); copies both ways and waits.

        Raises:
            BackendError: the images do not fit the engine, or CUDA reports an error.
        """
        cuda, kind = self._cuda, self._cuda.cudaMemcpyKind
        one = images if isinstance(images, np.ndarray) else next(iter(images.values()))
        images = np.ascontiguousarray(one, dtype=np.float32)
        if not self._context.set_input_shape(self._input, images.shape):
            raise BackendError(f"tensorrt: the engine was not built for the input shape {images.shape}")
        logits = np.empty(tuple(self._context.get_tensor_shape(self._output)), np.float32)
        source, target = self._buffer(self._input, images.nbytes), self._buffer(self._output, logits.nbytes)
        upload, download = kind.cudaMemcpyHostToDevice, kind.cudaMemcpyDeviceToHost
        _cuda_call(
            cuda, cuda.cudaMemcpyAsync(source, images.ctypes.data, images.nbytes, upload, self._stream)
        )
        if not self._context.execute_async_v3(int(self._stream)):
            raise BackendError("tensorrt: the engine did not start")
        _cuda_call(
            cuda, cuda.cudaMemcpyAsync(logits.ctypes.data, target, logits.nbytes, download, self._stream)
        )
        _cuda_call(cuda, cuda.cudaStreamSynchronize(self._stream))
        return logits

    def _buffer(self, name: str, size: int) -> int:
        """Address of a device buffer of at least `size` bytes, bound to the tensor."""
        address, held = self._buffers.get(name, (0, 0))
        if held < size:
            if address:
                _cuda_call(self._cuda, self._cuda.cudaFree(address))
            address = int(_cuda_call(self._cuda, self._cuda.cudaMalloc(size)))
            self._buffers[name] = (address, size)
            self._context.set_tensor_address(name, address)
        return address


class TensorRtBackend:
    """The package ``tensorrt`` on a machine with an NVIDIA GPU."""

    name = "tensorrt"

    def version(self) -> str:
        """Package and version: "tensorrt 11.4.0.106" or "tensorrt-rtx 1.7.1.116"."""
        package = _package()
        return f"{package.replace('_', '-')} {importlib.import_module(package).__version__}"

    def precisions(self) -> tuple[str, ...]:
        """What the GPU here executes; nothing when there is none. All of it comes from the graph."""
        _package()
        return ("f32", "f16", "int8") if _has_gpu() else ()

    def device(self) -> str:
        """The GPU's name, or that there is none."""
        _package()
        if not _has_gpu():
            return "no NVIDIA GPU"
        tree = Path("/proc/device-tree/model")  # present on a Jetson
        if tree.is_file():
            return tree.read_text(encoding="utf-8").strip("\0 \n")
        for told in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
            for line in told.read_text(encoding="utf-8").splitlines():
                if line.startswith("Model:"):
                    return line.partition(":")[2].strip()
        return "NVIDIA GPU"

    def open(
        self,
        model: Path,
        *,
        threads: int = 1,
        precision: str = "f32",
        batch: int | None = None,
        shapes: Shapes | None = None,
    ) -> TensorRtSession:
        """Build an engine for the GPU here and load it. `threads` does nothing on a GPU.

        Raises:
            BackendError: there is no GPU, the graph is refused, or `precision` is not "f32".
            MissingExtraError: ``tensorrt`` or ``cuda-python`` is not installed.
        """
        del threads
        package = _package()
        if not _has_gpu():
            raise BackendError(
                f"{package} cannot run {model}: no NVIDIA GPU here; the engine is built on the device",
                "copy the bundle to the device and open it there",
            )
        if precision != "f32":
            raise BackendError(f"tensorrt takes precision from the graph, got precision '{precision}'")
        if package != "tensorrt":
            raise missing_extra("tensorrt", "tensorrt", "running an engine")
        try:
            cuda = importlib.import_module("cuda.bindings.runtime")
        except ModuleNotFoundError as error:
            raise missing_extra("cuda-python", "tensorrt", "running a TensorRT engine") from error
        trt = importlib.import_module(package)
        batch = next(iter(shapes.values()))[0] if shapes else batch
        plan, _, message = _build(package, model, batch=batch)
        if plan is None:
            raise BackendError(f"tensorrt refuses {model}: {message}")
        engine = trt.Runtime(_logger(package)).deserialize_cuda_engine(plan)
        if engine is None:
            raise BackendError(f"tensorrt cannot load the engine of {model}: {_last_error(package)}")
        return TensorRtSession(engine, trt, cuda)

    def coverage(self, model: Path, *, precision: str = "f32", time_layers: bool = False) -> Coverage:
        """Not available: the kernels are chosen on the device and are not read back yet.

        Raises:
            BackendError: always.
        """
        del precision, time_layers
        raise BackendError(
            f"tensorrt does not tell which kernels {model} runs: they are chosen on the device",
            "inspect the engine on the device: trtexec --dumpLayerInfo --profilingVerbosity=detailed",
        )


def prove_build(model: Path, compute_capability: str) -> BuildProof:
    """Parse a graph and compile it ahead of time with TensorRT-RTX, without a GPU.

    TensorRT-RTX knows only some GPUs. A target that is not among them ("8.7", Jetson Orin) is built for the
    nearest older one of its generation ("8.6"), and the proof says so; with none, ``ok`` is None.

    Args:
        model: the ONNX file.
        compute_capability: of the target, such as "8.7".

    Raises:
        MissingExtraError: tensorrt_rtx is not installed.
        BackendError: the file cannot be read.
    """
    try:
        trt = importlib.import_module("tensorrt_rtx")
    except ModuleNotFoundError as error:
        raise missing_extra("tensorrt-rtx", "tensorrt-rtx", "the build proof for TensorRT") from error
    runtime = f"tensorrt-rtx {trt.__version__}"
    target = f"SM{compute_capability.replace('.', '')}"
    built = _stand_in(trt, compute_capability)
    if not built:
        reason = f"{runtime} has no target of the generation of {target}; nothing was built"
        return BuildProof(None, runtime, target, "", False, None, 0.0, (), reason)
    started = time.perf_counter()
    plan, warnings, message = _build("tensorrt_rtx", model, built=built)
    seconds = time.perf_counter() - started
    told = f"parses and compiles for {built}"
    if built != target:
        told += f", which stands in for {target}: {runtime} does not know {target}; nothing was executed"
    size_mib = None if plan is None else plan.nbytes / 2**20
    return BuildProof(
        ok=plan is not None,
        runtime=runtime,
        compute_capability_target=target,
        compute_capability_built=built,
        substituted=built != target,
        engine_mib=size_mib,
        seconds=seconds,
        warnings=warnings,
        message=message or told,
    )


def _stand_in(trt: Any, compute_capability: str) -> str:
    """The newest known target of the same generation that is not newer; "" when there is none."""
    major, _, minor = compute_capability.partition(".")
    known = [name.removeprefix("SM") for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    same = [name for name in known if name[:-1] == major and int(name[-1]) <= int(minor or 0)]
    return f"SM{max(same)}" if same else ""


def _build(
    package: str, model: Path, *, built: str = "", batch: int | None = None
) -> tuple[Any, tuple[str, ...], str]:
    """The serialized engine or None, the warnings, and what was wrong.

    A warning about UINT8 counts as a refusal: the parser would read u8 as s8 and halve the clip range.
    """
    if not model.is_file():
        raise BackendError(f"{package}: no such file: {model}")
    trt = importlib.import_module(package)
    logger = _logger(package)
    logger.messages.clear()
    builder = trt.Builder(logger)
    typed = trt.NetworkDefinitionCreationFlag.__members__.get(
        "STRONGLY_TYPED"
    )  # later versions know no other
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(model))
    if any(_FOREIGN_LOGGER in text for _, text in logger.messages):
        raise BackendError(f"{package}: another logger is registered in this process, so warnings are lost")
    refused = "" if parsed else _parser_errors(parser)
    unsigned = [text for kind, text in logger.messages if kind == "WARNING" and "UINT8" in text]
    plan = None
    if not refused and unsigned:
        refused = f"the graph has UINT8 tensors, which become INT8 silently: {unsigned[0]}"
    if not refused:
        config = builder.create_builder_config()
        if built:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(trt.ComputeCapability, built), 0)
        _add_profile(builder, network, config, batch)
        plan = builder.build_serialized_network(network, config)
        refused = "" if plan is not None else _last_error(package)
    warnings = tuple(text for kind, text in logger.messages if kind == "WARNING")
    return plan, warnings, refused


def _add_profile(builder: Any, network: Any, config: Any, batch: int | None) -> None:
    """Shapes for a dynamic batch: exactly `batch`, or 1 to 64 with 1 preferred."""
    images = network.get_input(0)
    shape = tuple(images.shape)
    if -1 not in shape:
        return
    if -1 in shape[1:]:
        raise BackendError(f"tensorrt: only the batch axis may be dynamic, got the input shape {shape}")
    smallest, largest = (1, _MAX_BATCH) if batch is None else (batch, batch)
    profile = builder.create_optimization_profile()
    profile.set_shape(images.name, (smallest, *shape[1:]), (smallest, *shape[1:]), (largest, *shape[1:]))
    config.add_optimization_profile(profile)


def _parser_errors(parser: Any) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    told = [f"{error.desc()} (node '{error.node_name()}', {error.node_operator()})" for error in errors]
    return "; ".join(told) or "the parser refuses the file and gives no reason"


def _last_error(package: str) -> str:
    errors = [text for kind, text in _logger(package).messages if kind in {"ERROR", "INTERNAL_ERROR"}]
    return errors[-1] if errors else "no reason given"


@functools.cache
def _logger(package: str) -> Any:
    """The one logger of this process: TensorRT keeps the first that it sees and ignores later ones."""
    base = importlib.import_module(package).ILogger

    def prepare(self: Any) -> None:
        base.__init__(self)
        self.messages = []

    def log(self: Any, severity: Any, text: str) -> None:
        self.messages.append((severity.name, text))

    return type("Messages", (base,), {"__init__": prepare, "log": log})()


def _package() -> str:
    """ "tensorrt" or, when only that is installed, "tensorrt_rtx"."""
    for package in ("tensorrt", "tensorrt_rtx"):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            if error.name != package:
                raise MissingExtraError(f"{package} is installed without {error.name}") from error
        else:
            return package
    raise missing_extra("tensorrt", "tensorrt", "the backend 'tensorrt'")


def _has_gpu() -> bool:
    return any(Path(file).exists() for file in _GPU_FILES)


def _cuda_call(cuda: Any, answer: tuple[Any, ...]) -> Any:
    """The value of a CUDA runtime call.

    Raises:
        BackendError: the call failed.
    """
    status, *values = answer
    if status != cuda.cudaError_t.cudaSuccess:
        raise BackendError(f"CUDA: {status.name}")
    return values[0] if values else None
