"""Tables of layer times that `edgekd targets calibrate` left: one for each target, precision, runtime, space,
input and number of classes, side by side in the cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import msgspec

from edgekd.errors import StorageError, UsageError
from edgekd.files import cache_folder, read_json, write_json
from edgekd.target import Target

_FORMAT = 3


@dataclass(frozen=True)
class Subject:
    """What students are of: a space, "" of one that was not searched, its input (C, H, W), and how many
    classes; 0 in tables of before they were noted."""

    space: str
    input_shape: tuple[int, int, int]
    classes: int

    @property
    def words(self) -> str:
        """For people: "mobile-cnn, 3x32x32, 10 classes"."""
        parts = [self.space, "x".join(map(str, self.input_shape))]
        return ", ".join(filter(None, [*parts, f"{self.classes} classes" if self.classes else ""]))


class Header(msgspec.Struct, frozen=True):
    """What a table was measured on and for; `runtime` has its version, `clock` is "cpu" or "wall"."""

    format: int
    target: str
    precision: str
    runtime: str
    device: str
    clock: str
    space: str
    input: tuple[int, int, int]
    classes: int = 0
    layers_of: str = ""  # device and runtime that the layers were measured on, where not on this one


class StoredTable(msgspec.Struct, frozen=True):
    """One table: its `header`, the `line` from layers to networks with its `validation`, and the layers'
    milliseconds."""

    header: Header
    line: dict[str, float]
    validation: dict[str, Any]
    entries_ms: dict[str, float]
    path: Path = Path()

    @property
    def subject(self) -> Subject:
        return Subject(self.header.space, self.header.input, self.header.classes)

    @property
    def made_for(self) -> tuple[str, str]:
        """Precision and runtime."""
        return self.header.precision, self.header.runtime.partition(" ")[0]

    def serves(self, subject: Subject) -> bool:
        """Whether it is about networks like these; the last layer alone knows the number of classes."""
        own = self.subject
        return own.input_shape == subject.input_shape and subject.space in ("", own.space)

    @property
    def facts(self) -> dict[str, Any]:
        """For the record."""
        networks, tau = (self.validation.get(key) for key in ("networks", "kendall_tau"))
        how = {"layers": len(self.entries_ms) - 1, "networks": networks, "kendall_tau": tau}
        how["layers_of"] = self.header.layers_of
        return asdict(self.subject) | how | {"path": str(self.path)}

    @property
    def words(self) -> str:
        """One line for people."""
        header = self.header
        layers = f"{len(self.entries_ms) - 1} layers{f' of {header.layers_of}' * bool(header.layers_of)}"
        what = f"{header.precision}, {self.subject.words}"
        return f"{what}: {layers} ({self.quality}), {header.runtime}, {self.path}"

    @property
    def quality(self) -> str:
        """How well it predicted networks that its line was not fitted on, in words."""
        error, tau = self.validation.get("median_error_percent"), self.validation.get("kendall_tau")
        return "error not known" if error is None else f"median error {error:.2g} %, tau {tau:.2f}"


def table_path(target: str, precision: str, runtime: str, subject: Subject) -> Path:
    """Where the table of a target is kept."""
    size = "x".join(map(str, subject.input_shape))
    name = f"{precision}-{runtime}-{subject.space}-{size}-{subject.classes}.json"
    return cache_folder() / "calibrated" / target / name


def table_files(target: str) -> list[Path]:
    """The files of a target's tables, the newest first; among them those of versions that kept only one for
    each precision."""
    folder = cache_folder()
    single = [folder / f"calibrated-{target}-{precision}.json" for precision in ("fp32", "int8")]
    found = [*(folder / "calibrated" / target).glob("*.json"), *(path for path in single if path.is_file())]
    return sorted(found, key=lambda path: (-path.stat().st_mtime, path.name))


def read_table(path: Path, target: str) -> StoredTable:
    """A table of a target.

    Raises:
        StorageError: the file is damaged, of another version's form, or about another target.
    """
    hint = f"delete it; edgekd targets calibrate {target} writes it anew"
    stored = read_json(path, hint)
    try:
        table = msgspec.convert(stored, StoredTable)
    except msgspec.ValidationError as error:
        raise StorageError(f"{path}: not a table of layers: {error}", hint) from error
    header = table.header
    if (header.format, header.target) != (_FORMAT, target):
        told = f"format {header.format} of '{header.target}', expected {_FORMAT} of '{target}'"
        raise StorageError(f"{path}: its header says {told}", hint)
    return msgspec.structs.replace(table, path=path)


def stored_tables(target: Target) -> Iterator[StoredTable]:
    """All tables of a target, the newest first.

    Raises:
        StorageError: one cannot be read.
    """
    return (read_table(path, target.id) for path in table_files(target.id))


def nearest_table(target: Target, precision: str, subject: Subject | None) -> StoredTable | None:
    """Of the tables for this precision and the target's runtime the one whose input, then space, then number
    of classes is the subject's; among equals the newest.

    Raises:
        StorageError: a table cannot be read.
    """
    wanted = (precision, target.primary.runtime)
    tables = [table for table in stored_tables(target) if table.made_for == wanted]
    if subject is None:
        return next(iter(tables), None)
    near = [(t.subject.input_shape == subject.input_shape, t.subject.space == subject.space,
             t.subject.classes == subject.classes) for t in tables]  # fmt: skip
    return tables[near.index(max(near))] if tables else None


def lent_table(target: Target, precision: str, subject: Subject) -> StoredTable:
    """The table of another target whose layers serve a subject.

    Raises:
        UsageError: there is none.
    """
    table = nearest_table(target, precision, subject)
    if table is None or not table.serves(subject) or table.header.layers_of:
        raise UsageError(
            f"{target.id} has no table of {precision} layers for {subject.words} that were measured there",
            calibrate_command(target.id, precision, subject),
        )
    return table


def told_tables(target: Target, name: str, precision: str, subject: Subject, used: StoredTable | None) -> str:
    """Which table predicts, or why none of those that there are; "" where there is none. `name` is what the
    user calls the target.

    Raises:
        StorageError: a table cannot be read.
    """
    own = f"{precision} on {target.primary.runtime}"
    if used is None:
        there = dict.fromkeys(" on ".join(table.made_for) for table in stored_tables(target))
        said = f"no table of layers is for {own}, only for {', '.join(there)}" if there else ""
    else:
        said = f"latency by the table of {used.subject.words} ({used.quality}) on {used.header.device}"
        said += "" if used.serves(subject) else f"; none is of {subject.words}, so its error is not known"
    if not said or (used is not None and used.serves(subject)):
        return said
    return f"{said}; {calibrate_command(name, precision, subject)} measures it"


def calibrate_command(name: str, precision: str, subject: Subject) -> str:
    """What measures the table of a subject for the target that the user names so."""
    channels, height, _ = subject.input_shape
    words = ["edgekd targets calibrate", name, f"--precision {precision} --image-size {height}"]
    words += [f"--space {subject.space}"] if subject.space else []
    words += ["--color grey"] if channels == 1 else []
    return " ".join([*words, f"--classes {subject.classes}"])


def store_table(target: Target, subject: Subject, table: Mapping[str, Any]) -> Path:
    """Write it beside the others, in place of one about the same.

    Raises:
        StorageError: the cache cannot be written.
    """
    precision = table["header"]["precision"]
    path = table_path(target.id, precision, target.primary.runtime, subject)
    write_json(path, table)
    single = cache_folder() / f"calibrated-{target.id}-{precision}.json"
    if single.is_file() and _superseded(single, target, subject):
        single.unlink()
    return path


def _superseded(single: Path, target: Target, subject: Subject) -> bool:
    try:
        old = read_table(single, target.id)
    except StorageError:
        return True
    return old.subject == Subject(subject.space, subject.input_shape, 0) and (
        old.made_for[1] == target.primary.runtime
    )
