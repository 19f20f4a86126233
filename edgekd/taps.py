"""Taps: the tensors inside a network that a transfer method may ask for, found by looking at one pass."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edgekd.errors import UnsupportedModelError
from edgekd.nets import Outputs

TAPS = ("logits", "embedding", "features", "stages", "preactivations", "tokens")


@dataclass(frozen=True)
class Layout:
    """Module paths: `classifier` (its input is the embedding), `stages` (one map a resolution) and `tokens`
    (one a transformer block). None or empty: this network has none."""

    classifier: str | None
    stages: tuple[str, ...]
    tokens: tuple[str, ...]

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of `TAPS` that this network can give."""
        found = ["logits"]
        if self.classifier is not None:
            found.append("embedding")
        if self.stages:
            found += ["features", "stages", "preactivations"]
        if self.tokens:
            found.append("tokens")
        return tuple(found)


def find_layout(model: nn.Module, example: Tensor, classes: int, stages: Sequence[str] = ()) -> Layout:
    """Look at one forward pass of `example` (N, C, H, W).

    The classifier is the last executed ``nn.Linear`` with `classes` outputs. A stage ends with the outermost
    module, of those the last, whose 4-D output has its resolution. Token layers are the numbered modules
    with the most frequent 3-D output. `stages` names module paths instead.

    Raises:
        UnsupportedModelError: a path of `stages` does not exist or gives no 4-D map; names the nearest.
    """
    classifier: str | None = None
    maps: dict[tuple[int, int], tuple[int, str]] = {}
    four_d: set[str] = set()
    token_shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            nonlocal classifier
            if isinstance(module, nn.Linear) and module.out_features == classes and args[0].dim() == 2:
                classifier = name
            if not isinstance(output, Tensor) or not name:
                return
            if output.dim() == 4:
                four_d.add(name)
                size, depth = (output.shape[-2], output.shape[-1]), name.count(".")
                if size[0] * size[1] > 1 and depth <= maps.get(size, (depth, ""))[0]:
                    maps[size] = (depth, name)
            elif output.dim() == 3:
                token_shapes[name] = tuple(output.shape)

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            model.eval()(example)
    finally:
        for module, mode in training.items():
            module.training = mode
        for hook in hooks:
            hook.remove()
    for path in stages:
        if path not in four_d:
            near = difflib.get_close_matches(path, sorted(four_d), 3, 0.0)
            raise UnsupportedModelError(
                f"tap '{path}': no module of that path with a 4-D output", f"nearest: {', '.join(near)}"
            )
    found = tuple(name for size, (_, name) in sorted(maps.items(), key=lambda item: -item[0][0] * item[0][1]))
    return Layout(classifier, tuple(stages) or found, _token_layers(token_shapes))


def _token_layers(shapes: dict[str, tuple[int, ...]]) -> tuple[str, ...]:
    numbered = {name: re.match(r"(.*\.)?\d+$", name) for name in shapes}
    families = Counter((m.group(1), shapes[name]) for name, m in numbered.items() if m)
    if not families:
        return ()
    family = max(families, key=lambda key: families[key])
    return tuple(name for name, m in numbered.items() if m and (m.group(1), shapes[name]) == family)


class _BeforeRelu(TorchFunctionMode):
    """Remembers what each rectifier of a pass was given."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name not in ("relu", "relu_"):
            return func(*args, **(kwargs or {}))
        given = args[0]
        result = torch.clamp_min(given, 0)  # never in place: the input is what is asked for
        self.inputs[id(result)] = given
        return result


class Tapped(nn.Module):
    """A network whose forward pass returns `Outputs` with the tensors that `wanted` names."""

    def __init__(self, model: nn.Module, layout: Layout, wanted: Sequence[str]) -> None:
        super().__init__()
        missing = sorted(set(wanted) - set(layout.taps))
        if missing:
            raise UnsupportedModelError(
                f"this network gives no {', '.join(missing)}; it gives {', '.join(layout.taps)}",
                "choose a method that needs less: edgekd methods list",
            )
        self.model, self.layout, self.wanted = model, layout, frozenset(wanted)
        self._kept: dict[str, Tensor] = {}
        maps = self.wanted & {"features", "stages", "preactivations"}
        watched = (layout.stages if maps else ()) + (layout.tokens if "tokens" in wanted else ())
        for path in watched:
            model.get_submodule(path).register_forward_hook(self._keep_output(path))
        if "embedding" in self.wanted and layout.classifier is not None:
            model.get_submodule(layout.classifier).register_forward_hook(self._keep_input)

    def _keep_output(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self._kept[path] = output

        return hook

    def _keep_input(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self._kept["embedding"] = args[0]

    def forward(self, inputs: Tensor) -> Outputs:
        if "preactivations" not in self.wanted:
            return self._outputs(self.model(inputs), ())
        with _BeforeRelu() as before:
            logits = self.model(inputs)
            maps = [self._kept[path] for path in self.layout.stages]
            return self._outputs(logits, tuple(before.inputs.get(id(m), m) for m in maps))

    def _outputs(self, logits: Tensor, preactivations: tuple[Tensor, ...]) -> Outputs:
        kept = self._kept
        maps = (
            tuple(kept[path] for path in self.layout.stages)
            if self.layout.stages[:1] and (self.layout.stages[0] in kept)
            else ()
        )
        outputs = Outputs(
            logits,
            kept.get("embedding"),
            maps[-1] if maps else None,
            maps,
            preactivations,
            tuple(kept[path] for path in self.layout.tokens if path in kept),
        )
        self._kept = {}
        return outputs

    def deploy(self) -> nn.Module:
        """The network itself."""
        return self.model
