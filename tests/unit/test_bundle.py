"""Bundles: what is written is read back, damage is found, and an old bundle is never half-replaced."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_bundle import CLASSES, RGB, edit_manifest, sample_bundle, sample_parts, set_variant

from edgekd import bundle as bundle_module
from edgekd import runtime
from edgekd.bundle import Golden, VariantFile, verify_bundle, write_bundle
from edgekd.errors import BundleError, StorageError
from edgekd.files import sha256_file
from edgekd.manifest import Manifest, OpenVinoSettings, manifest_schema, read_manifest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_bundle(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A private copy that a test may damage."""
    return Path(shutil.copytree(pristine, tmp_path / "model.ekd"))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_layout(pristine: Path) -> None:
    assert sorted(contents(pristine)) == [
        "golden/input.npy",
        "golden/ort.npy",
        "golden/ov.npy",
        "manifest.json",
        "models/ort.onnx",
        "models/ov.onnx",
    ]
    assert verify_bundle(pristine) == []


def test_the_manifest_holds_what_was_given(tmp_path: Path) -> None:
    parts = sample_parts(tmp_path, RGB)
    written = write_bundle(tmp_path / "out" / "model.ekd", **parts)
    assert written == read_manifest(tmp_path / "out" / "model.ekd")
    assert (written.name, written.labels, written.format, written.version) == (
        "sample",
        CLASSES,
        runtime.FORMAT,
        runtime.VERSION,
    )
    assert written.inputs[0].shape == (-1, 3, 8, 10) and written.outputs[0].shape == (-1, 3)
    preprocess = written.inputs[0].preprocess
    assert (preprocess.resize, preprocess.color, preprocess.mean, preprocess.std) == (
        (8, 10),
        "rgb",
        RGB.mean,
        RGB.std,
    )
    assert preprocess.scale == (RGB.scale,) * 3
    assert [variant.id for variant in written.variants] == ["ort", "ov"]
    assert written.variants[0].accuracy == 0.9
    assert written.provenance == parts["provenance"] and written.evidence == parts["evidence"]


def test_the_same_parts_give_the_same_bytes(tmp_path: Path) -> None:
    assert contents(sample_bundle(tmp_path / "a")) == contents(sample_bundle(tmp_path / "b"))


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"precision": "int8"}, "f32"),
        ({"precision": "bf16"}, "bf16"),
        ({"openvino": OpenVinoSettings(options={"INFERENCE_PRECISION_HINT": "f16"})}, "f16"),
    ],
)
def test_openvino_states_its_precision(tmp_path: Path, changes: dict[str, Any], hint: str) -> None:
    parts = sample_parts(tmp_path)
    ort, ov = parts["variants"]
    written = write_bundle(tmp_path / "model.ekd", **parts | {"variants": (ort, replace(ov, **changes))})
    assert written.variants[0].openvino is None
    assert written.variants[1].openvino is not None
    assert written.variants[1].openvino.options["INFERENCE_PRECISION_HINT"] == hint


def test_an_on_device_variant_carries_graph_and_recipe(tmp_path: Path) -> None:
    parts = sample_parts(tmp_path)
    recipe = {"compute_capability": "8.7", "options": {"builder_optimization_level": 3}}
    trt = replace(parts["variants"][0], runtime=("tensorrt",), build="on-device", build_recipe=recipe)
    written = write_bundle(tmp_path / "model.ekd", **parts | {"variants": (trt, parts["variants"][1])})
    assert (written.variants[0].build, written.variants[0].build_recipe) == ("on-device", recipe)
    assert runtime.load(tmp_path / "model.ekd").variant == "ov"


def test_numpy_numbers_and_paths_become_json(tmp_path: Path) -> None:
    evidence = {
        "accuracy": np.float64(0.5),
        "n": np.int64(3),
        "run": Path("runs/demo"),
        "missing": float("nan"),
    }
    written = write_bundle(tmp_path / "model.ekd", **sample_parts(tmp_path) | {"evidence": evidence})
    assert written.evidence == {"accuracy": 0.5, "n": 3, "run": "runs/demo", "missing": None}
    with pytest.raises(BundleError, match="cannot hold object"):
        write_bundle(tmp_path / "other.ekd", **sample_parts(tmp_path) | {"evidence": {"x": object()}})


def test_the_stored_schema_is_current() -> None:
    stored = REPOSITORY / "docs" / "manifest.schema.json"
    assert json.loads(stored.read_text()) == manifest_schema()
    assert stored.read_text() == json.dumps(manifest_schema(), indent=2) + "\n"
    assert manifest_schema()["$defs"]["Manifest"]["properties"]["version"] == {"enum": [runtime.VERSION]}


def test_unknown_keys_are_left_to_later_versions(folder: Path) -> None:
    edit_manifest(folder, lambda manifest: manifest.update(colour_profile="sRGB"))
    assert isinstance(read_manifest(folder), Manifest)


def bad_parts(parts: dict[str, Any], name: str) -> dict[str, Any]:
    """The parts with one thing wrong."""
    golden: Golden = parts["golden"]
    ort: VariantFile = parts["variants"][0]
    changes: dict[str, dict[str, Any]] = {
        "no variants": {"variants": ()},
        "same id": {"variants": (ort, ort)},
        "bad id": {
            "variants": (replace(ort, id="../x"),),
            "golden": Golden(golden.input, {"../x": golden.outputs["ort"]}, {"../x": 0.1}),
        },
        "no source": {"variants": (replace(ort, source=Path("gone.onnx")), parts["variants"][1])},
        "no tolerance": {"golden": replace(golden, tolerance={"ort": 0.1})},
        "negative tolerance": {"golden": replace(golden, tolerance={"ort": -0.1, "ov": 0.1})},
        "no logits": {"golden": replace(golden, outputs={"ort": golden.outputs["ort"]})},
        "float64": {"golden": replace(golden, input=golden.input.astype(np.float64))},
        "other shape": {"golden": replace(golden, input=golden.input[:, :, :4])},
        "other count": {"golden": replace(golden, input=golden.input[:2])},
        "no images": {
            "golden": replace(
                golden,
                input=golden.input[:0],
                outputs={i: logits[:0] for i, logits in golden.outputs.items()},
            )
        },
        "NaN": {"golden": replace(golden, input=golden.input * np.float32("nan"))},
        "classes": {"spec": replace(parts["spec"], classes=("a", "b"))},
    }
    return parts | changes[name]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no variants", "needs variants with different ids"),
        ("same id", "needs variants with different ids"),
        ("bad id", r"variant id '\.\./x'"),
        ("no source", "there is no file gone.onnx"),
        ("no tolerance", "every variant needs a tolerance"),
        ("negative tolerance", "max_abs"),
        ("no logits", "every variant needs golden logits"),
        ("float64", "golden input: expected float32"),
        ("other shape", "golden input: expected float32"),
        ("other count", r"ort: expected float32 \(2, 3\), got float32 \(4, 3\)"),
        ("no images", r"golden input: expected float32 \(0, 1, 8, 10\)"),
        ("NaN", "not finite"),
        ("classes", r"expected float32 \(4, 2\)"),
    ],
)
def test_parts_that_do_not_fit_are_refused_and_nothing_is_written(
    tmp_path: Path, name: str, words: str
) -> None:
    parts = bad_parts(sample_parts(tmp_path / "work"), name)
    with pytest.raises(BundleError, match=words):
        write_bundle(tmp_path / "out" / "model.ekd", **parts)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_a_new_bundle_replaces_the_old_one_and_leaves_nothing_beside(tmp_path: Path) -> None:
    parts = sample_parts(tmp_path / "work")
    for name in ("first", "second"):
        write_bundle(tmp_path / "out" / "model.ekd", **parts | {"name": name})
    assert read_manifest(tmp_path / "out" / "model.ekd").name == "second"
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.ekd"]


def test_where_folders_cannot_be_exchanged_the_old_bundle_is_moved_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle_module, "_exchange", lambda first, second: False)
    test_a_new_bundle_replaces_the_old_one_and_leaves_nothing_beside(tmp_path)


@pytest.mark.parametrize("step", ["_write", "_write_golden", "verify_bundle", "_exchange"])
def test_a_failure_at_any_step_leaves_the_old_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    parts = sample_parts(tmp_path / "work")
    target = tmp_path / "out" / "model.ekd"
    write_bundle(target, **parts)
    before = contents(target)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle_module, step, full)
    with pytest.raises(StorageError, match="No space left on device"):
        write_bundle(target, **parts | {"name": "second"})
    assert contents(target) == before
    assert [path.name for path in target.parent.iterdir()] == ["model.ekd"]


def test_a_rename_that_fails_puts_the_old_bundle_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = sample_parts(tmp_path / "work")
    target = tmp_path / "out" / "model.ekd"
    write_bundle(target, **parts)
    usual = Path.rename

    def rename(self: Path, other: Path) -> Path:
        if self.name == "new":
            raise OSError(5, "Input/output error")
        return usual(self, other)

    monkeypatch.setattr(bundle_module, "_exchange", lambda first, second: False)
    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(StorageError, match="Input/output error"):
        write_bundle(target, **parts | {"name": "second"})
    assert read_manifest(target).name == "sample"


def test_nothing_but_a_bundle_is_replaced(tmp_path: Path) -> None:
    parts = sample_parts(tmp_path / "work")
    for name in ("notes.txt", "manifest.json"):  # the second is a web application's
        home = tmp_path / name.partition(".")[0]
        home.mkdir()
        (home / name).write_text('{"name": "app"}')
        with pytest.raises(BundleError, match="is not a bundle"):
            write_bundle(home, **parts)
        assert (home / name).exists()
    (tmp_path / "empty").mkdir()
    write_bundle(tmp_path / "empty", **parts)
    (tmp_path / "empty" / "manifest.json").write_text('{"format": "edgekd-bundle", "vers')  # a damaged bundle
    write_bundle(tmp_path / "empty", **parts)


def test_a_file_in_the_way_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write the bundle"):
        write_bundle(tmp_path / "file" / "model.ekd", **sample_parts(tmp_path / "work"))


def text(value: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "manifest.json").write_text(value)


@pytest.mark.parametrize(
    ("damage", "words", "hint"),
    [
        (
            lambda folder: (folder / "manifest.json").unlink(),
            "cannot read .*No such file",
            "a bundle is a folder",
        ),
        (text('{"format": "edgekd-bundle", "vers'), "is not valid JSON", "copy the bundle again"),
        (
            lambda folder: os.truncate(folder / "manifest.json", 2**31),
            "has 2147483648 bytes, a manifest has less than",
            "copy the bundle again",
        ),
        (text("[" * 100_000), "is not valid JSON", "copy the bundle again"),
        (text("\udcff".encode("utf-8", "surrogateescape").decode("latin-1")), "is not valid JSON", "copy"),
        (text("[1]"), "expected format 'edgekd-bundle', got None", "right folder"),
        (
            text('{"format": "edgekd-bundle", "version": 2}'),
            "format version 2, this edgekd reads 1",
            "release that wrote",
        ),
        (text('{"format": "edgekd-bundle", "version": true}'), "format version True", "release that wrote"),
        (
            text('{"format": "edgekd-bundle", "version": 1}'),
            "missing required field `name`",
            "manifest.schema.json",
        ),
        (
            lambda folder: set_variant(folder, 1, {"sha256": "0"}),
            r"regex.*\$\.variants\[1\]\.sha256",
            "manifest.schema.json",
        ),
        (
            lambda folder: set_variant(folder, 0, {"tolerance": {"max_abs": float("inf")}}),
            "malformed|invalid",
            "manifest.schema.json",
        ),
    ],
)
def test_a_manifest_that_cannot_be_read(
    folder: Path, damage: Callable[[Path], object], words: str, hint: str
) -> None:
    damage(folder)
    with pytest.raises(BundleError, match=words) as caught:
        verify_bundle(folder)
    assert hint in caught.value.hint


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def save_golden(folder: Path, name: str, array: Any) -> None:
    """A golden file that the manifest agrees with."""
    path = folder / f"golden/{name}.npy"
    np.save(path, array)
    digest = sha256_file(path)
    edit_manifest(folder, lambda manifest: manifest["golden"]["sha256"].update({name: digest}))


def put_folder(folder: Path) -> None:
    (folder / "models/ov.onnx").unlink()
    (folder / "models/ov.onnx").mkdir()


PROBLEMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "model": (lambda f: flip(f / "models/ov.onnx"), "models/ov.onnx was altered (SHA-256 differs)"),
    "golden": (lambda f: flip(f / "golden/ort.npy"), "golden/ort.npy was altered (SHA-256 differs)"),
    "missing": (lambda f: (f / "golden/input.npy").unlink(), "golden/input.npy is missing"),
    "extra": (
        lambda f: (f / "models/notes.txt").write_text(""),
        "models/notes.txt is not listed in the manifest",
    ),
    "extra link": (lambda f: (f / "link").symlink_to("/"), "link is not listed in the manifest"),
    "huge": (lambda f: os.truncate(f / "models/ov.onnx", 2**31), "'models/ov.onnx' has 2 GiB or more"),
    "folder": (put_folder, "models/ov.onnx cannot be read: Is a directory"),
    "bytes": (
        lambda f: set_variant(f, 0, {"bytes": 1}),
        "models/ort.onnx does not have the 1 bytes that the manifest states",
    ),
    "labels": (
        lambda f: edit_manifest(f, lambda m: m["outputs"][0].update(shape=[-1, 9])),
        "output shape (-1, 9) does not match 3 labels",
    ),
    "input shape": (
        lambda f: edit_manifest(f, lambda m: m["inputs"][0].update(shape=[-1, 3, 8, 10])),
        "input shape (-1, 3, 8, 10) does not match its preprocessing",
    ),
    "golden shape": (
        lambda f: save_golden(f, "ov", np.zeros((4, 2), np.float32)),
        "golden/ov.npy: expected float32 (N, *(3,)), got float32 (4, 2)",
    ),
    "golden count": (
        lambda f: save_golden(f, "ov", np.zeros((5, 3), np.float32)),
        "the golden files hold different numbers of images: [4, 5]",
    ),
    "golden missing": (
        lambda f: edit_manifest(f, lambda m: m["golden"]["sha256"].pop("ov")),
        "golden.sha256 names ['ort'], the variants are ['ort', 'ov']",
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_verify_finds(folder: Path, name: str) -> None:
    damage, sentence = PROBLEMS[name]
    damage(folder)
    assert sentence in verify_bundle(folder)


def test_verify_opens_no_pickle(folder: Path) -> None:
    save_golden(folder, "ov", np.array([{"not": "numbers"}], dtype=object))
    assert any(problem.startswith("golden/ov.npy is not a NumPy array") for problem in verify_bundle(folder))


@pytest.mark.parametrize("name", ["../outside.onnx", "/etc/hostname", "..\\outside.onnx", "C:\\x", ""])
def test_verify_follows_no_path_out_of_the_bundle(folder: Path, name: str) -> None:
    (folder.parent / "outside.onnx").write_bytes((folder / "models/ort.onnx").read_bytes())
    set_variant(folder, 0, {"file": name})
    assert any(problem.startswith(f"'{name}' ") for problem in verify_bundle(folder))


def test_verify_reports_an_id_used_twice(folder: Path) -> None:
    set_variant(folder, 1, {"id": "ort"})
    assert "variant id 'ort' is used 2 times" in verify_bundle(folder)
