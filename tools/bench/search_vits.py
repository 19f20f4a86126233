"""Vision transformers whose accuracy after distillation is published in the table of Auto-Prox (Wei et al.
2024, arXiv:2312.09059): subnets of AutoFormer-Tiny (Chen et al. 2021, arXiv:2107.00651) and PiT (Heo et al.
2021, arXiv:2103.16302). Images of 224 x 224 pixels."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

_HEAD = 64  # channels of a head of AutoFormer


class _Layer(nn.Module):
    """Attention and perceptron before which the tokens are normed; `inner` channels in all heads together."""

    def __init__(self, width: int, heads: int, inner: int, ratio: float) -> None:
        super().__init__()
        self.heads, hidden = heads, int(width * ratio)
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * inner), nn.Linear(inner, width)
        self.perceptron = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        queries, keys, values = (
            self.qkv(self.first(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        shares = torch.softmax(queries @ keys.transpose(2, 3) / queries.shape[-1] ** 0.5, -1)
        x = x + self.project((shares @ values).transpose(1, 2).flatten(2))
        made: Tensor = x + self.perceptron(self.second(x))
        return made


class AutoFormer(nn.Module):
    """Patches of 16 pixels, a class token, and layers that differ in heads and ratio."""

    def __init__(self, arch: dict[str, Any], classes: int) -> None:
        super().__init__()
        width = arch["hidden_dim"]
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.token, self.position = (nn.Parameter(torch.zeros(1, n, width)) for n in (1, 197))
        layers = zip(arch["num_heads"], arch["mlp_ratio"], strict=True)
        self.layers = nn.Sequential(*(_Layer(width, heads, _HEAD * heads, ratio) for heads, ratio in layers))
        self.norm, self.classifier = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.token.expand(len(x), -1, -1), tokens), 1) + self.position
        logits: Tensor = self.classifier(self.norm(self.layers(tokens))[:, 0])
        return logits


class Pit(nn.Module):
    """Patches of 16 pixels every 8, three stages of maps that a depthwise convolution halves."""

    def __init__(self, arch: dict[str, Any], classes: int) -> None:
        super().__init__()
        widths = [arch["base_dim"] * heads for heads in arch["num_heads"]]
        self.patches = nn.Conv2d(3, widths[0], 16, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, widths[0]))
        self.position = nn.Parameter(torch.zeros(1, widths[0], 27, 27))
        shapes = zip(widths, arch["num_heads"], arch["depth"], strict=True)
        self.stages = nn.ModuleList(
            nn.Sequential(*(_Layer(width, heads, width, arch["mlp_ratio"]) for _ in range(depth)))
            for width, heads, depth in shapes
        )
        pairs = list(itertools.pairwise(widths))
        self.pools = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1, groups=math.gcd(a, b)) for a, b in pairs)
        self.tokens = nn.ModuleList(nn.Linear(a, b) for a, b in pairs)
        self.norm, self.classifier = nn.LayerNorm(widths[-1]), nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        maps = self.patches(x) + self.position
        token = self.token.expand(len(x), -1, -1)
        for number, stage in enumerate(self.stages):
            if number:
                maps, token = self.pools[number - 1](maps), self.tokens[number - 1](token)
            side = maps.shape[2:]
            made = stage(torch.cat((token, maps.flatten(2).transpose(1, 2)), 1))
            token, maps = made[:, :1], made[:, 1:].transpose(1, 2).unflatten(2, side)
        logits: Tensor = self.classifier(self.norm(token)[:, 0])
        return logits


def published(path: Path, which: str, count: int) -> tuple[list[str], dict[str, NDArray[np.float64]]]:
    """The first `count` architectures as JSON texts, and accuracies in %: after distillation on three sets,
    and without it on CIFAR-100. `which` is ``autoformer`` or ``pit``."""
    rows = json.loads(path.read_text())[f"gt_{which}"][:count]
    names = {
        "kd": "c100_kd_acc",
        "kd flowers": "flower_kd_acc",
        "kd chaoyang": "chaoyang_kd_acc",
        "plain": "c100_base_acc",
    }
    accuracy = {name: np.array([row[key] for row in rows], np.float64) for name, key in names.items()}
    return [json.dumps(row["arch"]) for row in rows], accuracy


def network(which: str, text: str, classes: int) -> nn.Module:
    """The network of one architecture; its weights come from `edgekd.probing.initialise`."""
    arch = json.loads(text)
    return AutoFormer(arch, classes) if which == "autoformer" else Pit(arch, classes)


def enlarged(images: Tensor) -> Tensor:
    """CIFAR images at the size that these networks were trained on."""
    return F.interpolate(images, size=(224, 224), mode="bilinear", align_corners=False)
