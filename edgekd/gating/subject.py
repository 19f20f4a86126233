"""What is compared: an ONNX file on a runtime, given as such or as a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.backends import backend
from edgekd.backends.feeds import Feed, external_files, read_feeds
from edgekd.bundle import verify_bundle
from edgekd.checks import Check, Verdict
from edgekd.errors import BundleError, UsageError
from edgekd.files import sha256_file
from edgekd.manifest import Manifest, read_manifest
from edgekd.profiler import Variant as Measured
from edgekd.runtime import BundleError as RuntimeBundleError
from edgekd.runtime import Model, load, resize, to_color

Images = Sequence[NDArray[np.uint8]]
_PLAIN = "onnxruntime"  # the runtime of an ONNX file unless another one is asked for


@dataclass(frozen=True)
class Subject:
    """One side of a comparison. `labels` is empty for a plain ONNX file."""

    given: Path
    model: Path
    backend: str
    precision: str
    feeds: tuple[Feed, ...]
    variant: str = ""
    labels: tuple[str, ...] = ()
    loaded: Model | None = None
    tolerance: float = 0.0

    @property
    def size_bytes(self) -> int:
        """Of the file and of the weights beside it."""
        return sum(path.stat().st_size for path in (self.model, *external_files(self.model)))

    def measured(self, name: str) -> Measured:
        """As the profiler takes it."""
        return Measured(name, self.backend, str(self.model), self.precision)

    def record(self) -> dict[str, Any]:
        """What `gate.json` says of it."""
        return {
            "file": str(self.given),
            "variant": self.variant or None,
            "sha256": sha256_file(self.model),
            "bytes": self.size_bytes,
            "backend": self.backend,
            "precision": self.precision,
        }

    def golden_check(self, name: str) -> list[Check]:
        """The golden outputs of a bundle, replayed; nothing for a plain file."""
        if self.loaded is None:
            return []
        try:
            found = self.loaded.selftest()
        except RuntimeBundleError as error:
            raise BundleError(str(error), "copy the bundle again") from error
        difference, note = found["max_abs_diff"], f"variant {self.variant}, largest difference of a logit"
        verdict: Verdict = "PASS" if found["ok"] else "FAIL"
        return [Check(f"golden outputs of the {name}", difference, self.tolerance, None, verdict, "", note)]


@dataclass(frozen=True)
class Normalisation:
    """For a plain ONNX file: ``(pixel / 255 - mean) / std`` for each channel."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Images, feed: Feed) -> NDArray[np.float32]:
        """uint8 (H, W, 1 or 3) each to (N, C, H, W) of the feed.

        Raises:
            UsageError: the input is not an image, or has another number of channels.
        """
        if len(feed.shape) != 4 or feed.shape[1] not in (1, 3) or feed.dtype != "float32":
            raise UsageError(f"--data with images needs one float32 input (1, 1 or 3, H, W), got {feed}")
        channels, height, width = feed.shape[1:]
        if not len(self.mean) == len(self.std) == channels:
            raise UsageError(
                f"--mean and --std need {channels} number(s) for the input {feed}, "
                f"got {len(self.mean)} and {len(self.std)}"
            )
        if 0 in self.std:
            raise UsageError("--std: 0 is not a deviation")
        color = "grey" if channels == 1 else "rgb"
        pixels = np.stack([to_color(resize(image, height, width), color) for image in images])
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        scaled = (pixels.astype(np.float32) / np.float32(255) - mean) / std
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def preprocess(subject: Subject, normalisation: Normalisation | None) -> Callable[[Images], Any]:
    """From pixels to what the subject takes.

    Raises:
        UsageError: a plain ONNX file, and nobody said how its input is normalised.
    """
    if subject.loaded is not None:
        return subject.loaded.preprocess
    if normalisation is None:
        raise UsageError(
            f"{subject.given}: an ONNX file does not say how pixels become its input",
            "add --mean and --std (0 and 1 for pixels in 0..1), or give a bundle",
        )
    return lambda images: normalisation(images, subject.feeds[0])


def resolve(
    given: Path, *, runtime: str, precision: str, variant: str, shapes: Mapping[str, Sequence[int]]
) -> Subject:
    """An ONNX file, or the variant of a bundle that runs here: the named one, else the first.

    Args:
        runtime: "" is the bundle's own choice, and ONNX Runtime for a plain file.
        precision: of operators not quantized in a plain file; a bundle states its own.

    Raises:
        UsageError: neither, or options that do not fit it.
        BackendError: the file is not an ONNX model.
        BundleError: the bundle is damaged, or nothing in it runs here.
    """
    if runtime:
        backend(runtime)
    if given.is_dir():
        return _from_bundle(given, runtime, variant)
    if variant:
        raise UsageError(f"{given} is a file; --variant chooses in a bundle")
    if not given.is_file():
        raise UsageError(f"{given} is neither a file nor a folder")
    feeds = read_feeds(given, shapes)
    return Subject(given, given.resolve(), runtime or _PLAIN, precision, feeds)


def _from_bundle(folder: Path, runtime: str, variant: str) -> Subject:
    manifest = read_manifest(folder)
    if problems := verify_bundle(folder):
        raise BundleError(f"{folder}: {'; '.join(problems)}", "copy the bundle again")
    wanted = _wanted(manifest, runtime, variant, folder)
    try:
        loaded = load(folder, variant=wanted)
    except RuntimeBundleError as error:
        raise BundleError(f"{folder}: {error}", "edgekd doctor tells what this machine has") from error
    chosen = next(one for one in manifest.variants if one.id == loaded.variant)
    used = runtime or loaded.runtime
    model = (folder / chosen.file).resolve()
    return Subject(
        folder,
        model,
        used,
        chosen.float_precision(used),
        read_feeds(model),
        chosen.id,
        manifest.labels,
        loaded,
        chosen.tolerance.max_abs,
    )


def _wanted(manifest: Manifest, runtime: str, variant: str, folder: Path) -> str | None:
    """The variant to load; None leaves the choice to the bundle."""
    if variant or not runtime:
        return variant or None
    fitting = [one.id for one in manifest.variants if runtime in one.runtime and not one.build]
    if not fitting:
        have = sorted({name for one in manifest.variants for name in one.runtime})
        raise UsageError(f"{folder}: no variant for --backend {runtime}; the bundle is for {', '.join(have)}")
    for name in fitting:
        try:
            return load(folder, variant=name).variant
        except RuntimeBundleError:
            continue
    return fitting[0]
