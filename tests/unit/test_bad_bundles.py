"""A bad bundle is refused by every command that takes one, with the reason, before anything is done."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sample_bundle import edit_manifest, sample_bundle, set_variant

from edgekd import cli

pytestmark = [pytest.mark.backends, pytest.mark.slow]
AGAIN, NEWER, DOCTOR = "copy the bundle again", "use the edgekd release that wrote", "edgekd doctor tells"


def tamper(folder: Path) -> None:
    path = folder / "models/ort.onnx"
    path.write_bytes(path.read_bytes() + b"x")


def link(folder: Path) -> None:
    (folder / "models/ort.onnx").rename(folder.parent / "out.onnx")
    (folder / "models/ort.onnx").symlink_to(folder.parent / "out.onnx")


def lie(folder: Path) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        manifest["inputs"][0]["shape"] = [-1, 1, 9, 9]
        manifest["inputs"][0]["preprocess"]["resize"] = [9, 9]

    edit_manifest(folder, edit)


def both(**changes: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for index in (0, 1):
            set_variant(folder, index, changes)

    return spoil


BAD: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "tampered": (tamper, "models/ort.onnx was altered (SHA-256 differs)", AGAIN),
    "truncated": (lambda f: os.truncate(f / "golden/input.npy", 100), "golden/input.npy was altered", AGAIN),
    "traversal": (both(file="../../other.onnx"), "'../../other.onnx' leads out of the bundle", AGAIN),
    "link": (link, "'models/ort.onnx' leads out of the bundle", AGAIN),
    "huge": (lambda f: os.truncate(f / "models/ort.onnx", 2**31), "has 2 GiB or more", AGAIN),
    "newer": (lambda f: edit_manifest(f, lambda m: m.update(version=2)), "version 2, this edgekd", NEWER),
    "shapes": (lie, "golden/input.npy: expected float32 (N, *(1, 9, 9))", AGAIN),
    "runtime": (both(runtime=["onnxruntime-web"]), "", DOCTOR),
    "processor": (both(requires_cpu_flags=["avx9"]), "the CPU does not report avx9", DOCTOR),
}
COMMANDS: dict[str, Callable[[Path, Path], list[object]]] = {
    "check": lambda folder, out: ["check", folder],
    "gate": lambda folder, out: ["gate", folder, "--reference", folder, "--out", out],
    "embed": lambda folder, out: ["embed", folder, "--lang", "python", "--out", out],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", BAD)
def test_a_bad_bundle_is_refused_before_anything_is_done(
    command: str,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil, text, hint = BAD[name]
    folder = sample_bundle(tmp_path)
    spoil(folder)
    words = COMMANDS[command](folder, tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["edgekd", *map(str, words)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr()
    if command == "embed" and hint == DOCTOR:
        hint = "--variant ID takes a variant that is made for another machine"
    assert (left.value.code, said.out) == (16, "")
    assert text in said.err and f"hint: {hint}" in said.err
    assert "session" not in said.err and not (tmp_path / "out").exists()
