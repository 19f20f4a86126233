"""Which grid a target's runtime executes in integers, derived from its card."""

from __future__ import annotations

from dataclasses import dataclass

from edgekd.errors import RecipeError
from edgekd.target import Target


@dataclass(frozen=True)
class Grid:
    """An affine integer grid: ``real = scale * (q - zero_point)``, q in [qmin, qmax]."""

    scale: float
    zero_point: int
    qmin: int
    qmax: int

    def shifted(self, signed: bool) -> Grid:
        """The same real values on an int8 (`signed`) or uint8 grid: zero point and bounds move together."""
        offset = (-128 if signed else 0) - self.qmin
        return Grid(self.scale, self.zero_point + offset, self.qmin + offset, self.qmax + offset)


@dataclass(frozen=True)
class QuantScheme:
    """`symmetric`: int8 activations with zero point 0 everywhere (TensorRT). Otherwise a tensor that is never
    negative starts its grid at zero, so that a ReLU is absorbed by clamping, and any other is centred.
    `weight_max`: largest weight code; 63 keeps pairwise int16 sums from saturating on CPUs without VNNI.
    """

    dialect: str
    symmetric: bool
    weight_max: int
    quantize_output: bool

    def grid(self, low: float, high: float) -> Grid:
        """The activation grid for an observed range."""
        reach = max(-low, high, 1e-8)
        if self.symmetric:
            return Grid(reach / 127, 0, -128, 127)
        if low >= 0:
            return Grid(max(high, 1e-8) / 255, 0, 0, 255)
        return Grid(reach / 127, 128, 0, 255)


def scheme_for(target: Target) -> QuantScheme:
    """The scheme of a card.

    Raises:
        RecipeError: the card asks for a form that no runtime of this version executes.
    """
    quant = target.quant
    if quant.weights.dtype != "int8" or not quant.weights.symmetric:
        raise RecipeError(
            f"target '{target.id}': quant.weights: expected symmetric int8, got "
            f"{'symmetric' if quant.weights.symmetric else 'asymmetric'} {quant.weights.dtype}"
        )
    symmetric = quant.activations.symmetric and quant.activations.dtype == "int8"
    return QuantScheme(
        dialect=quant.dialect,
        symmetric=symmetric,
        weight_max=63 if quant.weights.reduce_range else 127,
        quantize_output=not symmetric,
    )
