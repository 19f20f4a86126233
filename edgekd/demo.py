"""The built-in demonstration: Fashion-MNIST images and the teacher trained on them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgekd.sources.demo import demo_folder

__all__ = ["DEMO", "DemoTeacher", "demo_folder"]

DEMO = "demo"


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (He et al. 2016, arXiv:1512.03385, Fig. 2)."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or width_in != width_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width_out, 1, stride, bias=False), nn.BatchNorm2d(width_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DemoTeacher(nn.Module):
    """A residual network of 0.7 M parameters for 28x28 grey images, 10 classes."""

    def __init__(self, widths: tuple[int, ...] = (32, 64, 128), blocks: int = 2, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(1, widths[0], 3, 1, 1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        ]
        width_in = widths[0]
        for stage, width in enumerate(widths):
            for block in range(blocks):
                layers.append(_BasicBlock(width_in, width, 2 if stage > 0 and block == 0 else 1))
                width_in = width
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(width_in, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(torch.flatten(self.pool(self.features(x)), 1))
        return logits
