"""`import edgekd` and `edgekd --help` are light: neither torch, nor an engine, nor what training needs."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # starts processes

HEAVY = (
    "torch", "torchvision", "timm", "transformers", "datasets", "onnx", "onnxscript", "onnxruntime",
    "openvino", "tensorrt", "tensorrt_rtx", "optuna", "safetensors", "PIL", "numpy", "rich.console",
)  # fmt: skip
HELP = "import sys; from edgekd.cli import cli; cli({arguments}, standalone_mode=False)"


def loaded(code: str) -> list[str]:
    """Modules of `HEAVY` in a fresh interpreter after `code`."""
    told = f"import sys; print(*[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{told}"], capture_output=True, text=True, check=True, timeout=120
    )
    return done.stderr.split()


@pytest.mark.parametrize(
    "code",
    [
        "import edgekd; edgekd.__version__",
        HELP.format(arguments=["--help"]),
        HELP.format(arguments=["compress", "--help"]),
        HELP.format(arguments=["gate", "--help"]),
        HELP.format(arguments=["--version"]),
    ],
    ids=["import", "help", "compress-help", "gate-help", "version"],
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    assert loaded(code) == []


def test_the_check_sees_what_is_loaded() -> None:
    assert loaded("import numpy") == ["numpy"]


def test_cards_and_recipes_do_without_torch_and_engines() -> None:
    code = "from edgekd.recipe import load_recipe; load_recipe(None, {}); " + HELP.format(
        arguments=["targets", "list"]
    )
    assert loaded(code) == []
