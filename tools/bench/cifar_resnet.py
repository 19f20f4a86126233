"""CIFAR ResNets with basic blocks and 1x1-convolution shortcuts (He et al. 2016, arXiv:1512.03385, section
4.2), with the parameter names of the stored CIFAR-100 teachers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

# name: blocks a stage, widths of stem and stages
ARCHITECTURES: dict[str, tuple[int, tuple[int, int, int, int]]] = {
    "resnet8": (1, (16, 16, 32, 64)),
    "resnet8x0.5": (1, (8, 8, 16, 32)),
    "resnet8x4": (1, (32, 64, 128, 256)),
    "resnet20": (3, (16, 16, 32, 64)),
    "resnet32x4": (5, (32, 64, 128, 256)),
    "resnet56": (9, (16, 16, 32, 64)),
}


class _Block(nn.Module):
    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.b1 = nn.BatchNorm2d(width_out)
        self.c2 = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        self.b2 = nn.BatchNorm2d(width_out)
        self.d: nn.Module = nn.Identity()
        if stride > 1 or width_in != width_out:
            shortcut = nn.Conv2d(width_in, width_out, 1, stride, bias=False)
            self.d = nn.Sequential(shortcut, nn.BatchNorm2d(width_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.b2(self.c2(F.relu(self.b1(self.c1(x))))) + self.d(x))


class CifarResNet(nn.Module):
    """(N, classes) logits of normalised (N, 3, 32, 32) images."""

    def __init__(self, name: str, classes: int = 100) -> None:
        super().__init__()
        blocks, (width, *widths) = ARCHITECTURES[name]
        self.c = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.b = nn.BatchNorm2d(width)
        layers = []
        for stage, wider in enumerate(widths):
            for index in range(blocks):
                layers.append(_Block(width, wider, 2 if stage and not index else 1))
                width = wider
        self.l = nn.Sequential(*layers)
        self.f = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.l(F.relu(self.b(self.c(x))))
        logits: Tensor = self.f(maps.mean((2, 3)))
        return logits
