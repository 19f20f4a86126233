"""What students of several search spaces are made of: blocks, their costs, and how they are deployed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edgekd.nets import Outputs
from edgekd.spec import LayerShape


class Reparameterised(nn.Module, ABC):
    """A block that is trained in another form than it is deployed in."""

    @abstractmethod
    def folded(self) -> nn.Module:
        """The block of inference, which computes what this one computes in eval mode."""


def deployed(model: nn.Module) -> nn.Module:
    """The network with every such block folded, in place. A network without one stays as it is."""
    if isinstance(model, Reparameterised):
        return model.folded()
    for name, child in list(model.named_children()):
        made = deployed(child)
        if made is not child:
            model.add_module(name, made)
    return model


@dataclass(frozen=True)
class Block:
    """A mobile block: `kind` is ``inverted`` or ``residual``. Maps are square."""

    kind: str
    width_in: int
    width_out: int
    kernel: int
    stride: int
    expansion: int
    size_in: int

    @property
    def shortcut(self) -> bool:
        return self.stride == 1 and self.width_in == self.width_out

    @property
    def size_out(self) -> int:
        return -(-self.size_in // self.stride)

    def layers(self) -> list[LayerShape]:
        """What is executed, batch norm folded."""
        if self.kind == "inverted":
            hidden = self.width_in * self.expansion
            made = [
                LayerShape("conv", self.width_in, hidden, size_in=self.size_in, relu=True),
                LayerShape("conv", hidden, hidden, self.kernel, self.stride, hidden, self.size_in, relu=True),
                LayerShape("conv", hidden, self.width_out, size_in=self.size_out),
            ]
        else:
            first = (self.width_in, self.width_out, self.kernel, self.stride, 1, self.size_in)
            second = (self.width_out, self.width_out, self.kernel, 1, 1, self.size_out)
            made = [
                LayerShape("conv", *first, relu=True),
                LayerShape("conv", *second, relu=not self.shortcut),
            ]
        if self.shortcut:
            width, relu = self.width_out, self.kind == "residual"
            made.append(LayerShape("add", width, width, size_in=self.size_out, relu=relu))
        return made

    def describe(self) -> str:
        """One line for people."""
        expansion = f", expansion {self.expansion}" if self.kind == "inverted" else ""
        return (
            f"{self.kind} {self.kernel}x{self.kernel}, {self.width_in} to {self.width_out} "
            f"channels, stride {self.stride}{expansion}"
        )

    def build(self) -> nn.Module:
        """The block; its weights come from `with_weights`."""
        return _InvertedResidual(self) if self.kind == "inverted" else _Residual(self)


class _Conv(nn.Conv2d):
    """Without weights of its own, which would be drawn from the global generator: see `with_weights`."""

    def reset_parameters(self) -> None: ...


class _Linear(nn.Linear):
    """Likewise."""

    def reset_parameters(self) -> None: ...


def conv_norm(
    width_in: int, width_out: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """A convolution of "same" padding without bias, and batch norm."""
    conv = convolution(width_in, width_out, kernel, stride, groups)
    return [conv, nn.BatchNorm2d(width_out)]


def convolution(
    width_in: int, width_out: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> nn.Conv2d:
    """Of "same" padding, without bias; its weights come from `with_weights`."""
    return _Conv(width_in, width_out, kernel, stride, kernel // 2, groups=groups, bias=False)


class _InvertedResidual(nn.Module):
    """Sandler et al. 2018 (arXiv:1801.04381, Fig. 3d)."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        hidden = block.width_in * block.expansion
        self.body = nn.Sequential(
            *conv_norm(block.width_in, hidden), nn.ReLU(),
            *conv_norm(hidden, hidden, block.kernel, block.stride, hidden), nn.ReLU(),
            *conv_norm(hidden, block.width_out),
        )  # fmt: skip
        self.shortcut = block.shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.shortcut else y


class _Residual(nn.Module):
    """He et al. 2016 (arXiv:1512.03385, Fig. 2), without a shortcut where the shape changes."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *conv_norm(block.width_in, block.width_out, block.kernel, block.stride), nn.ReLU(),
            *conv_norm(block.width_out, block.width_out, block.kernel),
        )  # fmt: skip
        self.shortcut = block.shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return torch.relu(x + y if self.shortcut else y)


class Classifier(nn.Module):
    """Features, their mean over the map, a linear classifier."""

    def __init__(self, features: nn.Sequential, width: int, classes: int) -> None:
        super().__init__()
        self.features = features
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = _Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs(x).logits

    def outputs(self, x: Tensor) -> Outputs:
        """The logits and what they come from."""
        features = self.features(x)
        embedding = torch.flatten(self.pool(features), 1)
        return Outputs(self.classifier(embedding), embedding, features)


def head_layers(width: int, size: int, classes: int) -> list[LayerShape]:
    """Pooling and classifier behind maps of `size`."""
    return [LayerShape("pool", width, width, size_in=size), LayerShape("linear", width, classes)]


def to_multiple(width: float, multiple: int) -> int:
    """The nearest width that the card allows, at least one step."""
    return max(multiple, round(width / multiple) * multiple)


def stage_strides(size: int) -> tuple[int, tuple[int, ...]]:
    """Stride of the stem, and of the first block of each stage, for images of `size` pixels.

    Small images keep their resolution in the stem: at equal MACs that was worth 0.4 points at 28 px.
    """
    stem = 1 if size <= 40 else 2
    stages = 3 if size <= 96 else 4
    halvings = max(2, math.floor(math.log2(size / stem / 4)))
    return stem, tuple(2 if stage < halvings else 1 for stage in range(stages))


def with_weights(body: Sequence[nn.Module], width: int, classes: int, rng: torch.Generator) -> Classifier:
    """The whole network with fresh weights drawn from `rng`.

    Convolutions: Kaiming normal, fan out (He et al. 2015, arXiv:1502.01852); 0.01 for the classifier.
    """
    model = Classifier(nn.Sequential(*body), width, classes)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight.shape[0] * module.kernel_size[0] * module.kernel_size[1] / module.groups
            nn.init.normal_(module.weight, 0.0, math.sqrt(2 / fan_out), generator=rng)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01, generator=rng)
            nn.init.zeros_(module.bias)
    return model
