"""How training steps run on this machine: measured in seconds, then kept for the run."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edgekd.errors import DeviceMemoryError

log = logging.getLogger(__name__)
_CONV2D = 7  # arguments as a module gives them: input, weight, bias, stride, padding, dilation, groups


@dataclass(frozen=True)
class Plan:
    """How steps run. `graphed`: the whole step is one captured CUDA graph; `compiled`: networks go through
    ``torch.compile``. Kept with a checkpoint, so that resuming is exact."""

    threads: int = 1
    bfloat16: bool = False
    channels_last: bool = True
    one_thread_rate: float = 0.0  # images per second of the same plan with one thread; 0: not measured
    device: str = "cpu"
    graphed: bool = False
    compiled: bool = False

    def __str__(self) -> str:
        layout = "channels-last" if self.channels_last else "channels-first"
        form = f"{'bf16' if self.bfloat16 else 'f32'} {layout}"
        if self.device == "cpu":
            return f"{form}, {self.threads} thread{'s' * (self.threads > 1)}"
        extras = ", compiled" * self.compiled + ", one graph a step" * self.graphed
        return f"{form} on {self.device}{extras}"

    @contextmanager
    def active(self) -> Iterator[None]:
        """Set the thread count for the block."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Enter anew for every step: autocast keeps its cast copies of the weights until it is left."""
        device = torch.device(self.device).type
        special = self.bfloat16 and device == "cpu" and not self.compiled
        exceptions = _StridedInFloat() if special else nullcontext()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.bfloat16), exceptions:
            yield

    def place(self, model: nn.Module) -> nn.Module:
        """Move a network to the device and memory format, in place."""
        model.to(self.device)
        if self.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model

    def arrange(self, inputs: Tensor) -> Tensor:
        """Inputs in the plan's memory format."""
        return inputs.contiguous(memory_format=torch.channels_last) if self.channels_last else inputs


class _StridedInFloat(TorchFunctionMode):
    """Depthwise convolutions with a stride stay in float32: on a CPU their backward pass takes ten times as
    long in bfloat16 (96 maps of 28 x 28, torch 2.13, oneDNN with AMX: 427 ms of CPU time against 49)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.conv2d and len(args) == _CONV2D:
            inputs, weight, bias, stride, *others = args
            depthwise = others[-1] == weight.shape[0] > 1
            if depthwise and stride not in (1, (1, 1), [1, 1]):
                with torch.autocast("cpu", enabled=False):
                    bias = bias if bias is None else bias.float()
                    return func(inputs.float(), weight.float(), bias, stride, *others)
        return func(*args, **(kwargs or {}))


@contextmanager
def within_memory(batch_size: int) -> Iterator[None]:
    """Steps of `batch_size` images run inside.

    Raises:
        DeviceMemoryError: they do not fit into the memory of the device, or of the machine.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        gpu, machine = isinstance(error, torch.OutOfMemoryError), isinstance(error, MemoryError)
        if not (gpu or machine or "DefaultCPUAllocator: can't allocate memory" in str(error)):
            raise
        told = (str(error).splitlines() or [type(error).__name__])[0]
        first = told.partition(". ")[0] if gpu else told.rpartition("DefaultCPUAllocator: ")[2]
        raise DeviceMemoryError(
            f"{batch_size} images a step do not fit into the memory of the {'device' if gpu else 'machine'}: "
            f"{first}",
            f"try half of it: --set distill.batch_size={batch_size // 2}"
            if batch_size >= 4
            else f"free memory{' on the device, or train on the processor: --set device=cpu' * gpu}",
        ) from error


class Pace:
    """Goes on with one thread while several are slower: two threads wait for each other whenever something
    else takes a core, and a step may then take ten times as long. Several are tried again later, the later
    the more often they failed."""

    _STEPS = 5  # of a measurement
    _PATIENCE = (40, 1280)  # steps with one thread before several are tried again: first, and at most

    def __init__(self, plan: Plan, clock: Callable[[], float] = time.perf_counter) -> None:
        self._several, self.threads = plan.threads, plan.threads
        # The probe knows nothing of the optimiser and the loss.
        self._one_rate = 0.8 * plan.one_thread_rate if plan.threads > 1 else 0.0
        self._patience, self._waited = self._PATIENCE[0], 0
        self._clock, self._last = clock, clock()
        self._rates: list[float] = []

    def count(self, images: int) -> None:
        """Called after each step."""
        if not self._one_rate:
            return
        now = self._clock()
        self._rates.append(images / max(now - self._last, 1e-9))
        self._last = now
        self._waited += 1
        if len(self._rates) < self._STEPS:
            return
        rate = float(np.median(self._rates))
        self._rates.clear()
        if self.threads == 1:
            self._one_rate = rate
            if self._waited >= self._patience:
                self._set(self._several)
        elif rate < self._one_rate:
            log.info("%.0f images a second: something else uses the machine, going on with one thread", rate)
            self._set(1)
        elif self._waited >= self._PATIENCE[0]:  # several do well again
            self._patience = self._PATIENCE[0]

    def _set(self, threads: int) -> None:
        if threads > 1:
            self._patience = min(2 * self._patience, self._PATIENCE[1])
        self.threads, self._waited = threads, 0
        torch.set_num_threads(threads)


def probe(
    model: nn.Module,
    inputs: Tensor,
    threads: int,
    *,
    device: str = "cpu",
    allow_bfloat16: bool = True,
    seconds: float = 0.5,
) -> tuple[Plan, dict[str, float]]:
    """Time forward and backward of a few plans on a copy of `model`; the fastest wins.

    `threads` 0 tries one thread and all that this process may use. Returns the plan, and images per second
    of each.

    Raises:
        DeviceMemoryError: a step does not fit into the memory of the CUDA device.
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = sorted({1, available}) if threads == 0 else [threads]
    if device != "cpu":
        counts = [1]
    forms = [(False, False), (False, True), *([(True, True)] if allow_bfloat16 else [])]
    plans = [Plan(n, half, last, device=device) for n in counts for half, last in forms]
    rates: dict[str, float] = {}
    with within_memory(len(inputs)):
        for plan in plans:
            rates[str(plan)] = _rate(model, inputs, plan, seconds)
    best = max(plans, key=lambda plan: rates[str(plan)])
    alone = rates.get(str(replace(best, threads=1)), 0.0)
    best = replace(best, one_thread_rate=round(alone, 1), graphed=device != "cpu")
    return best, {name: round(rate, 1) for name, rate in rates.items()}


def _rate(model: nn.Module, inputs: Tensor, plan: Plan, seconds: float) -> float:
    """Images per second of forward and backward, the median over at least two steps."""
    trial = plan.place(copy.deepcopy(model)).train()
    batch = plan.arrange(inputs.to(plan.device))
    with plan.active():
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < 3 or (time.perf_counter() - begin < seconds and len(times) < 40):
            start = time.perf_counter()
            with plan.autocast():
                logits = trial(batch)
            logits.float().square().mean().backward()
            if plan.device != "cpu":
                torch.cuda.synchronize(plan.device)
            times.append(time.perf_counter() - start)
    return len(inputs) / float(np.median(times[1:]))
