"""Measure on another machine over the system's ssh; nothing is installed there and nothing stays.

One connection a session: files go in as a tar stream, `edgekd.worker` runs in a temporary folder, answers
come back as a tar stream, the folder is removed. The device needs a POSIX shell, tar, Python 3.10 or later,
numpy and the runtime. Host keys are checked by ssh itself, against its known hosts.
"""

from __future__ import annotations

import io
import json
import queue
import re
import shlex
import subprocess
import tarfile
import tempfile
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar
from urllib.parse import urlsplit

from edgekd.backends.feeds import external_files
from edgekd.errors import BackendError, DeviceError, MissingExtraError, UsageError
from edgekd.profiler import Device

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")
_CONNECT_S = 15
_ALIVE = ("-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")
_SENSOR_S = 3  # some sensors, such as tegrastats, print for ever
_LOCK_S = 900
# What the script on the device leaves with, besides the worker's own code.
_LEAVES = {
    93: ("a command of the card's measure.prepare failed", "run it by hand there, or edit the card"),
    94: ("its Python is older than 3.10", "name another one: ssh://user@host/path/to/python"),
    95: ("there is no such Python", "name one: ssh://user@host/path/to/python"),
    96: ("another measurement has held it for too long", "one measurement at a time; wait for the other"),
    97: ("its folder for temporary files cannot be written", "free some space on its disk"),
    98: ("its Python has no numpy", "there: python3 -m pip install numpy onnxruntime; or name another one"),
    124: ("the measurement did not end in time", "fewer rounds, or a smaller model"),
}
# What ssh says, in the order in which it is looked for.
_REFUSALS = (
    ("REMOTE HOST IDENTIFICATION HAS CHANGED", "its host key is not the one that is known",
     "if the device was really set up again: ssh-keygen -R HOST, then ssh to it once"),
    ("Host key verification failed", "its host key is not known",
     "ssh to it once and compare the key that is shown"),
    ("Permission denied", "it refuses the login", "ssh-copy-id, or name the key in your ssh configuration"),
    ("Connection refused", "nothing listens there", "is sshd running, and is this its port?"),
    ("Could not resolve hostname", "the name is not known", "check the name, or use the address"),
    ("timed out", "it does not answer", "is it on, and in this network?"),
    ("No route to host", "there is no way to it", "is it on, and in this network?"),
    ("No space left on device", "its disk is full", "free some space on its disk"),
)  # fmt: skip
_FITS = """import sys, importlib.util as find
sys.exit(94 if sys.version_info < (3, 10) else 98 if find.find_spec("numpy") is None else 0)"""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")  # never an option of ssh
_FILES = ("__init__.py", "errors.py", "memory.py", "runtime.py", "worker.py")


class Remote(ABC):
    """A machine that takes a shell script and its input, and gives what it prints. `prepare` and `sensors`
    are commands of its card, run there."""

    python: str
    prepare: tuple[str, ...]
    sensors: tuple[str, ...]

    @property
    @abstractmethod
    def name(self) -> str:
        """As a user writes it."""

    @abstractmethod
    def send(self, script: str, sent: IO[bytes], timeout_s: float) -> subprocess.CompletedProcess[bytes]:
        """Run the script there; its standard input is the file.

        Raises:
            DeviceError: it cannot be reached, or was lost on the way.
            BackendError: no answer in time.
        """

    def work(self, order: dict[str, Any], timeout_s: float) -> subprocess.CompletedProcess[bytes]:
        """See `edgekd.profiler.Device`.

        Raises:
            DeviceError: it cannot be reached, refuses, is full, or was lost on the way.
            BackendError: the measurement did not end in time.
        """
        with tempfile.TemporaryFile() as sent:
            names = pack(order, sent)
            sent.seek(0)
            done = self.send(self._script(timeout_s), sent, timeout_s + _LOCK_S + 60)
        told = done.stderr.decode(errors="replace").strip()
        if done.returncode == 255 or done.returncode in _LEAVES or not done.stdout:
            raise self._refused(done.returncode, told)
        files = self._unpack(done.stdout)
        if "answers.npz" in files:
            Path(order["answers"]).write_bytes(files["answers.npz"])
        answer = self._told(files, names)
        code = done.returncode
        return subprocess.CompletedProcess(done.args, 128 - code if code > 128 else code, answer, done.stderr)

    def _script(self, timeout_s: float) -> str:
        """What runs there. The exit codes are those of `_LEAVES`, else the worker's."""
        python = shlex.quote(self.python)
        lines = [
            "umask 077",
            'here=$(mktemp -d "${TMPDIR:-/tmp}/edgekd.XXXXXX") || exit 97',
            "trap 'rm -rf \"$here\"' EXIT",
            "trap 'exit 99' HUP INT TERM PIPE",
            'cd "$here" && mkdir in out && tar -C in -xf - || exit 97',
            f"command -v {python} >/dev/null || exit 95",
            f"{python} -c {shlex.quote(_FITS)} || exit $(( $? == 98 ? 98 : 94 ))",
            "if command -v flock >/dev/null; then",
            f'exec 9>"${{TMPDIR:-/tmp}}/edgekd-$(id -u).lock"; flock -w {_LOCK_S} 9 || exit 96; fi',
        ]
        for command in self.prepare:
            quoted = shlex.quote(command)
            lines.append(
                f"sh -c {quoted} >log 2>&1 </dev/null || sudo -n sh -c {quoted} >>log 2>&1 </dev/null "
                f"|| {{ echo {quoted} >&2; cat log >&2; exit 93; }}"
            )
        lines.append("command -v nvpmodel >/dev/null && nvpmodel -q >out/power-mode 2>&1 </dev/null")
        lines += self._reading("before")
        lines.append(
            f'(cd in && TMPDIR="$here" PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=. timeout -k 5 {timeout_s:g} '
            f"{python} -m edgekd.worker <order.json >../out/answer.json); code=$?"
        )
        lines += self._reading("after")
        lines += [
            'if [ "$code" = 124 ]; then exit 124; fi',
            "[ -f in/answers.npz ] && mv in/answers.npz out/",
        ]
        lines += ["tar -C out -cf - . || exit 97", "exit $code"]
        return "\n".join(lines)

    def _reading(self, when: str) -> list[str]:
        return [
            f"timeout {_SENSOR_S} sh -c {shlex.quote(command)} >out/sensor-{when}-{index} 2>&1 </dev/null"
            for index, command in enumerate(self.sensors)
        ]

    def _refused(self, code: int, told: str) -> DeviceError | BackendError:
        last = " ".join(told.splitlines()[-3:])
        for words, meaning, hint in _REFUSALS:
            if words in told:
                return DeviceError(f"{self.name}: {meaning}: {last}", hint)
        if code in _LEAVES:
            meaning, hint = _LEAVES[code]
            kind = BackendError if code == 124 else DeviceError
            return kind(f"{self.name}: {meaning}" + (f": {last}" if last else ""), hint)
        return DeviceError(
            f"{self.name}: the connection was lost: {last or f'exit code {code}'}",
            "what was measured before is kept; run the command again",
        )

    def _unpack(self, data: bytes) -> dict[str, bytes]:
        """Plain files of the answer by name; nothing is written to disk."""
        try:
            with tarfile.open(fileobj=io.BytesIO(data)) as archive:
                members = [one for one in archive.getmembers() if one.isfile()]
                return {one.name.removeprefix("./"): archive.extractfile(one).read() for one in members}  # type: ignore[union-attr]
        except (tarfile.TarError, EOFError, OSError) as error:
            raise DeviceError(
                f"{self.name}: the connection was lost: its answer is cut off",
                "what was measured before is kept; run the command again",
            ) from error

    def _told(self, files: dict[str, bytes], names: dict[str, str]) -> bytes:
        """The worker's answer with this machine's file names, and what the device's sensors said."""
        text = files.get("answer.json", b"").decode(errors="replace")
        try:
            answer = json.loads(text)
        except ValueError:
            return b""  # it died; its last words are on stderr
        if refusal := answer.get("refusal"):
            for there, here in names.items():
                refusal["message"] = refusal["message"].replace(there, here)
            refusal["message"] = f"{self.name}: {refusal['message']}"
            if missing := re.search(r"needs the package '([^']+)'", refusal["message"]):
                refusal["hint"] = f"there: {self.python} -m pip install {missing[1]}"
        machine = (answer.get("result") or {}).get("environment")
        if machine is not None:
            read = {name: data.decode(errors="replace").strip() for name, data in files.items()}
            machine["host"] = self.name
            machine |= sensed(
                [read.get(f"sensor-before-{index}", "") for index in range(len(self.sensors))],
                [read.get(f"sensor-after-{index}", "") for index in range(len(self.sensors))],
            )
            if "power-mode" in read:
                machine["power_mode"] = read["power-mode"].splitlines()
        return json.dumps(answer).encode()


@dataclass(frozen=True)
class SshDevice(Remote):
    """A machine by its address."""

    user: str
    host: str
    port: int | None = None
    python: str = "python3"
    config: Path | None = None  # of ssh; None: the user's own
    prepare: tuple[str, ...] = ()
    sensors: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.user}@{self.host}" + (f":{self.port}" if self.port else "")

    def send(self, script: str, sent: IO[bytes], timeout_s: float) -> subprocess.CompletedProcess[bytes]:
        words = [*self._ssh(), script]
        try:
            return subprocess.run(words, stdin=sent, capture_output=True, timeout=timeout_s, check=False)
        except FileNotFoundError as error:
            raise DeviceError("there is no program ssh here", "install OpenSSH's client") from error
        except subprocess.TimeoutExpired as error:
            raise BackendError(f"{self.name}: no answer within {error.timeout:g} s") from error

    def _ssh(self) -> list[str]:
        words = ["ssh", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", *_ALIVE]
        words += ["-o", f"ConnectTimeout={_CONNECT_S}"]
        words += ["-F", str(self.config)] if self.config else []
        words += ["-p", str(self.port)] if self.port else []
        return [*words, "-l", self.user, "--", self.host]


def pack(order: dict[str, Any], to: IO[bytes]) -> dict[str, str]:
    """Write the worker, the models and the order as a tar; {name there: path here}."""
    package = Path(__file__).parent
    sources = [package / name for name in _FILES] + sorted((package / "backends").glob("*.py"))
    names: dict[str, str] = {}
    there: dict[str, str] = {}
    for path in [variant["model"] for variant in order["variants"]]:
        if path not in there:
            folder, there[path] = f"model{len(there)}", f"model{len(there)}/{Path(path).name}"
            names[there[path]] = path
            for beside in _beside(Path(path)):
                names[f"{folder}/{beside.relative_to(Path(path).resolve().parent)}"] = str(beside)
    order = order | {"variants": [v | {"model": there[v["model"]]} for v in order["variants"]]}
    for key, name in (("data", "data.npz"), ("stored", "stored.npz")):
        if key in order:
            names[name] = order[key]
            order = order | {key: name}
    if "bundle" in order:
        bundle = Path(order["bundle"])
        files = (path for path in sorted(bundle.rglob("*")) if path.is_file())
        names |= {f"bundle/{path.relative_to(bundle).as_posix()}": str(path) for path in files}
        order = order | {"bundle": "bundle"}
    if "answers" in order:
        order = order | {"answers": "answers.npz"}
    with tarfile.open(fileobj=to, mode="w") as archive:
        for source in sources:
            archive.add(source, f"edgekd/{source.relative_to(package).as_posix()}")
        for name, path in names.items():
            try:
                archive.add(path, name)
            except OSError as error:
                raise BackendError(f"cannot read {path}: {error.strerror}") from error
        data = json.dumps(order).encode()
        entry = tarfile.TarInfo("order.json")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return names


def _beside(model: Path) -> tuple[Path, ...]:
    """Files of weights that belong to a model; one that is no ONNX model is refused there, in its words."""
    try:
        return external_files(model)
    except (BackendError, MissingExtraError):
        return ()


def sensed(before: Sequence[str], after: Sequence[str]) -> dict[str, Any]:
    """What sensors say: ``throttled`` (a text, "" for no), the highest ``temp_c_after``, and their own words.

    Reads ``vcgencmd get_throttled`` and ``measure_temp`` of a Raspberry Pi, and ``tegrastats`` of a Jetson.
    """
    told: dict[str, Any] = {"sensors_before": list(before), "sensors_after": list(after)}
    flags = [
        [int(number, 16) for text in texts for number in re.findall(r"throttled=0x([0-9a-fA-F]+)", text)]
        for texts in (before, after)
    ]
    if flags[1]:
        now = flags[1][-1] & 0xF  # low bits: at this moment; bits 16 and above: since it was started
        since = flags[1][-1] & ~(flags[0][-1] if flags[0] else 0) & 0xF0000
        told["throttled"] = f"0x{flags[1][-1]:x}" if now or since else ""
    heat = [float(number) for text in after for number in re.findall(r"(?:temp=|@)([\d.]+)'?C", text)]
    if heat:
        told["temp_c_after"] = max(heat)
    return told


def ssh_device(url: str, *, config: Path | None = None, prepare: Sequence[str] = (),
               sensors: Sequence[str] = ()) -> SshDevice:  # fmt: skip
    """From ``ssh://user@host[:port][/path/to/python]``.

    Raises:
        UsageError: another form.
    """
    hint = "such as ssh://pi@192.168.1.7, ssh://pi@board:2222/home/pi/venv/bin/python"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"--on {url}: {error}", hint) from error
    user, host = parts.username or "", parts.hostname or ""
    if parts.scheme != "ssh" or parts.password or parts.query or parts.fragment:
        raise UsageError(f"--on {url}: expected ssh://user@host[:port][/path/to/python]", hint)
    if not _NAME.fullmatch(user) or not (_NAME.fullmatch(host) or re.fullmatch(r"[0-9a-f:]+", host)):
        raise UsageError(f"--on {url}: expected a user and a host, ssh://user@host", hint)
    return SshDevice(user, host, port, parts.path or "python3", config, tuple(prepare), tuple(sensors))


def pooled(
    devices: Sequence[Device], items: Sequence[_Item], work: Callable[[Device, _Item], _Made]
) -> list[_Made]:
    """`work` of every item, in their order; each device takes the next item when it is free.

    A device that is lost gives its item to the others. An error of another kind ends the whole.

    Raises:
        DeviceError: no device is left.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(items)):
        waiting.put(index)
    made: dict[int, _Made] = {}
    lost: list[DeviceError] = []
    errors: list[BaseException] = []

    def serve(device: Device) -> None:
        while len(made) < len(items) and not errors:
            try:
                index = waiting.get(timeout=0.2)
            except queue.Empty:  # the last items may come back from a device that is lost
                continue
            try:
                made[index] = work(device, items[index])
            except DeviceError as error:
                waiting.put(index)
                lost.append(error)
                return
            except BaseException as error:  # noqa: BLE001 (raised again below)
                errors.append(error)

    threads = [threading.Thread(target=serve, args=(device,), daemon=True) for device in devices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    if len(made) < len(items):
        raise DeviceError("; ".join(error.message for error in lost), lost[-1].hint if lost else "")
    return [made[index] for index in range(len(items))]
