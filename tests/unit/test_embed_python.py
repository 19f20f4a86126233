"""The Python service and its container: self-check without torch, answers, and what the image needs."""

from __future__ import annotations

import ast
import functools
import json
import os
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from projects import assert_check, done, expected_line, needs, run, spoil
from sample_bundle import CLASSES, RGB, sample_bundle

from edgekd.embed.project import write_project

pytestmark = pytest.mark.backends


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_bundle(tmp_path_factory.mktemp("bundle"), RGB)


@functools.cache
def _blocked() -> str:
    """A sitecustomize that forbids what the service must do without."""
    names = ("torch", "onnx", "msgspec", "click", "rich", "edgekd")
    return (
        "import sys\nclass Blocker:\n    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {names!r}:\n            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )


def python_environment(folder: Path) -> dict[str, str]:
    (folder / "blocked").mkdir(exist_ok=True)
    (folder / "blocked/sitecustomize.py").write_text(_blocked())
    return {"PYTHONPATH": str(folder / "blocked"), "PYTHONWARNINGS": "error", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.mark.parametrize("variant", [None, "ov"])
def test_python_checks_itself_without_torch(bundle: Path, tmp_path: Path, variant: str | None) -> None:
    project = write_project(bundle, "python", tmp_path / "app", variant).folder
    more = python_environment(tmp_path)
    assert_check(done(sys.executable, "service.py", "--check", folder=project, **more), variant or "ort")
    engine = "openvino" if variant else "onnxruntime"
    assert [line.partition(">=")[0] for line in (project / "requirements.txt").read_text().split()] == [
        "numpy",
        engine,
    ]
    spoil(project / "golden/picture.f32")
    assert run(sys.executable, "service.py", "--check", folder=project, **more).returncode == 1
    (project / "model.ekd/models/ort.onnx").unlink()
    (project / "model.ekd/models/ov.onnx").unlink()
    broken = run(sys.executable, "service.py", "--check", folder=project, **more)
    assert broken.returncode == 2 and "No such file" in json.loads(broken.stdout)["error"]


@pytest.fixture
def service(bundle: Path, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """(project, address) of a running service."""
    project = write_project(bundle, "python", tmp_path / "app").folder
    command_line = [sys.executable, "service.py", "--port", "0"]
    environment = {**os.environ, **python_environment(tmp_path)}
    with subprocess.Popen(
        command_line,
        cwd=project,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            yield project, process.stdout.readline().partition("/ with ")[0]
        finally:
            process.terminate()


def ask(address: str, data: bytes | None = None) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data), timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_the_python_service_answers(service: tuple[Path, str], bundle: Path) -> None:
    project, address = service
    picture = project / "golden/picture.ppm"
    label, probability = expected_line(bundle, picture)
    assert ask(f"{address}/health") == (200, {"ok": True, "variant": "ort", "classes": list(CLASSES)})
    status, answer = ask(f"{address}/predict", picture.read_bytes())
    assert (status, answer["label"]) == (200, label)
    assert answer["probability"] == pytest.approx(probability, abs=1e-6)
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-6)

    from PIL import Image

    Image.open(picture).save(project / "photo.png")
    assert ask(f"{address}/predict", (project / "photo.png").read_bytes()) == (200, answer)
    for data in (
        b"",
        b"P6\n1 1\n255\n",
        b"P6\n0 5\n255\n",
        b"P5\n" + b"9" * 9000 + b" 1 255\n",
        b"\x89PNG\r\n",
    ):
        status, found = ask(f"{address}/predict", data)
        assert status == 400 and "error" in found, data
    assert ask(f"{address}/nothing")[0] == 404

    answers: list[tuple[int, Any]] = []
    threads = [
        threading.Thread(target=lambda: answers.append(ask(f"{address}/predict", picture.read_bytes())))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [(200, answer)] * 8


def _copied(project: Path, image: Path) -> list[list[str]]:
    """Do the Dockerfile's COPY instructions into the folder ``image``; the other instructions."""
    others = []
    for line in (project / "Dockerfile").read_text().splitlines():
        name, *words = line.split()[:1] + line.split()[1:]
        if name == "COPY":
            *sources, target = words
            for source in sources:
                if (project / source).is_dir():
                    shutil.copytree(project / source, image / target)
                else:
                    shutil.copy(project / source, image / target)
        elif not name.startswith("#"):
            others.append([name, *words])
    return others


def test_the_dockerfile_copies_all_that_its_commands_need(bundle: Path, tmp_path: Path) -> None:
    project = write_project(bundle, "docker", tmp_path / "app").folder
    image = tmp_path / "image"
    image.mkdir()
    others = _copied(project, image)
    checks = [words[2:] for words in others if words[:2] == ["RUN", "python"]]
    assert checks == [["service.py", "--check"]]
    more = python_environment(tmp_path)
    (install,) = [words[1:] for words in others if words[:2] == ["RUN", "pip"]]
    told = done(sys.executable, "-m", *install, folder=image, PIP_NO_INDEX="1")  # offline: they are here
    assert "Requirement already satisfied: onnxruntime>=" in told
    assert_check(done(sys.executable, *checks[0], folder=image, **more), "ort")
    started = next(ast.literal_eval(" ".join(words[1:])) for words in others if words[0] == "CMD")
    assert started[:2] == ["python", "service.py"]
    done(sys.executable, *started[1:], "--help", folder=image, **more)
    kept = {line[1:] for line in (project / ".dockerignore").read_text().split() if line.startswith("!")}
    assert kept == {path.name for path in image.iterdir() if path.name != "__pycache__"}


def test_docker_builds_and_checks(bundle: Path, tmp_path: Path) -> None:
    needs("docker")
    if run("docker", "info", folder=tmp_path).returncode:
        pytest.skip("no Docker daemon answers")
    if run("docker", "image", "inspect", "python:3.12-slim", folder=tmp_path).returncode:
        pytest.skip("the image python:3.12-slim is not there: docker pull python:3.12-slim")
    project = write_project(bundle, "docker", tmp_path / "app").folder
    image = done("docker", "build", "--quiet", ".", folder=project).strip()
    assert_check(
        done("docker", "run", "--rm", image, "python", "service.py", "--check", folder=project), "ort"
    )
