"""The main job, through the command line: a teacher and images in, a verified bundle out."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from samples import Tiny, edgekd_command, settings

from edgekd import cli, export
from edgekd.backends import backend_names
from edgekd.bundle import verify_bundle
from edgekd.errors import EXIT_GATE
from edgekd.quantize.capture import capture
from edgekd.recipe import TeacherRecipe, load_recipe
from edgekd.run import STAGES
from edgekd.spec import ModelSpec, Preprocessing
from edgekd.teacher import load_teacher

ROOT = Path(__file__).parent.parent


@dataclass
class Finished:
    """A command that ended: `record` is what it printed with --json."""

    folder: Path
    code: int
    out: str
    err: str

    @property
    def record(self) -> dict[str, Any]:
        return strict_json(self.out)

    def file(self, name: str = "record.json") -> Any:
        return strict_json((self.folder / name).read_text())


def strict_json(text: str) -> dict[str, Any]:
    """JSON as other programs read it: without NaN and infinity."""

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    found: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return found


def environment(tiny: Tiny) -> dict[str, str]:
    """That of a user whose teacher lies in the current folder."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(tiny: Tiny, folder: Path, *arguments: str, command: list[str] | None = None) -> Finished:
    words = [*(command or edgekd_command("compress")), *arguments, "--out", str(folder), "--json"]
    done = subprocess.run(
        words, cwd=tiny.folder, env=environment(tiny), capture_output=True, text=True, check=False
    )
    return Finished(folder, done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module", params=["x86", "jetson"])
def finished(
    request: pytest.FixtureRequest, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    folder = tmp_path_factory.mktemp(request.param) / "run"
    return run(tiny, folder, "--target", request.param, *tiny.arguments(), *settings())


# ---------------------------------------------------------------- what a run leaves


def test_the_exit_code_is_the_verdict(finished: Finished) -> None:
    assert finished.code in EXIT_GATE.values(), finished.err
    assert finished.code == EXIT_GATE[finished.record["verdict"]]


def test_json_on_stdout_is_the_record(finished: Finished) -> None:
    assert finished.record == finished.file()


def test_the_record_names_version_recipe_and_target(finished: Finished) -> None:
    from edgekd import __version__

    record = finished.record
    assert record["edgekd_version"] == __version__
    assert record["recipe"]["teacher"]["source"] == "tiny_teacher:build"
    assert record["recipe"]["search"]["evaluations"] == 8
    assert record["target"]["id"] in ("x86-amx-server", "jetson-orin-nano-8gb")
    assert record["demo"] is False


def test_every_stage_has_its_time_and_the_digest_of_its_inputs(finished: Finished) -> None:
    stages = finished.record["stages"]
    assert list(stages) == list(STAGES)
    for stage in stages.values():
        assert stage["seconds"] >= 0
        assert len(stage["inputs_sha256"]) == 64


def test_the_record_describes_the_teacher_and_the_student(finished: Finished) -> None:
    metrics = finished.record["metrics"]
    teacher, student = metrics["teacher"], metrics["student_float"]
    assert teacher["accuracy"] > 0.9
    assert teacher["parameters"] > 0
    assert teacher["size_mib"] > 0
    assert 0.5 < student["accuracy"] <= 1  # chance is 0.25
    assert student["macs"] <= 2 * teacher["macs"]
    assert student["parameters"] > 0


def test_every_runtime_has_its_row(finished: Finished) -> None:
    keys = {
        "accuracy", "top1_agreement", "max_abs_diff", "int8_coverage_nodes", "int8_coverage_macs",
        "latency_p50_ms", "latency_p90_ms", "latency_kind", "latency_device", "size_mib", "reason",
    }  # fmt: skip
    rows = finished.record["metrics"]["backends"]
    assert set(rows) == set(backend_names()) == {"onnxruntime", "openvino", "tensorrt"}
    for row in rows.values():
        assert keys <= row.keys()


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_runtime_of_this_machine_was_measured(finished: Finished, name: str) -> None:
    row = finished.record["metrics"]["backends"][name]
    assert row["latency_kind"] == "measured"
    assert 0 < row["latency_p50_ms"] <= row["latency_p90_ms"]
    assert row["latency_device"]
    assert row["top1_agreement"] >= 0.9
    assert row["int8_coverage_macs"] > 0.9
    assert row["size_mib"] > 0


def test_every_model_is_compared_with_the_teacher(finished: Finished) -> None:
    metrics = finished.record["metrics"]
    student = metrics["student_float"]
    for key in ("top1_agreement", "negative_flips", "expected_calibration_error"):
        assert student["fidelity"][key] == student[key]
    for row in (student, metrics["quantize"], *metrics["variants"]):
        found = row["fidelity"]
        if row["accuracy"] is None:
            assert found is None
            continue
        lost = found["negative_flips"] - found["positive_flips"]
        assert row["accuracy"] == pytest.approx(metrics["teacher"]["accuracy"] - lost)
        assert found["kl_divergence"] >= 0


def test_what_was_not_executed_has_no_latency_and_says_why(finished: Finished) -> None:
    row = finished.record["metrics"]["backends"]["tensorrt"]
    assert row["latency_p50_ms"] is row["latency_p90_ms"] is row["accuracy"] is None
    assert row["reason"]
    if finished.record["target"]["class"] == "nvidia-jetson":
        assert "not executed" in row["reason"] or "not compiled" in row["reason"]
    for variant in finished.record["metrics"]["variants"]:
        assert variant["latency_p50_ms"] is not None or variant["reason"]


def test_the_student_keeps_the_budget_of_the_search(finished: Finished) -> None:
    search = finished.record["metrics"]["search"]
    chosen = search["candidates"][search["chosen"]]
    assert chosen["feasible"]
    assert chosen["macs"] <= search["budget"]["max_macs"]
    assert chosen["macs"] == finished.record["metrics"]["student_float"]["macs"]


def test_a_latency_on_another_machine_is_no_verdict(finished: Finished) -> None:
    from edgekd.target import find_target, is_this_machine

    if is_this_machine(find_target(finished.record["target"]["id"])):
        return
    latency = [check for check in finished.record["gate"]["checks"] if check["name"].startswith("latency")]
    assert [check["verdict"] for check in latency] == ["NOT_MEASURED"]


def test_reports_are_written(finished: Finished) -> None:
    page = (finished.folder / "report.html").read_text()
    assert finished.record["verdict"] in page
    assert finished.record["target"]["id"] in page
    assert (finished.folder / "report.md").stat().st_size > 0


def test_the_resolved_recipe_is_complete(finished: Finished) -> None:
    recipe = load_recipe(finished.folder / "recipe.toml", {})
    assert recipe.distill.epochs == finished.record["recipe"]["distill"]["epochs"]


def test_no_temporary_file_is_left(finished: Finished) -> None:
    hidden = [path.name for path in finished.folder.rglob(".*")]
    assert hidden == [".lock"]


# ---------------------------------------------------------------- the bundle

PREDICT = """
import json, sys
for name in ("torch", "safetensors", "optuna", "onnx", "edgekd.pipeline", "edgekd.train"):
    sys.modules[name] = None
import numpy as np
from edgekd.runtime import load

bundle, data = sys.argv[1:]
arrays = np.load(data)
model = load(bundle)
found = model.predict(list(arrays["x_test"]))
labels = [list(arrays["classes"])[label] for label in arrays["y_test"]]
right = float(np.mean([a == b for a, b in zip(found.labels, labels)]))
print(json.dumps({"right": right, "variant": model.variant, "selftest": model.selftest()}, default=str))
"""


def test_the_bundle_is_whole(finished: Finished) -> None:
    assert verify_bundle(Path(finished.record["bundle"])) == []


def test_the_bundle_predicts_without_torch(finished: Finished, tiny: Tiny) -> None:
    """And as well as the record says."""
    done = subprocess.run(
        [sys.executable, "-c", PREDICT, finished.record["bundle"], str(tiny.data)],
        env=environment(tiny), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["selftest"]["ok"]
    rows = {row["id"]: row["accuracy"] for row in finished.record["metrics"]["variants"]}
    assert found["right"] == pytest.approx(rows[found["variant"]], abs=0.02)


def test_the_bundle_states_what_was_measured(finished: Finished) -> None:
    manifest = json.loads((Path(finished.record["bundle"]) / "manifest.json").read_text())
    assert manifest["evidence"]["verdict"] == finished.record["verdict"]
    accuracy = manifest["evidence"]["accuracy"]
    assert accuracy["teacher"] == finished.record["metrics"]["teacher"]["accuracy"]
    assert accuracy["n"] == 120


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_logits_do_not_depend_on_the_batches_before(finished: Finished, backend: str) -> None:
    """OpenVINO 2026.4 packs int8 weights for its first batch; a smaller one then read garbage."""
    from edgekd.runtime import load

    bundle = Path(finished.record["bundle"])
    images = np.random.default_rng(0).integers(0, 256, (48, 16, 16), dtype=np.uint8)
    for row in finished.record["metrics"]["variants"]:
        if row["backend"] != backend or row["latency_p50_ms"] is None:
            continue
        exact = load(bundle, variant=row["id"])
        inputs = exact.preprocess(list(images))
        single = np.concatenate([exact(inputs[i : i + 1]) for i in range(8)])
        mixed = load(bundle, variant=row["id"])
        for count in (48, 8, 1, 33, 5):
            found = mixed(inputs[:count])[:8]
            tolerance = 0.05 * max(1.0, float(np.abs(single).max()))
            np.testing.assert_allclose(found, single[: len(found)], atol=tolerance)


# ---------------------------------------------------------------- the same command again


def test_the_same_command_finds_everything_up_to_date(finished: Finished, tiny: Tiny) -> None:
    target = finished.record["recipe"]["target"]
    before = (finished.folder / "record.json").read_text()
    again = run(tiny, finished.folder, "--target", target, *tiny.arguments(), *settings())
    resumed = [name for name, stage in again.record["stages"].items() if stage["resumed"]]
    if finished.record["verdict"] in ("PASS", "FAIL"):
        assert resumed == list(STAGES)
        assert again.record["metrics"] == finished.record["metrics"]
        assert (again.code, again.record["verdict"]) == (finished.code, finished.record["verdict"])
    else:  # the gate found no answer, and is asked again
        assert resumed == list(STAGES[: STAGES.index("gate")])
    (finished.folder / "record.json").write_text(before)


def test_a_run_is_profiled_and_gated_by_its_folder(finished: Finished, tiny: Tiny) -> None:
    before = (finished.folder / "record.json").read_text()
    settled = finished.record["verdict"] in ("PASS", "FAIL")  # else the gate measures again, and may find so
    for stage in ("profile", "gate"):
        command = [*edgekd_command(stage), str(finished.folder), "--json"]
        done = subprocess.run(
            command, cwd=tiny.folder, env=environment(tiny), capture_output=True, text=True, check=False
        )
        record = strict_json(done.stdout)
        assert f"{stage}: up to date" in done.stderr or not settled
        assert done.returncode == (EXIT_GATE[record["verdict"]] if stage == "gate" else 0), done.stderr
    (finished.folder / "record.json").write_text(before)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["gate", "."], "it has no recipe.toml"),
        (["profile", "."], "it has no recipe.toml"),
        (["gate", "tiny_teacher.py"], "--reference is missing"),
        (["profile", ".", "tiny_teacher.py"], "one run at a time"),
    ],
)
def test_a_folder_that_is_no_run_is_refused(tiny: Tiny, words: list[str], text: str) -> None:
    done = subprocess.run(
        edgekd_command(*words),
        cwd=tiny.folder,
        env=environment(tiny),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, text in done.stderr) == (2, True), done.stderr


# The command line with a training plan that does not depend on measured speed, and a process that is
# killed at one call of one function.
PINNED = """
import os, signal, sys
import edgekd.loop, edgekd.stages.search, edgekd.stages.training
from edgekd import cli
from edgekd.plan import Plan

where, call = sys.argv.pop(1).split(":")
edgekd.stages.training.probe = lambda *a, **k: (Plan(1, False, False), {"pinned": 1.0})
owner, name = {
    "search": (edgekd.stages.search._Evaluator, "_keep"),
    "distill": (edgekd.loop.Loop, "_update_average"),
    "nowhere": (edgekd.loop.Loop, "finish"),
}[where]
real, count = getattr(owner, name), 0

def dying(*args, **kwargs):
    global count
    count += 1
    if count == int(call):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)

setattr(owner, name, dying)
cli.main()
"""


def test_a_killed_run_ends_with_the_same_student(tiny: Tiny, tmp_path: Path) -> None:
    """SIGKILL in the search, then in the third epoch of distillation; then the same command."""

    def go(name: str, dies: str) -> Finished:
        command = [sys.executable, "-c", PINNED, dies, "distill"]
        words = ["--target", "jetson", *tiny.arguments(), *settings("distill.epochs=4")]
        return run(tiny, tmp_path / name, *words, command=command)

    straight = go("straight", "nowhere:-1")
    assert straight.code == 0, straight.err
    for dies in ("search:5", "distill:21"):
        assert go("killed", dies).code == -signal.SIGKILL
    assert list((tmp_path / "killed" / "checkpoints").glob("distill-*.pt"))
    killed = go("killed", "nowhere:-1")
    assert killed.code == 0, killed.err
    for path in ("2-student.json", "3-distilled.safetensors"):
        assert (killed.folder / path).read_bytes() == (straight.folder / path).read_bytes(), path
    assert (
        killed.record["metrics"]["search"]["candidates"] == straight.record["metrics"]["search"]["candidates"]
    )


# ---------------------------------------------------------------- other ways through


@pytest.fixture
def in_process(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Finished]]:
    """The command line without the seconds that a new process takes to start."""
    monkeypatch.chdir(tiny.folder)

    def go(*arguments: str) -> Finished:
        words = [*arguments, *settings("distill.epochs=2"), "--out", str(tmp_path / "run"), "--json"]
        monkeypatch.setattr(sys, "argv", ["edgekd", "compress", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        said = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        assert caught.value.code in EXIT_GATE.values(), said.err
        return Finished(tmp_path / "run", caught.value.code, said.out, said.err)

    yield go


def test_a_black_box_teacher_is_distilled_for_a_target_that_wants_floats(
    in_process: Callable[..., Finished], tiny: Tiny, tmp_path: Path
) -> None:
    """An ONNX file with logits only; the browser's card says that int8 does not pay."""
    spec = ModelSpec(Preprocessing(16, 16, "grey", (0.0,), (1.0,)), ("a", "b", "c", "d"))
    model = load_teacher(TeacherRecipe(source="tiny_teacher:build", weights=str(tiny.weights))).model
    assert model is not None
    export.save(export.to_onnx(capture(model, spec.input_shape), spec), tmp_path / "teacher.onnx")
    done = in_process(
        "--target", "web", "--teacher", str(tmp_path / "teacher.onnx"), "--data", str(tiny.data)
    )
    metrics = done.record["metrics"]
    assert metrics["teacher"]["accuracy"] > 0.9
    assert metrics["teacher"]["parameters"] is None
    assert metrics["teacher"]["size_kind"] == "file"
    assert set(metrics["search"]["candidates"][metrics["search"]["chosen"]]["terms"]) == {
        "relation",
        "semantic",
    }
    assert metrics["search"]["left_out"] == []  # the graph shows the classifier's input and the last maps
    assert metrics["quantize"]["mode"] == "none"
    assert "card" in metrics["quantize"]["reason"]
    assert {variant["precision"] for variant in metrics["variants"]} <= {"f32", "bf16"}
    assert metrics["backends"]["onnxruntime"]["int8_coverage_nodes"] == 0
    assert not (done.folder / "5-export" / "int8.onnx").exists()
    assert verify_bundle(done.folder / "6-bundle") == []


def test_quantization_can_be_left_out(in_process: Callable[..., Finished], tiny: Tiny) -> None:
    done = in_process("--target", "jetson", *tiny.arguments(), "--quantize", "none")
    metrics = done.record["metrics"]
    assert metrics["quantize"]["reason"] == "asked for"
    assert metrics["quantize"]["chosen"] == "none"
    assert not [variant for variant in metrics["variants"] if variant["precision"] == "int8"]
    assert not done.record["gate"]["shipped"].endswith("int8")
    assert verify_bundle(done.folder / "6-bundle") == []


def test_quantization_can_do_without_training(in_process: Callable[..., Finished], tiny: Tiny) -> None:
    """On an arm64 card, with another method and another calibrator."""
    done = in_process(
        "--target", "rpi5", *tiny.arguments(), "--quantize", "ptq", "--method", "lskd+kd",
        "--set", "quantize.calibrator=percentile",
    )  # fmt: skip
    metrics = done.record["metrics"]
    assert (metrics["quantize"]["mode"], metrics["quantize"]["chosen"]) == ("ptq", "ptq")
    assert metrics["quantize"]["history"] == []
    assert metrics["quantize"]["qat_selection_accuracy"] is None
    arm = [variant for variant in metrics["variants"] if variant["id"] == "onnxruntime-arm64-int8"]
    assert arm[0]["latency_p50_ms"] is None
    assert "not run on this machine" in arm[0]["reason"]
    with np.load(done.folder / "5-export" / "reference.npz") as file:
        assert set(file.files) == {"float", "int8"}


# ---------------------------------------------------------------- the real thing


@pytest.mark.main_job
def test_the_demonstration_becomes_a_bundle_for_the_jetson(tmp_path: Path) -> None:
    """The built-in teacher and images, a short recipe, the card of the default target."""
    short = ("search.evaluations=24", "distill.epochs=2", "quantize.epochs=1", "gate.restarts=2",
             "gate.max_restarts=2", "threads=1")  # fmt: skip
    words = [part for text in short for part in ("--set", text)]
    command = [*edgekd_command("compress", "--target", "jetson"), *words, "--out", "run", "--json"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode in EXIT_GATE.values(), done.stderr
    record = strict_json(done.stdout)
    metrics = record["metrics"]
    assert metrics["teacher"]["accuracy"] > 0.9
    assert metrics["student_float"]["accuracy"] > 0.7
    assert metrics["student_float"]["macs"] < 0.1 * metrics["teacher"]["macs"]
    for name in ("onnxruntime", "openvino"):
        assert metrics["backends"][name]["top1_agreement"] > 0.97
        assert metrics["backends"][name]["accuracy"] > metrics["student_float"]["accuracy"] - 0.02
    assert metrics["backends"]["tensorrt"]["latency_p50_ms"] is None
    assert verify_bundle(tmp_path / record["bundle"]) == []
    again = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
                           capture_output=True, text=True, check=False)  # fmt: skip
    resumed = [name for name, stage in strict_json(again.stdout)["stages"].items() if stage["resumed"]]
    assert resumed[:6] == list(STAGES[:6])  # the gate is asked again when it found no answer
