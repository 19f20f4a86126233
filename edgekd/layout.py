"""Where in a network the tensors lie that a transfer method may ask for, found by looking at one pass."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.errors import UnsupportedModelError

TAPS = ("logits", "embedding", "features", "stages", "preactivations", "tokens")


@dataclass(frozen=True)
class Layout:
    """Module paths: `classifier` (its input is the embedding), `stages` (one map a resolution) and `tokens`
    (one a transformer block). None or empty: this network has none. Of a module that runs several times in
    one pass, ``path`` is the first run, ``path@2`` the second. `shapes` are (C, H, W) of the stages;
    `ends_in_classifier` says that the classifier's output is the network's."""

    classifier: str | None
    stages: tuple[str, ...]
    tokens: tuple[str, ...]
    shapes: tuple[tuple[int, int, int], ...] = ()
    ends_in_classifier: bool = True

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


@dataclass
class _Look:
    """What one pass showed, in the order in which the modules finished."""

    classifier: str | None = None
    class_logits: Tensor | None = None
    maps: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    tokens: dict[str, tuple[int, ...]] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)


def find_layout(model: nn.Module, example: Tensor, classes: int, stages: Sequence[str] = ()) -> Layout:
    """Look at one forward pass of `example` (N, C, H, W).

    The classifier is the last executed ``nn.Linear`` with `classes` outputs. A stage ends with the outermost
    module, of those the last, whose 4-D output has its resolution; what has not the shape of the image
    (channels-last maps, attention) and what lies inside a block of tokens is no stage, nor is a patch
    embedding: a map that only leads to the tokens. Token layers are the numbered modules with the most
    frequent 3-D output. `stages` names module paths instead.

    Raises:
        UnsupportedModelError: a path of `stages` does not exist or gives no 4-D map; names the nearest.
    """
    look, logits = _look(model, example, classes)
    for path in stages:
        if path not in look.maps:
            near = difflib.get_close_matches(path, sorted(look.maps), 3, 0.0)
            raise UnsupportedModelError(
                f"tap '{path}': no module of that path with a 4-D output",
                f"nearest: {', '.join(near)}" if near else "this network has no 4-D maps",
            )
    tokens = _token_layers(look.tokens)
    found = tuple(stages) or _stages(look, tokens, (example.shape[-2], example.shape[-1]))
    return Layout(
        look.classifier,
        found,
        tokens,
        tuple(look.maps[path] for path in found),
        look.class_logits is not None and look.class_logits is logits,
    )


def _look(model: nn.Module, example: Tensor, classes: int) -> tuple[_Look, object]:
    """One pass in eval mode, without a trace in the model."""
    look, calls = _Look(), Counter[str]()

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            calls[name] += 1
            path, made = numbered(name, calls[name]), first_tensor(output)
            if isinstance(module, nn.Linear) and module.out_features == classes and args[0].dim() == 2:
                look.classifier, look.class_logits = name, made
            if made is None or not name:
                return
            look.order.append(path)
            if made.dim() == 4:
                look.maps[path] = (made.shape[1], made.shape[2], made.shape[3])
            elif made.dim() == 3:
                look.tokens[path] = tuple(made.shape)

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in model.named_modules()]
    training = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            logits = model.eval()(example)
    finally:
        for module, mode in training.items():
            module.training = mode
        for hook in hooks:
            hook.remove()
    return look, logits


def numbered(name: str, call: int) -> str:
    """The path of one run of a module."""
    return name if call == 1 else f"{name}@{call}"


def first_tensor(output: object) -> Tensor | None:
    """The tensor that a module gives; blocks of some libraries give it as the first of a tuple."""
    made = output[0] if isinstance(output, tuple) and output else output
    return made if isinstance(made, Tensor) else None


def _stages(look: _Look, tokens: tuple[str, ...], image: tuple[int, int]) -> tuple[str, ...]:
    inside = tuple(f"{path.partition('@')[0]}." for path in look.tokens)
    maps = [
        path for path in look.order if path in look.maps and _like(look.maps[path], image)
        and not path.startswith(inside)
    ]  # fmt: skip
    if tokens and maps and look.order.index(maps[-1]) < look.order.index(tokens[0]):
        return ()
    best: dict[tuple[int, int], str] = {}
    for path in maps:
        size = look.maps[path][1:]
        if size not in best or path.count(".") <= best[size].count("."):
            best[size] = path
    return tuple(best[size] for size in sorted(best, key=lambda size: -size[0] * size[1]))


def _like(shape: tuple[int, int, int], image: tuple[int, int]) -> bool:
    """Whether a map has more than one pixel and, up to rounding, the proportions of the image."""
    (_, height, width), (rows, columns) = shape, image
    near = (height - 1) * columns < (width + 1) * rows and (width - 1) * rows < (height + 1) * columns
    return near and height * width > 1


def _token_layers(shapes: dict[str, tuple[int, ...]]) -> tuple[str, ...]:
    numbered = {name: re.match(r"(.*\.)?\d+$", name) for name in shapes}
    families = Counter((m.group(1), shapes[name]) for name, m in numbered.items() if m)
    if not families:
        return ()
    family = max(families, key=lambda key: families[key])
    return tuple(name for name, m in numbered.items() if m and (m.group(1), shapes[name]) == family)
