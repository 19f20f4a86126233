"""A device emulated here with qemu-user: it proves what loads and what is computed, never how fast."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edgekd.card import Target
from edgekd.errors import BackendError, DeviceError, UsageError
from edgekd.files import cache_folder
from edgekd.sysroot import Parts, Say, prepare

_START_S = 120


@dataclass(frozen=True)
class Emulated:
    """A processor by its name in qemu (`cpu`), with the parts that run programs for it."""

    name: str
    machine: str
    cpu: str
    parts: Parts

    def work(self, order: dict[str, Any], timeout_s: float) -> subprocess.CompletedProcess[bytes]:
        """See `edgekd.profiler.Device`.

        Raises:
            BackendError: the process did not end in time.
        """
        try:
            return self._python(["-m", "edgekd.worker"], msgspec.json.encode(order), timeout_s)
        except subprocess.TimeoutExpired as error:
            raise BackendError(f"{self.name}: the process did not end within {timeout_s:g} s") from error

    def start(self) -> None:
        """Start its Python once.

        Raises:
            DeviceError: it does not start, or has no numpy.
        """
        try:
            done = self._python(["-c", "import numpy, json, ctypes"], b"", _START_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DeviceError(f"{self.name}: {error}", "check --sysroot") from error
        if done.returncode:
            said = " ".join(done.stderr.decode(errors="replace").split("\n")[-3:]).strip()
            hint = "install numpy and onnxruntime in it, or add --onnxruntime VERSION to bring them along"
            raise DeviceError(f"{self.name}: {self.parts.python} cannot import numpy: {said}", hint)

    def _python(self, words: list[str], told: bytes, timeout_s: float) -> subprocess.CompletedProcess[bytes]:
        package, parts = Path(__file__).resolve().parents[1], self.parts
        paths = [str(path) for path in (parts.packages, package) if path is not None]
        call = [str(parts.qemu), "-cpu", self.cpu, "-L", str(parts.root), str(parts.python), "-s", *words]
        settings = {
            "PATH": os.defpath,
            "LC_ALL": "C.UTF-8",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONPYCACHEPREFIX": str(cache_folder() / "emulation/compiled"),
        }
        return subprocess.run(
            call, input=told, capture_output=True, timeout=timeout_s, env=settings, cwd=package, check=False
        )


def emulated(target: Target, sysroot: Path | None, version: str | None, say: Say) -> Emulated:
    """The device of a card. The parts that are missing are fetched; see `edgekd.sysroot.prepare`.

    Raises:
        UsageError: the card does not say how its device is emulated.
        As `edgekd.sysroot.prepare`; DeviceError also when a root of the user's own does not start.
    """
    emulation = target.check.emulation
    if emulation is None:
        raise UsageError(
            f"the card '{target.id}' does not say how its device is emulated",
            "rpi5, rpi4, android and the Jetson Orins do; [check.emulation] in docs/targets.md",
        )
    root = None if sysroot is None else sysroot.resolve()
    parts = prepare(emulation.arch, str(emulation.qemu_min.value), root, version, say)
    name = f"{target.id}, emulated ({emulation.qemu_cpu})"
    made = Emulated(name, emulation.arch, emulation.qemu_cpu, parts)
    if sysroot is not None:
        made.start()
    return made
