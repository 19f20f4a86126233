"""The page: its preprocessing in Node, its server, and the whole of it in a headless browser."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from projects import SHAPES, assert_check, done, needs, run, spoil
from sample_bundle import RGB, sample_bundle

from edgekd.embed.project import ONNXRUNTIME_WEB, write_project

pytestmark = pytest.mark.backends


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_bundle(tmp_path_factory.mktemp("bundle"), RGB)


def test_web_preprocessing_is_that_of_the_runtime(tmp_path: Path) -> None:
    needs("node")
    for number, preprocessing in enumerate(SHAPES):
        folder = sample_bundle(tmp_path / f"work{number}", preprocessing)
        project = write_project(folder, "web", tmp_path / f"app{number}").folder
        code = (
            'import { readFileSync, writeFileSync } from "node:fs";\n'
            'import { preprocess, readPpm } from "./public/preprocess.mjs";\n'
            'const model = JSON.parse(readFileSync("public/model.json", "utf8"));\n'
            'const picture = readPpm(readFileSync("public/golden/picture.ppm"));\n'
            'writeFileSync("found.f32", preprocess(picture, model.preprocess));\n'
        )
        done("node", "--input-type=module", "--eval", code, folder=project)
        assert (project / "found.f32").read_bytes() == (project / "public/golden/picture.f32").read_bytes()


def test_web_in_a_headless_browser(bundle: Path, tmp_path: Path) -> None:
    needs("node", "npm", "chromium")
    project = write_project(bundle, "web", tmp_path / "app").folder
    installed = run("npm", "install", "--ignore-scripts", "--offline", folder=project)
    if installed.returncode:
        pytest.skip(
            f"npm's cache lacks it: npm cache add onnxruntime-web@{ONNXRUNTIME_WEB}, or npm install once"
        )
    assert_check(done("npm", "run", "--silent", "check", folder=project), "ort")
    spoil(project / "public/golden/logits.f32")
    assert run("npm", "run", "--silent", "check", folder=project).returncode == 1
    (project / "public/model.onnx").write_bytes(b"not a model")
    broken = run("npm", "run", "--silent", "check", folder=project)
    assert broken.returncode == 2 and "error" in json.loads(broken.stdout)


def test_the_web_server_stays_in_its_folder(bundle: Path, tmp_path: Path) -> None:
    needs("node")
    project = write_project(bundle, "web", tmp_path / "app").folder
    shutil.copytree(project / "public", project / "dist")
    code = (
        'import { serve } from "./server.mjs"; import { request } from "node:http";\n'
        "const server = await serve(0), port = server.address().port;\n"
        "const get = (path) => new Promise((done) => request({ port, path }, (r) => (r.resume(), done(\n"
        '  [r.statusCode, r.headers["content-type"], r.headers["cross-origin-opener-policy"]]))).end());\n'
        'for (const path of ["/", "/app.mjs", "/../package.json", "/%2e%2e/package.json", "/golden", "/%"])\n'
        "  console.log(JSON.stringify(await get(path)));\n"
        "server.close(); server.closeAllConnections();\n"
    )
    lines = done("node", "--input-type=module", "--eval", code, folder=project).splitlines()
    answers = [json.loads(line) for line in lines]
    assert answers[0] == [200, "text/html; charset=utf-8", "same-origin"]
    assert answers[1] == [200, "text/javascript", "same-origin"]
    assert [status for status, *_ in answers[2:]] == [404, 404, 404, 400]
