"""Networks that users bring: a factory that builds one, and a file with its weights.

Weights are data: they are read from safetensors or with ``weights_only=True``, and a pickle with code in it
is refused. Code runs only from a factory that the user names.
"""

from __future__ import annotations

import importlib
import inspect
import pickle
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from edgekd.errors import EdgekdError, StudentError, TeacherError


@dataclass(frozen=True)
class Role:
    """What the network is for: `name` stands in messages, `error` is what is raised."""

    name: str
    error: type[EdgekdError]


TEACHER = Role("teacher", TeacherError)
STUDENT = Role("student", StudentError)


def from_factory(source: str, role: Role) -> nn.Module:
    """The module of ``package.module:attribute``: a module, or a callable without required arguments that
    returns one. This runs the user's code.

    Raises:
        TeacherError, StudentError: it cannot be imported, called, or is no module.
    """
    module_name, _, attribute = source.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        made = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        raise role.error(
            f"{role.name} '{source}': {error}",
            "run from the folder that holds the package, or install it",
        ) from error
    except AttributeError as error:
        raise role.error(f"{role.name} '{source}': {error}") from error
    except Exception as error:  # the user's code may raise anything
        raise _raised(source, role, error) from error
    if inspect.isclass(made) or not isinstance(made, nn.Module):
        try:
            made = made()
        except TypeError as error:
            raise role.error(
                f"{role.name} factory '{source}': {error}", "factories are called without arguments"
            ) from error
        except Exception as error:
            raise _raised(source, role, error) from error
    if not isinstance(made, nn.Module):
        raise role.error(
            f"{role.name} factory '{source}' returned {type(made).__name__}, expected torch.nn.Module"
        )
    return made


def _raised(source: str, role: Role, error: Exception) -> EdgekdError:
    """What the user's code raised, with the last line of it that ran."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    module, _, attribute = source.partition(":")
    return role.error(
        f"{role.name} '{source}' raised {type(error).__name__}: {error} "
        f"({last.filename}, line {last.lineno})",
        f"python -c 'import {module} as m; m.{attribute}()' shows the same",
    )


def load_weights(model: nn.Module, path: Path, role: Role) -> None:
    """Fill `model` from a file that has exactly its tensors; floating-point ones become float32.

    Raises:
        TeacherError, StudentError: the file is missing, damaged, holds code, or does not fit.
    """
    state = read_state(path, role)
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise role.error(f"weights {path} do not fit the model: {error}") from error


def read_state(path: Path, role: Role) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file or of a state dict that torch saved.

    Raises:
        TeacherError, StudentError: the file is missing, damaged or holds more than tensors.
    """
    if not path.is_file():
        raise role.error(f"weights {path}: no such file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise role.error(f"weights {path}: {error}", "the file is damaged or not safetensors") from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).split(".")[0]
        raise role.error(
            f"weights {path}: refused, the pickle holds more than tensors ({reason})",
            "store a plain state dict: "
            f"safetensors.torch.save_file(model.state_dict(), '{role.name}.safetensors')",
        ) from error
    except Exception as error:  # bytes that are no pickle make its reader raise anything
        told = f"{type(error).__name__}: {error}"
        raise role.error(f"weights {path}: {told}", "the file is damaged") from error
    for key in ("state_dict", "model", "model_state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise role.error(f"weights {path}: expected a state dict of tensors, got {type(loaded).__name__}")
    return {key.removeprefix("module."): value for key, value in loaded.items()}
