"""The shipped demonstration images: Fashion-MNIST, 12,000 for training and 3,000 for validation."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from edgekd.errors import DataError
from edgekd.files import data_folder, sha256_file
from edgekd.sources import arrays
from edgekd.sources.dataset import Dataset, Request


def demo_folder() -> Path:
    """The folder with ``card.toml``, ``images.npz`` and ``teacher.safetensors``."""
    return data_folder("calibration") / "fashion_mnist"


def demo_card() -> dict[str, Any]:
    """The card of the demonstration set: source, licence, counts, classes, digests, teacher.

    Raises:
        DataError: the card is missing or not TOML.
    """
    path = demo_folder() / "card.toml"
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}", "reinstall edgekd") from error


def load(request: Request) -> Dataset:
    """Read the shipped images.

    Raises:
        DataError: the file is missing or is not the one its card describes.
    """
    card, path = demo_card(), demo_folder() / "images.npz"
    if not path.is_file() or sha256_file(path) != card["sha256"]["images.npz"]:
        raise DataError(f"{path} is missing or not the file its card describes", "reinstall edgekd")
    train, validation = card["counts"]["train"], card["counts"]["validation"]
    where = f"{card['name']} ({train} + {validation} images, {card['licence']})"
    return arrays.from_mapping(arrays.read_archive(path), where, request, tuple(card["classes"]))
