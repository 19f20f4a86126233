"""The runtime on a bundle: the same numbers as a plain session, the choice of variant, and clear refusals."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from sample_bundle import CLASSES, GREY, RGB, edit_manifest, raw_logits, sample_bundle, set_variant

from edgekd import runtime
from edgekd.backends.onnxruntime import OnnxRuntimeBackend
from edgekd.bundle import verify_bundle
from edgekd.runtime import BundleError, load, main
from edgekd.spec import Preprocessing

pytestmark = pytest.mark.backends
IMAGES = np.random.default_rng(2).integers(0, 256, (7, 8, 10, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_bundle(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    """A private copy that a test may damage."""
    return Path(shutil.copytree(pristine, tmp_path / "model.ekd"))


@pytest.mark.parametrize(("preprocessing", "images"), [(GREY, IMAGES[..., 0]), (RGB, IMAGES)])
@pytest.mark.parametrize("variant", ["ort", "ov"])
def test_predict_equals_own_preprocessing_and_a_plain_session(
    tmp_path: Path, preprocessing: Preprocessing, images: runtime.Pixels, variant: str
) -> None:
    folder = sample_bundle(tmp_path, preprocessing)
    pixels = images.reshape(7, 8, 10, -1).astype(np.float32) * np.float32(1 / 255)
    mean, std = (np.array(values, np.float32) for values in (preprocessing.mean, preprocessing.std))
    array = (pixels - mean) / std
    array = np.ascontiguousarray(array.transpose(0, 3, 1, 2))
    expected = raw_logits(tmp_path / "model.onnx", array)

    model = load(folder, variant=variant)
    np.testing.assert_array_equal(model.preprocess(images), array)
    np.testing.assert_allclose(model(array), expected, atol=1e-5)
    found = model.predict(images)
    powers = np.exp(expected - expected.max(1, keepdims=True))
    np.testing.assert_allclose(found.probabilities, powers / powers.sum(1, keepdims=True), atol=1e-6)
    assert found.indices.tolist() == expected.argmax(1).tolist()
    assert found.labels == [CLASSES[index] for index in found.indices]


def test_batches_do_not_change_the_answer(bundle: Path) -> None:
    model = load(bundle)
    whole = model.predict(IMAGES)
    for size in (1, 3, 100):
        np.testing.assert_allclose(
            model.predict(IMAGES, batch_size=size).probabilities, whole.probabilities, atol=1e-6
        )
    with pytest.raises(ValueError, match="batch_size"):
        model.predict(IMAGES, batch_size=0)


def test_images_of_different_sizes_are_answered_in_order(bundle: Path) -> None:
    model = load(bundle)
    images = [IMAGES[0], np.zeros((31, 5), np.uint8), IMAGES[1][:4]]
    one_by_one = [model.predict(image).probabilities[0] for image in images]
    np.testing.assert_allclose(model.predict(images).probabilities, one_by_one, atol=1e-6)


def test_no_images_give_no_predictions(bundle: Path) -> None:
    found = load(bundle).predict([])
    assert found.labels == [] and found.probabilities.shape == (0, 3)


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 1, 8, 10)), np.zeros((1, 8, 10), np.float32), np.zeros((2, 3, 8, 10), np.float32), [1.0]],
)
def test_a_call_wants_preprocessed_float32(bundle: Path, array: Any) -> None:
    with pytest.raises(ValueError, match=r"expected a float32 array"):
        load(bundle)(array)


def test_a_good_call_does_not_open_the_door_for_a_bad_one(bundle: Path) -> None:
    model, good = load(bundle), np.zeros((2, 1, 8, 10), np.float32)
    first = model(good)
    for bad in (good.astype(np.float64), good.astype(">f4"), good[:, :, :, :9], good[0], good.tolist()):
        with pytest.raises(ValueError, match=r"expected a float32 array"):
            model(bad)  # type: ignore[arg-type] # that is the point
    turned = np.asfortranarray(np.random.default_rng(0).normal(size=good.shape).astype(np.float32))
    np.testing.assert_array_equal(model(turned), model(turned.copy(order="C")))
    assert model(good[:1]).shape == (1, 3)
    np.testing.assert_array_equal(model(good), first)


def flip(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def set_key(key: str, value: object) -> Callable[[Path], None]:
    return lambda folder: edit_manifest(folder, lambda manifest: manifest.__setitem__(key, value))


def set_file(name: str) -> Callable[[Path], None]:
    return lambda folder: set_variant(folder, 0, {"file": name})


def link_out(folder: Path) -> None:
    (folder / "models/ort.onnx").rename(folder.parent / "outside.onnx")
    (folder / "models/ort.onnx").symlink_to(folder.parent / "outside.onnx")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "altered model": (lambda folder: flip(folder / "models/ort.onnx"), r"models/ort\.onnx: altered"),
    "missing model": (
        lambda folder: (folder / "models/ort.onnx").unlink(),
        r"models/ort\.onnx: No such file",
    ),
    "path escape": (set_file("../outside.onnx"), r"'\.\./outside\.onnx' leads out of the bundle"),
    "backslash escape": (set_file("models\\..\\..\\outside.onnx"), "leads out of the bundle"),
    "absolute path": (set_file("/etc/hostname"), "'/etc/hostname' is not a relative path"),
    "drive letter": (set_file("C:model.onnx"), "is not a relative path"),
    "null byte": (set_file("models/\0.onnx"), "is not a relative path"),
    "empty path": (set_file(""), "is not a relative path"),
    "link out": (link_out, "leads out of the bundle"),
    "other version": (set_key("version", 2), r"format \('edgekd-bundle', 2\), not"),
    "version is true": (set_key("version", True), "key 'version': expected int"),
    "other format": (set_key("format", "zip"), "format .*'zip'.*, not"),
    "truncated JSON": (lambda folder: truncate(folder / "manifest.json"), "not a readable JSON"),
    "deep JSON": (lambda folder: (folder / "manifest.json").write_text("[" * 100_000), "not a readable JSON"),
    "JSON list": (lambda folder: (folder / "manifest.json").write_text("[]"), r"format \('', 0\), not"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "No such file"),
    "no variants": (set_key("variants", []), "no variant of this bundle runs here"),
    "variant is text": (set_key("variants", ["ort"]), "key 'id': expected str, got None"),
    "labels missing": (set_key("labels", None), "key 'labels': expected list, got None"),
    "two inputs": (lambda f: edit_manifest(f, lambda m: m["inputs"].append(m["inputs"][0])), "one input"),
    "huge model": (
        lambda folder: os.truncate(folder / "models/ort.onnx", 2**31),  # sparse
        r"'models/ort\.onnx' has 2 GiB or more",
    ),
    "huge manifest": (
        lambda folder: os.truncate(folder / "manifest.json", 2**31),
        "not a readable JSON",
    ),
    "zero std": (
        lambda f: edit_manifest(f, lambda m: m["inputs"][0]["preprocess"].update(std=[0.0])),
        "key 'preprocess': values that cannot be used",
    ),
    "mean of another length": (
        lambda f: edit_manifest(f, lambda m: m["inputs"][0]["preprocess"].update(mean=[0.0, 1.0])),
        "key 'preprocess': values that cannot be used",
    ),
    "endless resize": (
        lambda f: edit_manifest(f, lambda m: m["inputs"][0]["preprocess"].update(resize=[10**400, 8])),
        "key 'preprocess': values that cannot be used",
    ),
    "resize is text": (
        lambda f: edit_manifest(f, lambda m: m["inputs"][0]["preprocess"].update(resize=["8", "10"])),
        "key 'preprocess': values that cannot be used",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_with_its_own_words(bundle: Path, name: str) -> None:
    damage, words = DAMAGE[name]
    damage(bundle)
    with pytest.raises(BundleError, match=words):
        load(bundle)


def test_an_unknown_variant_is_refused_with_those_that_exist(bundle: Path) -> None:
    with pytest.raises(BundleError, match="unknown variant 'tflite'; this bundle holds: ort, ov"):
        load(bundle, variant="tflite")


@pytest.mark.parametrize(("index", "name", "engine"), [(0, "ort", "onnxruntime"), (1, "ov", "openvino")])
def test_a_graph_that_the_engine_refuses(bundle: Path, index: int, name: str, engine: str) -> None:
    (bundle / f"models/{name}.onnx").write_bytes(b"not a graph")
    set_variant(bundle, index, {"sha256": hashlib.sha256(b"not a graph").hexdigest()})
    with pytest.raises(BundleError, match=f"{engine} refused the variant '{name}'"):
        load(bundle, variant=name)


ON_DEVICE = {"runtime": ["tensorrt"], "build": "on-device"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"arch": ["riscv64"]}, f"made for riscv64, this is {runtime.machine()}"),
        ({"requires_cpu_flags": ["avx9999"]}, "the CPU does not report avx9999"),
        (
            {"min_version": {"onnxruntime": "99.1"}},
            f"onnxruntime {onnxruntime.__version__} is older than 99.1",
        ),
        ({"runtime": ["onnxruntime-web"]}, "runtime 'onnxruntime-web' is not installed"),
        ({"runtime": ["os"]}, "runtime 'os' is not installed"),
        ({"runtime": []}, "no runtime is named"),
        ({"ep": [["NoSuchProvider", {}]]}, "this onnxruntime has no NoSuchProvider"),
        ({"ep": [1]}, "manifest.json: key 'ep'"),
        (ON_DEVICE, "runtime 'tensorrt' is not installed"),
    ],
)
def test_a_variant_that_cannot_run_gives_way_to_the_next(
    bundle: Path, changes: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorrt" else installed(name)
    )
    set_variant(bundle, 0, changes)
    model = load(bundle)
    assert model.variant == "ov"
    assert list(model.rejected) == ["ort"] and model.rejected["ort"].startswith(reason)


@pytest.fixture
def on_device(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Its first variant is TensorRT's, whose package seems to be installed beside a GPU's node."""
    set_variant(bundle, 0, ON_DEVICE)
    installed = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: installed("json" if name == "tensorrt" else name)
    )
    monkeypatch.setattr(runtime, "_GPU_NODES", (os.devnull,))
    return bundle


def test_tensorrt_says_why_even_when_it_is_installed(
    on_device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_GPU_NODES", ("/dev/no-such-node",))
    assert load(on_device).rejected["ort"] == "no NVIDIA GPU was found"


def test_tensorrt_beside_the_file_alone_asks_for_the_package(
    on_device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeming = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "edgekd" else seeming(name))
    assert "the package edgekd builds its engine" in load(on_device).rejected["ort"]


def test_tensorrts_engine_is_built_from_the_variant_and_gives_its_logits(
    on_device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU is here: ONNX Runtime stands in for the engine; what it reads and gives is real."""

    def build(model: bytes) -> Any:
        path = on_device.parent / "given.onnx"
        path.write_bytes(model)
        return OnnxRuntimeBackend().open(path)

    monkeypatch.setattr(runtime, "_installed_version", lambda name: "10.3.0")
    monkeypatch.setitem(sys.modules, "tensorrt", sys.modules["json"])
    monkeypatch.setattr("edgekd.backends.tensorrt.from_bytes", build)
    model = load(on_device)
    assert (model.runtime, model.variant) == ("tensorrt", "ort")
    pixels = model.preprocess(IMAGES)
    np.testing.assert_allclose(model(pixels), load(on_device, variant="ov")(pixels), atol=1e-4)


def test_an_engine_that_tensorrt_does_not_build_is_an_error_of_the_bundle(
    on_device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "_installed_version", lambda name: "10.3.0")
    monkeypatch.setitem(sys.modules, "tensorrt", sys.modules["json"])
    with pytest.raises(BundleError, match="tensorrt refused the variant 'ort'"):
        load(on_device)


def test_the_first_variant_that_runs_is_used(bundle: Path) -> None:
    model = load(bundle)
    assert (model.variant, model.classes) == ("ort", CLASSES)
    assert model.rejected == {"ov": "not tried, 'ort' is used"}


def test_a_variant_may_name_several_runtimes(bundle: Path) -> None:
    set_variant(bundle, 0, {"runtime": ["onnxruntime-web", "openvino"]})
    assert load(bundle).variant == "ort"


def test_conditions_that_are_met_do_not_reject(bundle: Path) -> None:
    flags = sorted(runtime.cpu_flags(Path("/proc/cpuinfo").read_text()))[:3]
    met = {"arch": [runtime.machine()], "requires_cpu_flags": flags, "min_version": {"onnxruntime": "1.2"}}
    set_variant(bundle, 0, met)
    assert load(bundle).variant == "ort"


def test_asking_for_a_variant_skips_conditions(bundle: Path) -> None:
    unmet = {"arch": ["riscv64"], "requires_cpu_flags": ["x"], "min_version": {"onnxruntime": "99"}}
    set_variant(bundle, 0, unmet)
    assert load(bundle, variant="ort").selftest()["ok"]


def test_when_nothing_runs_every_reason_is_named(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "ARM64")
    for index in (0, 1):
        set_variant(bundle, index, {"arch": ["x86_64"]})
    with pytest.raises(BundleError, match=r"ort: made for x86_64, this is aarch64; ov: made for x86_64"):
        load(bundle)


@pytest.mark.parametrize("asked", [None, 1, 10_000])
def test_threads_never_exceed_the_usable_cores(
    bundle: Path, asked: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    usual = runtime._OPEN["onnxruntime"]

    def spy(data: bytes, variant: object, threads: int, names: list[str]) -> Any:
        seen.append(threads)
        return usual(data, variant, threads, names)

    monkeypatch.setitem(runtime._OPEN, "onnxruntime", spy)
    set_variant(bundle, 0, {"session": {"threads": 64, "config": {"session.intra_op.allow_spinning": "0"}}})
    load(bundle, threads=asked)
    assert seen == [min(asked or 64, len(os.sched_getaffinity(0)))]


@pytest.mark.parametrize("variant", ["ort", "ov"])
def test_selftest_of_a_sound_bundle(bundle: Path, variant: str) -> None:
    result = load(bundle, variant=variant, selftest=True).selftest()
    assert set(result) == {"variant", "machine", "max_abs_diff", "ok", "start_s", "rss_mib"}
    assert result["ok"] is True and result["variant"] == variant and result["max_abs_diff"] < 1e-4
    assert result["start_s"] > 0 and result["rss_mib"] > 1


def shift_golden(folder: Path, by: float) -> None:
    """Golden logits that this installation does not reproduce, with a manifest that agrees with them."""
    path = folder / "golden/ort.npy"
    np.save(path, np.load(path) + np.float32(by))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_manifest(folder, lambda manifest: manifest["golden"]["sha256"].update(ort=digest))


@pytest.mark.parametrize("by", [0.5, np.nan])
def test_selftest_fails_beyond_the_tolerance(
    bundle: Path, by: float, capsys: pytest.CaptureFixture[str]
) -> None:
    shift_golden(bundle, by)
    with pytest.raises(BundleError, match="the self-test failed"):
        load(bundle, selftest=True)
    assert main([str(bundle), "selftest"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


@pytest.mark.parametrize("name", ["golden/input.npy", "golden/ort.npy", "models/ort.onnx"])
def test_the_command_leaves_with_2_when_a_file_is_altered(
    bundle: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(bundle / name)
    assert main([str(bundle), "selftest"]) == 2
    result = json.loads(capsys.readouterr().out)
    assert result["ok"] is False and f"{name}: altered" in result["error"]


def test_the_command_prints_one_line_and_leaves_with_0(
    bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(bundle), "selftest", "ov"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and json.loads(out)["variant"] == "ov"


@pytest.mark.parametrize("data", [b"", b"not an array", None])
def test_golden_values_that_cannot_be_used_leave_with_2(
    bundle: Path, data: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = bundle / "golden/input.npy"
    if data is None:
        np.save(path, np.zeros((2, 3), np.float32))
    else:
        path.write_bytes(data)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_manifest(bundle, lambda manifest: manifest["golden"].update(input_sha256=digest))
    assert main([str(bundle), "selftest"]) == 2
    assert "golden values that cannot be used" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize("words", [[], ["x"], ["x", "run"], ["x", "selftest", "ort", "more"]])
def test_the_command_explains_its_usage(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "usage" in capsys.readouterr().err


def test_an_answer_that_is_not_finite_is_an_error(bundle: Path) -> None:
    model = load(bundle)
    model._run = lambda array: np.full((len(array), 3), np.nan, np.float32)
    with pytest.raises(BundleError, match="not finite"):
        model.predict(IMAGES)


@pytest.mark.parametrize("labels", [["bag"], ["a", "b", "c", "d"]])
def test_labels_of_another_model_are_refused_at_the_first_call(bundle: Path, labels: list[str]) -> None:
    edit_manifest(bundle, lambda manifest: manifest.update(labels=labels))
    with pytest.raises(BundleError, match=r"labels are of another model: 'ort' gave \(1, 3\)"):
        load(bundle).predict(np.zeros((8, 10), np.uint8))


@pytest.mark.parametrize("variant", ["ort", "ov"])
def test_an_input_size_of_another_model_is_refused(bundle: Path, variant: str) -> None:
    fixed = onnx.load(bundle / "models" / f"{variant}.onnx")
    for dim, size in zip(fixed.graph.input[0].type.tensor_type.shape.dim, (1, 1, 8, 10), strict=True):
        dim.dim_value = size
    data = fixed.SerializeToString()
    (bundle / "models" / f"{variant}.onnx").write_bytes(data)
    index = ["ort", "ov"].index(variant)
    set_variant(bundle, index, {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)})
    edit_manifest(bundle, lambda manifest: manifest["inputs"][0]["preprocess"].update(resize=[9, 9]))
    with pytest.raises(BundleError, match=variant):
        load(bundle, variant=variant, selftest=False).predict(np.zeros((8, 10), np.uint8))


@pytest.mark.parametrize("count", [2**40, 5])
def test_golden_values_with_a_header_that_lies_are_refused(bundle: Path, count: int) -> None:
    """More images than the file holds: one number of the size of the disk, one just too many."""
    header = io.BytesIO()
    told = {"descr": "<f4", "fortran_order": False, "shape": (count, 1, 8, 10)}
    np.lib.format.write_array_header_1_0(header, told)
    data = header.getvalue() + bytes(4 * 4 * 80)
    (bundle / "golden" / "input.npy").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    edit_manifest(bundle, lambda manifest: manifest["golden"].update(input_sha256=digest))
    with pytest.raises(BundleError, match="golden values that cannot be used"):
        load(bundle).selftest()
    assert any("is not a NumPy array" in problem for problem in verify_bundle(bundle))
