"""Data without labels through the command line: selection, automatic labels, semi-supervised runs."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from samples import CLASSES, Tiny, settings, shapes

from edgekd import cli
from edgekd.bundle import verify_bundle
from edgekd.errors import EXIT_GATE
from edgekd.recipe import DataRecipe
from edgekd.sources import load_dataset
from edgekd.stages import annotator

pytestmark = pytest.mark.backends


class Terminal:
    """The command line in this process."""

    def __init__(self, patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str]) -> None:
        self._patch, self._capture = patch, capture
        self.out = self.err = ""

    def __call__(self, *words: object) -> int:
        self._patch.setattr(sys, "argv", ["edgekd", *map(str, words)])
        self._capture.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as left:
            assert isinstance(left.code, int)
            code = left.code
        said = self._capture.readouterr()
        self.out, self.err = said.out, said.err
        assert "Traceback" not in self.err
        return code

    def json(self, *words: object) -> Any:
        """What a command that did its work prints on stdout."""
        assert self(*words, "--json") == 0, self.err
        return json.loads(self.out)


@pytest.fixture
def edgekd(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Terminal:
    monkeypatch.chdir(tiny.folder)
    return Terminal(monkeypatch, capsys)


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """100 images without labels."""
    path = tmp_path / "pool.npz"
    np.savez(path, images=shapes(100, 7)[0])
    return path


@pytest.fixture
def gold(tmp_path: Path) -> Path:
    """60 images with human labels."""
    images, labels = shapes(60, 8)
    path = tmp_path / "gold.npz"
    np.savez(path, train_images=images, train_labels=labels, classes=np.array(CLASSES))
    return path


def teacher(tiny: Tiny) -> list[str]:
    return ["--teacher", "tiny_teacher:build", "--weights", str(tiny.weights)]


# ---------------------------------------------------------------- select


@pytest.mark.parametrize("strategy", ["pcoreset", "coreset", "class-balanced"])
def test_picks_are_written_in_order(
    edgekd: Terminal, tiny: Tiny, pool: Path, tmp_path: Path, strategy: str
) -> None:
    out = tmp_path / "picks.csv"
    words = ("select", *teacher(tiny), "--unlabeled", pool, "--data", tiny.data, "--budget", 7,
             "--strategy", strategy, "--out", out)  # fmt: skip
    found = edgekd.json(*words)
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["rank"]) for row in rows] == list(range(1, 8))
    assert [int(row["index"]) for row in rows] == [pick["index"] for pick in found["picks"]]
    assert rows[0]["name"] == f"pool.npz:images[{rows[0]['index']}]"
    assert {row["class"] for row in rows} <= set(CLASSES)
    assert all(row["reason"] for row in rows)
    assert (found["pool"], found["start"], found["labelled_already"]) == (100, 440, 0)
    assert edgekd.json(*words)["picks"] == found["picks"]


def test_what_is_labelled_already_is_not_chosen(edgekd: Terminal, tiny: Tiny, tmp_path: Path) -> None:
    images = np.concatenate([shapes(4, 0)[0], shapes(5, 7)[0]])
    np.savez(tmp_path / "pool.npz", images=images)
    words = ("select", *teacher(tiny), "--unlabeled", tmp_path / "pool.npz", "--data", tiny.data)
    data = np.load(tiny.data)["x_train"]
    copies = int(sum((data == image).all((1, 2)).any() for image in images))
    found = edgekd.json(*words, "--budget", 9 - copies, "--out", tmp_path / "p.csv")
    assert found["labelled_already"] == copies
    assert edgekd(*words, "--budget", 10, "--out", tmp_path / "p.csv") == 11
    assert f"larger than the pool of {9 - copies}" in edgekd.err


def test_a_selection_that_cannot_be_made_is_refused(
    edgekd: Terminal, tiny: Tiny, pool: Path, tmp_path: Path
) -> None:
    words = ("select", *teacher(tiny), "--budget", 5, "--out", tmp_path / "p.csv")
    assert edgekd(*words, "--unlabeled", "nowhere") == 11
    assert "--unlabeled 'nowhere' does not exist" in edgekd.err
    images, labels = shapes(40, 3)
    np.savez(tmp_path / "other.npz", train_images=images, train_labels=labels,
             classes=np.array(["a", "b", "c", "d"]))  # fmt: skip
    assert edgekd(*words, "--unlabeled", pool, "--data", tmp_path / "other.npz") == 0
    np.savez(tmp_path / "five.npz", train_images=images, train_labels=np.arange(40) % 5)
    assert edgekd(*words, "--unlabeled", pool, "--data", tmp_path / "five.npz") == 12
    assert "4 outputs, and 5 classes are named" in edgekd.err


# ---------------------------------------------------------------- label


def test_labels_are_what_data_reads(
    edgekd: Terminal, tiny: Tiny, pool: Path, gold: Path, tmp_path: Path
) -> None:
    out = tmp_path / "labels.npz"
    words = ("--min-confidence", 0.6, "--curve", "16,64", "--curve-steps", 12, "--out", out)
    found = edgekd.json("label", *teacher(tiny), "--unlabeled", pool, "--gold", gold, *words)
    held = np.load(out)
    kept = held["index"]
    assert found["images"]["kept"] == len(kept) == len(held["train_labels"])
    assert found["images"]["below_min_confidence"] == 100 - len(kept)
    assert held["confidence"].min() >= 0.6
    assert held["probabilities"].dtype == np.float16
    assert np.array_equal(held["probabilities"].argmax(1), held["train_labels"])
    assert np.array_equal(held["train_images"][..., 0], shapes(100, 7)[0][kept])
    assert str(held["teacher_sha256"]) == found["teacher"]["sha256"]
    assert str(held["preprocessing_sha256"]) == found["preprocessing_sha256"]
    data = load_dataset(DataRecipe(source=str(out)), seed=0)
    assert data.classes == CLASSES
    assert np.array_equal(data.validation_labels, shapes(60, 8)[1][gold_order(gold)])
    agreed = found["agreement"]
    assert agreed["images"] == 60
    right = (held["train_labels"] == shapes(100, 7)[1][kept]).mean()
    assert agreed["accuracy"] > 0.8 < right
    assert [point["labels"] for point in found["curve"]["points"]] == [16, 64]
    assert json.loads((tmp_path / "labels.report.json").read_text()) == found
    page = (tmp_path / "labels.report.html").read_text()
    assert "Learning curve" in page
    assert page.count("<svg") == 4
    assert "Krippendorff" in page


def gold_order(gold: Path) -> np.ndarray:
    """Rows of the gold file in the order in which both parts of it are read."""
    images = np.load(gold)["train_images"]
    data = load_dataset(DataRecipe(source=str(gold)), seed=0)
    both = np.concatenate([data.train_images, data.validation_images])[..., 0]
    return np.array([int(np.flatnonzero((images == one).all((1, 2)))[0]) for one in both])


def test_a_table_names_the_images(edgekd: Terminal, tiny: Tiny, pool: Path, tmp_path: Path) -> None:
    words = ("label", *teacher(tiny), "--unlabeled", pool, "--classes", ",".join(CLASSES))
    edgekd.json(*words, "--out", tmp_path / "labels.csv")
    with (tmp_path / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 100
    assert rows[3]["name"] == "pool.npz:images[3]"
    assert {row["class"] for row in rows} <= set(CLASSES)
    assert sum(float(rows[0][f"p:{name}"]) for name in CLASSES) == pytest.approx(1, abs=2e-3)


def test_answers_are_asked_for_once_and_survive_a_crash(
    edgekd: Terminal, tiny: Tiny, pool: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(annotator, "_CHUNK", 30)
    asked: list[int] = []
    real = annotator.Annotator.inputs

    def counting(self: annotator.Annotator, images: np.ndarray) -> Any:
        asked.append(len(images))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real(self, images)

    monkeypatch.setattr(annotator.Annotator, "inputs", counting)
    words = ("label", *teacher(tiny), "--unlabeled", pool, "--out", tmp_path / "l.npz")
    assert edgekd(*words) == 130
    assert not (tmp_path / "l.npz").exists()
    assert edgekd(*words) == 0
    assert asked == [30, 30, 30, 30, 10]
    assert edgekd(*words, "--min-confidence", 0.5) == 0
    assert len(asked) == 5
    assert edgekd(*words, "--mean", "0.1") == 0
    assert asked[5:] == [30, 30, 30, 10]


def test_an_exported_file_labels_with_its_own_classes_and_normalisation(
    edgekd: Terminal, tiny: Tiny, pool: Path, tmp_path: Path
) -> None:
    """The black box that `label` leaves beside its answers is such a file."""
    words = ("--unlabeled", pool, "--out", tmp_path / "l.npz")
    first = edgekd.json("label", *teacher(tiny), "--std", "0.9", "--classes", ",".join(CLASSES), *words)
    (black_box,) = (tmp_path / "l.answers").glob("*.onnx")
    second = edgekd.json("label", "--teacher", black_box, *words)
    for key in ("classes", "preprocessing_sha256"):
        assert second[key] == first[key]
    a, b = (row["images"]["by_class"] for row in (first, second))
    assert sum(abs(x["found"] - y["found"]) for x, y in zip(a, b, strict=True)) <= 4


def test_labels_that_cannot_be_given_are_refused(
    edgekd: Terminal, tiny: Tiny, pool: Path, gold: Path, tmp_path: Path
) -> None:
    words = ("label", *teacher(tiny), "--unlabeled", pool)
    out = ("--out", tmp_path / "l.npz")
    images, labels = shapes(40, 3)
    np.savez(tmp_path / "other.npz", train_images=images, train_labels=labels,
             classes=np.array(["cross", "frame", "rows", "zebra"]))  # fmt: skip
    for extra, code, text in (
        (("--out", tmp_path / "l.txt"), 2, "written as .npz or .csv"),
        ((*out, "--curve", "10,20"), 2, "there are none"),
        ((*out, "--curve", "ten", "--gold", gold), 2, "--curve ten"),
        ((*out, "--curve", "20,10", "--gold", gold), 11, "sizes must grow"),
        ((*out, "--curve", "20,101", "--gold", gold), 11, "asks for 101 labels, and there are 100"),
        ((*out, "--min-confidence", "1"), 11, "none of 100 images reaches"),
        ((*out, "--classes", "cat,dog"), 12, "4 outputs, and 2 classes are named"),
        ((*out, "--classes", ",".join(CLASSES), "--gold", tmp_path / "other.npz"), 11, "zebra"),
        ((*out, "--gold", tmp_path / "none"), 11, "does not exist"),
        ((*out, "--mean", "1,2,3"), 11, "1 channels"),
    ):  # fmt: skip
        assert edgekd(*words, *extra) == code, edgekd.err
        assert text in edgekd.err
    assert not (tmp_path / "l.npz").exists()


# ---------------------------------------------------------------- semi-supervised runs


def test_dho_learns_from_few_labels_and_a_pool_and_becomes_a_bundle(
    edgekd: Terminal, tiny: Tiny, pool: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    short = settings("data.labelled_fraction=0.1", f"data.unlabeled={pool}", "data.pool_per_class=20")
    words = ("--target", "x86", *tiny.arguments(), "--method", "dho", "--out", out, *short)
    assert edgekd("compress", *words) in EXIT_GATE.values(), edgekd.err
    record = json.loads((out / "record.json").read_text())
    data = record["metrics"]["data"]
    assert data["labelled"] == 28  # of 288 images, 72 a class
    assert data["pool"]["found"] == 100
    assert data["train"] == 288 + data["pool"]["kept"] < 388
    assert record["metrics"]["student_float"]["accuracy"] > 0.6
    assert verify_bundle(Path(record["bundle"])) == []
    for row in record["metrics"]["variants"]:
        assert row["top1_agreement"] is None or row["top1_agreement"] > 0.95
    for name in ("float.onnx", "uint8.onnx"):
        graph = onnx.load(out / "5-export" / name).graph
        kinds = [node.op_type for node in graph.node]
        assert kinds.count("Gemm") + kinds.count("MatMul") == 2, kinds
        assert kinds.count("LogSoftmax") == 2
    weights = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    assert sum(name.startswith("classifier.") and name.endswith("_int8") for name in weights) == 2
    assert edgekd("compress", *words) in EXIT_GATE.values()
    assert "[3/8] distill: up to date" in edgekd.err


def test_a_method_that_needs_every_label_is_refused_before_any_work(
    edgekd: Terminal, tiny: Tiny, tmp_path: Path
) -> None:
    for setting in ("data.labelled_fraction=0.5", "data.unlabeled=pool.npz"):
        words = ("--method", "dkd", "--set", setting, "--out", tmp_path / "run", *tiny.arguments())
        assert edgekd("compress", *words) == 2
        assert "method 'dkd' needs labels, and not all of these samples have one" in edgekd.err
        assert "ssld" in edgekd.err
        assert not (tmp_path / "run").exists()


def test_a_changed_pool_runs_again(edgekd: Terminal, tiny: Tiny, pool: Path, tmp_path: Path) -> None:
    words = ("search", "--target", "x86", *tiny.arguments(), *settings(f"data.unlabeled={pool}"),
             "--out", tmp_path / "run")  # fmt: skip
    assert edgekd(*words) == 0, edgekd.err
    assert edgekd(*words) == 0
    assert "[1/8] teacher: up to date" in edgekd.err
    np.savez(pool, images=shapes(30, 9)[0])
    assert edgekd(*words) == 0
    assert "30 of 30 of the pool" in edgekd.err
