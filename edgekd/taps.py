"""Taps: a network that also gives the tensors inside it that a transfer method asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edgekd.errors import UnsupportedModelError
from edgekd.layout import TAPS, Layout, find_layout, first_tensor, numbered
from edgekd.nets import Outputs

__all__ = ["TAPS", "Layout", "Tapped", "find_layout"]

_MAPS = {"features", "stages", "preactivations"}
_RECTIFIERS = ("relu", "relu_", "relu6", "hardtanh", "hardtanh_")  # nn.ReLU6 is a hardtanh


class _Record:
    """What the hooks see while a pass is open. It is copied with the network that has the hooks."""

    def __init__(self) -> None:
        self.open = False
        self.tensors: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}
        self.calls: dict[str, int] = {}
        self.rectified: tuple[Tensor, Tensor] | None = None  # result and input of the last rectifier

    def close(self) -> None:
        """Forget the pass, so that nothing of it stays alive."""
        self.open, self.rectified = False, None
        for kept in (self.tensors, self.before, self.calls):
            kept.clear()


class _Hook:
    """Puts a module's output into a record, or its first input as "embedding"."""

    def __init__(self, record: _Record, path: str, *, of_input: bool = False) -> None:
        self.record, self.path, self.of_input = record, path, of_input

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: object) -> None:
        record = self.record
        if not record.open:
            return
        if self.of_input:
            record.tensors["embedding"] = args[0]
            return
        call = record.calls[self.path] = record.calls.get(self.path, 0) + 1
        made, key = first_tensor(output), numbered(self.path, call)
        if made is not None:
            record.tensors[key] = made
            last = record.rectified
            record.before[key] = last[1] if last is not None and last[0] is made else made


class _BeforeRelu(TorchFunctionMode):
    """Remembers what the last rectifier was given. One that works in place is given a copy's history."""

    def __init__(self, record: _Record) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        bound = (*args[1:2], kwargs.get("min_val", -1))[0] if name.startswith("hardtanh") else 0
        if name not in _RECTIFIERS or bound != 0:
            return func(*args, **kwargs)
        given = args[0] if args else kwargs["input"]
        in_place = name.endswith("_") or kwargs.get("inplace") or any(value is True for value in args)
        before = given.clone() if in_place else given
        result = func(*args, **kwargs)
        self.record.rectified = (result, before)
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
        self._record, self._hooked = _Record(), False
        self._attach()

    def _attach(self) -> None:
        """Hooks stay until `deploy`, so that the pass can be compiled; outside of `forward` they sleep."""
        stages = self.layout.stages if self.wanted & _MAPS else ()
        watched = stages + (self.layout.tokens if "tokens" in self.wanted else ())
        for path in dict.fromkeys(path.partition("@")[0] for path in watched):
            self.model.get_submodule(path).register_forward_hook(_Hook(self._record, path))
        if "embedding" in self.wanted and self.layout.classifier is not None:
            classifier = self.model.get_submodule(self.layout.classifier)
            classifier.register_forward_hook(_Hook(self._record, "embedding", of_input=True))
        self._hooked = True

    def forward(self, inputs: Tensor) -> Outputs:
        if not self._hooked:
            self._attach()
        record = self._record
        record.open = True
        try:
            if "preactivations" not in self.wanted:
                return self._outputs(self.model(inputs))
            with _BeforeRelu(record):
                logits = self.model(inputs)
            outputs = self._outputs(logits)
            return replace(outputs, preactivations=tuple(record.before[path] for path in self.layout.stages))
        finally:
            record.close()

    def _outputs(self, logits: Tensor) -> Outputs:
        seen = self._record.tensors
        maps = tuple(seen[path] for path in self.layout.stages) if self.wanted & _MAPS else ()
        tokens = tuple(seen[path] for path in self.layout.tokens) if "tokens" in self.wanted else ()
        return Outputs(logits, seen.get("embedding"), maps[-1] if maps else None, maps, tokens=tokens)

    def changed(self, layout: Layout, modules: dict[str, nn.Module]) -> Tapped:
        """The same network, not a copy, with these modules in place of those at their paths. `layout` is
        that of the network as it is then."""
        model = self.deploy()
        for path, module in modules.items():
            model.set_submodule(path, module)
        return Tapped(model, layout, sorted(self.wanted))

    def deploy(self) -> nn.Module:
        """The network itself, without hooks."""
        for module in self.model.modules():
            for key, hook in list(module._forward_hooks.items()):
                if isinstance(hook, _Hook) and hook.record is self._record:
                    del module._forward_hooks[key]
        self._hooked = False
        return self.model
