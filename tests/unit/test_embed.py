"""`edgekd embed`: which variant a project takes, what is refused, and what every project holds."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from sample_bundle import RGB, sample_bundle, set_variant

from edgekd.embed import command
from edgekd.embed.project import LANGUAGES, write_project
from edgekd.errors import BundleError, UsageError

pytestmark = pytest.mark.backends


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_bundle(tmp_path_factory.mktemp("bundle"), RGB)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_nothing_stays_unfilled(bundle: Path, tmp_path: Path, lang: str) -> None:
    project = write_project(bundle, lang, tmp_path / "app").folder
    texts = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    assert not [path for path, data in texts.items() if b"@NAME@" in data or b"@VARIANT@" in data]
    text = (project / "README.md").read_text()
    assert "sample" in text and ("--check" in text or "npm run check" in text)
    if (project / "service.py").exists():
        ast.parse((project / "service.py").read_text())


def command_line(*words: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(command.embed, list(map(str, words)))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_the_command_says_what_comes_next(bundle: Path, tmp_path: Path) -> None:
    code, text = command_line(bundle, "--lang", "c", "--out", tmp_path / "my app")
    assert code == 0 and "variant ort with onnxruntime" in text
    assert "cd '" in text and "cmake --build build" in text
    code, text = command_line(bundle, "--lang", "web", "--out", tmp_path / "page", "--json")
    assert json.loads(text) == {"folder": str(tmp_path / "page"), "variant": "ort", "engine": "onnxruntime"}
    assert command_line(bundle, "--lang", "rust", "--out", tmp_path / "x")[0] == 2


def test_the_command_knows_every_language() -> None:
    option = next(item for item in command.embed.params if item.name == "lang")
    assert isinstance(option.type, click.Choice) and tuple(option.type.choices) == tuple(LANGUAGES)


def test_a_folder_with_files_is_left_alone(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("precious")
    with pytest.raises(UsageError, match="not an empty folder"):
        write_project(bundle, "c", tmp_path / "mine")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]
    (tmp_path / "empty").mkdir()
    assert write_project(bundle, "c", tmp_path / "empty").variant == "ort"


def test_an_altered_bundle_is_refused(bundle: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(bundle, tmp_path / "model.ekd"))
    (mine / "models/ort.onnx").write_bytes(b"other")
    with pytest.raises(BundleError, match=r"is not sound: .*ort\.onnx was altered"):
        write_project(mine, "c", tmp_path / "app")
    assert not (tmp_path / "app").exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"arch": ["riscv64"]}, "ort: made for riscv64, this is"),
        ({"requires_cpu_flags": ["avx9999"]}, "ort: the CPU does not report avx9999"),
        ({"build": "on-device"}, "ort: its engine is built on the device"),
        ({"ep": [["CUDAExecutionProvider", {}]]}, "ort: needs CUDAExecutionProvider"),
    ],
)
def test_a_variant_that_does_not_fit_is_refused_with_the_reason(
    bundle: Path, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    mine = Path(shutil.copytree(bundle, tmp_path / "model.ekd"))
    set_variant(mine, 0, changes)
    with pytest.raises(BundleError, match=reason) as caught:
        write_project(mine, "c", tmp_path / "app")
    assert "ov: made for openvino, not for onnxruntime" in caught.value.message
    if "arch" in changes or "requires_cpu_flags" in changes:
        assert write_project(mine, "c", tmp_path / "app", "ort").variant == "ort"
    with pytest.raises(BundleError, match="unknown variant 'orr'"):
        write_project(mine, "c", tmp_path / "app2", "orr")


def test_the_page_takes_float_first_and_any_architecture(bundle: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(bundle, tmp_path / "model.ekd"))
    set_variant(mine, 0, {"quant": "x86-u8-relu0"})
    set_variant(mine, 1, {"runtime": ["onnxruntime"], "arch": ["riscv64"]})
    assert write_project(mine, "web", tmp_path / "float").variant == "ov"
    set_variant(mine, 0, {"runtime": ["onnxruntime-web"]})
    assert write_project(mine, "web", tmp_path / "web").engine == "onnxruntime-web"


def test_options_of_openvino_become_text(bundle: Path, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(bundle, tmp_path / "model.ekd"))
    options = {"NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False, "INFERENCE_PRECISION_HINT": "f32"}
    set_variant(mine, 1, {"openvino": {"device": "CPU", "options": options}})
    header = (write_project(mine, "cpp", tmp_path / "app").folder / "model.h").read_text()
    for line in (
        '{"NUM_STREAMS", "1"}',
        '{"ENABLE_CPU_PINNING", "NO"}',
        '{"INFERENCE_PRECISION_HINT", "f32"}',
    ):
        assert line in header


def test_every_template_is_part_of_the_package() -> None:
    folder = Path(str(command.__file__)).parent
    names: Sequence[str] = [name for language in LANGUAGES.values() for name in language.templates]
    assert {path.name for path in folder.iterdir() if path.is_dir() and path.name != "__pycache__"} == set(
        names
    )
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert files and {path.suffix for path in files} == {".in"}
