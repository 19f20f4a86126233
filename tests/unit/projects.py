"""Helpers of the tests of `edgekd embed`: commands, programs that may be absent, spoilt golden files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from sample_bundle import GREY, RGB

from edgekd import runtime
from edgekd.spec import Preprocessing

# What is shrunk and what is stretched is different in each.
SHAPES = [
    RGB,
    GREY,
    Preprocessing(28, 28, "grey", (0.2860,), (0.3530,)),
    Preprocessing(64, 33, "rgb", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    Preprocessing(9, 96, "rgb", (0.0, 1e-3, 0.5), (1.0, 2.0, 1e-3), scale=1.0),
]


def run(*words: str | Path, folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """A command in ``folder``; it may fail."""
    environment = {**os.environ, **more}
    return subprocess.run(
        list(map(str, words)),
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def done(*words: str | Path, folder: Path, **more: str) -> str:
    """What a command printed on stdout; it must leave with 0."""
    result = run(*words, folder=folder, **more)
    assert result.returncode == 0, f"{words}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def needs(*programs: str) -> None:
    if missing := [name for name in programs if shutil.which(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")


def package_folder(name: str) -> Path:
    found = find_spec(name)
    assert found is not None and found.origin is not None
    return Path(found.origin).parent


def spoil(path: Path) -> None:
    """Move the first golden value away from what the model gives."""
    values = np.fromfile(path, "<f4")
    values[0] += 0.5
    values.tofile(path)


def spoil_picture(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 0xFF
    path.write_bytes(data)


def assert_check(text: str, variant: str) -> None:
    """The self-check's line: logits within 1e-4, and a preprocessing equal to runtime.py's in every bit."""
    found = json.loads(text)
    assert found["ok"] is True and found["variant"] == variant
    assert found["max_abs_diff"] <= 1e-4
    assert found["input_max_abs_diff"] == 0.0


def expected_line(bundle: Path, picture: Path) -> tuple[str, float]:
    """(label, probability) that runtime.py gives for a PPM file."""
    from PIL import Image

    found = runtime.load(bundle, variant="ort").predict(np.asarray(Image.open(picture)))
    return found.labels[0], float(found.probabilities.max())
