"""Teachers: every form that a user can name, and every way in which it can be wrong."""

from __future__ import annotations

import builtins
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import CLASSES, SIZE, Tiny, shapes, train_teacher
from torch import Tensor

from edgekd import export
from edgekd.errors import EdgekdError, MissingExtraError, TeacherError
from edgekd.quantize.capture import capture
from edgekd.recipe import TeacherRecipe
from edgekd.spec import ModelSpec, Preprocessing
from edgekd.stages.ready import ready_teacher
from edgekd.teacher import LoadedTeacher, Teacher, check_teacher, load_teacher, use_fastest_runtime

pytestmark = pytest.mark.slow  # exports networks

SPEC = ModelSpec(Preprocessing(SIZE, SIZE, "grey", (0.0,), (1.0,)), CLASSES)


def load(source: str, weights: Path | str = "") -> LoadedTeacher:
    return load_teacher(TeacherRecipe(source=source, weights=str(weights)))


def refused(source: str, *expected: str, weights: Path | str = "") -> EdgekdError:
    with pytest.raises(EdgekdError) as caught:
        load(source, weights)
    for text in expected:
        assert text in caught.value.message + " | " + caught.value.hint
    return caught.value


def inputs(count: int = 40) -> Tensor:
    return torch.from_numpy(shapes(count, 1)[0])[:, None].float() / 255


def labels(count: int = 40) -> np.ndarray:
    return shapes(count, 1)[1]


def teacher_of(loaded: LoadedTeacher, spec: ModelSpec = SPEC) -> Teacher:
    return Teacher("tiny", spec, loaded.sha256, loaded.size_mib, loaded.model, loaded.onnx)


# ---------------------------------------------------------------- factories and weights


def test_a_factory_gives_a_module_in_evaluation_mode_with_its_weights(tiny: Tiny) -> None:
    loaded = load("tiny_teacher:build", tiny.weights)
    assert loaded.model is not None
    assert not loaded.model.training
    for name, value in load_file(tiny.weights).items():
        assert torch.equal(loaded.model.state_dict()[name], value)
    assert loaded.size_mib == pytest.approx(4 * sum(p.numel() for p in loaded.model.parameters()) / 2**20)


def test_a_class_without_arguments_is_a_factory(tiny: Tiny) -> None:
    assert type(load("tiny_teacher:Net").model).__name__ == "Net"


def test_the_digest_follows_the_weights(tiny: Tiny) -> None:
    first, again = load("tiny_teacher:build", tiny.weights), load("tiny_teacher:build", tiny.weights)
    assert first.sha256 == again.sha256
    assert first.sha256 != load("tiny_teacher:build").sha256


@pytest.mark.parametrize("wrap", [None, "state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_plain_state_dicts_of_torch_are_read(
    tiny: Tiny, wrap: str | None, prefix: str, tmp_path: Path
) -> None:
    state = {prefix + name: value for name, value in load_file(tiny.weights).items()}
    torch.save(state if wrap is None else {wrap: state, "epoch": 3}, tmp_path / "t.pt")
    loaded = load("tiny_teacher:build", tmp_path / "t.pt")
    assert loaded.sha256 == load("tiny_teacher:build", tiny.weights).sha256


def test_weights_of_half_precision_are_widened(tiny: Tiny, tmp_path: Path) -> None:
    half = {n: v.half() if v.is_floating_point() else v for n, v in load_file(tiny.weights).items()}
    save_file(half, tmp_path / "half.safetensors")
    loaded = load("tiny_teacher:build", tmp_path / "half.safetensors")
    assert loaded.model is not None
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}


def test_weights_of_another_shape_are_refused(tiny: Tiny) -> None:
    error = refused("tiny_teacher:five_classes", str(tiny.weights), "do not fit", weights=tiny.weights)
    assert "classifier.weight" in error.message
    assert error.exit_code == 12


def test_missing_weights_are_named(tiny: Tiny) -> None:
    refused("tiny_teacher:build", "nowhere.safetensors: no such file", weights="nowhere.safetensors")


class _Code:
    """A pickle of this would run code when it is read."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (builtins.print, ("code was run",))


def test_a_pickle_with_code_is_refused_and_not_run(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"weight": torch.zeros(1), "extra": _Code()}, tmp_path / "code.pt")
    refused("tiny_teacher:build", "more than tensors", "safetensors", weights=tmp_path / "code.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(_Code(), protocol=2))
    refused("tiny_teacher:build", "plain.pt", weights=tmp_path / "plain.pt")
    assert "code was run" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("damage", [b"", b"no weights", b"junk\n", b"\xff" * 64])
def test_damaged_weights_are_refused(tiny: Tiny, name: str, damage: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(damage)
    assert refused("tiny_teacher:build", name, weights=tmp_path / name).exit_code == 12


def test_a_state_dict_of_other_things_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    torch.save([1, 2, 3], tmp_path / "list.pt")
    refused("tiny_teacher:build", "expected a state dict of tensors, got list", weights=tmp_path / "list.pt")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("tiny_teacher:not_a_module", "returned dict, expected torch.nn.Module"),
        ("tiny_teacher:needs_an_argument", "called without arguments"),
        ("tiny_teacher:nothing_here", "nothing_here"),
        ("no_such_module_here:build", "run from the folder that holds the package"),
        ("resnet50", "none of the known forms"),
        ("nowhere.onnx", "no such file"),
    ],
)
def test_a_source_that_is_no_teacher_is_refused(tiny: Tiny, source: str, expected: str) -> None:
    error = refused(source, expected)
    assert isinstance(error, TeacherError)
    assert error.exit_code == 12


def test_the_demo_teacher_states_its_normalisation() -> None:
    loaded = load("demo")
    assert (loaded.mean, loaded.std) == ((0.2860,), (0.3530,))
    assert (loaded.image_size, loaded.channels) == ((28, 28), 1)


# ---------------------------------------------------------------- optional packages


@pytest.fixture
def without_packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("timm", "torchvision", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    yield


@pytest.mark.parametrize("package", ["timm", "torchvision", "transformers"])
def test_a_missing_package_names_the_command_that_installs_it(package: str, without_packages: None) -> None:
    error = refused(f"{package}:some_model", f"needs the package '{package}'")
    assert isinstance(error, MissingExtraError)
    assert error.hint == f"python -m pip install 'edgekd[{package}]'"
    assert error.exit_code == 13


# ---------------------------------------------------------------- ONNX


@pytest.fixture(scope="module")
def black_box(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = load("tiny_teacher:build", tiny.weights).model
    assert model is not None
    path = tmp_path_factory.mktemp("onnx") / "teacher.onnx"
    export.save(export.to_onnx(capture(model, SPEC.input_shape), SPEC), path)
    return path


def test_an_onnx_file_is_a_black_box_with_the_logits_of_its_model(tiny: Tiny, black_box: Path) -> None:
    loaded = load(str(black_box))
    assert loaded.model is None
    assert (loaded.image_size, loaded.channels) == ((SIZE, SIZE), 1)
    teacher = teacher_of(loaded)
    use_fastest_runtime(teacher, inputs(), 1)
    exact = teacher_of(load("tiny_teacher:build", tiny.weights))
    found = teacher.outputs(inputs())
    assert found.embedding is None
    assert found.features is None
    assert (found.logits.argmax(1) == exact.outputs(inputs()).logits.argmax(1)).all()
    assert teacher.parameters is None
    assert teacher.macs == exact.macs


def test_the_runtime_of_a_teacher_gives_the_logits_of_torch(tiny: Tiny, black_box: Path) -> None:
    teacher = teacher_of(load("tiny_teacher:build", tiny.weights))
    teacher.onnx = black_box
    exact = teacher.logits(inputs())
    use_fastest_runtime(teacher, inputs(), 1)
    assert teacher.runtime != "torch f32"
    difference = float((teacher.logits(inputs()) - exact).abs().max())
    assert difference <= 0.1 * float(exact.max() - exact.min())
    assert teacher.logits_max_abs_diff == pytest.approx(difference, rel=1e-3)


def test_a_runtime_that_computes_something_else_is_not_used(tiny: Tiny, black_box: Path) -> None:
    teacher = teacher_of(load("tiny_teacher:build"))  # fresh weights, and the file of the trained ones
    teacher.onnx = black_box
    use_fastest_runtime(teacher, inputs(), 1)
    assert teacher.runtime == "torch f32"


@pytest.mark.parametrize("batch", [1, 7])
def test_a_file_with_a_fixed_batch_gets_that_many_images(black_box: Path, batch: int, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(black_box)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    export.save(model, tmp_path / "fixed.onnx")
    loaded = load(str(tmp_path / "fixed.onnx"))
    assert loaded.batch == batch
    found = []
    for each in (loaded, load(str(black_box))):
        teacher = teacher_of(each)
        teacher.batch = each.batch
        use_fastest_runtime(teacher, inputs(), 1)
        found.append(teacher.logits(inputs(10)))
    assert found[0].shape == (10, 4)
    torch.testing.assert_close(found[0], found[1], rtol=0.05, atol=0.1)


def test_a_file_for_images_of_another_size_says_which(black_box: Path, tmp_path: Path) -> None:
    wide = ModelSpec(Preprocessing(SIZE, SIZE + 4, "grey", (0.0,), (1.0,)), CLASSES)
    with pytest.raises(TeacherError) as caught:
        ready_teacher(
            load(str(black_box)), "box", wide, folder=tmp_path, inputs=inputs(2), threads=1, say=print
        )
    told = (
        f"takes images of 1 x {SIZE} x {SIZE} (channels, height, width), those of the data are 1 x {SIZE} x"
    )
    assert told in caught.value.message
    assert "leave --image-size out" in caught.value.hint


@pytest.mark.parametrize("damage", [b"", b"no model", b"\x08\x01" * 50])
def test_a_file_that_is_no_onnx_model_is_refused(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "t.onnx").write_bytes(damage)
    assert refused(str(tmp_path / "t.onnx"), "t.onnx").exit_code == 12


# ---------------------------------------------------------------- does it know the task?


def test_a_trained_teacher_passes_with_its_accuracy(tiny: Tiny) -> None:
    teacher = teacher_of(load("tiny_teacher:build", tiny.weights))
    assert check_teacher(teacher, teacher.outputs(inputs()).logits, labels()) > 0.9


def test_a_teacher_at_chance_is_refused(tiny: Tiny) -> None:
    teacher = teacher_of(load("tiny_teacher:build"))
    with pytest.raises(TeacherError) as caught:
        check_teacher(teacher, torch.zeros(40, 4), labels())
    assert "gets 25.0 % of 40 validation images right; chance is 25.0 %" in caught.value.message
    assert "--mean" in caught.value.hint
    assert caught.value.exit_code == 12


def test_the_largest_class_is_chance() -> None:
    teacher = Teacher("constant", SPEC, "", 0.0, None)
    with pytest.raises(TeacherError, match=r"chance is 90\.0 %"):
        check_teacher(teacher, torch.eye(4)[[0] * 40], np.array([0] * 36 + [1, 2, 3, 1]))


def test_a_teacher_with_other_classes_is_refused(tiny: Tiny) -> None:
    teacher = teacher_of(load("tiny_teacher:five_classes"))
    with pytest.raises(TeacherError) as caught:
        check_teacher(teacher, torch.zeros(40, 5), labels())
    assert "has 5 outputs, the data has 4 classes: cross, frame" in caught.value.message


def test_a_teacher_with_features_shows_them(tiny: Tiny) -> None:
    teacher = teacher_of(load("tiny_teacher:build", tiny.weights))
    found = teacher.outputs(inputs(3))
    assert found.features is not None
    assert found.embedding is not None
    assert found.features.shape == (3, 32, 4, 4)
    assert found.embedding.shape == (3, 32)
    assert not found.logits.requires_grad


def test_train_teacher_is_reproducible(tiny: Tiny) -> None:
    """The tiny task of these tests is the same in every run."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        model = load("tiny_teacher:build").model
        assert model is not None
        made.append(train_teacher(model.train(), steps=3).state_dict())
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
