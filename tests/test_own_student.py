"""A student of the user's own, and stages that start from files alone."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import Tiny, settings

from edgekd import cli
from edgekd.bundle import verify_bundle
from edgekd.errors import EXIT_GATE, StorageError
from edgekd.stages import quantize

STUDENTS = '''
"""Students of a user: written into a folder and named as `tiny_students:small`."""

import torch
from torch import nn
from tiny_teacher import Net


def small():
    return Net(width=8)


def five_classes():
    return Net(5, 8)


def raising():
    raise ValueError("not today")


def three_channels():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))


def large_images():
    return nn.Sequential(nn.Conv2d(1, 4, 17), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Net(width=8)

    def forward(self, x):
        return self.net(x), x


class Branching(Pair):
    def forward(self, x):
        return self.net(x) if x.sum() > 0 else self.net(-x)


class Squeezed(nn.Module):
    """Squeeze and excitation, a concatenation, SiLU; weights that two names share; no plain last layer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Hardsigmoid())
        self.body = nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.BatchNorm2d(16), nn.Hardswish())
        self.drop = nn.Dropout(0.1)
        self.head = nn.Conv2d(16, 4, 1)
        self.same_head = self.head

    def forward(self, x):
        x = self.stem(x)
        x = self.body(torch.cat([x, x * self.gate(x)], 1))
        return self.head(self.drop(x)).mean((2, 3))


def not_a_module():
    return 3
'''


class Terminal:
    """The command line in this process, with the short recipe."""

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capture = patch, capture
        self.err = ""

    def __call__(self, command: str, out: Path, *arguments: object) -> dict[str, Any]:
        """The record of a command that did its work."""
        assert self.code(command, out, *arguments) in EXIT_GATE.values(), self.err
        record: dict[str, Any] = json.loads((out / "record.json").read_text())
        return record

    def code(self, command: str, out: Path, *arguments: object) -> int:
        words = [command, *settings("distill.epochs=2"), *map(str, arguments), "--out", str(out)]
        self._patch.setattr(sys, "argv", ["edgekd", *words])
        self._capture.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as left:
            assert isinstance(left.code, int)
            code = left.code
        self.err = self._capture.readouterr().err
        assert "Traceback" not in self.err
        return code


@pytest.fixture
def edgekd(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    monkeypatch.chdir(tiny.folder)
    (tiny.folder / "tiny_students.py").write_text(STUDENTS)
    return Terminal(monkeypatch, capsys)


def worked(record: dict[str, Any]) -> list[str]:
    return [name for name, stage in record["stages"].items() if not stage["resumed"]]


# ---------------------------------------------------------------- a factory


def test_a_student_of_a_factory_becomes_a_bundle(edgekd: Terminal, tiny: Tiny, tmp_path: Path) -> None:
    words = ("--target", "x86", "--student", "tiny_students:small", *tiny.arguments())
    record = edgekd("compress", tmp_path, *words)
    assert "given, not searched" in edgekd.err
    search, student = record["metrics"]["search"], record["metrics"]["student_float"]
    assert (search["candidates"], search["chosen"], search["evaluated"]) == ([], None, 0)
    assert search["given"]["source"] == "tiny_students:small"
    assert search["given"]["parameters"] == student["parameters"] > 0
    assert search["given"]["macs"] == student["macs"] > 0
    assert search["given"]["latency_ms"] > 0
    assert json.loads((tmp_path / "2-student.json").read_text())["factory"] == "tiny_students:small"
    assert student["architecture"][0] == "conv 3x3, 1 to 8 channels"
    for row in record["metrics"]["variants"]:
        assert row["top1_agreement"] is None or row["top1_agreement"] > 0.9
    assert verify_bundle(Path(record["bundle"])) == []
    page = (tmp_path / "report.html").read_text()
    assert "given, not searched: tiny_students:small" in page
    assert "latency of the given student" in page
    assert "Candidates of the search" not in page


def test_a_student_of_unusual_layers_is_quantized_and_exported(
    edgekd: Terminal, tiny: Tiny, tmp_path: Path
) -> None:
    words = ("--target", "jetson", "--student", "tiny_students:Squeezed", *tiny.arguments(),
             "--set", "distill.epochs=16")  # fmt: skip
    record = edgekd("export", tmp_path, *words)
    assert set(record["metrics"]["export"]) == {"float.onnx", "int8.onnx", "uint8.onnx", "openvino.onnx"}


@pytest.mark.parametrize(
    ("student", "code", "texts"),
    [
        ("tiny_students:five_classes", 21, ["shape (2, 5)", "expected logits of shape (2, 4)", "4 outputs"]),
        ("tiny_students:three_channels", 21, ["refuses float32 images of shape (2, 1, 16, 16)"]),
        ("tiny_students:large_images", 21, ["refuses float32 images", "--image-size"]),
        ("tiny_students:Pair", 21, ["returns tuple", "logits alone"]),
        ("tiny_students:Branching", 19, ["cannot be traced"]),
        ("tiny_students:not_a_module", 21, ["student factory", "expected torch.nn.Module"]),
        ("tiny_students:raising", 21, ["raised ValueError: not today (", "tiny_students.py, line"]),
        ("tiny_students:nothing", 21, ["student 'tiny_students:nothing'"]),
        ("no_such_package:build", 21, ["no_such_package", "run from the folder"]),
        ("resnet", 21, ["none of the known forms", "package.module:factory"]),
        ("nowhere.json", 21, ["nowhere.json"]),
    ],
)
def test_a_student_that_does_not_fit_is_refused_before_any_training(
    edgekd: Terminal, tiny: Tiny, tmp_path: Path, student: str, code: int, texts: list[str]
) -> None:
    words = ("--target", "jetson", "--student", student, *tiny.arguments())
    assert edgekd.code("distill", tmp_path / "run", *words) == code, edgekd.err
    for text in (*texts, "hint:" if "nothing" not in student and code != 21 else ""):
        assert text in edgekd.err
    assert not (tmp_path / "run" / "2-student.json").exists()


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"space": "mobile-cnn"}', '{"space": "none", "genome": [1]}', '{"genome": "x"}',
     '{"space": "mobile-cnn", "genome": [1, 2]}', '{"space": "mobile-cnn", "genome": [9], "factory": "a:b"}'],
)  # fmt: skip
def test_a_malformed_student_file_is_named(
    edgekd: Terminal, tiny: Tiny, tmp_path: Path, content: str
) -> None:
    (tmp_path / "s.json").write_text(content)
    words = ("--target", "jetson", "--student", tmp_path / "s.json", *tiny.arguments())
    assert edgekd.code("search", tmp_path / "run", *words) == 21
    assert "s.json" in edgekd.err


# ---------------------------------------------------------------- from files alone


def test_each_stage_runs_from_files_alone(edgekd: Terminal, tiny: Tiny, tmp_path: Path) -> None:
    """A searched and distilled student moves by its two files, even to another target, and is not trained."""
    words = ("--target", "jetson", *tiny.arguments())
    first = edgekd("distill", tmp_path / "first", *words)
    for name in ("2-student.json", "3-distilled.safetensors"):
        (tmp_path / name).write_bytes((tmp_path / "first" / name).read_bytes())
    state = load_file(tmp_path / "3-distilled.safetensors")
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    files = ("--student", tmp_path / "2-student.json", "--student-weights", tmp_path / "w.pt")
    second = edgekd(
        "export", tmp_path / "second", "--target", "rpi5", "--quantize", "ptq", *files, *words[2:]
    )
    assert "weights given, not trained" in edgekd.err
    assert list(second["stages"]) == ["teacher", "search", "distill", "quantize", "export"]
    metrics = second["metrics"]
    assert metrics["student_float"] == first["metrics"]["student_float"]
    assert metrics["distill"]["history"] == []
    assert metrics["distill"]["method"] is None
    assert len(metrics["distill"]["weights"]["sha256"]) == 64
    kept = load_file(tmp_path / "second" / "3-distilled.safetensors")
    assert kept.keys() == state.keys()
    assert all(torch.equal(kept[name], state[name]) for name in state)
    genomes = [json.loads((tmp_path / run / "2-student.json").read_text()) for run in ("first", "second")]
    for key in ("space", "genome", "channel_multiple", "kernels", "architecture"):
        assert genomes[0][key] == genomes[1][key]
    page = (tmp_path / "second" / "report.html").read_text()
    assert "given, not trained" in page


def test_changed_weights_run_again_and_unchanged_ones_do_not(
    edgekd: Terminal, tiny: Tiny, tmp_path: Path
) -> None:
    module = tiny.folder / "changing_student.py"
    module.write_text("from tiny_teacher import Net\n\ndef build():\n    return Net(width=8)\n")
    words = ("--target", "jetson", "--student", "changing_student:build", *tiny.arguments())
    edgekd("distill", tmp_path / "run", *words)
    path = tmp_path / "w.safetensors"
    path.write_bytes((tmp_path / "run" / "3-distilled.safetensors").read_bytes())
    words = (*words, "--student-weights", str(path))

    def go() -> list[str]:
        return worked(edgekd("distill", tmp_path / "run", *words))

    assert go() == ["distill"]
    assert go() == []
    state = load_file(path)
    state["classifier.bias"] += 1
    save_file(state, path)
    assert go() == ["distill"]
    module.write_text(module.read_text() + "\n# another version\n")
    assert go() == ["search", "distill"]


def test_weights_of_another_student_are_refused(edgekd: Terminal, tiny: Tiny, tmp_path: Path) -> None:
    words = ("--student", "tiny_students:small", "--student-weights", tiny.weights, *tiny.arguments())
    assert edgekd.code("distill", tmp_path / "run", *words) == 21
    assert "do not fit the model" in edgekd.err
    assert not (tmp_path / "run" / "3-distilled.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--student-weights", "w.safetensors"], 2, "need the student they belong to"),
        (["--student", "tiny_students:small", "--student-weights", "w.pt"], 21, "w.pt: no such file"),
    ],
)
def test_weights_that_cannot_be_used_are_refused_before_any_work(
    edgekd: Terminal, tiny: Tiny, tmp_path: Path, words: list[str], code: int, text: str
) -> None:
    assert edgekd.code("distill", tmp_path / "run", *words, *tiny.arguments()) == code
    assert text in edgekd.err
    assert not (tmp_path / "run").exists()


def test_a_quantized_file_of_another_student_is_refused(
    edgekd: Terminal, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor that is missing in the file of stage 4 must not be left at its float value."""
    real = quantize.load_quantized

    def incomplete(path: Path) -> Any:
        parameters, sites, scheme = real(path)
        parameters.tensors.popitem()
        return parameters, sites, scheme

    monkeypatch.setattr(quantize, "load_quantized", incomplete)
    words = ("--target", "jetson", "--student", "tiny_students:small", "--quantize", "ptq", *tiny.arguments())
    assert edgekd.code("export", tmp_path, *words) == StorageError.exit_code
    assert "does not belong to the student" in edgekd.err
