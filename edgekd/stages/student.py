"""Which network the student is: what ``2-student.json`` and `search.student` say."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edgekd.errors import StudentError, UsageError, unknown_name
from edgekd.files import sha256_json
from edgekd.recipe import Recipe
from edgekd.run import fingerprint
from edgekd.spaces import space_names

_FORMS = "use package.module:factory, or the 2-student.json of an earlier run"


class Blueprint(msgspec.Struct, frozen=True, kw_only=True):
    """A genome of a space, with the restrictions under which it was found (0 and empty: those of the card),
    or a factory of the user's. Other keys of the file are for readers."""

    space: str = ""
    genome: tuple[int, ...] = ()
    channel_multiple: int = 0
    kernels: tuple[int, ...] = ()
    forbidden_ops: tuple[str, ...] = ()
    factory: str = ""


def given_blueprint(source: str) -> Blueprint:
    """The blueprint that `search.student` names.

    Raises:
        StudentError: it has none of the known forms, or the file cannot be read.
    """
    path = Path(source).expanduser()
    if path.suffix == ".json" or path.is_file():
        return read_blueprint(path)
    module, colon, attribute = source.partition(":")
    if not (module and colon and attribute):
        raise StudentError(f"student '{source}' is none of the known forms", _FORMS)
    return Blueprint(factory=source)


def read_blueprint(path: Path) -> Blueprint:
    """What a ``2-student.json`` holds.

    Raises:
        StudentError: the file is missing, malformed, or names neither a genome nor a factory.
    """
    try:
        made = msgspec.json.decode(path.read_bytes(), type=Blueprint)
    except OSError as error:
        raise StudentError(f"student {path}: {error.strerror}", _FORMS) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StudentError(f"student {path}: {error}", _FORMS) from error
    if bool(made.factory) == bool(made.space and made.genome):
        raise StudentError(
            f"student {path}: expected either 'space' and 'genome', or 'factory' alone", _FORMS
        )
    if made.space and made.space not in space_names():
        message, hint = unknown_name("search space", made.space, space_names())
        raise StudentError(f"student {path}: {message}", hint)
    return made


def check_given(recipe: Recipe) -> dict[str, str]:
    """Digests of the student and of the weights that a recipe brings, empty for what it leaves out.

    They follow contents, not names: the blueprint a file holds, the source of a factory, a file's bytes.

    Raises:
        UsageError: there are weights, but no student to put them into.
        StudentError: the student cannot be read, or the weights are no file.
    """
    student, weights = recipe.search.student, recipe.distill.weights
    if weights and not student:
        raise UsageError(
            f"the weights {weights} need the student they belong to",
            "add --student package.module:factory, or --student with the 2-student.json of their run",
        )
    if weights and not Path(weights).expanduser().is_file():
        raise StudentError(f"weights {weights}: no such file")
    blueprint = given_blueprint(student) if student else None
    return {
        "student": "" if blueprint is None else sha256_json([blueprint, fingerprint(blueprint.factory)]),
        "weights": fingerprint(weights),
    }
