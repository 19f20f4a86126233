"""Bundles: the folder that is handed over. Write and verify; running one is `edgekd.runtime`.

``manifest.json``, ``models/<variant>.onnx``, ``golden/input.npy`` and ``golden/<variant>.npy``.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import io
import os
import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekd.errors import BundleError, StorageError
from edgekd.files import sha256_file
from edgekd.manifest import (
    GoldenFiles,
    Input,
    InputPreprocess,
    Manifest,
    OpenVinoSettings,
    Output,
    SessionSettings,
    Tolerance,
    Variant,
    read_manifest,
)
from edgekd.runtime import FORMAT, path_problem
from edgekd.spec import ModelSpec, Preprocessing

Array = NDArray[np.float32]
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@dataclass(frozen=True)
class VariantFile:
    """What goes into a bundle as one variant; the fields have the meaning of the manifest's keys.

    ``source`` is a single ONNX file without external data. ``arch`` holds names as ``uname -m`` gives them,
    ``min_version`` a version for each runtime, ``accuracy`` a share of 1. Empty means: no such condition.
    With ``build="on-device"`` the graph is only the source of an engine, made there by ``build_recipe``.
    """

    id: str
    source: Path
    runtime: tuple[str, ...]
    quant: str = "none"
    precision: str = "f32"  # of the operators that are not quantized, or "int8"
    accuracy: float | None = None
    min_version: Mapping[str, str] = field(default_factory=dict)
    arch: tuple[str, ...] = ()
    requires_cpu_flags: tuple[str, ...] = ()
    ep: tuple[tuple[str, dict[str, Any]], ...] = ()
    session: SessionSettings = field(default_factory=SessionSettings)
    openvino: OpenVinoSettings | None = None  # None: CPU, low latency, and the precision stated above
    build: str = ""
    build_recipe: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Golden:
    """Preprocessed inputs, float32 (N, C, H, W), and for each variant id its logits and its tolerance.

    For a variant that is built on the device the logits come from the executor that stands in for it.
    """

    input: Array
    outputs: Mapping[str, Array]
    tolerance: Mapping[str, float]


def write_bundle(
    folder: Path,
    *,
    name: str,
    spec: ModelSpec,
    variants: Sequence[VariantFile],
    golden: Golden,
    provenance: Mapping[str, Any],
    evidence: Mapping[str, Any],
) -> Manifest:
    """Write a bundle beside ``folder``, verify it, and move it there in one step, replacing an older bundle.

    A crash leaves the old bundle or the new one. Where the file system cannot exchange two folders, the old
    one is moved aside first (into a hidden folder beside), and for that moment nothing is in its place.

    Raises:
        BundleError: the parts do not fit each other, or the folder holds something that is not a bundle.
        StorageError: the folder cannot be written; nothing is left half-written.
    """
    folder = folder.resolve()
    _check_parts(spec, variants, golden)
    _refuse_foreign(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            new = Path(temporary) / "new"
            entries = tuple(_write_variant(new, file, golden.tolerance[file.id]) for file in variants)
            manifest = Manifest(
                format="edgekd-bundle",
                version=1,
                name=name,
                task="image-classification",
                inputs=(_input(spec),),
                outputs=(_output(spec),),
                labels=spec.classes,
                variants=entries,
                golden=_write_golden(new, golden, [file.id for file in variants]),
                provenance=dict(provenance),
                evidence=dict(evidence),
            )
            text = msgspec.json.format(msgspec.json.encode(manifest, enc_hook=_plain), indent=2)
            _write(new / "manifest.json", text + b"\n")
            if problems := verify_bundle(new):
                raise BundleError(f"the bundle just written is not sound: {'; '.join(problems)}")
            _put_in_place(new, folder)
    except OSError as error:
        raise StorageError(
            f"cannot write the bundle {folder}: {error.strerror or error}",
            "choose a writable folder with free space: --out FOLDER",
        ) from error
    return read_manifest(folder)


def _check_parts(spec: ModelSpec, variants: Sequence[VariantFile], golden: Golden) -> None:
    """The variants, the golden arrays and the specification describe the same model."""
    ids = [file.id for file in variants]
    if not ids or len(set(ids)) != len(ids):
        raise BundleError(f"a bundle needs variants with different ids, got {ids}")
    for part, found in (("golden logits", golden.outputs), ("a tolerance", golden.tolerance)):
        if set(found) != set(ids):
            raise BundleError(f"every variant needs {part}: variants {sorted(ids)}, got {sorted(found)}")
    count = len(golden.input)
    expected = {"golden input": (count, *spec.input_shape)} | {i: (count, len(spec.classes)) for i in ids}
    for key, array in ({"golden input": golden.input} | dict(golden.outputs)).items():
        if array.dtype != np.float32 or array.shape != expected[key] or not count:
            raise BundleError(f"{key}: expected float32 {expected[key]}, got {array.dtype} {array.shape}")
        if not np.isfinite(array).all():
            raise BundleError(f"{key}: holds numbers that are not finite")
    for file in variants:
        if not re.fullmatch(r"[a-z0-9][a-z0-9_-]{0,63}", file.id):
            raise BundleError(f"variant id '{file.id}': use lower-case letters, digits, '-' and '_'")
        if not file.source.is_file():
            raise BundleError(f"variant '{file.id}': there is no file {file.source}", "run the export again")


def _refuse_foreign(folder: Path) -> None:
    """Replace nothing but a bundle (even a damaged one) or an empty folder."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    manifest = folder / "manifest.json"
    if not manifest.is_file() or FORMAT.encode() not in manifest.read_bytes():
        raise BundleError(f"{folder} exists and is not a bundle", "choose another folder: --out FOLDER")


def _input(spec: ModelSpec) -> Input:
    p: Preprocessing = spec.preprocessing
    preprocess = {
        "resize": (p.height, p.width),
        "mode": p.mode,
        "color": p.color,
        "mean": p.mean,
        "std": p.std,
    }
    return Input(
        name=spec.input_name,
        dtype="float32",
        shape=(-1, *spec.input_shape),
        layout="NCHW",
        preprocess=msgspec.convert(preprocess | {"scale": (p.scale,) * p.channels}, InputPreprocess),
    )


def _output(spec: ModelSpec) -> Output:
    shape = (-1, len(spec.classes))
    return Output(name=spec.output_name, dtype="float32", shape=shape, postprocess="softmax")


def _write_variant(folder: Path, file: VariantFile, max_abs: float) -> Variant:
    data = file.source.read_bytes()
    path = f"models/{file.id}.onnx"
    _write(folder / path, data)
    settings = {item.name: getattr(file, item.name) for item in fields(file) if item.name != "source"}
    if file.openvino is None and "openvino" in file.runtime:
        hint = file.precision if file.precision in ("bf16", "f16") else "f32"
        options = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY"}
        settings["openvino"] = OpenVinoSettings(options=options)
    return Variant(
        file=path,
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        tolerance=Tolerance(max_abs=float(max_abs)),
        **settings,
    )


def _write_golden(folder: Path, golden: Golden, ids: Sequence[str]) -> GoldenFiles:
    files = {name: f"golden/{name}.npy" for name in ids}
    for path, array in [("golden/input.npy", golden.input), *((files[i], golden.outputs[i]) for i in ids)]:
        buffer = io.BytesIO()
        np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
        _write(folder / path, buffer.getvalue())
    digests = {name: sha256_file(folder / path) for name, path in files.items()}
    input_sha256 = sha256_file(folder / "golden/input.npy")
    return GoldenFiles(input="golden/input.npy", input_sha256=input_sha256, files=files, sha256=digests)


def _plain(value: object) -> object:
    """JSON for what provenance and evidence may hold besides JSON types."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path):
        return str(value)
    raise BundleError(f"the manifest cannot hold {type(value).__name__}: {value!r:.60}")


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _put_in_place(new: Path, folder: Path) -> None:
    """Move ``new`` to ``folder``; what was there goes where ``new`` was, or beside it."""
    if not folder.exists() or not _exchange(new, folder):
        old = new.with_name("old")
        if folder.exists():
            folder.rename(old)
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    parent = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False where the system cannot (renameat2(2) is Linux's)."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    if call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def verify_bundle(folder: Path) -> list[str]:
    """What is wrong with a bundle, one sentence each: altered, missing, unlisted or escaping files, shapes.

    Raises:
        BundleError: the manifest itself cannot be read.
    """
    manifest = read_manifest(folder)
    golden = manifest.golden
    ids = [variant.id for variant in manifest.variants]
    problems = [
        f"variant id '{name}' is used {count} times" for name, count in Counter(ids).items() if count > 1
    ]
    for key, found in (("files", golden.files), ("sha256", golden.sha256)):
        if set(found) != set(ids):
            problems.append(f"golden.{key} names {sorted(found)}, the variants are {sorted(set(ids))}")
    listed = [(variant.file, variant.sha256) for variant in manifest.variants]
    listed.append((golden.input, golden.input_sha256))
    listed += [(golden.files[name], golden.sha256[name]) for name in golden.files if name in golden.sha256]
    sound = {name for name, digest in listed if not _file_problem(folder, name, digest, problems)}
    expected = {"manifest.json", *(name for name, _ in listed)}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if (path.is_symlink() or not path.is_dir()) and name not in expected:
            problems.append(f"{name} is not listed in the manifest")
    return problems + _shape_problems(folder, manifest, sound)


def _file_problem(folder: Path, name: str, digest: str, problems: list[str]) -> bool:
    """Whether a listed file is not what the manifest says; the reason is added to ``problems``."""
    problem = path_problem(folder, name)
    if not problem:
        try:
            problem = "" if sha256_file(folder / name) == digest else f"{name} was altered (SHA-256 differs)"
        except FileNotFoundError:
            problem = f"{name} is missing"
        except OSError as error:
            problem = f"{name} cannot be read: {error.strerror}"
    if problem:
        problems.append(problem)
    return bool(problem)


def _shape_problems(folder: Path, manifest: Manifest, sound: set[str]) -> list[str]:
    """Whether specification, labels, file sizes and golden arrays agree; only unaltered files are opened."""
    problems = []
    tensor, classes = manifest.inputs[0], len(manifest.labels)
    p = tensor.preprocess
    channels = 1 if p.color == "grey" else 3
    if tensor.shape != (-1, channels, *p.resize) or {len(p.scale), len(p.mean), len(p.std)} != {channels}:
        problems.append(f"input shape {tensor.shape} does not match its preprocessing")
    if manifest.outputs[0].shape != (-1, classes):
        problems.append(f"output shape {manifest.outputs[0].shape} does not match {classes} labels")
    for variant in manifest.variants:
        if variant.file in sound and (folder / variant.file).stat().st_size != variant.bytes:
            problems.append(
                f"{variant.file} does not have the {variant.bytes} bytes that the manifest states"
            )
    counts = set()
    wanted = {manifest.golden.input: tensor.shape[1:]} | dict.fromkeys(
        manifest.golden.files.values(), (classes,)
    )
    for name in sorted(wanted.keys() & sound):
        try:
            array = np.load(folder / name, allow_pickle=False)
        except (ValueError, EOFError, OSError, MemoryError) as error:
            problems.append(f"{name} is not a NumPy array: {error}")
            continue
        counts.add(len(array) if array.ndim else 0)
        if array.dtype != np.float32 or array.shape[1:] != wanted[name]:
            problems.append(f"{name}: expected float32 (N, *{wanted[name]}), got {array.dtype} {array.shape}")
    if len(counts) > 1:
        problems.append(f"the golden files hold different numbers of images: {sorted(counts)}")
    return problems
