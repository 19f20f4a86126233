"""What users get wrong: a message that names the place, a hint, the exit code, and nothing half-written."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from samples import CLASSES, Tiny, settings, shapes

from edgekd import cli

pytestmark = pytest.mark.slow  # each starts the command line

# What a run that failed may leave: its own files, each of them whole.
OWN = re.compile(
    r"\.lock|recipe\.toml|record\.json|1-teacher\.json|checkpoints|search\.jsonl|teacher-[0-9a-f]{12}\.onnx"
)


@dataclass
class Ended:
    code: int
    out: str
    err: str

    def says(self, code: int, *texts: str) -> None:
        assert self.code == code, self.err
        for text in texts:
            assert text in self.err
        assert "Traceback" not in self.err
        assert self.out == ""


class Terminal:
    """Runs the command line in this process; the run folder is `out`."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self.out, self._patch, self._capture = folder / "run", patch, capture

    def __call__(self, *arguments: object, command: str = "compress", out: bool = True) -> Ended:
        words = [str(argument) for argument in arguments] + (["--out", str(self.out)] if out else [])
        self._patch.setattr(sys, "argv", ["edgekd", command, *words])
        self._capture.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = self._capture.readouterr()
        assert isinstance(caught.value.code, int)
        if self.out.exists():
            left = [path.name for path in self.out.rglob("*") if not OWN.fullmatch(path.name)]
            assert not left, f"left behind: {left}"
            for path in self.out.glob("*.json"):
                json.loads(path.read_text())
        return Ended(caught.value.code, said.out, said.err)

    @property
    def nothing_was_started(self) -> bool:
        return not self.out.exists()


@pytest.fixture
def edgekd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny: Tiny
) -> Terminal:
    monkeypatch.chdir(tiny.folder)
    return Terminal(tmp_path, monkeypatch, capsys)


def folder_of_images(folder: Path, per_class: int = 6, classes: int = 4) -> Path:
    images, labels = shapes(per_class * 4, 4)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        if label < classes:
            path = folder / CLASSES[label] / f"{index:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return folder


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (["--target", "jetsn"], ["unknown target 'jetsn'", "did you mean 'jetson'?"]),
        (["--method", "dits"], ["unknown distillation method 'dits'", "did you mean 'dist'?"]),
        (["--method", "kd+dkdd"], ["unknown distillation method 'dkdd'", "did you mean 'dkd'?"]),
        (["--method", "KD"], ["unknown distillation method 'KD'", "did you mean 'kd'?"]),
        (["--method", "hints+fitnet"], ["names 'fitnet' more than once"]),
        (["--method", "kd", "--set", "distill.options.kd.weight=hot"], ["weight = 'hot': Expected `float`"]),
        (["--method", "kd", "--set", "distill.options.kd.temperature=0"], ["temperature = 0", "> 0.0"]),
        (["--method", "crd", "--set", "distill.options.crd.width=1.5"], ["width = 1.5: Expected `int`"]),
        (["--method", "dml"], ["blends images", "method dml cannot learn", "--set data.augment=crop"]),
        (
            ["--teacher", "t.onnx", "--method", "kd+at"],
            ["'at' needs the teacher's stages", "methods that fit: kd"],
        ),
        (["--set", "search.score=diswott"], ["unknown search score 'diswott'", "did you mean 'diswot'?"]),
        (["--set", "search.space=mobile"], ["unknown search space 'mobile'", "mobile-cnn"]),
        (["--set", "quantize.calibrator=mes"], ["unknown calibrator 'mes'", "did you mean 'mse'?"]),
        (["--set", "quantize.engine=nncf"], ["not of a student", "edgekd quantize RUN/5-export/float.onnx"]),
        (["--quantize", "int4"], ["'int4' is not one of"]),
        (["--mean", "a,b"], ["expected numbers such as 0.485,0.456,0.406"]),
        (["--epochs", "3"], ["No such option"]),
    ],
)
def test_an_unknown_name_is_refused_before_any_work(
    edgekd: Terminal, tiny: Tiny, arguments: list[str], texts: list[str]
) -> None:
    edgekd(*tiny.arguments(), *arguments).says(2, *texts)
    assert edgekd.nothing_was_started


# ---------------------------------------------------------------- recipes and cards


@pytest.mark.parametrize(
    ("text", "texts"),
    [
        ("target = ", ["r.toml", "Invalid value"]),
        ("[distill]\nepoch = 3", ["r.toml", "epoch"]),
        ("[distill]\nepochs = 0", ["r.toml", "distill.epochs"]),
        ('[distill]\nepochs = "three"', ["r.toml", "distill.epochs"]),
        ("[quantize]\nmode = 'int4'", ["r.toml", "quantize.mode"]),
    ],
)
def test_a_malformed_recipe_is_named_with_its_key(
    edgekd: Terminal, tmp_path: Path, text: str, texts: list[str]
) -> None:
    (tmp_path / "r.toml").write_text(text)
    edgekd("--recipe", tmp_path / "r.toml").says(10, "hint:", *texts)
    assert edgekd.nothing_was_started


def test_a_missing_recipe_is_named(edgekd: Terminal) -> None:
    edgekd("--recipe", "nowhere.toml").says(10, "nowhere.toml")


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("distill.epoch=3", "epoch"),
        ("distill.epochs", "expected KEY=VALUE"),
        ("distill.epochs=x", "distill.epochs"),
        ("target.id=x", "'target'"),
        ("nothing=1", "nothing"),
    ],
)
def test_a_wrong_setting_is_named(edgekd: Terminal, setting: str, text: str) -> None:
    edgekd("--target", "jetson", "--set", setting).says(10, text)
    assert edgekd.nothing_was_started


@pytest.mark.parametrize("text", ["schema = ", "schema = 1\nid = 'x'\n"])
def test_a_malformed_card_is_named(edgekd: Terminal, tmp_path: Path, text: str) -> None:
    (tmp_path / "card.toml").write_text(text)
    edgekd("--target", tmp_path / "card.toml").says(10, "card.toml")
    assert edgekd.nothing_was_started


# ---------------------------------------------------------------- data


def test_a_truncated_image_is_named(edgekd: Terminal, tiny: Tiny, tmp_path: Path) -> None:
    data = folder_of_images(tmp_path / "images")
    broken = data / "frame" / "001.png"
    broken.write_bytes(broken.read_bytes()[:60])
    edgekd("--teacher", "tiny_teacher:build", "--data", data).says(11, str(broken), "skip_bad=true")


def test_images_left_out_are_counted_and_an_impossible_budget_names_the_nearest(
    edgekd: Terminal, tiny: Tiny, tmp_path: Path
) -> None:
    """Two promises in one run, because the teacher is checked on the way."""
    data = folder_of_images(tmp_path / "images", 12)
    broken = data / "frame" / "001.png"
    broken.write_bytes(broken.read_bytes()[:60])
    words = ["--teacher", "tiny_teacher:build", "--weights", tiny.weights, "--data", data, "--skip-bad"]
    ended = edgekd("--target", "jetson", *words, *settings(), "--max-latency-ms", "1e-9")
    ended.says(14, "no student of", "nearest, as predicted: latency", "(limit 1e-09 ms)", "--max-latency")
    record = json.loads((edgekd.out / "record.json").read_text())
    assert [Path(name.split(":")[0]).name for name in record["metrics"]["data"]["skipped"]] == ["001.png"]
    assert record["metrics"]["data"]["train"] + record["metrics"]["data"]["validation"] < 48
    assert list(record["stages"]) == ["teacher"]


def test_a_folder_without_images_is_refused(edgekd: Terminal, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    edgekd("--teacher", "tiny_teacher:build", "--data", tmp_path / "empty").says(11, "empty")


def test_a_folder_of_one_class_is_refused(edgekd: Terminal, tmp_path: Path) -> None:
    data = folder_of_images(tmp_path / "images", classes=1)
    edgekd("--teacher", "tiny_teacher:build", "--data", data).says(11, "one class only: cross")


def test_missing_data_are_named(edgekd: Terminal) -> None:
    edgekd("--teacher", "tiny_teacher:build", "--data", "nowhere").says(11, "'nowhere' does not exist")


def test_a_mean_for_other_channels_is_refused(edgekd: Terminal, tiny: Tiny) -> None:
    edgekd(*tiny.arguments(), "--mean", "0.1,0.2,0.3").says(11, "teacher.mean has 3 values", "1 channels")


def test_a_deviation_of_zero_is_refused(edgekd: Terminal, tiny: Tiny) -> None:
    edgekd(*tiny.arguments(), "--std", "0").says(11, "teacher.std must be positive", "--std")


# ---------------------------------------------------------------- teachers


def test_a_teacher_with_other_classes_is_refused(edgekd: Terminal, tiny: Tiny) -> None:
    edgekd("--teacher", "tiny_teacher:five_classes", "--data", tiny.data).says(
        12, "has 5 outputs, the data has 4 classes"
    )


def test_a_teacher_at_chance_is_refused(edgekd: Terminal, tiny: Tiny) -> None:
    edgekd("--teacher", "tiny_teacher:build", "--data", tiny.data).says(12, "chance is 25.0 %", "--mean")


def test_a_pickle_with_code_is_refused(edgekd: Terminal, tiny: Tiny, tmp_path: Path) -> None:
    torch.save({"weight": np.float64(1.0), "code": Ended}, tmp_path / "code.pt")
    edgekd(
        "--teacher", "tiny_teacher:build", "--weights", tmp_path / "code.pt", "--data", tiny.data
    ).says(12, "more than tensors", "safetensors")  # fmt: skip


def test_a_missing_package_names_its_install_command(
    edgekd: Terminal, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    edgekd("--teacher", "timm:resnet18", "--data", tiny.data).says(13, "pip install 'edgekd[timm]'")


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("no_such_package:build", "no_such_package"),
        ("tiny_teacher:nothing_here", "nothing_here"),
        ("tiny_teacher:not_a_module", "expected torch.nn.Module"),
        ("nowhere.onnx", "no such file"),
    ],
)
def test_a_teacher_that_is_none_is_refused(edgekd: Terminal, tiny: Tiny, source: str, text: str) -> None:
    edgekd("--teacher", source, "--data", tiny.data).says(12, text)


def test_a_teacher_of_two_gibibytes_is_refused_without_reading_it(
    edgekd: Terminal, tiny: Tiny, tmp_path: Path
) -> None:
    path = tmp_path / "huge.onnx"
    path.touch()
    os.truncate(path, 2**31)
    edgekd("--teacher", path, "--data", tiny.data).says(12, "huge.onnx has 2147483648 bytes", "external data")


@pytest.mark.parametrize("header", [2**31, 2**62])
def test_weights_with_an_endless_header_are_refused(
    edgekd: Terminal, tiny: Tiny, tmp_path: Path, header: int
) -> None:
    path = tmp_path / "t.safetensors"
    path.write_bytes(struct.pack("<Q", header) + b"{}")
    edgekd(
        "--teacher", "tiny_teacher:build", "--weights", path, "--data", tiny.data
    ).says(12, "t.safetensors", "header too large", "damaged or not safetensors")  # fmt: skip


# ---------------------------------------------------------------- storage and the rest


def test_a_folder_that_cannot_be_written_is_named(edgekd: Terminal, tiny: Tiny) -> None:
    edgekd(*tiny.arguments(), "--out", "/dev/null/x", out=False).says(18, "/dev/null/x", "--out")


def test_an_interrupted_run_says_how_to_continue(
    edgekd: Terminal, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(bench: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgekd.stages.teacher.run", interrupted)
    edgekd(*tiny.arguments()).says(130, "the same command continues")


def test_an_error_of_edgekd_itself_is_not_a_failed_gate(
    edgekd: Terminal, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(bench: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("edgekd.stages.teacher.run", broken)
    ended = edgekd(*tiny.arguments())
    assert ended.code == 70
    assert "please report it" in ended.err


def test_without_the_packages_that_train_a_command_says_what_to_install() -> None:
    script = "import sys; sys.modules['torch'] = None; from edgekd.cli import main; main()"
    words = [sys.executable, "-c", script, "compress", "--target", "x86"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 13, done.stderr
    assert "needs the package 'torch', which is not installed" in done.stderr
    assert "hint: python -m pip install 'edgekd[all]'" in done.stderr
    assert "Traceback" not in done.stderr
