"""The manifest of a bundle: its types, reading it, and its JSON schema (``docs/manifest.schema.json``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from edgekd.errors import BundleError
from edgekd.runtime import FORMAT, LARGEST, VERSION

Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
VariantId = Annotated[str, msgspec.Meta(pattern="^[a-z0-9][a-z0-9_-]*$", max_length=64)]
Count = Annotated[int, msgspec.Meta(ge=1)]
_AGAIN = "copy the bundle again, or run the export again"


class _Part(msgspec.Struct, frozen=True, omit_defaults=True):
    """Unknown keys are ignored, so that a reader of version 1 reads later additions."""


class InputPreprocess(_Part, frozen=True, kw_only=True):
    """In this order: resize, colour, multiply by scale, subtract mean, divide by std (one each a channel)."""

    resize: tuple[Count, Count]
    mode: Literal["bilinear"]
    color: Literal["grey", "rgb"]
    scale: tuple[float, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Input(_Part, frozen=True, kw_only=True):
    """A tensor that goes in; -1 in the shape is the batch."""

    name: str
    dtype: Literal["float32"]
    shape: tuple[int, ...]
    layout: Literal["NCHW"]
    preprocess: InputPreprocess


class Output(_Part, frozen=True, kw_only=True):
    """A tensor that comes out, and what makes probabilities of it."""

    name: str
    dtype: Literal["float32"]
    shape: tuple[int, ...]
    postprocess: Literal["softmax"]


class SessionSettings(_Part, frozen=True, kw_only=True, omit_defaults=False):
    """Threads of any engine; config entries of ONNX Runtime."""

    threads: Count = 1
    config: dict[str, str] = {}


class OpenVinoSettings(_Part, frozen=True, kw_only=True):
    """Device and properties to compile for with OpenVINO."""

    device: str = "CPU"
    options: dict[str, Any] = {}


class Tolerance(_Part, frozen=True, kw_only=True):
    """Largest absolute difference of a logit to its golden value that a self-test accepts."""

    max_abs: Annotated[float, msgspec.Meta(ge=0)]


class Variant(_Part, frozen=True, kw_only=True):
    """One model file. Variants are ordered: the first that runs on a machine is used there."""

    id: VariantId
    file: str
    sha256: Digest
    bytes: int
    runtime: tuple[str, ...]
    quant: str
    precision: str
    tolerance: Tolerance
    min_version: dict[str, str] = {}
    arch: tuple[str, ...] = ()
    requires_cpu_flags: tuple[str, ...] = ()
    ep: tuple[tuple[str, dict[str, Any]], ...] = ()
    session: SessionSettings = SessionSettings()
    openvino: OpenVinoSettings | None = None
    build: Literal["", "on-device"] = ""
    build_recipe: dict[str, Any] = {}
    accuracy: float | None = None
    note: str = ""

    def float_precision(self, runtime: str) -> str:
        """That in which a runtime executes what is not quantized."""
        if runtime != "openvino" or self.openvino is None:
            return "f32"
        return str(self.openvino.options.get("INFERENCE_PRECISION_HINT", "f32"))


class GoldenFiles(_Part, frozen=True, kw_only=True):
    """Inputs and, for each variant, the logits that they gave when the bundle was written."""

    input: str
    input_sha256: Digest
    files: dict[str, str]
    sha256: dict[str, Digest]


class Manifest(_Part, frozen=True, kw_only=True):
    """``manifest.json`` of a bundle."""

    format: Literal["edgekd-bundle"]
    version: Literal[1]
    name: str
    task: Literal["image-classification"]
    inputs: tuple[Input]
    outputs: tuple[Output]
    labels: tuple[str, ...]
    variants: tuple[Variant, ...]
    golden: GoldenFiles
    provenance: dict[str, Any]
    evidence: dict[str, Any]


def read_manifest(folder: Path) -> Manifest:
    """Read and check ``manifest.json``; the files that it names are not looked at.

    Raises:
        BundleError: it is missing, not JSON, of another format or version, or a key is wrong.
    """
    path = folder / "manifest.json"
    try:
        if (size := path.stat().st_size) >= LARGEST >> 7:
            raise BundleError(f"{path} has {size} bytes, a manifest has less than {LARGEST >> 7}", _AGAIN)
        data = path.read_bytes()
        raw = json.loads(data)
    except OSError as error:
        hint = "a bundle is a folder that holds manifest.json"
        raise BundleError(f"cannot read {path}: {error.strerror}", hint) from error
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not valid JSON: {error}", _AGAIN) from error
    kind, version = (raw.get("format"), raw.get("version")) if isinstance(raw, dict) else (None, None)
    if kind != FORMAT:
        raise BundleError(
            f"{path}: expected format '{FORMAT}', got {kind!r:.60}", "is this the right folder?"
        )
    if type(version) is not int or version != VERSION:
        hint = "use the edgekd release that wrote the bundle, or run its export again with this one"
        raise BundleError(f"{path}: format version {version!r:.60}, this edgekd reads {VERSION}", hint)
    try:
        return msgspec.json.decode(data, type=Manifest)
    except msgspec.DecodeError as error:
        raise BundleError(f"{path}: {error}", "see docs/manifest.schema.json; " + _AGAIN) from error


def manifest_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of ``manifest.json``."""
    schema: dict[str, Any] = json.loads(msgspec.json.encode(msgspec.json.schema(Manifest)))
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "edgekd bundle manifest",
    } | schema
