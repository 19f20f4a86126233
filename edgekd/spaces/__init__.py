"""Which students exist; one space a file. A genome is a tuple of integers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol

from edgekd.errors import UsageError, unknown_name
from edgekd.spec import LayerShape, ModelSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

Genome = tuple[int, ...]

_TABLE = {"mobile-cnn": "edgekd.spaces.mobile_cnn:MobileCnn"}


class SearchSpace(Protocol):
    """All students of one family for one input, one task and one card's restrictions."""

    @property
    def choices(self) -> tuple[int, ...]:
        """How many options each gene has."""

    def layers(self, genome: Genome) -> tuple[LayerShape, ...]:
        """The network's layers in order, batch norm folded."""

    def describe(self, genome: Genome) -> tuple[str, ...]:
        """One line a block, for people."""

    def build(self, genome: Genome, rng: torch.Generator) -> nn.Module:
        """The network with fresh weights drawn from `rng`."""


def search_space(name: str, spec: ModelSpec, channel_multiple: int, kernels: tuple[int, ...]) -> SearchSpace:
    """The space of this name, restricted by a card.

    Raises:
        UsageError: no such space.
    """
    if name not in _TABLE:
        raise UsageError(*unknown_name("search space", name, _TABLE))
    module, _, attribute = _TABLE[name].partition(":")
    made: SearchSpace = getattr(importlib.import_module(module), attribute)(spec, channel_multiple, kernels)
    return made


def space_names() -> tuple[str, ...]:
    """Names of all spaces."""
    return tuple(_TABLE)
