"""Projects in C++ and C: built here, equal to the golden values, and not blind to wrong ones."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from projects import (
    SHAPES,
    assert_check,
    done,
    expected_line,
    needs,
    package_folder,
    run,
    spoil,
    spoil_picture,
)
from sample_bundle import RGB, edit_manifest, sample_bundle, set_variant

from edgekd.embed.fill import _c_string
from edgekd.embed.project import write_project
from edgekd.spec import Preprocessing

pytestmark = pytest.mark.backends


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_bundle(tmp_path_factory.mktemp("bundle"), RGB)


def ort_library() -> Path:
    found = sorted((package_folder("onnxruntime") / "capi").glob("libonnxruntime.so*"))
    if not found:
        pytest.skip("this onnxruntime wheel has no libonnxruntime.so")
    return found[0]


def assert_classifies(project: Path, bundle: Path) -> None:
    """A C or C++ program names the class of a picture as runtime.py does, and refuses what is none."""
    picture = project / "data/golden/picture.ppm"
    label, probability = expected_line(bundle, picture)
    found = done("build/classify", picture, folder=project).strip().partition(": ")[2]
    assert found.rpartition(" ")[0] == label
    assert float(found.rpartition(" ")[2]) == pytest.approx(probability, abs=1e-5)
    assert run("build/classify", project / "model.h", folder=project).returncode == 2
    assert run("build/classify", "absent.ppm", folder=project).returncode == 2
    assert run("build/classify", folder=project).returncode == 2
    assert run("build/classify", "--chekc", folder=project).returncode == 2


def assert_notices(project: Path, golden: Path, *check: str | Path) -> None:
    """Other logits, another picture: exit 1; a file cut short: exit 2."""
    for name, change in (("logits.f32", spoil), ("picture.ppm", spoil_picture)):
        kept = (golden / name).read_bytes()
        change(golden / name)
        result = run(*check, folder=project)
        assert result.returncode == 1 and json.loads(result.stdout)["ok"] is False
        (golden / name).write_bytes(kept)
    (golden / "input.f32").write_bytes((golden / "input.f32").read_bytes()[:-4])
    assert run(*check, folder=project).returncode == 2


def test_cpp_with_openvino(bundle: Path, tmp_path: Path) -> None:
    needs("cmake", "g++")
    project = write_project(bundle, "cpp", tmp_path / "app").folder
    cmake = package_folder("openvino") / "cmake"
    done("cmake", "-S.", "-Bbuild", f"-DOpenVINO_DIR={cmake}", "-DCMAKE_CXX_FLAGS=-Werror", folder=project)
    done("cmake", "--build", "build", folder=project)
    assert_check(done("build/classify", "--check", folder=project), "ov")
    assert_classifies(project, bundle)
    assert_notices(project, project / "build/data/golden", "build/classify", "--check")


def build_c(project: Path, *flags: str) -> None:
    needs("cmake", "gcc")
    library = f"-DONNXRUNTIME_LIBRARY={ort_library()}"
    done("cmake", "-S.", "-Bbuild", library, "-DCMAKE_C_FLAGS=-Werror", *flags, folder=project)
    done("cmake", "--build", "build", folder=project)


@pytest.mark.parametrize("preprocessing", SHAPES, ids=lambda p: f"{p.color}-{p.height}x{p.width}")
def test_c_with_onnx_runtime(tmp_path: Path, preprocessing: Preprocessing) -> None:
    folder = sample_bundle(tmp_path / "work", preprocessing)
    project = write_project(folder, "c", tmp_path / "app").folder
    build_c(project)
    assert_check(done("build/classify", "--check", folder=project), "ort")


def test_c_notices_and_classifies(bundle: Path, tmp_path: Path) -> None:
    project = write_project(bundle, "c", tmp_path / "app").folder
    build_c(project)
    assert_classifies(project, bundle)
    absent = run("build/classify", "--check", folder=project, ONNXRUNTIME_LIBRARY="/absent.so")
    assert absent.returncode == 2 and "ONNXRUNTIME_LIBRARY" in absent.stderr
    (project / "build/data/model.onnx").write_bytes(b"not a model")
    broken = run("build/classify", "--check", folder=project)
    assert broken.returncode == 2 and "ONNX Runtime: " in broken.stderr
    shutil.copy(project / "data/model.onnx", project / "build/data")
    assert_notices(project, project / "build/data/golden", "build/classify", "--check")


def test_c_passes_session_settings(bundle: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(bundle, tmp_path / "model.ekd"))
    set_variant(mine, 0, {"session": {"threads": 2, "config": {"session.intra_op.allow_spinning": "0"}}})
    project = write_project(mine, "c", tmp_path / "app").folder
    build_c(project)
    assert_check(done("build/classify", "--check", folder=project), "ort")
    assert '{"session.intra_op.allow_spinning", "0"}' in (project / "model.h").read_text()
    set_variant(mine, 0, {"session": {"threads": 1, "config": {"session.load_model_format": "ORT"}}})
    project = write_project(mine, "c", tmp_path / "other-format").folder
    build_c(project)
    refused = run("build/classify", "--check", folder=project)  # the file is ONNX: the setting has arrived
    assert refused.returncode == 2 and "ONNX Runtime: " in refused.stderr


def test_the_function_table_of_c_is_that_of_the_header(bundle: Path, tmp_path: Path) -> None:
    root = os.environ.get("ONNXRUNTIME_ROOT", "")
    if not root:
        pytest.skip("ONNXRUNTIME_ROOT, an onnxruntime release with headers, is not set")
    project = write_project(bundle, "c", tmp_path / "app").folder
    build_c(project, f"-DONNXRUNTIME_ROOT={root}")


AWKWARD = ('say "hi" \\ ??/', "Größe", "@NAME@", "線\n", "</script>")


def test_awkward_labels_survive_in_c(bundle: Path, tmp_path: Path) -> None:
    needs("gcc")
    text = ", ".join(map(_c_string, AWKWARD))
    program = f"""#include <stdio.h>
int main(void)
{{
    const char *labels[] = {{{text}}};
    for (int i = 0; i < {len(AWKWARD)}; i++)
        printf("%s|", labels[i]);
    return 0;
}}
"""
    (tmp_path / "labels.c").write_text(program, encoding="ascii")
    done("gcc", "-std=c11", "-Wall", "-Werror", "labels.c", "-o", "labels", folder=tmp_path)
    assert done("./labels", folder=tmp_path) == "".join(f"{label}|" for label in AWKWARD)
    mine = Path(shutil.copytree(bundle, tmp_path / "model.ekd"))
    edit_manifest(mine, lambda manifest: manifest.update(labels=list(AWKWARD[:3]), name="a */ b"))
    project = write_project(mine, "c", tmp_path / "app").folder
    assert "a __ b" in (project / "main.c").read_text()
    page = write_project(mine, "web", tmp_path / "page").folder
    assert json.loads((page / "public/model.json").read_text())["labels"] == list(AWKWARD[:3])
