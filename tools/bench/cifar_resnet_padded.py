"""CIFAR ResNets whose shortcuts have no weights: every second pixel, zeros for the new channels (option A of
He et al. 2016, arXiv:1512.03385, section 4.2), with the names of akamaster/pytorch_resnet_cifar10."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class _Block(nn.Module):
    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        self._stride, self._zeros = stride, (width_out - width_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self._stride > 1 or self._zeros:
            x = F.pad(x[:, :, :: self._stride, :: self._stride], (0, 0, 0, 0, self._zeros, self._zeros))
        return F.relu(y + x)


class PaddedResNet(nn.Module):
    """(N, classes) logits of normalised (N, 3, 32, 32) images; `blocks` a stage, 3 for ResNet-20."""

    def __init__(self, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        width = 16
        for stage, wider in enumerate((16, 32, 64)):
            layers = []
            for index in range(blocks):
                layers.append(_Block(width, wider, 2 if stage and not index else 1))
                width = wider
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.linear = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in (1, 2, 3):
            x = self.get_submodule(f"layer{stage}")(x)
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits
