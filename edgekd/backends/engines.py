"""TensorRT engines: parse and build a graph, and keep what was built for one device.

Precision lives in the graph (strongly typed network), never in builder flags.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from edgekd.errors import BackendError

_MAX_BATCH = 64  # upper end of the optimisation profile of a dynamic batch
_FOREIGN_LOGGER = "differs from one already registered"
_LEVEL = 3  # of the builder's optimisation, the default of TensorRT


def build(
    package: str,
    model: Path,
    *,
    built: str = "",
    batch: int | None = None,
    timing: Path | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[Any, tuple[str, ...], str]:
    """The serialized engine or None, the warnings, and what was wrong.

    A warning about UINT8 counts as a refusal: the parser would read u8 as s8 and halve the clip range.

    Args:
        built: of TensorRT-RTX, the GPU to build for ahead of time, such as "SM86".
        shapes: of the inputs by name, for one call: what stands in for axes that the file leaves open.
        timing: a file with the times of kernels, which the builder reads and adds to.
    """
    if not model.is_file():
        raise BackendError(f"{package}: no such file: {model}")
    trt = importlib.import_module(package)
    logger = messages(package)
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
        config.builder_optimization_level = _LEVEL
        if built:
            config.num_compute_capabilities = 1
            config.set_compute_capability(getattr(trt.ComputeCapability, built), 0)
        _add_profile(builder, network, config, batch, shapes or {})
        if timing is not None:
            config.set_timing_cache(config.create_timing_cache(_read(timing)), False)
        plan = builder.build_serialized_network(network, config)
        refused = "" if plan is not None else last_error(package)
        if plan is not None and timing is not None:
            store(timing, bytes(config.get_timing_cache().serialize()))
    warnings = tuple(text for kind, text in logger.messages if kind == "WARNING")
    return plan, warnings, refused


def _add_profile(
    builder: Any, network: Any, config: Any, batch: int | None, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Shapes for a dynamic batch: exactly `batch`, or 1 to 64 with 1 preferred. Other open axes are those of
    `shapes`."""
    smallest, largest = (1, _MAX_BATCH) if batch is None else (batch, batch)
    profile = builder.create_optimization_profile()
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    for port in inputs:
        shape = tuple(port.shape)
        given = shapes.get(port.name, shape)
        rest = tuple(got if size == -1 else size for size, got in zip(shape, given, strict=True))[1:]
        if -1 in rest:
            raise BackendError(f"tensorrt: only the batch axis may be dynamic, got the input shape {shape}")
        if -1 in shape:
            least, most = (smallest, largest) if shape[0] == -1 else (shape[0], shape[0])
            profile.set_shape(port.name, (least, *rest), (least, *rest), (most, *rest))
    if any(-1 in tuple(port.shape) for port in inputs):
        config.add_optimization_profile(profile)


def _parser_errors(parser: Any) -> str:
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    told = [f"{error.desc()} (node '{error.node_name()}', {error.node_operator()})" for error in errors]
    return "; ".join(told) or "the parser refuses the file and gives no reason"


def last_error(package: str) -> str:
    """The last error that the package told."""
    errors = [text for kind, text in messages(package).messages if kind in {"ERROR", "INTERNAL_ERROR"}]
    return errors[-1] if errors else "no reason given"


@functools.cache
def messages(package: str) -> Any:
    """The one logger of this process: TensorRT keeps the first that it sees and ignores later ones."""
    base = importlib.import_module(package).ILogger

    def prepare(self: Any) -> None:
        base.__init__(self)
        self.messages = []

    def log(self: Any, severity: Any, text: str) -> None:
        self.messages.append((severity.name, text))

    return type("Messages", (base,), {"__init__": prepare, "log": log})()


class Kept:
    """Engines that were built on this device, and the times of its kernels, below ``~/.cache/edgekd``.

    An engine belongs to a model, a version of TensorRT, a compute capability, a driver and the builder's
    options; the times to all of them but the model. A folder that cannot be written costs building again.
    """

    def __init__(self, device: tuple[str, str, str]) -> None:
        """`device`: version of TensorRT, compute capability, driver."""
        self._device = device
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        self._folder = cache / "edgekd" / "tensorrt"

    @property
    def timing(self) -> Path:
        """The file of the kernels' times."""
        return self._folder / f"timing-{self._key('')}.cache"

    def path(self, model: Path, batch: int | None) -> Path:
        """The file of a model's engine."""
        digest = hashlib.sha256(model.read_bytes()).hexdigest()
        return self._folder / f"engine-{self._key(digest, batch)}.plan"

    def _key(self, *model: object) -> str:
        parts = [*self._device, {"builder_optimization_level": _LEVEL}, *model]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def engine(
        self, model: Path, batch: int | None, make: Callable[[], Any], load: Callable[[bytes], Any]
    ) -> Any:
        """What `load` makes of the engine: the kept one, else one that `make` builds, which is kept once it
        loads.

        Raises:
            BackendError: of `make` and `load`; a kept file that does not load is built again.
        """
        path = self.path(model, batch)
        if plan := _read(path):
            try:
                return load(plan)
            except BackendError:
                path.unlink()
        plan = bytes(make())
        loaded = load(plan)
        store(path, plan)
        return loaded


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def store(path: Path, data: bytes) -> None:
    """Write in one step, where it can be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(name).replace(path)
    except OSError:
        return
