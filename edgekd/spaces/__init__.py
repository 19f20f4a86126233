"""Which students exist; one space a file. A genome is a tuple of integers."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from edgekd.errors import UsageError, unknown_name
from edgekd.spec import LayerShape, ModelSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

Genome = tuple[int, ...]

_TABLE = {
    "mobile-cnn": "edgekd.spaces.mobile_cnn:MobileCnn",
    "inverted-residual": "edgekd.spaces.mobile_cnn:InvertedCnn",
    "residual": "edgekd.spaces.mobile_cnn:ResidualCnn",
    "repvgg": "edgekd.spaces.repvgg:RepVgg",
    "hybrid": "edgekd.spaces.hybrid:Hybrid",
    "cifar-resnet": "edgekd.spaces.cifar_resnet:CifarResNet",
    "nb201": "edgekd.spaces.nb201:Nb201",
}


@dataclass(frozen=True)
class Restrictions:
    """What a card asks of a student: widths are multiples of `channel_multiple`, kernels are among
    `kernels`, and no operator is one of `forbidden_ops`."""

    channel_multiple: int = 8
    kernels: tuple[int, ...] = (3, 5)
    forbidden_ops: tuple[str, ...] = ()


class SearchSpace(Protocol):
    """All students of one family for one input, one task and one card's restrictions."""

    needs: ClassVar[tuple[str, ...]]  # operators without which the space has no student, and kernels as "3x3"

    @property
    def choices(self) -> tuple[int, ...]:
        """How many options each gene has."""

    def layers(self, genome: Genome) -> tuple[LayerShape, ...]:
        """The layers of the deployed network in order, batch norm folded."""

    def describe(self, genome: Genome) -> tuple[str, ...]:
        """One line a block, for people."""

    def build(self, genome: Genome, rng: torch.Generator) -> nn.Module:
        """The network as it is trained, with fresh weights drawn from `rng`; `edgekd.blocks.deployed` gives
        the form that is shipped."""


def search_space(
    name: str,
    spec: ModelSpec,
    channel_multiple: int,
    kernels: tuple[int, ...],
    forbidden_ops: tuple[str, ...] = (),
) -> SearchSpace:
    """The space of this name, restricted by a card.

    Raises:
        UsageError: no such space, or the card forbids what all its students are made of.
    """
    if name not in _TABLE:
        raise UsageError(*unknown_name("search space", name, _TABLE))
    module, _, attribute = _TABLE[name].partition(":")
    space = getattr(importlib.import_module(module), attribute)
    allowed = {f"{size}x{size}" for size in kernels}
    missing = [
        need for need in space.needs if need in forbidden_ops or (need == "3x3" and need not in allowed)
    ]
    if missing:
        raise UsageError(
            f"search space '{name}' is made of {' and '.join(missing)} convolutions, which the target's "
            "card does not allow",
            "choose another space, such as --set search.space=mobile-cnn, which follows the card",
        )
    made: SearchSpace = space(spec, Restrictions(channel_multiple, kernels, forbidden_ops))
    return made


def space_names() -> tuple[str, ...]:
    """Names of all spaces."""
    return tuple(_TABLE)
