"""What runs programs of another processor here: qemu-user, a Debian root in user space, and wheels.

All of it lies in ``~/.cache/edgekd/emulation`` and needs no root rights: packages of Debian 13 through apt
with a configuration of its own, wheels through pip. Nothing is installed on this machine.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from edgekd.errors import DeviceError, MissingExtraError, StorageError, UsageError
from edgekd.files import cache_folder

Say = Callable[[str], None]

ARCHITECTURES = {"aarch64": ("arm64", 183)}  # its name in Debian, and in ELF headers (elf.h, EM_*)
_SUITE, _MIRROR = "trixie", "EDGEKD_DEBIAN_MIRROR"  # the environment's
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# What Python, numpy and onnxruntime load, and what those load.
_ROOT = (
    "libc6", "libgcc-s1", "libstdc++6", "zlib1g", "libbz2-1.0", "liblzma5", "libexpat1", "libffi8",
    "libssl3t64", "libuuid1", "libpython3.13-minimal", "libpython3.13-stdlib", "python3.13-minimal",
)  # fmt: skip
_GLIBC = (17, 24, 27, 28, 31, 34, 35)  # manylinux tags of wheels that Debian 13 can load
_FETCH_S = 900
_OWN = "or name a root of your own: --sysroot FOLDER"


@dataclass(frozen=True)
class Parts:
    """An emulator, a root folder with a Python in it, and a folder of packages, if the root has none."""

    qemu: Path
    root: Path
    python: Path
    packages: Path | None


def prepare(arch: str, qemu_min: str, sysroot: Path | None, version: str | None, say: Say) -> Parts:
    """The parts, fetched where they are missing.

    Args:
        sysroot: a root of the user's own, with Python; used as it is.
        version: of onnxruntime. None: the one that is installed here, or the sysroot's own.

    Raises:
        UsageError: an architecture that is not known, a sysroot or a version that cannot be used, no mirror
            of Debian.
        MissingExtraError: a program that fetches is not installed.
        DeviceError: something could not be fetched.
        StorageError: the cache cannot be written.
    """
    if arch not in ARCHITECTURES:
        raise UsageError(f"cannot emulate '{arch}'; known: {', '.join(ARCHITECTURES)}")
    python = None if sysroot is None else python_of(sysroot, arch)
    wanted = version or (None if sysroot else _installed())
    if wanted is not None and not re.fullmatch(r"\d+(\.\d+)+\w*", wanted):
        raise UsageError(f"--onnxruntime {wanted}: expected a version such as 1.31.1")
    try:
        cache = cache_folder() / "emulation"
        cache.mkdir(parents=True, exist_ok=True)
        qemu, root = _machine(cache, arch, qemu_min, sysroot, say)
        python = python or python_of(root, arch)
        packages = None if wanted is None else _packages(cache, arch, wanted, python, say)
    except OSError as error:
        where = error.filename or cache_folder()
        raise StorageError(
            f"cannot write {where}: {error.strerror}",
            "free some space, or set XDG_CACHE_HOME to another folder",
        ) from error
    return Parts(qemu, root, python, packages)


def python_of(root: Path, arch: str) -> Path:
    """The newest Python of a root folder.

    Raises:
        UsageError: there is none, or it is for another processor.
    """
    found = [
        (int(match[1]), path)
        for path in (root / "usr/bin").glob("python3.*")
        if (match := re.fullmatch(r"python3\.(\d+)", path.name))
    ]
    if not found:
        raise UsageError(f"{root} holds no usr/bin/python3.x", "give the root folder of a system for " + arch)
    python = max(found)[1]
    head = python.read_bytes()[:20]
    if head[:4] != b"\x7fELF" or int.from_bytes(head[18:20], "little") != ARCHITECTURES[arch][1]:
        raise UsageError(f"{python} is no program for {arch}", "give the root folder of a system for " + arch)
    return python


def _installed() -> str:
    try:
        return metadata.version("onnxruntime")
    except metadata.PackageNotFoundError as error:
        raise UsageError(
            "which onnxruntime? none is installed here to take the version of", "add --onnxruntime 1.31.1"
        ) from error


def _machine(cache: Path, arch: str, qemu_min: str, sysroot: Path | None, say: Say) -> tuple[Path, Path]:
    """qemu of the PATH where it is new enough, else Debian's; and the root."""
    root, own_qemu = sysroot or cache / f"debian-13-{arch}", cache / f"qemu-{arch}"
    qemu = found_qemu(arch, qemu_min, own_qemu)
    packages = [] if root.is_dir() else list(_ROOT)
    if qemu is None:
        packages.append(f"qemu-user:{_here()}")
    if packages:
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as folder:
            work = Path(folder)
            for file in _debian(work, ARCHITECTURES[arch][0], packages, say):
                if file.name.startswith("qemu-user_"):
                    _run(["dpkg-deb", "-x", str(file), str(work / "qemu")], "unpacking qemu")
                    (work / f"qemu/usr/bin/qemu-{arch}").replace(own_qemu)
                else:
                    _run(["dpkg-deb", "-x", str(file), str(work / "root")], "unpacking the root")
            if not root.is_dir():
                (work / "root/lib").symlink_to("usr/lib")  # where programs look for their loader
                _place(work / "root", root)
        qemu = qemu or found_qemu(arch, qemu_min, own_qemu)
    if qemu is None:
        raise DeviceError(
            f"emulation needs qemu-user {qemu_min} or newer; that of Debian 13 is older",
            f"put a newer qemu-{arch} into the PATH",
        )
    return qemu, root


def found_qemu(arch: str, minimum: str, own: Path) -> Path | None:
    """The emulator in the PATH, else `own`, that is new enough."""
    for name in (f"qemu-{arch}", f"qemu-{arch}-static", str(own)):
        path = shutil.which(name)
        if path is not None:
            told = re.search(r"version (\d+(?:\.\d+)*)", _run([path, "--version"], path))
            if told and _numbers(told[1]) >= _numbers(minimum):
                return Path(path)
    return None


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)]


def _here() -> str:
    return _run(["dpkg", "--print-architecture"], "asking for this machine's architecture").strip()


def debian_mirror() -> str:
    """Where Debian's packages come from: what the environment says, else the mirror of this system's own apt.

    Raises:
        UsageError: neither names one.
    """
    told = os.environ.get(_MIRROR, "")
    if not told:
        sites = _run(["apt-get", "indextargets", "--format", "$(SITE)"], "asking apt for its mirror").split()
        told = next((site for site in sites if site.rstrip("/").endswith("/debian")), "none")
    if not re.fullmatch(r"[a-z+]+://\S+", told):
        raise UsageError(
            f"no mirror of Debian: that of {_MIRROR} or of apt here is {told!r}",
            f"{_MIRROR}=URL names one, {_OWN}",
        )
    return told


def _debian(work: Path, arch: str, packages: Sequence[str], say: Say) -> list[Path]:
    """Packages of Debian, signatures checked, in ``work``; the system's own apt is not touched."""
    if not _KEYRING.is_file():
        raise MissingExtraError(
            f"Debian's keys are missing: {_KEYRING}", "apt-get install debian-archive-keyring"
        )
    here, mirror, lists = _here(), debian_mirror(), work / "apt"
    for name in ("state/lists/partial", "cache/archives/partial", "debs"):
        (lists / name).mkdir(parents=True)
    (lists / "state/status").touch()
    (lists / "sources.list").write_text(f"deb [signed-by={_KEYRING}] {mirror} {_SUITE} main\n")
    proxies = re.findall(
        r"^Acquire::\S*[Pp]roxy.*$", _run(["apt-config", "dump"], "apt-config"), re.MULTILINE
    )
    settings = {
        "Dir::State": lists / "state", "Dir::State::status": lists / "state/status",
        "Dir::Cache": lists / "cache",
        "Dir::Etc::SourceList": lists / "sources.list", "Dir::Etc::SourceParts": os.devnull,
        "Dir::Etc::Parts": os.devnull, "APT::Architecture": arch, "APT::Sandbox::User": "root",
        "APT::Update::Error-Mode": "any", "Acquire::Languages": "none",
    }  # fmt: skip
    lines = [f'{key} "{value}";' for key, value in settings.items()]
    lines += [f'APT::Architectures {{"{arch}"; "{here}";}};', *proxies]
    (lists / "apt.conf").write_text("\n".join(lines) + "\n")
    say(f"package lists of Debian 13 for {arch}, about 20 MB, into {cache_folder()}")
    apt = {"APT_CONFIG": str(lists / "apt.conf")}
    _run(["apt-get", "update", "-q"], "fetching package lists", apt)
    told = _run(["apt-get", "download", "--print-uris", *packages], "finding packages", apt)
    sizes = [int(size) for size in re.findall(r"^\S+ \S+\.deb (\d+) ", told, re.MULTILINE)]
    say(f"{len(sizes)} packages of Debian 13, {sum(sizes) / 1e6:.0f} MB (qemu and a root with Python)")
    _run(["apt-get", "download", "-q", *packages], "fetching packages", apt, lists / "debs")
    return sorted((lists / "debs").glob("*.deb"))


def _packages(cache: Path, arch: str, version: str, python: Path, say: Say) -> Path:
    """numpy and a version of onnxruntime for a root's Python."""
    minor = python.name.removeprefix("python3.")
    folder = cache / f"onnxruntime-{version}-cp3{minor}-{arch}"
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("pip") is None:
        raise MissingExtraError(
            "fetching wheels needs pip, which is not installed", "python -m ensurepip, " + _OWN
        )
    say(f"wheels of onnxruntime {version} and numpy for {arch}, about 40 MB, into {cache_folder()}")
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=cache) as work:
        words = [
            sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
            "--only-binary=:all:", "--python-version", f"3.{minor}", "--dest", f"{work}/wheels",
        ]  # fmt: skip
        for glibc in _GLIBC:
            words += ["--platform", f"manylinux_2_{glibc}_{arch}"]
        _run([*words, f"onnxruntime=={version}", "numpy"], f"fetching onnxruntime {version} for {arch}")
        for wheel in Path(work, "wheels").glob("*.whl"):
            with zipfile.ZipFile(wheel) as file:
                file.extractall(f"{work}/packages")
        _place(Path(work, "packages"), folder)
    return folder


def _place(made: Path, folder: Path) -> None:
    """Move a folder where another process may just have put the same."""
    try:
        made.replace(folder)
    except OSError:
        if not folder.is_dir():
            raise


def _run(
    words: list[str], what: str, settings: dict[str, str] | None = None, folder: Path | None = None
) -> str:
    """What a program says.

    Raises:
        MissingExtraError: there is no such program.
        DeviceError: it failed, or took too long.
    """
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_FETCH_S,
            check=False,
            cwd=folder,
            env=os.environ | {"LC_ALL": "C"} | (settings or {}),
        )
    except FileNotFoundError as error:
        raise MissingExtraError(
            f"preparing an emulation needs the program {words[0]}, which is not installed",
            f"apt-get install apt dpkg on a Debian or Ubuntu, {_OWN}",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"{what} took more than {_FETCH_S} s", f"try again, {_OWN}") from error
    if done.returncode:
        said = " ".join([line for line in (done.stderr + done.stdout).splitlines() if line.strip()][-3:])
        raise DeviceError(f"{what} failed: {said}", f"is there a network? Then try again, {_OWN}")
    return done.stdout
