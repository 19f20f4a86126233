"""What crosses the doors between stages: shapes, preprocessing, classes. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preprocessing:
    """From uint8 pixels to the network's input: resize, then ``(pixel * scale - mean) / std``.

    ``mean`` and ``std`` have one value per channel and apply to pixels already multiplied by ``scale``.
    """

    height: int
    width: int
    color: str  # "grey" | "rgb"
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 1 / 255
    mode: str = "bilinear"

    @property
    def channels(self) -> int:
        return 1 if self.color == "grey" else 3


@dataclass(frozen=True)
class ModelSpec:
    """An image classifier's input and output: float32 (N, C, H, W) in, float32 logits (N, classes) out."""

    preprocessing: Preprocessing
    classes: tuple[str, ...]
    input_name: str = "image"
    output_name: str = "logits"

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        p = self.preprocessing
        return (p.channels, p.height, p.width)
