"""Networks of NAS-Bench-201 (Dong & Yang 2020, arXiv:2001.00326, Fig. 1): one cell, stacked five times at
each of three resolutions. An architecture is its string, such as
``|nor_conv_3x3~0|+|none~0|skip_connect~1|+|avg_pool_3x3~0|nor_conv_1x1~1|nor_conv_3x3~2|``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTHS, CELLS = (16, 32, 64), 5


class _Zero(nn.Module):
    """Gives zeros, through which no gradient passes."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.0


def _relu_conv_norm(width_in: int, width_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(width_in, width_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(nn.ReLU(), conv, nn.BatchNorm2d(width_out))


def _operation(name: str, width: int) -> nn.Module:
    if name in ("nor_conv_1x1", "nor_conv_3x3"):
        return _relu_conv_norm(width, width, int(name[-1]))
    if name == "avg_pool_3x3":
        return nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    return {"none": _Zero, "skip_connect": nn.Identity}[name]()


class _Cell(nn.Module):
    """Four nodes; each is the sum of one operation on every node before it."""

    def __init__(self, text: str, width: int) -> None:
        super().__init__()
        nodes = [[edge.split("~") for edge in node.strip("|").split("|")] for node in text.split("+")]
        self.sources = [[int(source) for _, source in node] for node in nodes]
        self.nodes = nn.ModuleList(
            nn.ModuleList(_operation(name, width) for name, _ in node) for node in nodes
        )

    def forward(self, x: Tensor) -> Tensor:
        made = [x]
        for node, sources in zip(self.nodes, self.sources, strict=True):
            assert isinstance(node, nn.ModuleList)
            parts = [operation(made[source]) for operation, source in zip(node, sources, strict=True)]
            made.append(torch.stack(parts).sum(0))
        return made[-1]


class _Reduction(nn.Module):
    """A residual block of stride 2, its shortcut an average pool and a 1x1 convolution."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_relu_conv_norm(width_in, width_out, 3, 2), *_relu_conv_norm(width_out, width_out, 3)
        )
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(width_in, width_out, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        shortcut, body = self.shortcut(x), self.body(x)
        made: Tensor = shortcut + body
        return made


class Nb201(nn.Module):
    """(N, classes) logits of normalised (N, 3, 32, 32) images."""

    def __init__(self, arch: str, classes: int) -> None:
        super().__init__()
        body: list[nn.Module] = [nn.Conv2d(3, WIDTHS[0], 3, padding=1, bias=False), nn.BatchNorm2d(WIDTHS[0])]
        for stage, width in enumerate(WIDTHS):
            if stage:
                body.append(_Reduction(WIDTHS[stage - 1], width))
            body += [_Cell(arch, width) for _ in range(CELLS)]
        self.body = nn.Sequential(*body, nn.BatchNorm2d(WIDTHS[-1]), nn.ReLU())
        self.classifier = nn.Linear(WIDTHS[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.body(x).mean((2, 3)))
        return logits
