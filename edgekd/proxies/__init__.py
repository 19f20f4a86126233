"""Training-free scores of an untrained student beside its teacher; one score a file."""

from __future__ import annotations

import importlib
from typing import Protocol

from torch import Tensor

from edgekd.errors import UsageError, unknown_name
from edgekd.nets import Outputs

_TABLE = {"diswot": "edgekd.proxies.diswot:DisWot"}


class Proxy(Protocol):
    """A score; higher is better. Its terms may differ in scale by orders of magnitude."""

    def terms(self, student: Outputs, teacher: Outputs, labels: Tensor) -> dict[str, float]:
        """Named parts of the score for one batch; a part whose inputs are missing is left out."""


def proxy(name: str) -> Proxy:
    """The score of this name.

    Raises:
        UsageError: no such score.
    """
    if name not in _TABLE:
        raise UsageError(*unknown_name("search score", name, _TABLE))
    module, _, attribute = _TABLE[name].partition(":")
    made: Proxy = getattr(importlib.import_module(module), attribute)()
    return made


def proxy_names() -> tuple[str, ...]:
    """Names of all scores."""
    return tuple(_TABLE)
