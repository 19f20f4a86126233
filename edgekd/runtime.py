"""Run a bundle in an application: this one file, numpy, one engine (tensorrt: and the package edgekd).

    load("model.ekd").predict(images).labels        # images: a uint8 array, or a list of them

``python -m edgekd.runtime BUNDLE selftest [VARIANT]``: exit 0: within tolerance, 1: beyond, 2: cannot run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PureWindowsPath
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Pixels = NDArray[np.uint8]
_T = TypeVar("_T")

FORMAT, VERSION, LARGEST = "edgekd-bundle", 1, 1 << 31  # bytes of a protobuf message
_FLOAT, _ONE = np.dtype(np.float32), 1 << 22  # Pillow's fixed-point unit of a resampling weight
_CPU: list[Any] = [["CPUExecutionProvider", {}]]
_CPUINFO, _STATM = Path("/proc/cpuinfo"), Path("/proc/self/statm")
_TYPES = ("onnxruntime.capi.onnxruntime_pybind11_state", "edgekd.errors")  # hold types of exceptions
_GPU_NODES = ("/dev/nvidia0", "/dev/nvhost-gpu", "/dev/nvgpu/igpu0")  # discrete, Jetson, newer Jetson


class BundleError(RuntimeError):
    """A bundle is incomplete, altered, of another format, or has nothing that runs on this machine."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """One entry an image, in the order of the images."""

    labels: list[str]
    indices: NDArray[np.int64]  # (N,), position of the label in `Model.classes`
    probabilities: Floats  # (N, classes), rows sum to 1


@lru_cache(maxsize=4)
def _weights(size_in: int, size_out: int) -> NDArray[np.float64]:
    """Triangle filter, widened when shrinking: (size_in, size_out) whole numbers, about `_ONE` a column."""
    scale = size_in / size_out
    centre = (np.arange(size_out) + 0.5) * scale
    triangle = np.maximum(0.0, 1.0 - np.abs(np.arange(size_in)[:, None] - centre + 0.5) / max(scale, 1.0))
    return np.asarray(np.floor(triangle / triangle.sum(axis=0) * _ONE + 0.5))


def resize(image: Pixels, height: int, width: int) -> Pixels:
    """Resize an (H, W, C) uint8 image like Pillow's ``Image.resize(BILINEAR)``: along x, round, along y."""
    for axis, size in ((1, width), (0, height)):
        if image.shape[axis] != size:
            moved, weights = np.moveaxis(image, axis, -1), _weights(image.shape[axis], size)
            lines = moved.reshape(-1, moved.shape[-1])
            out = np.empty((len(lines), size), np.uint8)
            step = (1 << 20) // lines.shape[1] + 1  # bounds memory: about 8 MiB at a time
            for start in range(0, len(lines), step):
                sums = lines[start : start + step].astype(np.float64) @ weights  # exact: below 2**53
                out[start : start + step] = np.floor((sums + _ONE // 2) / _ONE)
            image = np.moveaxis(out.reshape(*moved.shape[:-1], size), -1, axis)
    return image


def to_color(image: Pixels, color: str) -> Pixels:
    """(H, W, 1 or 3) to "grey" (H, W, 1), by the ITU-R 601 luma as Pillow's mode L, or to "rgb" (H, W, 3)."""
    if image.shape[2] == (3 if color == "rgb" else 1):
        return image
    if color == "rgb":
        return np.repeat(image, 3, axis=2)
    luma = image.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
    return ((luma + 0x8000) >> 16).astype(np.uint8)[..., None]


@dataclass(frozen=True, eq=False)
class _Preprocess:
    size: tuple[int, int]  # height, width
    color: str
    factors: Floats  # (3, C): scale, mean, std

    def __call__(self, images: Sequence[Pixels]) -> Floats:
        """Resize, colour, ``(pixel * scale - mean) / std``: (H, W, 1 or 3) each to float32 (N, C, H, W)."""
        scale, mean, std = self.factors
        pixels = np.empty((len(images), *self.size, len(mean)), np.float32)
        for index, image in enumerate(images):
            pixels[index] = to_color(resize(image, *self.size), self.color)
        return np.ascontiguousarray(((pixels * scale - mean) / std).transpose(0, 3, 1, 2))


def as_images(images: object) -> list[Pixels]:
    """Views of shape (H, W, 1 or 3), one an image, of a uint8 array or a list of such.

    An array of three dimensions whose last one is 1 or 3 is one image (H, W, C), otherwise grey (N, H, W).
    TypeError for anything but uint8 arrays, ValueError for other shapes and empty images.
    """
    if isinstance(images, np.ndarray):
        one = images.ndim < 3 or (images.ndim == 3 and images.shape[2] in (1, 3))
        images = [images] if one else list(images)
    views: list[Pixels] = []
    for image in images if isinstance(images, list | tuple) else [images]:
        if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
            got = getattr(image, "dtype", type(image).__name__)
            hint = "read files with numpy.asarray(PIL.Image.open(path)); preprocessed input goes to model()"
            raise TypeError(f"images are uint8 arrays of pixels 0..255, or a list of them, got {got}; {hint}")
        if image.ndim not in (2, 3) or image.shape[2:] not in ((), (1,), (3,)) or 0 in image.shape:
            raise ValueError(f"an image has the shape (H, W), (H, W, 1) or (H, W, 3), got {image.shape}")
        views.append(image[..., None] if image.ndim == 2 else image)
    return views


def path_problem(folder: Path, name: str) -> str:
    """Why a file name of a manifest is not acceptable; empty when it stays inside the bundle."""
    path = PureWindowsPath(name)  # splits at both kinds of slash
    if not name or path.anchor or "\0" in name:
        return f"'{name}' is not a relative path"
    inside = ".." not in path.parts and (folder / name).resolve().is_relative_to(folder.resolve())
    large = inside and (folder / name).is_file() and (folder / name).stat().st_size >= LARGEST
    return f"'{name}' has 2 GiB or more" if large else "" if inside else f"'{name}' leads out of the bundle"


def _get(table: object, key: str, kind: type[_T], default: _T | None = None) -> _T:
    """A value of the manifest by its dotted key, of the stated type."""
    value: Any = table
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if value is None and default is not None:
        return default
    value = float(value) if kind is float and isinstance(value, int) else value
    if not isinstance(value, kind) or isinstance(value, bool):
        raise BundleError(f"manifest.json: key '{key}': expected {kind.__name__}, got {value!r:.60}")
    return value


def _preprocess(table: object) -> _Preprocess:
    color, mode = _get(table, "color", str), _get(table, "mode", str)
    lists = [_get(table, key, list) for key in ("resize", "scale", "mean", "std")]
    channels = {"grey": 1, "rgb": 3}.get(color)
    numbers = all(isinstance(value, int | float) and abs(value) < 1e9 for values in lists for value in values)
    usable = mode == "bilinear" and list(map(len, lists)) == [2, channels, channels, channels] and numbers
    if not usable or 0 in lists[3] or min(lists[0]) < 1:
        raise BundleError(f"manifest.json: key 'preprocess': values that cannot be used: {table!r:.300}")
    return _Preprocess((int(lists[0][0]), int(lists[0][1])), color, np.array(lists[1:], np.float32))


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_bytes() if path.stat().st_size < LARGEST >> 7 else b"too large")
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not a readable JSON file ({error}); copy the bundle again") from error
    found = (_get(manifest, "format", str, ""), _get(manifest, "version", int, 0))
    if found != (FORMAT, VERSION):
        raise BundleError(f"{path}: format {found}, not {FORMAT, VERSION}: take runtime.py from its release")
    return dict(manifest)


def _read(folder: Path, name: str, sha256: str) -> bytes:
    """The bytes of one file, checked against a digest: it finds damage, not forgery of file and manifest."""
    if problem := path_problem(folder, name):
        raise BundleError(f"{folder / 'manifest.json'}: {problem}")
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise BundleError(f"{folder / name}: {error.strerror}; copy the bundle again") from error
    if (digest := hashlib.sha256(data).hexdigest()) != sha256:
        raise BundleError(f"{folder / name}: altered: SHA-256 {digest} is not {sha256}; copy it again")
    return data


def _installed_version(runtime: str) -> str:
    """From the package's metadata where there is any: a wheel made for newer CPUs can die on import."""
    try:
        return str(importlib.import_module("importlib.metadata").version(runtime))  # slow to import
    except ModuleNotFoundError:
        return str(importlib.import_module(runtime).__version__)


def cpu_flags(cpuinfo: str) -> set[str]:
    """Instruction set flags that every core of a ``/proc/cpuinfo`` text has (x86 flags, Arm Features)."""
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    return set.intersection(*(set(line.split()) for line in lines)) if lines else set()


def machine() -> str:
    """The processor architecture under its Linux name."""
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name := platform.machine().lower(), name)


def _machine_problem(variant: object) -> str:
    if (known := _get(variant, "arch", list, [])) and machine() not in known:
        return f"made for {', '.join(map(str, known))}, this is {machine()}"
    needed = set(map(str, _get(variant, "requires_cpu_flags", list, [])))
    if needed and _CPUINFO.exists():
        needed -= cpu_flags(_CPUINFO.read_text(errors="replace"))
    return f"the CPU does not report {', '.join(sorted(needed))}" if needed else ""


def _engine_problem(runtime: str, variant: object, forced: bool) -> str:
    """Why an engine cannot run a variant here; empty when it can (and the engine is imported)."""
    if runtime not in _OPEN or importlib.util.find_spec(runtime) is None:
        return f"runtime '{runtime}' is not installed"
    if runtime == "tensorrt" and not any(Path(node).exists() for node in _GPU_NODES):
        return "no NVIDIA GPU was found"
    if runtime == "tensorrt" and importlib.util.find_spec("edgekd") is None:
        return "the package edgekd builds its engine, and is not installed"
    installed, minimum = _installed_version(runtime), _get(variant, f"min_version.{runtime}", str, "0")
    have, need = (list(map(int, re.findall(r"\d+", text)[:3])) for text in (installed, minimum))
    if have < need and not forced:
        return f"{runtime} {installed} is older than {minimum}"
    try:
        engine = importlib.import_module(runtime)
        wanted = dict(_get(variant, "ep", list, _CPU)) if runtime == "onnxruntime" else {}
    except ImportError as error:
        return f"runtime '{runtime}' cannot be imported: {error}"
    except (TypeError, ValueError) as error:
        return f"manifest.json: key 'ep': expected pairs of name and options: {error}"
    lacking = set(map(str, wanted)) - set(wanted and engine.get_available_providers())
    return f"this onnxruntime has no {', '.join(sorted(lacking))}" if lacking else ""


def engine_for(variant: object, forced: bool = False) -> tuple[str, str]:
    """(the runtime that runs a variant of a manifest here, ""), or ("", why none does)."""
    problem = "" if forced else _machine_problem(variant)
    for runtime in map(str, [] if problem else _get(variant, "runtime", list)):
        if not (problem := _engine_problem(runtime, variant, forced)):
            return runtime, ""
    return "", problem or "no runtime is named"


def _choose(manifest: object, forced: str | None) -> tuple[dict[str, Any], str, dict[str, str]]:
    """(variant, runtime, why the others are not used); forcing skips architecture, CPU flags and version."""
    variants = {_get(variant, "id", str): variant for variant in _get(manifest, "variants", list)}
    if forced is not None and forced not in variants:
        raise BundleError(f"unknown variant '{forced}'; this bundle holds: {', '.join(variants)}")
    rejected: dict[str, str] = {}
    for name in variants if forced is None else [forced]:
        runtime, rejected[name] = engine_for(variants[name], forced is not None)
        if runtime:
            unused = f"not tried, '{name}' is used"
            return variants[name], runtime, {i: rejected.get(i, unused) for i in variants if i != name}
    raise BundleError(f"no variant of this bundle runs here: {'; '.join(map(': '.join, rejected.items()))}")


def _open_onnxruntime(data: bytes, variant: object, threads: int, names: list[str]) -> Callable[..., Any]:
    onnxruntime = importlib.import_module("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    for key, value in _get(variant, "session.config", dict, {}).items():
        options.add_session_config_entry(key, str(value))
    providers = list(dict(_get(variant, "ep", list, _CPU)).items())
    session = onnxruntime.InferenceSession(data, options, providers=providers)
    image, logits, run = names[0], names[1:], session.run  # looked up once: a call may take 40 µs
    return lambda array: run(logits, {image: array})[0]


def _open_openvino(data: bytes, variant: object, threads: int, names: list[str]) -> Callable[..., Any]:
    core, device = importlib.import_module("openvino").Core(), _get(variant, "openvino.device", str, "CPU")
    options = {**_get(variant, "openvino.options", dict, {}), "INFERENCE_NUM_THREADS": threads}
    request = core.compile_model(core.read_model(data), device, options).create_infer_request()
    # Int8 weights packed by a large first batch give garbage to a smaller one (2026.4.1): one image first.
    one = [max(1, size) for size in request.model_inputs[0].get_partial_shape().get_min_shape()]
    request.infer({names[0]: np.zeros(one, np.float32)})
    return lambda array: np.array(request.infer({names[0]: array})[names[1]], np.float32)


_OPEN: dict[str, Any] = {"onnxruntime": _open_onnxruntime, "openvino": _open_openvino}
_OPEN["tensorrt"] = lambda data, *_: importlib.import_module("edgekd.backends.tensorrt").from_bytes(data).run


def _engine_errors() -> tuple[type[BaseException], ...]:
    """What an engine raises when it refuses a graph or an input; onnxruntime's own types share no base."""
    own = (kind for name in _TYPES for kind in vars(sys.modules.get(name, object)).values())
    return (RuntimeError, ValueError, *(k for k in own if isinstance(k, type) and issubclass(k, Exception)))


class Model:
    """A loaded variant of a bundle; made by `load`. One thread at a time may use it."""

    def __init__(self, folder: Path, variant: str | None, threads: int | None) -> None:
        started = time.perf_counter()
        self._folder, self._manifest = folder, _manifest(folder)
        ends = [*_get(self._manifest, "inputs", list), *_get(self._manifest, "outputs", list)]
        if len(ends) != 2 or _get(ends[1], "postprocess", str) != "softmax":
            raise BundleError("manifest.json: expected one input and one output with postprocess softmax")
        self._preprocess = _preprocess(_get(ends[0], "preprocess", dict))
        self.classes = tuple(map(str, _get(self._manifest, "labels", list)))
        self._seen: tuple[int, ...] = (-1,)  # shape of the last input that was accepted; its logits: _answer
        self._variant, self.runtime, self.rejected = _choose(self._manifest, variant)
        self.variant = _get(self._variant, "id", str)
        data = _read(folder, _get(self._variant, "file", str), _get(self._variant, "sha256", str))
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        threads = max(1, min(threads or _get(self._variant, "session.threads", int, 1), usable))
        start, names = _OPEN[self.runtime], [_get(end, "name", str) for end in ends]
        try:
            self._run = start(data, self._variant, threads, names)
        except _engine_errors() as error:
            raise BundleError(f"{self.runtime} refused the variant '{self.variant}': {error}") from error
        self._start_s = time.perf_counter() - started

    def preprocess(self, images: object) -> Floats:
        """What the network sees, float32 (N, C, H, W); `images` as for `predict`."""
        return self._preprocess(as_images(images))

    def __call__(self, array: Floats) -> Floats:
        """Logits of preprocessed float32 (N, C, H, W); ValueError for others, BundleError of the engine."""
        if type(array) is not np.ndarray or array.dtype != _FLOAT or array.shape != self._seen:
            self._look_at(array)
        try:
            logits: Floats = self._run(np.ascontiguousarray(array))
        except _engine_errors() as error:
            raise BundleError(f"the variant '{self.variant}' failed: {error}") from error
        if getattr(logits, "shape", None) != self._answer:
            raise BundleError(f"the labels are of another model: '{self.variant}' gave {np.shape(logits)}")
        return logits

    def _look_at(self, array: Floats) -> None:
        shape, got = (self._preprocess.factors.shape[1], *self._preprocess.size), np.shape(array)
        if getattr(array, "dtype", None) != _FLOAT or len(got) != 4 or got[1:] != shape:
            raise ValueError(f"expected a float32 array of shape (N, *{shape}), got {type(array)} {got}")
        self._seen, self._answer = got, (got[0], len(self.classes))

    def predict(self, images: object, *, batch_size: int = 32) -> Prediction:
        """Classify uint8 images: (H, W), (H, W, C), (N, H, W), (N, H, W, C), or a list of images of any size.
        TypeError or ValueError for other input, BundleError when the engine fails or gives a NaN."""
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        views, logits = as_images(images), [np.empty((0, len(self.classes)), np.float32)]
        for start in range(0, len(views), batch_size):
            logits.append(self(self._preprocess(views[start : start + batch_size])))
        rows = np.concatenate(logits)
        if not np.isfinite(rows).all():
            raise BundleError(f"the variant '{self.variant}' gave a number that is not finite")
        powers = np.exp(rows - rows.max(axis=1, keepdims=True))
        probabilities, indices = powers / powers.sum(axis=1, keepdims=True), rows.argmax(axis=1)
        return Prediction([self.classes[index] for index in indices], indices, probabilities)

    def selftest(self) -> dict[str, Any]:
        """Replay the golden inputs: {variant, machine, max_abs_diff, ok, start_s, rss_mib}.

        ``max_abs_diff`` is over the logits (None: not a number), ``start_s`` the time to load in seconds,
        ``rss_mib`` the process's memory (None: unknown). Raises BundleError for a missing or altered file.
        """
        keys = ("input", "input_sha256", f"files.{self.variant}", f"sha256.{self.variant}")
        entries = [_get(self._manifest, f"golden.{key}", str) for key in keys]
        data = [io.BytesIO(_read(self._folder, *pair)) for pair in (entries[:2], entries[2:])]
        try:
            golden, expected = (np.load(file, allow_pickle=False) for file in data)
            found = float(np.abs(self(golden) - expected).max())
            ok = found <= _get(self._variant, "tolerance.max_abs", float)
        except (EOFError, MemoryError, OverflowError, ValueError) as error:
            raise BundleError(f"{self._folder}: golden values that cannot be used: {error}") from error
        pages = _STATM.read_text().split()[1] if _STATM.exists() else None
        return {"variant": self.variant, "machine": machine(), "ok": ok, "start_s": round(self._start_s, 4),
                "max_abs_diff": found if np.isfinite(found) else None,
                "rss_mib": pages and round(int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)}  # fmt: skip


def load(
    path: str | Path, *, variant: str | None = None, threads: int | None = None, selftest: bool = False
) -> Model:
    """Load the first variant of a bundle that runs here, or the one asked for.

    ``threads`` defaults to the manifest's count and never exceeds the cores this process may use.
    Raises BundleError when nothing runs here, a file is missing or altered, or the self-test fails.
    """
    model = Model(Path(path), variant, threads)
    if selftest and not (result := model.selftest())["ok"]:
        raise BundleError(f"the self-test failed: {json.dumps(result)}")
    return model


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``BUNDLE selftest [VARIANT]``; prints one JSON line and returns the exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if len(words) not in (2, 3) or words[1] != "selftest":
        print("usage: BUNDLE selftest [VARIANT]", file=sys.stderr)
        return 2
    try:
        result = load(words[0], variant=words[2] if len(words) == 3 else None).selftest()
    except BundleError as error:
        result = {"ok": False, "error": str(error)}
    print(json.dumps(result))
    return 2 if "error" in result else int(not result["ok"])


if __name__ == "__main__":
    sys.exit(main())
