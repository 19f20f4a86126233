"""What an application needs: runtime.py alone, numpy and one engine; nothing of the training side."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_bundle import RGB, sample_bundle

from edgekd import runtime

pytestmark = pytest.mark.backends
REPOSITORY = Path(__file__).parents[2]
FORBIDDEN = ("torch", "onnx", "msgspec", "PIL", "click", "rich")
BLOCKER = f"""
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {(*FORBIDDEN, "edgekd")!r}:
            raise ImportError(f"blocked: {{name}}")

sys.meta_path.insert(0, Blocker())
"""


def python(*arguments: str, folder: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python in ``folder`` with warnings as errors; ``path`` is the only addition to the search path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    command = [sys.executable, "-W", "error", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def application(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as docs/embedding.md describes it: a bundle, a copy of the runtime and a picture."""
    folder = tmp_path_factory.mktemp("application")
    shutil.move(sample_bundle(folder / "work", RGB), folder / "model.ekd")
    shutil.copy(str(runtime.__file__), folder / "edgekd_runtime.py")
    Image.fromarray(np.zeros((30, 20, 3), np.uint8)).save(folder / "photo.png")
    return folder


def test_importing_the_runtime_loads_neither_the_training_side_nor_an_engine(tmp_path: Path) -> None:
    names = (*FORBIDDEN, "onnxruntime", "openvino")
    code = f"import sys, edgekd.runtime; print([name for name in {names!r} if name in sys.modules])"
    result = python("-c", code, folder=tmp_path, path=REPOSITORY)
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


def test_importing_the_runtime_loads_little_besides_numpy(tmp_path: Path) -> None:
    code = (
        "import sys, numpy, numpy.typing; before = set(sys.modules)\n"
        "import edgekd.runtime; print(*sorted(set(sys.modules) - before))"
    )
    result = python("-c", code, folder=tmp_path, path=REPOSITORY)
    standard = {name.partition(".")[0] for name in result.stdout.split()} - {"edgekd"}
    assert standard <= sys.stdlib_module_names and len(standard) < 40


@pytest.mark.parametrize("variant", ["ort", "ov"])
def test_a_copied_file_predicts_while_everything_else_is_blocked(application: Path, variant: str) -> None:
    code = BLOCKER + (
        "import numpy as np\nfrom edgekd_runtime import load\n"
        f"model = load('model.ekd', variant={variant!r}, selftest=True)\n"
        "print(model.predict(np.zeros((2, 30, 20, 3), np.uint8)).labels)\n"
    )
    result = python("-c", code, folder=application)
    images = np.zeros((2, 30, 20, 3), np.uint8)
    expected = runtime.load(application / "model.ekd", variant=variant).predict(images).labels
    assert (result.stdout.strip(), result.returncode) == (str(expected), 0), result.stderr


def test_the_module_is_a_command(application: Path) -> None:
    result = python("-m", "edgekd.runtime", "model.ekd", "selftest", folder=application, path=REPOSITORY)
    assert (result.returncode, result.stderr) == (0, "") and '"ok": true' in result.stdout
    result = python("-m", "edgekd.runtime", "nowhere", "selftest", folder=application, path=REPOSITORY)
    assert (result.returncode, result.stderr) == (2, "") and '"ok": false' in result.stdout


def test_the_embedding_page_is_true(application: Path) -> None:
    page = (REPOSITORY / "docs" / "embedding.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    result = python("-c", "\n".join(blocks), folder=application)
    assert len(blocks) == 4 and result.returncode == 0, result.stderr
    assert "model.ekd selftest" in page
    result = python("edgekd_runtime.py", "model.ekd", "selftest", folder=application)
    assert result.returncode == 0, result.stderr
