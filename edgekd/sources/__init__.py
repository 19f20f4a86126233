"""Where samples come from; one kind of source a file. Images are decoded once, to uint8 arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Dataset:
    """Labelled images in memory (or a memory map): uint8 (N, H, W, C) and int64 class indices (N,)."""

    train_images: NDArray[np.uint8]
    train_labels: NDArray[np.int64]
    validation_images: NDArray[np.uint8]
    validation_labels: NDArray[np.int64]
    classes: tuple[str, ...]
    description: str  # what and from where, for the report
    sha256: str  # of the decoded arrays and class names
    skipped: tuple[str, ...] = ()  # unreadable files left out on request

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of every image."""
        _, height, width, channels = self.train_images.shape
        return int(height), int(width), int(channels)


def summary(data: Dataset) -> dict[str, Any]:
    """What the record keeps of a data set."""
    return {
        "source": data.description,
        "classes": list(data.classes),
        "train": len(data.train_labels),
        "validation": len(data.validation_labels),
        "shape": list(data.shape),
        "sha256": data.sha256,
        "skipped": list(data.skipped),
    }
