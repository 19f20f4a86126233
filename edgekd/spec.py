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


@dataclass(frozen=True)
class LayerShape:
    """One executed layer: what a cost model needs. Maps are square; sizes are in pixels."""

    op: str  # "conv" | "linear" | "add" | "pool" (of the whole map) | "avgpool" | "attention"
    channels_in: int
    channels_out: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    size_in: int = 1
    relu: bool = False

    @property
    def size_out(self) -> int:
        return 1 if self.op in ("linear", "pool") else -(-self.size_in // self.stride)

    @property
    def macs(self) -> int:
        if self.op == "attention":  # queries times keys, and weights times values; `groups` are the heads
            return 2 * self.channels_in * self.size_in**4
        if self.op not in ("conv", "linear"):
            return 0
        return self.channels_out * (self.channels_in // self.groups) * self.kernel**2 * self.size_out**2

    @property
    def parameters(self) -> int:
        """Weights and biases after batch norm is folded."""
        if self.op not in ("conv", "linear"):
            return 0
        return self.channels_out * (self.channels_in // self.groups) * self.kernel**2 + self.channels_out

    @property
    def values_moved(self) -> int:
        """Elements read and written: inputs, output, weights, and what attention keeps in between."""
        reads = {"add": 2, "attention": 3}.get(self.op, 1)
        maps = reads * self.channels_in * self.size_in**2 + self.channels_out * self.size_out**2
        return maps + self.parameters + (2 * self.groups * self.size_in**4 if self.op == "attention" else 0)
