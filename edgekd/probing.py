"""Looking into an untrained network and leaving it as it was: what training-free scores measure with."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from edgekd.layout import first_tensor

Initialisation = Literal["normal", "kaiming", "small"]
_DEVIATION = {"normal": 1.0, "small": 0.02}
_TINY = 1e-300  # keeps nothing over nothing a number
_SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)
_NORMS = (_BatchNorm, nn.LayerNorm, nn.GroupNorm)
_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Linear)
_ACTIVATIONS = frozenset(
    f"{name}{end}"
    for name in ("relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "mish", "hardswish")
    for end in ("", "_")
)


@contextmanager
def untouched(model: nn.Module, seed: int) -> Iterator[nn.Module]:
    """`model` in training mode. Afterwards its modes, buffers and gradients are as before.

    What it draws itself, as dropout does, follows `seed`; the global generator does not move.
    """
    modes = [(module, module.training) for module in model.modules()]
    norms = [module for module, _ in modes if isinstance(module, _BatchNorm) and module.track_running_stats]
    kept = {id(buffer) for norm in norms for buffer in norm.buffers()}  # they do not move: see below
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if id(buffer) not in kept]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model.train().requires_grad_(True)
        for norm in norms:
            norm.track_running_stats = False
        try:
            yield model
        finally:
            for norm in norms:
                norm.track_running_stats = True
            for module, mode in modes:
                module.training = mode
            for parameter, flag in trainable:
                parameter.requires_grad_(flag)
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


@contextmanager
def watching(
    modules: Sequence[nn.Module], see: Callable[[nn.Module, tuple[Any, ...], Any], Any]
) -> Iterator[None]:
    """Forward hooks for as long as the block lasts."""
    hooks: list[RemovableHandle] = [module.register_forward_hook(see) for module in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Activations(TorchFunctionMode):
    """Calls `see` with the input of every rectifier or smooth activation, module or function, in order."""

    def __init__(self, see: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._see = see

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name.startswith("hardtanh"):  # nn.ReLU6 is one from 0 to 6
            watched = (*args[1:2], kwargs.get("min_val", -1))[0] == 0
        else:
            watched = name in _ACTIVATIONS
        if watched:
            self._see((args[0] if args else kwargs["input"]).detach())
        return func(*args, **kwargs)


def rows_of(values: Tensor) -> Tensor:
    """(N, D) of (N, ...), the values of a map in the order in which they lie in memory: products of rows know
    none."""
    if values.dim() == 4 and values.is_contiguous(memory_format=torch.channels_last):
        values = values.permute(0, 2, 3, 1)
    return values.flatten(1)


def weighted_modules(model: nn.Module) -> list[nn.Module]:
    """Convolutions and linear layers, each once."""
    return [module for module in model.modules() if isinstance(module, _WEIGHTED)]


def weights_of(model: nn.Module) -> list[Tensor]:
    """Weights of the convolutions and linear layers; one that two layers share is listed once."""
    found = {id(module.weight): module.weight for module in weighted_modules(model)}
    return [weight for weight in found.values() if isinstance(weight, Tensor)]


def gradients(value: Tensor, of: list[Tensor], *, create_graph: bool = False) -> list[Tensor]:
    """``d value / d of``; zeros for those that `value` does not depend on."""
    if not value.requires_grad:
        return [torch.zeros_like(tensor) for tensor in of]
    found = torch.autograd.grad(value, of, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(of, found, strict=True)]


def loss_gradients(
    model: nn.Module, inputs: Tensor, labels: Tensor, *, create_graph: bool = False
) -> list[Tensor]:
    """Gradients of the mean cross-entropy by `weights_of` the network."""
    loss = F.cross_entropy(model(inputs), labels)
    return gradients(loss, weights_of(model), create_graph=create_graph)


def initialise(model: nn.Module, generator: torch.Generator, how: Initialisation) -> nn.Module:
    """Fresh weights: N(0, 1), Kaiming with fan in (He et al. 2015), or "small", N(0, 0.02^2), as transformers
    begin; norms and biases at 1 and 0."""
    for module in model.modules():
        if isinstance(module, _WEIGHTED):
            deviation = _DEVIATION.get(how) or math.sqrt(2 / module.weight[0].numel())
            drawn = torch.empty(module.weight.shape).normal_(0.0, deviation, generator=generator)
            module.weight.data.copy_(drawn)  # the network may lie on a GPU, the generator does not
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, _NORMS):
            module.reset_parameters()
    return model


def randomised(model: nn.Module, seed: int, how: Initialisation = "normal") -> nn.Module:
    """A copy with fresh weights, in training mode: a teacher that knows nothing."""
    return initialise(copy.deepcopy(model), torch.Generator().manual_seed(seed), how).train()


class _Shares(TorchFunctionMode):
    """No gradient through what a softmax makes; or, to find paths, a linear map in place of each softmax,
    whose own derivative vanishes where tokens are equal or one has all."""

    def __init__(self, through: bool) -> None:
        super().__init__()
        self._through = through

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            query, key, value = args[:3]
            if self._through:
                return self._linear(query @ key.transpose(-2, -1)) @ value
            args = (query.detach(), key.detach(), *args[2:])
        if func not in _SOFTMAX:
            return func(*args, **(kwargs or {}))
        return self._linear(args[0]) if self._through else func(*args, **(kwargs or {})).detach()

    @staticmethod
    def _linear(scores: Tensor) -> Tensor:
        return scores / (scores.detach().amax() + _TINY)


def linear_saliency(
    model: nn.Module, input_shape: torch.Size, *, through_shares: bool = False
) -> dict[str, float]:
    """``sum |w| * dR/d|w|`` of each convolution and linear layer by its path (SynFlow).

    R is the sum of the answers to an image of ones, of a float64 copy with absolute weights and without
    norms, which would undo the flow that is looked for. The shares of attention are constants, since what
    flows does so through the values, and the derivatives of shares grow beyond all numbers in a few blocks.
    With `through_shares` they are linear, and a layer has 0 exactly when no path leads through it from the
    image to the logits.
    """
    trial = copy.deepcopy(model).double().eval()
    for module in trial.modules():
        if isinstance(module, _NORMS):
            module.forward = nn.Identity().forward  # type: ignore[method-assign]
    with torch.no_grad():
        for parameter in trial.parameters():
            parameter.abs_()
    trial.requires_grad_(True)
    first = next(trial.parameters())
    ones = torch.ones(1, *input_shape, dtype=torch.float64, device=first.device)
    layers = {path: m for path, m in trial.named_modules() if isinstance(m, _WEIGHTED)}
    weights = [layer.weight for layer in layers.values()]
    with _Shares(through_shares):
        answer = trial(ones).sum()
    found = gradients(answer, weights)
    return {path: float((w.detach() * g).sum()) for path, w, g in zip(layers, weights, found, strict=True)}


def layer_macs(model: nn.Module, input_shape: torch.Size) -> dict[str, int]:
    """Multiply-accumulates of one image through each convolution and linear layer that ran, by its path."""

    def each(module: nn.Module) -> int:
        weight = module.weight
        assert isinstance(weight, Tensor)
        return int(module.in_features) if isinstance(module, nn.Linear) else weight[0].numel()

    return {path: sum(each(module) * values for module, values in ran)
            for path, ran in _ran(model, input_shape).items()}  # fmt: skip


def layer_values(model: nn.Module, input_shape: torch.Size) -> dict[str, int]:
    """Values that each convolution and linear layer that ran made of one image, by its path."""
    return {path: sum(values for _, values in ran) for path, ran in _ran(model, input_shape).items()}


def _ran(model: nn.Module, input_shape: torch.Size) -> dict[str, list[tuple[nn.Module, int]]]:
    """Convolutions and linear layers by path, with the number of values of each run."""
    paths = {module: path for path, module in model.named_modules()}
    found: dict[str, list[tuple[nn.Module, int]]] = {}

    def add(module: nn.Module, _: tuple[Any, ...], output: Any) -> None:
        if isinstance(module.weight, Tensor):
            found.setdefault(paths[module], []).append((module, output[0].numel()))

    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.no_grad(), watching(weighted_modules(model), add):
            model.eval()(torch.zeros(1, *input_shape, device=device))
    finally:
        for module, mode in modes:
            module.training = mode
    return found


def block_features(model: nn.Module, inputs: Tensor) -> list[Tensor]:
    """What enters each block after the first, and what leaves the last: tensors of one graph, in order.

    A block is the largest module with a convolution or linear layer that is no container; the classifier
    and what works on vectors are none.
    """
    entered: list[Tensor] = []
    left: list[Tensor] = []

    def see(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        made, given = first_tensor(output), first_tensor(args)
        if made is not None and given is not None and made.dim() > 2 and given.dim() > 2:
            entered.append(given)
            left.append(made)

    with watching(_blocks(model), see):
        model(inputs)
    return [*entered[1:], *left[-1:]]


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The largest modules with weights below containers, in the order of their definition."""
    holding = [child for child in model.children() if weighted_modules(child)]
    found: list[nn.Module] = []
    for child in holding:
        contains = isinstance(child, nn.Sequential | nn.ModuleList) or len(holding) == 1
        found += _blocks(child) if contains and any(True for _ in child.children()) else [child]
    return found
