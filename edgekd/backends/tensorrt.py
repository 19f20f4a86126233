"""TensorRT: builds and runs on an NVIDIA GPU; without one, TensorRT-RTX proves that a graph compiles.

The part that runs an engine was written against the documented Python API of TensorRT 10 and later and has
not been executed yet: no machine of the project's tests has a GPU with the package ``tensorrt``. What stands
behind it was: `edgekd.backends.engines` with TensorRT-RTX, `edgekd.backends.cudart` on an NVIDIA H200.
"""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.backends import Array, Coverage, Feeds, Shapes, cudart, engines
from edgekd.backends.feeds import Feed
from edgekd.errors import BackendError, MissingExtraError, missing_extra

_GPU_FILES = ("/dev/nvidia0", "/dev/nvhost-gpu", "/dev/nvgpu/igpu0")  # desktop and server; Jetson
_OLDEST = 10  # major version of TensorRT


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
    """One engine with device buffers for a single input and a single output. `device_ms`: what the last call
    took on the GPU by CUDA events, without the copies to it and back."""

    def __init__(self, engine: Any, trt: Any) -> None:
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in inputs]
        if len(inputs) != 1 or len(outputs) != 1:
            raise BackendError(f"tensorrt: expected one input and one output, got {inputs} and {outputs}")
        self._engine, self._trt, self._context = engine, trt, engine.create_execution_context()
        self._input, self._output = inputs[0], outputs[0]
        self._kinds = {name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))) for name in names}
        self.names = (inputs[0],)
        self.device_ms = 0.0
        self._stream = cudart.Stream()
        self._buffers: dict[str, tuple[int, int]] = {}  # name -> (address, bytes)

    def run(self, images: Array | Feeds) -> Array:
        """Logits, float32 (N, classes), of float32 (N, C, H, W); copies both ways and waits.

        Raises:
            BackendError: the images do not fit the engine, or CUDA reports an error.
        """
        one = images if isinstance(images, np.ndarray) else next(iter(images.values()))
        given = np.ascontiguousarray(one, dtype=self._kinds[self._input])
        if not self._context.set_input_shape(self._input, given.shape):
            raise BackendError(f"tensorrt: the engine was not built for the input shape {given.shape}")
        made = np.empty(tuple(self._context.get_tensor_shape(self._output)), self._kinds[self._output])
        source, target = self._buffer(self._input, given.nbytes), self._buffer(self._output, made.nbytes)
        self._stream.copy(source, given.ctypes.data, given.nbytes, cudart.TO_DEVICE)
        self._stream.begin()
        if not self._context.execute_async_v3(self._stream.handle.value):
            raise BackendError("tensorrt: the engine did not start")
        self._stream.end()
        self._stream.copy(made.ctypes.data, target, made.nbytes, cudart.TO_HOST)
        self._stream.wait()
        self.device_ms = self._stream.elapsed_ms()
        return made.astype(np.float32, copy=False)

    def layers_ms(self, images: Array | Feeds, calls: int) -> dict[str, float]:
        """Median milliseconds of each layer on the GPU, by TensorRT's profiler, which slows the calls."""
        profiler = _profiler(self._trt)
        self._context.profiler = profiler
        for _ in range(calls):
            self.run(images)
        self._context.profiler = None
        return {name: float(np.median(took)) for name, took in profiler.taken.items()}

    def _buffer(self, name: str, size: int) -> int:
        """Address of a device buffer of at least `size` bytes, bound to the tensor."""
        address, held = self._buffers.get(name, (0, 0))
        if held < size:
            if address:
                cudart.free(address)
            address = cudart.allocate(size)
            self._buffers[name] = (address, size)
            self._context.set_tensor_address(name, address)
        return address


def from_bytes(model: bytes) -> TensorRtSession:
    """An engine of a model in memory, as `TensorRtBackend.open`: the first one takes seconds to minutes and
    is kept for this GPU and version."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(model)
        return TensorRtBackend().open(path)


def _profiler(trt: Any) -> Any:
    """An ``IProfiler`` with the milliseconds of each layer in `taken`."""

    def prepare(self: Any) -> None:
        trt.IProfiler.__init__(self)
        self.taken = {}

    def report(self: Any, layer_name: str, ms: float) -> None:
        self.taken.setdefault(layer_name, []).append(ms)

    return type("Layers", (trt.IProfiler,), {"__init__": prepare, "report_layer_time": report})()


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
        """An engine for the GPU here: the one kept of an earlier start, else built, which takes from seconds
        to minutes. `threads` does nothing on a GPU.

        Raises:
            BackendError: there is no GPU, the graph is refused, or `precision` is not "f32".
            MissingExtraError: ``tensorrt`` is not installed.
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
        trt = importlib.import_module(package)
        if int(trt.__version__.partition(".")[0]) < _OLDEST:
            raise BackendError(
                f"tensorrt {trt.__version__} is too old: {_OLDEST} or later is needed",
                "on a Jetson Orin: JetPack 6.1 or later",
            )
        if not model.is_file():
            raise BackendError(f"tensorrt: no such file: {model}")
        if cudart.device_count() < 1:
            raise BackendError(f"tensorrt cannot run {model}: the CUDA driver shows no GPU")
        kept = engines.Kept((trt.__version__, cudart.compute_capability(), cudart.driver()))
        batch = next(iter(shapes.values()))[0] if shapes else batch

        def make() -> Any:
            plan, _, message = engines.build(package, model, batch=batch, timing=kept.timing)
            if plan is None:
                raise BackendError(f"tensorrt refuses {model}: {message}")
            return plan

        def load(plan: bytes) -> TensorRtSession:
            engine = trt.Runtime(engines.messages(package)).deserialize_cuda_engine(plan)
            if engine is None:
                raise BackendError(
                    f"tensorrt cannot load the engine of {model}: {engines.last_error(package)}"
                )
            return TensorRtSession(engine, trt)

        session: TensorRtSession = kept.engine(model, batch, make, load)
        return session

    def coverage(
        self,
        model: Path,
        *,
        precision: str = "f32",
        time_layers: bool = False,
        feeds: Sequence[Feed] | None = None,
    ) -> Coverage:
        """Not available: the kernels are chosen on the device and are not read back yet.

        Raises:
            BackendError: always.
        """
        del precision, time_layers, feeds
        raise BackendError(
            f"tensorrt does not tell which kernels {model} runs: they are chosen on the device",
            "inspect the engine on the device: trtexec --dumpLayerInfo --profilingVerbosity=detailed",
        )


def prove_build(
    model: Path, compute_capability: str, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> BuildProof:
    """Parse a graph and compile it ahead of time with TensorRT-RTX, without a GPU.

    TensorRT-RTX knows only some GPUs. A target that is not among them ("8.7", Jetson Orin) is built for the
    nearest older one of its generation ("8.6"), and the proof says so; with none, ``ok`` is None.

    Args:
        model: the ONNX file.
        compute_capability: of the target, such as "8.7".
        shapes: of the inputs by name, for axes that the file leaves open.

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
    plan, warnings, message = engines.build("tensorrt_rtx", model, built=built, shapes=shapes)
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
