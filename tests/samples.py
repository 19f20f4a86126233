"""A tiny task that can be learnt in seconds: four shapes on 16x16 grey images, and a teacher for them."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

SIZE = 16
CLASSES = ("cross", "frame", "rows", "stripes")  # in alphabetical order, as folders are

# The module of a user's teacher: written into a folder and named as `tiny_teacher:build`.
TEACHER_SOURCE = '''
"""A small convolutional classifier of 16x16 grey images."""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, classes=4, width=16):
        super().__init__()
        widths = (1, width, 2 * width, 2 * width)
        layers = []
        for index, (a, b) in enumerate(zip(widths, widths[1:])):
            layers += [nn.Conv2d(a, b, 3, 1 + (index > 0), 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(widths[-1], classes)

    def forward(self, x):
        return self.classifier(torch.flatten(self.pool(self.features(x)), 1))


def build():
    return Net()


def five_classes():
    return Net(5)


def not_a_module():
    return {"weights": 1}


def needs_an_argument(path):
    return Net()
'''


def shapes(count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(N, 16, 16) images and labels: one shape of 7x7 pixels at a random place, with noise."""
    rng = np.random.default_rng(seed)
    patterns = np.zeros((4, 7, 7))
    patterns[0, 3, :] = patterns[0, :, 3] = 1
    patterns[1, [0, -1], :] = patterns[1, :, [0, -1]] = 1
    patterns[2, ::2, :] = 1
    patterns[3, :, ::2] = 1
    labels = np.arange(count) % 4
    images = rng.integers(0, 40, (count, SIZE, SIZE)).astype(np.float64)
    for image, label, (y, x) in zip(images, labels, rng.integers(0, SIZE - 6, (count, 2)), strict=True):
        image[y : y + 7, x : x + 7] += patterns[label] * rng.uniform(150, 210)
    return images.astype(np.uint8), labels.astype(np.int64)


def write_npz(path: Path, train: int = 320, validation: int = 120) -> Path:
    """The four shapes as a file that `--data` reads."""
    x_train, y_train = shapes(train, 0)
    x_test, y_test = shapes(validation, 1)
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test, classes=np.array(CLASSES))
    return path


def write_teacher_module(folder: Path) -> Path:
    path = folder / "tiny_teacher.py"
    path.write_text(TEACHER_SOURCE)
    return path


def train_teacher(model: nn.Module, steps: int = 80) -> nn.Module:
    """Cross-entropy on the four shapes; pixels are divided by 255 and nothing else."""
    images, labels = shapes(640, 2)
    x, y = torch.from_numpy(images)[:, None].float() / 255, torch.from_numpy(labels)
    optimizer = torch.optim.Adam(model.parameters(), 4e-3)
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        index = torch.randint(0, len(y), (64,), generator=order)
        optimizer.zero_grad()
        F.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
    return model.eval()


@dataclass(frozen=True)
class Tiny:
    """Where the tiny task lies: import `tiny_teacher` from `folder`."""

    folder: Path

    @property
    def weights(self) -> Path:
        return self.folder / "teacher.safetensors"

    @property
    def data(self) -> Path:
        return self.folder / "shapes.npz"

    def arguments(self) -> list[str]:
        """Command line options that name teacher and data."""
        return ["--teacher", "tiny_teacher:build", "--weights", str(self.weights), "--data", str(self.data)]


def make_tiny(folder: Path) -> Tiny:
    """Write data, module and trained weights."""
    from safetensors.torch import save_file

    write_npz(folder / "shapes.npz")
    write_teacher_module(folder)
    space: dict[str, Any] = {}
    exec(compile(TEACHER_SOURCE, "tiny_teacher", "exec"), space)
    torch.manual_seed(0)
    model = train_teacher(space["build"]())
    tiny = Tiny(folder)
    save_file(model.state_dict(), tiny.weights)
    return tiny


# A recipe of seconds: the smallest search, two epochs, the shortest measurements.
SHORT = (
    "threads=1", "budget.max_macs_ratio=2.0", "budget.max_latency_ratio=100.0", "search.evaluations=8",
    "search.population=4", "search.batch_size=16", "distill.epochs=10", "distill.views=2",
    "distill.ema_decay=0.8", "distill.learning_rate=0.01", "distill.batch_size=32",
    "data.selection_fraction=0.1", "data.augment=crop", "quantize.epochs=1", "quantize.calibration_images=64",
    "profile.calls=64", "gate.restarts=2", "gate.max_restarts=2", "gate.rounds=10", "gate.calls_per_round=1",
)  # fmt: skip


def settings(*extra: str) -> list[str]:
    """`--set` options of the short recipe, then of `extra`."""
    return [part for text in (*SHORT, *extra) for part in ("--set", text)]


def edgekd_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "edgekd.cli", *arguments]
