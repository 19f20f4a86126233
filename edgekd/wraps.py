"""What the wraps of a student are made of: branches on its maps, and a second network of its kind."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor, nn

from edgekd.errors import UnsupportedModelError, UsageError
from edgekd.layout import Layout
from edgekd.nets import Outputs
from edgekd.taps import Tapped


def only_wrap(student: nn.Module, method: str, *, head: bool = False) -> Tapped:
    """The tapped student that a method is going to change; with `head`, one whose classifier can be replaced.

    Raises:
        UsageError: another part of the method has changed the student already.
        UnsupportedModelError: the network goes on after its classifier.
    """
    if not isinstance(student, Tapped):
        raise UsageError(
            f"method '{method}' changes the student, and so does a method before it",
            "join it only with methods that leave the student as it is, such as kd or dist",
        )
    if head and not student.layout.ends_in_classifier:
        raise UnsupportedModelError(
            f"method '{method}' replaces the student's classifier, and this network goes on after it",
            "let the student end in a torch.nn.Linear",
        )
    return student


def classifier_of(network: nn.Module | None, method: str) -> nn.Linear:
    """The last layer of a tapped network.

    Raises:
        UnsupportedModelError: there is none that can be seen.
    """
    path = network.layout.classifier if isinstance(network, Tapped) else None
    found = network.model.get_submodule(path) if isinstance(network, Tapped) and path else None
    if not isinstance(found, nn.Linear):
        raise UnsupportedModelError(
            f"method '{method}' reads the classifier of the teacher, which does not show one",
            "bring a torch teacher that ends in a torch.nn.Linear, or choose a method on logits such as kd",
        )
    return found


def frozen(layer: nn.Linear) -> nn.Linear:
    """A copy, without hooks, that is not trained."""
    made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    made.load_state_dict(layer.state_dict())
    return made.requires_grad_(requires_grad=False)


def separable(width_in: int, width_out: int) -> nn.Sequential:
    """Halves a map: twice depthwise 3x3, pointwise, batch norm, ReLU (the shallow branches of Zhang et al.
    2019, arXiv:1905.08094)."""
    return nn.Sequential(
        nn.Conv2d(width_in, width_in, 3, 2, 1, groups=width_in, bias=False),
        nn.Conv2d(width_in, width_in, 1, bias=False),
        nn.BatchNorm2d(width_in),
        nn.ReLU(),
        nn.Conv2d(width_in, width_in, 3, 1, 1, groups=width_in, bias=False),
        nn.Conv2d(width_in, width_out, 1, bias=False),
        nn.BatchNorm2d(width_out),
        nn.ReLU(),
    )


class Branch(nn.Module):
    """An auxiliary classifier on one map: `trunk`, global average pooling, linear layer."""

    def __init__(self, trunk: nn.Module, width: int, outputs: int) -> None:
        super().__init__()
        self.trunk, self.classifier = trunk, nn.Linear(width, outputs)

    def forward(self, map_: Tensor) -> tuple[Tensor, Tensor]:
        """The trunk's map and the logits (N, outputs) of a map (N, C, H, W)."""
        deep = self.trunk(map_)
        return deep, self.classifier(deep.mean((2, 3)))


def trunk_to(maps: Sequence[Tensor], index: int, width: int) -> nn.Module:
    """Separable halvings from the size of map `index` to that of the last one. The width doubles each time
    and ends in `width`; a map of the last one's size gets a 1x1 convolution."""
    shape, last = maps[index].shape, maps[-1].shape
    halvings = max(0, round(math.log2(max(shape[2] / last[2], shape[3] / last[3]))))
    if not halvings:
        return nn.Conv2d(shape[1], width, 1)
    widths = [shape[1] * 2**step for step in range(halvings)] + [width]
    return nn.Sequential(*(separable(*pair) for pair in pairwise(widths)))


class Peers(nn.Module):
    """Two networks of one architecture that learn together; the first is the one that stays."""

    def __init__(self, student: Tapped, seed: int) -> None:
        super().__init__()
        self.student, self.peer = student, drawn_again(student, seed)

    def forward(self, inputs: Tensor) -> Outputs:
        outputs: Outputs = self.student(inputs)
        return replace(outputs, peer=self.peer(inputs)) if self.training else outputs

    def deploy(self) -> nn.Module:
        """The first network."""
        return self.student.deploy()


@torch.no_grad()
def drawn_again(network: Tapped, seed: int) -> Tapped:
    """A copy with other weights of the same distribution: each trainable tensor's values change places, so
    constants stay and every kind of initialisation is kept without knowing it."""
    twin = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(seed)
    for parameter in twin.parameters():
        if parameter.requires_grad:
            order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
            parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return twin


def square(layout: Layout) -> bool:
    """Whether all stages are as high as wide."""
    return all(height == width for _, height, width in layout.shapes)
