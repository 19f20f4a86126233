"""The folder of a run: numbered artefacts, ``record.json``, and which stages need not run again."""

from __future__ import annotations

import datetime
import fcntl
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import msgspec

from edgekd import __version__
from edgekd.errors import StorageError
from edgekd.files import read_json, sha256_file, sha256_json, write_json, write_text
from edgekd.profiler import environment
from edgekd.recipe import Recipe, to_toml
from edgekd.target import Target

STAGES = ("teacher", "search", "distill", "quantize", "export", "profile", "gate", "bundle")
_LIBRARIES = ("timm", "torchvision", "transformers")  # forms of a teacher whose rest is a name or a folder
_VERDICTS = ("gate", "verdict", "bundle")  # results that stand beside the metrics


class Reporter(Protocol):
    """Who is told what happens; the command line shows it, a library call may ignore it."""

    def say(self, text: str) -> None:
        """One line."""

    def step(self, what: str, done: int, total: int, note: str = "") -> None:
        """Progress of something that takes more than two seconds; `note` is how it stands."""


class Silent:
    """A reporter that shows nothing."""

    def say(self, text: str) -> None: ...

    def step(self, what: str, done: int, total: int, note: str = "") -> None: ...


class Run:
    """A run's folder and its record. A stage is skipped when inputs, upstream and files are as recorded."""

    def __init__(self, folder: Path, recipe: Recipe, target: Target, reporter: Reporter) -> None:
        self.folder, self.recipe, self.target, self.reporter = folder, recipe, target, reporter
        self.on_epoch: Callable[[str, dict[str, float]], None] | None = None
        self._path = folder / "record.json"
        self._environment = environment()
        self.record: dict[str, Any] = {}
        self._read()

    def _read(self) -> None:
        """What earlier starts left in the record, under the names of this one."""
        recipe, target = self.recipe, self.target
        self.record = read_json(self._path) if self._path.exists() else {}
        self.record |= {
            "edgekd_version": __version__,
            "created": self.record.get("created")
            or datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "recipe": msgspec.to_builtins(recipe),
            "demo": "demo" in (recipe.teacher.source, recipe.data.source),
            "target": {
                "id": target.id,
                "description": target.description,
                "class": target.device_class,
                "runtime": target.primary.runtime,
                "dialect": target.quant.dialect,
                "unverified": self.record.get("target", {}).get("unverified", []),
            },
            "environment": self._environment,
        }
        for key in ("stages", "metrics"):
            self.record.setdefault(key, {})

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against a second process; the record is read again once it is held.

        Raises:
            StorageError: the folder cannot be written, or another process works in it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("w")
        except OSError as error:
            raise StorageError(
                f"cannot write into {self.folder}: {error.strerror}", "choose a writable folder: --out FOLDER"
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StorageError(
                    f"another process works in {self.folder}", "wait for it, or choose another --out FOLDER"
                ) from error
            self._read()
            write_text(self.folder / "recipe.toml", to_toml(self.recipe))
            yield

    def stage(
        self,
        name: str,
        inputs: Mapping[str, object],
        artefacts: tuple[str, ...],
        work: Callable[[], dict[str, Any]],
    ) -> None:
        """Run one stage unless it is up to date; its metrics go into the record, which is then written.

        `inputs` are the recipe's values and the digests of outside files it depends on; the stage before is
        always one more. `artefacts` are the files it leaves, relative to the folder; a folder means all in
        it.
        """
        position = STAGES.index(name)
        before = self.record["stages"].get(STAGES[position - 1], {}) if position else {}
        digest = sha256_json(
            [__version__, dict(inputs), before.get("inputs_sha256"), before.get("outputs_sha256")]
        )
        old = self.record["stages"].get(name, {})
        number = f"[{position + 1}/{len(STAGES)}] {name}"
        settled = name != "gate" or self.record.get("verdict") in ("PASS", "FAIL")  # others ask for a new try
        same = old.get("inputs_sha256") == digest and old.get("outputs_sha256") == self._digest(artefacts)
        if same and settled:
            old["resumed"] = True
            self.reporter.say(f"{number}: up to date")
            return
        self.reporter.say(f"{number} …")
        self._forget(STAGES[position:])
        self.save()
        begin = time.perf_counter()
        found = work()
        if "_unverified" in found:
            self.record["target"]["unverified"] = found.pop("_unverified")
        results = list(found)
        self.record.update({key: found.pop(key) for key in _VERDICTS if key in found})
        self.record["metrics"].update(found)
        self.record["stages"][name] = {
            "seconds": round(time.perf_counter() - begin, 2),
            "inputs_sha256": digest,
            "outputs_sha256": self._digest(artefacts),
            "resumed": False,
            "results": results,
        }
        self.save()

    def _forget(self, later: tuple[str, ...]) -> None:
        """Drop what later stages found from other inputs: a verdict must not outlive its student."""
        for name in later:
            for key in self.record["stages"].pop(name, {}).get("results", ()):
                (self.record if key in _VERDICTS else self.record["metrics"]).pop(key, None)

    def save(self) -> None:
        """Rewrite ``record.json`` in one step."""
        write_json(self._path, self.record)

    def _digest(self, artefacts: tuple[str, ...]) -> str | None:
        """Digest of the files' contents; None when one is missing."""
        digests: dict[str, str] = {}
        for artefact in artefacts:
            path = self.folder / artefact
            files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
            if not files or not all(file.is_file() for file in files):
                return None
            digests |= {str(file.relative_to(self.folder)): sha256_file(file) for file in files}
        return sha256_json(digests)


def machine() -> dict[str, object]:
    """What measured numbers depend on: processor and versions of the runtimes."""
    here = environment()
    return {"cpu": here["cpu"], "packages": here["packages"]}


def _sources(module: str) -> dict[str, Path]:
    """The source files behind a factory's module, found without importing it: its own, and with a package
    all of the package."""
    parts = module.split(".")
    tails = (Path(*parts).with_suffix(".py"), Path(*parts, "__init__.py"))
    for entry in (Path(folder or ".") for folder in ("", *sys.path)):
        own = next((tail for tail in tails if (entry / tail).is_file()), None)
        if own is not None:
            package = entry / parts[0]
            files = sorted(package.rglob("*.py")) if own != tails[0] or parts[1:] else [entry / own]
            return {str(file.relative_to(entry)): file for file in files}
    return {}


def fingerprint(source: str) -> str:
    """Tells whether an outside file or folder changed: a file's contents, a folder's names, sizes, times; of
    a factory, the contents of its module or package."""
    module, colon, rest = source.partition(":")
    if colon and module in _LIBRARIES:
        return f"{module}:{fingerprint(rest)}"
    if colon and (sources := _sources(module)):
        return sha256_json({name: sha256_file(file) for name, file in sources.items()})
    path = Path(source).expanduser()
    if not source:  # an empty path would mean the current folder
        return ""
    if path.is_file():
        return sha256_file(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file())
        return sha256_json(
            [(str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
        )
    return source
