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

    @property
    def narrow(self) -> bool:
        """Whether it has fewer than 256 codes, so that a container of 8 bits does not clip for it."""
        return self.qmax - self.qmin < 255

    def shifted(self, signed: bool) -> Grid:
        """The same real values in int8 (`signed`) or uint8: zero point and bounds move together, by 128 where
        the codes do not fit as they are."""
        low, high = (-128, 127) if signed else (0, 255)
        offset = 0 if low <= self.qmin and self.qmax <= high else (-128 if signed else 128)
        return Grid(self.scale, self.zero_point + offset, self.qmin + offset, self.qmax + offset)

    @property
    def centred(self) -> Grid:
        """The same real values with zero point 0, in int8, where that is the middle of 256 codes."""
        middle = not self.narrow and self.zero_point - self.qmin == 128
        return self.shifted(signed=True) if middle else self


@dataclass(frozen=True)
class QuantScheme:
    """`symmetric`: int8 activations with zero point 0 everywhere (TensorRT). Otherwise a tensor that is never
    negative starts its grid at zero, so that a ReLU is absorbed by clamping, and any other is centred.
    `weight_max`: largest weight code; 63 keeps pairwise int16 sums from saturating on CPUs without VNNI.
    `learn_offsets`: grids of tensors with negative values lie anywhere around zero, and training moves them.
    """

    dialect: str
    symmetric: bool
    weight_max: int
    quantize_output: bool
    learn_offsets: bool = False

    def grid(self, low: float, high: float, bits: int = 8) -> Grid:
        """The activation grid for an observed range. One of fewer than 8 bits lies in a container of 8, where
        a tensor that is never negative has all of its codes from zero on."""
        reach, last, half = max(-low, high, 1e-8), 2**bits - 1, 2 ** (bits - 1)
        if low >= 0 and not (self.symmetric and bits == 8):
            return Grid(max(high, 1e-8) / last, 0, 0, last)
        if self.symmetric:
            return Grid(reach / (half - 1), 0, -half, half - 1)
        if self.learn_offsets:
            scale = max((max(high, 0.0) - low) / last, 1e-8)
            return Grid(scale, min(max(round(-low / scale), 0), last), 0, last)
        return Grid(reach / (half - 1), half, 0, last)


def scheme_for(target: Target, learn_offsets: bool = False) -> QuantScheme:
    """The scheme of a card.

    Raises:
        RecipeError: the card asks for a form that no runtime of this version executes; or offsets cannot be
            learnt, because its runtime has none.
    """
    quant = target.quant
    if quant.weights.dtype != "int8" or not quant.weights.symmetric:
        raise RecipeError(
            f"target '{target.id}': quant.weights: expected symmetric int8, got "
            f"{'symmetric' if quant.weights.symmetric else 'asymmetric'} {quant.weights.dtype}"
        )
    symmetric = quant.activations.symmetric and quant.activations.dtype == "int8"
    if symmetric and learn_offsets:
        raise RecipeError(
            f"quantize.learn_offsets: the dialect '{quant.dialect}' of target '{target.id}' has zero points "
            "of 0 only",
            "leave it out; scales are learnt in every dialect",
        )
    return QuantScheme(
        dialect=quant.dialect,
        symmetric=symmetric,
        weight_max=63 if quant.weights.reduce_range else 127,
        quantize_output=not symmetric,
        learn_offsets=learn_offsets,
    )
