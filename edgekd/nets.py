"""Small vocabulary around networks: batches, outputs, taps, and what a layer costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.spec import LayerShape


@dataclass(frozen=True)
class Batch:
    """`inputs` float (N, C, H, W), `labels` int64 (N,), `index` int64 (N,): the samples' stable numbers."""

    inputs: Tensor
    labels: Tensor
    index: Tensor


@dataclass(frozen=True)
class Outputs:
    """What a network gives in one forward pass. A black-box teacher has logits only.

    `logits` (N, classes); `embedding` (N, D), the classifier's input; `features` (N, C, H, W), the last map
    before pooling; `stages`, the last map of each resolution, the finest first, `features` last;
    `preactivations`, the same maps before their last ReLU; `tokens`, (N, L, D) of each transformer block;
    `exits`, further (N, classes) logits of auxiliary heads; `peer`, a second network trained along;
    `extra_maps`, (N, C, H, W) maps that a wrap hands to the term of its own method.
    """

    logits: Tensor
    embedding: Tensor | None = None
    features: Tensor | None = None
    stages: tuple[Tensor, ...] = ()
    preactivations: tuple[Tensor, ...] = ()
    tokens: tuple[Tensor, ...] = ()
    exits: tuple[Tensor, ...] = ()
    peer: Outputs | None = None
    extra_maps: tuple[Tensor, ...] = ()


def as_outputs(made: Outputs | Tensor) -> Outputs:
    """What a network gave, be it logits alone."""
    return made if isinstance(made, Outputs) else Outputs(made)


class Attend(nn.Module):
    """Attention of `heads` over the pixels of maps (Vaswani et al. 2017, arXiv:1706.03762, eq. 1).

    Queries, keys and values are (N, C, H, W), and so is what it gives.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        width, height, across = queries.shape[1:]
        depth = width // self.heads
        shape = (-1, self.heads, depth, height * across)  # a trace leaves the batch size open
        scores = keys.reshape(shape).transpose(2, 3) @ (queries.reshape(shape) * depth**-0.5)
        made = values.reshape(shape) @ torch.softmax(scores, 2)  # keys along axis 2: no transpose behind it
        return made.reshape(-1, width, height, across)


def evaluate(model: nn.Module, inputs: Tensor, batch_size: int = 250, device: str | None = None) -> Tensor:
    """float32 (N, classes) logits in eval mode without gradients, on the CPU. They are computed on `device`,
    from where the network returns; where none is named, where the network is."""
    home = next((p.device for p in model.parameters()), inputs.device)
    if device is not None:
        made = evaluate(model.to(device), inputs, batch_size)
        model.to(home)
        return made
    training = {module: module.training for module in model.modules()}
    model.eval()
    with torch.inference_mode():
        parts = [as_outputs(model(part.to(home))).logits.float() for part in torch.split(inputs, batch_size)]
    for module, mode in training.items():
        module.training = mode
    return torch.cat(parts).cpu().clone()


def wide(values: Tensor) -> Tensor:
    """Half precision as float32: sums need the mantissa."""
    return values if values.dtype.itemsize >= 4 else values.float()


def softened_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor) -> Tensor:
    """(N,) ``T^2 * KL(softmax(teacher / T) || softmax(student / T))`` of (N, classes) logits.

    No gradient reaches the teacher's logits; one does reach a temperature that is a tensor.
    """
    student = F.log_softmax(wide(student_logits) / temperature, 1)
    teacher = F.log_softmax(wide(teacher_logits).detach() / temperature, 1)
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1) * temperature**2


def tapped_forward(model: nn.Module, inputs: Tensor, classes: int) -> Outputs:
    """One forward pass that also keeps the classifier's input and the last 4-D feature map.

    The classifier is the last executed ``nn.Linear`` with `classes` outputs; a network without one
    (a convolutional head, a black box) gives logits only.
    """
    embedding: list[Tensor] = []
    features: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
        if isinstance(module, nn.Linear) and module.out_features == classes:
            embedding[:] = [args[0]]
        elif isinstance(output, Tensor) and output.dim() == 4 and output.shape[-1] * output.shape[-2] > 1:
            features[:] = [output]

    hooks = [module.register_forward_hook(keep) for module in model.modules()]
    try:
        logits: Tensor = model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    embedded = embedding[0] if embedding and embedding[0].dim() == 2 else None
    return Outputs(logits, embedded, features[0] if features else None)


def count_macs(model: nn.Module, input_shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of one image through all convolutions, linear layers and `Attend`."""
    total = 0

    def add(module: nn.Module, _: object, output: object) -> None:
        nonlocal total
        if not isinstance(output, Tensor):
            return
        if isinstance(module, nn.Conv2d):
            total += output[0].numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            total += output[0].numel() * module.in_features
        elif isinstance(module, Attend):
            total += 2 * output[0].numel() * output.shape[-1] * output.shape[-2]

    hooks = [module.register_forward_hook(add) for module in model.modules()]
    training = model.training
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, *input_shape))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return total


def layer_shapes(model: nn.Module, input_shape: tuple[int, int, int]) -> tuple[LayerShape, ...]:
    """The convolutions and linear layers a network executes, for a cost model; nothing else is listed."""
    shapes: list[LayerShape] = []

    def add(module: nn.Module, args: tuple[Tensor, ...], _: object) -> None:
        if isinstance(module, nn.Conv2d):
            shapes.append(
                LayerShape(
                    "conv",
                    module.in_channels,
                    module.out_channels,
                    module.kernel_size[0],
                    module.stride[0],
                    module.groups,
                    args[0].shape[-1],
                    relu=True,
                )
            )
        elif isinstance(module, nn.Linear):
            shapes.append(LayerShape("linear", module.in_features, module.out_features))

    hooks = [module.register_forward_hook(add) for module in model.modules()]
    try:
        with torch.inference_mode():
            model.eval()(torch.zeros(1, *input_shape))
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(shapes)


def count_parameters(model: nn.Module) -> int:
    """Number of trainable values."""
    return sum(parameter.numel() for parameter in model.parameters())
