"""``edgekd check``: every variant replayed in its own process, here, over ssh's packing, and emulated."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd import cli
from edgekd.checking import CheckOrder, check_bundle
from edgekd.emulation import Emulated, emulated
from edgekd.errors import BundleError, DeviceError, MissingExtraError, StorageError, UsageError
from edgekd.profiler import HERE
from edgekd.runtime import machine
from edgekd.sysroot import debian_mirror, found_qemu, python_of
from edgekd.target import find_target

from .small_models import small_bundle

pytestmark = [pytest.mark.backends, pytest.mark.slow]
X86 = pytest.mark.skipif(machine() != "x86_64", reason="about kernels of x86")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_bundle(tmp_path_factory.mktemp("bundle"))


def edgekd(
    patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str, str]:
    patch.setattr(sys, "argv", ["edgekd", "check", *map(str, words)])
    capture.readouterr()
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capture.readouterr()
    assert isinstance(left.value.code, int)
    return left.value.code, said.out, said.err


@X86
def test_every_variant_that_runs_here_is_replayed_and_a_float_int8_graph_fails(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = edgekd(monkeypatch, capsys, bundle, "--json")
    result = json.loads(out)
    rows = {row["id"]: row for row in result["variants"]}
    assert {name: row["verdict"] for name, row in rows.items()} == {
        "f32": "PASS", "ov": "PASS", "u8": "PASS", "s8": "FAIL", "elsewhere": "NOT_MEASURED",
    }  # fmt: skip
    assert (code, result["exit"], result["verdict"]) == (1, 1, "FAIL")
    assert rows["elsewhere"]["reason"] == "made for riscv64; the machine is x86_64"
    assert rows["f32"]["golden"]["max_abs_diff"] <= rows["f32"]["golden"]["tolerance"] == 1e-4
    assert rows["u8"]["kernels"]["QLinearConv"] == 2 and rows["u8"]["int8_coverage_macs"] > 0.95
    assert any(kernel.startswith("Convolution ") for kernel in rows["ov"]["kernels"])
    left = rows["s8"]["float_layers"]
    assert {layer["name"] for layer in left} >= {"conv1", "conv2"}
    assert any("signed s8 activation" in layer["reason"] for layer in left)
    assert "of the work is in int8 kernels, the limit is 95.0%" in rows["s8"]["reason"]
    assert "in float: conv1 (" in err


def test_the_share_of_int8_is_the_users_to_choose(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = edgekd(monkeypatch, capsys, bundle, "--min-coverage", 0)
    assert (code, out) == (0, "")
    assert "PASS          on this machine" in err


def test_a_runs_folder_stands_for_its_bundle(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "6-bundle").symlink_to(bundle)
    assert edgekd(monkeypatch, capsys, tmp_path, "--variant", "f32")[0] == 0


def test_golden_outputs_of_another_model_fail(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "model.ekd"))
    golden = folder / "golden/f32.npy"
    np.save(golden, np.load(golden) + np.float32(0.01))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["golden"]["sha256"]["f32"] = hashlib.sha256(golden.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (row,) = check_bundle(folder, CheckOrder(HERE, variants=("f32",)))["variants"]
    assert (row["verdict"], row["reason"]) == ("FAIL", "the golden outputs differ")


def test_a_damaged_bundle_is_refused_before_anything_runs(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "model.ekd"))
    (folder / "models/f32.onnx").write_bytes(b"altered")
    code, out, err = edgekd(monkeypatch, capsys, folder)
    assert (code, out) == (16, "")
    assert "models/f32.onnx was altered" in err and "hint: copy the bundle again" in err


def test_a_folder_that_is_no_bundle_and_an_unknown_variant_are_told(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"cannot read .*manifest\.json"):
        check_bundle(tmp_path, CheckOrder(HERE))
    with pytest.raises(UsageError, match="unknown variant 'f23'") as caught:
        check_bundle(bundle, CheckOrder(HERE, variants=("f23",)))
    assert caught.value.hint == "did you mean 'f32'?"


def test_a_bundle_of_which_nothing_runs_here_is_told_with_reasons(bundle: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle, tmp_path / "model.ekd"))
    manifest = json.loads((folder / "manifest.json").read_text())
    for variant in manifest["variants"]:
        variant["min_version"] = dict.fromkeys(variant["runtime"], "9999.0")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        BundleError, match=r"runs on this machine: f32: onnxruntime .* is older than 9999"
    ) as told:
        check_bundle(folder, CheckOrder(HERE, machine()))
    assert "--variant NAME" in told.value.hint
    assert check_bundle(folder, CheckOrder(HERE, machine(), ("f32",)))["verdict"] == "PASS"


class Killed:
    """A device whose process really dies by a signal."""

    name = "a device"

    def __init__(self, signal: str) -> None:
        self._signal = signal

    def work(self, order: dict[str, Any], timeout_s: float) -> subprocess.CompletedProcess[bytes]:
        words = ["sh", "-c", f"echo last words >&2; kill -{self._signal} $$"]
        return subprocess.run(words, capture_output=True, check=False)


def test_a_process_that_dies_is_a_fail_with_its_signal(bundle: Path) -> None:
    result = check_bundle(bundle, CheckOrder(Killed("ILL"), variants=("f32",)))
    assert (result["verdict"], result["exit"]) == ("FAIL", 1)
    reason = result["variants"][0]["reason"]
    assert "SIGILL, an instruction that this processor does not have" in reason and "last words" in reason
    result = check_bundle(bundle, CheckOrder(Killed("SEGV"), variants=("f32",)))
    assert "signal SIGSEGV" in result["variants"][0]["reason"]


# ---------------------------------------------------------------- emulation: what can go wrong before it runs


def emulating(card: str = "rpi5", sysroot: Path | None = None, version: str | None = None) -> Emulated:
    return emulated(find_target(card), sysroot, version, print)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--emulate", "x86"], "does not say how its device is emulated"),
        (["--emulate", "rpi6"], "unknown target 'rpi6'"),
        (["--emulate", "rpi5", "--onnxruntime", "../1.2"], "--onnxruntime ../1.2: expected a version"),
        (["--emulate", "rpi5", "--on", "ssh://a@b"], "exclude each other"),
        (["--onnxruntime", "1.21.0"], "--onnxruntime goes with --emulate"),
        (["--sysroot", "."], "--sysroot goes with --emulate"),
        (["--emulate", "rpi5", "--sysroot", "."], "holds no usr/bin/python3.x"),
    ],
)
def test_wrong_usage_is_told_before_anything_is_fetched(
    bundle: Path, words: list[str], text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code, out, err = edgekd(monkeypatch, capsys, bundle, *words)
    assert (code, out) == (2, "") and text in err
    assert not (tmp_path / "cache").exists()


def test_a_root_for_another_processor_is_refused(tmp_path: Path) -> None:
    (tmp_path / "usr/bin").mkdir(parents=True)
    shutil.copy(shutil.which("ls") or "/bin/ls", tmp_path / "usr/bin/python3.13")
    with pytest.raises(UsageError, match="is no program for aarch64"):
        python_of(tmp_path, "aarch64")


def test_a_machine_without_apt_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    with pytest.raises(MissingExtraError, match="needs the program dpkg") as told:
        emulating()
    assert "--sysroot FOLDER" in told.value.hint


@pytest.mark.skipif(not shutil.which("apt-get"), reason="needs apt-get")
def test_no_network_is_told_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every connection goes to a port on which nothing listens."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("EDGEKD_DEBIAN_MIRROR", "http://mirror.invalid/debian")
    with pytest.raises(DeviceError, match=r"fetching package lists failed: .*127\.0\.0\.1") as told:
        emulating()
    assert "is there a network?" in told.value.hint
    assert "about 20 MB" in capsys.readouterr().out
    assert list((tmp_path / "edgekd/emulation").iterdir()) == []


def test_the_mirror_is_that_of_the_environment_or_of_apt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "apt-get"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("EDGEKD_DEBIAN_MIRROR", raising=False)
    program.write_text("#!/bin/sh\necho 'https://a.invalid/x https://b.invalid/debian'\n")
    program.chmod(0o755)
    assert debian_mirror() == "https://b.invalid/debian"
    program.write_text("#!/bin/sh\necho https://a.invalid/ubuntu\n")
    with pytest.raises(UsageError, match="of apt here is 'none'") as told:
        debian_mirror()
    assert "EDGEKD_DEBIAN_MIRROR=URL" in told.value.hint
    monkeypatch.setenv("EDGEKD_DEBIAN_MIRROR", "http://c.invalid/debian")
    assert debian_mirror() == "http://c.invalid/debian"
    monkeypatch.setenv("EDGEKD_DEBIAN_MIRROR", "http://c.invalid/a b\ndeb evil")
    with pytest.raises(UsageError, match="no mirror of Debian"):
        debian_mirror()


def test_a_cache_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    with pytest.raises(StorageError, match="cannot write /dev/null") as told:
        emulating()
    assert "XDG_CACHE_HOME" in told.value.hint


def test_a_qemu_that_is_too_old_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "qemu-aarch64"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for version, found in (("7.2.0", None), ("10.0.2", program), ("11.0", program)):
        program.write_text(f"#!/bin/sh\necho 'qemu-aarch64 version {version} (Debian)'\n")
        program.chmod(0o755)
        assert found_qemu("aarch64", "10.0.2", tmp_path / "none") == found


# ---------------------------------------------------------------- emulation: the real thing


@pytest.fixture(scope="session")
def fetched() -> str:
    """The version of onnxruntime that is fetched beside the one installed here."""
    if not shutil.which("apt-get"):
        pytest.skip("needs apt-get, and a network")
    return "1.21.0"


@pytest.mark.nightly
def test_on_an_emulated_raspberry_pi_the_bundle_loads_fuses_and_gives_its_golden_outputs(
    bundle: Path, fetched: str
) -> None:
    """Fetches about 120 MB, then 160 MB."""
    device = emulating("rpi5")
    rows = {row["id"]: row for row in check_bundle(bundle, CheckOrder(device, device.machine))["variants"]}
    verdicts = {name: row["verdict"] for name, row in rows.items()}
    assert verdicts == {
        "f32": "PASS",
        "ov": "NOT_MEASURED",
        "u8": "PASS",
        "s8": "FAIL",
        "elsewhere": "NOT_MEASURED",
    }
    assert (
        rows["f32"]["environment"]["platform"].startswith("Linux")
        and "asimddp" in rows["f32"]["environment"]["isa"]
    )
    assert rows["u8"]["kernels"]["QLinearConv"] == 2 and rows["u8"]["float_layers"] == []

    device = emulating("rpi4", version=fetched)
    (row,) = check_bundle(bundle, CheckOrder(device, device.machine, ("f32",)))["variants"]
    assert row["verdict"] == "FAIL" and "SIGILL" in row["reason"]
    device = emulating("rpi5", version=fetched)
    (row,) = check_bundle(bundle, CheckOrder(device, device.machine, ("f32",)))["variants"]
    assert row["verdict"] == "PASS" and row["version"] == fetched

    own = emulating("rpi5", sysroot=device.parts.root, version=fetched)
    assert own.parts.packages == device.parts.packages
    with pytest.raises(DeviceError, match="cannot import numpy"):
        emulating("rpi5", sysroot=device.parts.root)
