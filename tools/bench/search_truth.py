"""Ground truths of `search_rank.py`: architectures whose accuracy after full training is published."""

from __future__ import annotations

import csv
import importlib.util
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import search_vits
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgekd.blocks import with_weights
from edgekd.spaces import nb201 as cells
from edgekd.spec import LayerShape, Preprocessing
from edgekd.tasks.classification import normalise

CLASSES, WIDTHS = 100, (16, 32, 64)
VITS = ("autoformer", "pit")
CIFAR = Preprocessing(32, 32, "rgb", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761))


@dataclass(frozen=True)
class Truth:
    """Architectures, how to build them, and their accuracy in % by what they were trained for."""

    name: str
    architectures: list[str]
    build: Callable[[str], nn.Module]
    accuracy: dict[str, NDArray[np.float64]]


class _Basic(nn.Module):
    """He et al. 2016 (arXiv:1512.03385, Fig. 2); a 1x1 convolution where the shape changes."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False), nn.BatchNorm2d(width_out), nn.ReLU(),
            nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False), nn.BatchNorm2d(width_out),
        )  # fmt: skip
        same = stride == 1 and width_in == width_out
        self.shortcut: nn.Module = nn.Identity()
        if not same:
            conv = nn.Conv2d(width_in, width_out, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(width_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class _ResNet(nn.Module):
    def __init__(self, depths: tuple[int, ...]) -> None:
        super().__init__()
        body: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        width = 16
        for stage, (depth, wider) in enumerate(zip(depths, WIDTHS, strict=True)):
            for index in range(depth):
                body.append(_Basic(width, wider, 2 if stage and not index else 1))
                width = wider
        self.body = nn.Sequential(*body)
        self.classifier = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.body(x).mean((2, 3)))
        return logits


def cifar_resnet(code: str) -> nn.Module:
    """``135``: basic blocks of the three stages of 16, 32 and 64 channels."""
    return _ResNet(tuple(int(digit) for digit in code))


def resnets(path: Path) -> Truth:
    """The 64 CIFAR-100 ResNets of DisWOT: rows ``depth_code,kd_accuracy,vanilla_accuracy``."""
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    accuracy = {
        name: np.array([float(row[f"{name}_accuracy"]) for row in rows]) for name in ("kd", "vanilla")
    }
    return Truth("resnets", [row["depth_code"] for row in rows], cifar_resnet, accuracy)


def nb201(path: Path, count: int, seed: int) -> Truth:
    """`count` random architectures of NAS-Bench-201 with their test accuracy after 200 epochs: a ``.npz``
    with ``arch`` and one array for each data set."""
    with np.load(path) as file:
        accuracy = {name: file[name].astype(np.float64) for name in file.files if name != "arch"}
    with zipfile.ZipFile(path) as archive, archive.open("arch.npy") as stream:
        names = [str(name) for name in _texts(stream)]
    rows = np.random.default_rng(seed).permutation(len(names))[:count]
    chosen = {name: values[rows] for name, values in accuracy.items()}
    return Truth("nb201", [names[row] for row in rows], nb201_network, chosen)


def vits(path: Path, which: str, count: int) -> Truth:
    """Transformers of Auto-Prox's table."""
    names, accuracy = search_vits.published(path, which, count)
    return Truth(which, names, lambda text: search_vits.network(which, text, CLASSES), accuracy)


def nb201_network(text: str, classes: int = CLASSES) -> nn.Module:
    """As published, with the edges that no path to the logits needs."""
    stem = LayerShape("conv", 3, cells.WIDTHS[0], 3, size_in=32)
    body = cells.network_body(stem, cells.edges_of(text), cells.WIDTHS)
    return with_weights(body, cells.WIDTHS[-1], classes, torch.Generator())


class _ArrayOfTexts(pickle.Unpickler):
    """Reads an array of texts and refuses any other code."""

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith(("numpy.core.", "numpy._core.", "numpy")) and name in (
            "_reconstruct", "ndarray", "dtype",
        ):  # fmt: skip
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"unexpected {module}.{name} in an array of texts")


def _texts(stream: Any) -> NDArray[np.object_]:
    """A stored array of Python texts, which numpy keeps as a pickle."""
    opened: BinaryIO = stream
    if np.lib.format.read_magic(opened) == (1, 0):
        np.lib.format.read_array_header_1_0(opened)
    else:
        np.lib.format.read_array_header_2_0(opened)
    found: NDArray[np.object_] = _ArrayOfTexts(opened).load()
    return found


def images(folder: Path, name: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """`count` normalised images of ``NAME.npz`` in `folder`, drawn by a seed, and their int64 labels.

    `folder` holds ``load_shared.py`` too, which unpacks the file.
    """
    spec = importlib.util.spec_from_file_location("load_shared", folder / "load_shared.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(folder / "load_shared.py")
    loader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    pixels, labels, _ = loader.images(folder / f"{name}.npz")
    rows = np.random.default_rng(seed).permutation(len(pixels))[:count]
    channels_first = np.ascontiguousarray(pixels[rows].transpose(0, 3, 1, 2))
    inputs = normalise(torch.from_numpy(channels_first), CIFAR)
    return inputs, torch.from_numpy(labels[rows].astype(np.int64))
