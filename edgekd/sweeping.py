"""One teacher for several targets: one search and one training where their cards allow the same students."""

from __future__ import annotations

import os
import platform
import secrets
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from edgekd.errors import DeviceError, EdgekdError, StorageError, UsageError
from edgekd.executor import Workers
from edgekd.files import append_text, write_text
from edgekd.recipe import Recipe
from edgekd.run import Reporter
from edgekd.target import Target, find_target

_LIBRARIES = ("timm", "torchvision", "transformers")  # forms of a teacher that are no module of the user's


@dataclass(frozen=True)
class Swept:
    """What became of one target. `taken_from` names the target whose float student it shares."""

    target: str
    folder: Path
    taken_from: str
    record: dict[str, Any] | None
    error: EdgekdError | None = None

    def row(self) -> dict[str, Any]:
        """For a table and for scripts."""
        found: dict[str, Any] = {
            "target": self.target,
            "folder": str(self.folder),
            "student_of": self.taken_from,
        }
        if self.record is None:
            error = self.error
            return found | {"verdict": "ERROR", "error": None if error is None else error.message}
        shipped = (self.record.get("gate") or {}).get("shipped")
        rows = {row["id"]: row for row in self.record["metrics"].get("variants", [])}
        told = {key: rows.get(shipped, {}).get(key) for key in ("accuracy", "size_mib", "latency_p50_ms")}
        return found | {"verdict": self.record["verdict"], "shipped": shipped, **told}


@dataclass(frozen=True)
class _Job:
    """The run of one target. `others`: those that wait for its float student. `start`: the folder that paths
    of the recipe are relative to."""

    card: Target
    recipe: Recipe
    folder: Path
    taken_from: str
    start: Path
    others: tuple[_Job, ...] = ()


def sweep(recipe: Recipe, targets: Sequence[str], folder: Path, reporter: Reporter) -> list[Swept]:
    """Compress for each target, in a folder of its own below `folder`; the same call again resumes.

    A target takes the float student of an earlier one of the sweep whose card restricts students alike
    (channel multiple, kernels, forbidden operators); it is then neither searched nor trained again. A target
    that fails is told in its row, and the others go on. With an executor of several processes the targets
    run side by side, those that share a student after the one that makes it; each tells its progress in
    ``progress.log`` of its folder. On a cluster a target runs on the worker that is its device, if there is
    one.

    Raises:
        UsageError: a target is unknown, or named twice.
        StorageError: a worker of the cluster does not see `folder`.
    """
    cards = [find_target(name) for name in targets]
    ids = [card.id for card in cards]
    if len(set(ids)) != len(ids) or not ids:
        raise UsageError(f"--targets names a target twice, or none: {', '.join(ids) or 'none'}")
    found: dict[str, Swept] = {}
    with Workers(recipe.executor) as workers:
        if workers.cluster:
            _check_shared(workers, folder)
        devices = workers.devices()

        def then(job: _Job, swept: Swept | None) -> list[_Job]:
            found[job.card.id] = swept or _died(job)
            if swept is None or swept.record is None:
                return _first(job.others)
            if not workers.here:
                reporter.say(f"target {job.card.id}: {swept.record['verdict']}")
            return [_follower(other, job) for other in job.others]

        def work(job: _Job) -> Swept:
            return _compress(job, reporter)

        first = _jobs(recipe, list(zip(targets, cards, strict=True)), folder.resolve())
        if not workers.here:
            reporter.say(f"progress is told in {folder}/TARGET/progress.log")
        for job, _ in workers.run(
            work if workers.here else _apart, first, then=then, needs=lambda job: _device(job.card, devices)
        ):
            if (error := found[job.card.id].error) is not None:
                reporter.say(f"target {job.card.id} failed: {error.message}")
    return [found[name] for name in ids]


def _jobs(recipe: Recipe, wanted: list[tuple[str, Target]], folder: Path) -> list[_Job]:
    """One job for each kind of restriction, the others of its kind behind it."""
    kinds: dict[str, list[_Job]] = {}
    for name, card in wanted:
        own = msgspec.structs.replace(recipe, target=name, executor="local")
        job = _Job(card, own, folder / card.id, card.id, Path.cwd())
        kinds.setdefault(_restrictions(card), []).append(job)
    return [job for kind in kinds.values() for job in _first(kind)]


def _first(jobs: Sequence[_Job]) -> list[_Job]:
    return [replace(jobs[0], others=tuple(jobs[1:]))] if jobs else []


def _follower(job: _Job, giver: _Job) -> _Job:
    return replace(job, recipe=_with_student_of(job.recipe, giver.folder), taken_from=giver.card.id)


def _device(card: Target, devices: Sequence[str]) -> str:
    """The resource of the cluster that is the card's device; "" where no worker has it."""
    return next((name for name in (card.id, *card.aliases) if name in devices), "")


def _compress(job: _Job, reporter: Reporter) -> Swept:
    from edgekd.pipeline import run_pipeline

    own = job.taken_from == job.card.id
    what = "a search and a training of its own" if own else f"the float student of {job.taken_from}"
    reporter.say(f"target {job.card.id}: {what}")
    _lend_logits(job.folder)
    try:
        record = run_pipeline(job.recipe, job.folder, reporter)
    except EdgekdError as error:
        return Swept(job.card.id, job.folder, job.taken_from, None, error)
    return Swept(job.card.id, job.folder, job.taken_from, record)


def _lend_logits(folder: Path) -> None:
    """The teacher's logits that other targets have stored, as links: each file says which teacher, data and
    views it belongs to, and is not used for others."""
    cache = folder / "cache"
    for path in sorted(folder.parent.glob("*/cache/logits-*.safetensors")):
        if path.parent != cache:
            cache.mkdir(parents=True, exist_ok=True)
            with suppress(OSError):  # it is there already, or the file system has no links: it is computed
                (cache / path.name).hardlink_to(path)


def _apart(job: _Job) -> Swept:
    """In another process: from the folder where the sweep was started, with the user's modules read anew."""
    os.chdir(job.start)
    factories = (job.recipe.teacher.source, *job.recipe.teacher.others, job.recipe.search.student)
    own = {text.partition(":")[0].partition(".")[0] for text in factories if ":" in text}
    for name in [name for name in sys.modules if name.partition(".")[0] in own - {*_LIBRARIES, "edgekd"}]:
        del sys.modules[name]  # a worker of a cluster may have those of an earlier sweep
    log = _Log(job.folder / "progress.log")
    log.say(f"process {os.getpid()} on {platform.node()}")
    return _compress(job, log)


class _Log:
    """A reporter into a file, for a run whose console is elsewhere."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def say(self, text: str) -> None:
        append_text(self._path, text + "\n")

    def step(self, what: str, done: int, total: int, note: str = "") -> None: ...


def _died(job: _Job) -> Swept:
    error = DeviceError(
        f"the process that compressed for {job.card.id} died twice",
        f"its last words: {job.folder}/progress.log; too little memory? The same command resumes",
    )
    return Swept(job.card.id, job.folder, job.taken_from, None, error)


def _check_shared(workers: Workers, folder: Path) -> None:
    """Raises a StorageError naming the workers that do not see the folder."""
    marker = folder.resolve() / f".sweep-{secrets.token_hex(8)}"
    write_text(marker, "")
    try:
        blind = workers.blind(marker)
    finally:
        marker.unlink()
    if blind:
        raise StorageError(
            f"these workers do not see {folder.resolve()}: {', '.join(blind)}",
            "a sweep needs --out, the data and the teacher in a file system that all workers share",
        )


def _restrictions(card: Target) -> str:
    """What decides which students a card allows, as a key."""
    space = card.space
    return repr((float(space.channel_multiple.value), sorted(space.kernels), sorted(space.forbidden_ops)))


def _with_student_of(recipe: Recipe, folder: Path) -> Recipe:
    search = msgspec.structs.replace(recipe.search, student=str(folder / "2-student.json"))
    distill = msgspec.structs.replace(recipe.distill, weights=str(folder / "3-distilled.safetensors"))
    return msgspec.structs.replace(recipe, search=search, distill=distill)
