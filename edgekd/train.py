"""The only training loop. Distillation and quantization-aware training are two calls of `fit`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from edgekd.loop import Loop, Stage, load_checkpoint
from edgekd.nets import evaluate
from edgekd.plan import Pace, within_memory

__all__ = ["Progress", "Stage", "evaluate", "fit", "fit_together", "load_checkpoint"]

Progress = Callable[[str, int, int], None]  # what, steps done, steps in all


def fit(stage: Stage, progress: Progress) -> list[dict[str, float]]:
    """Train `stage.model` in place; it ends in eval mode with the averaged weights. Returns one row an epoch.

    Raises:
        TrainingDivergedError: the loss is not finite; the checkpoint of the last epoch is kept.
    """
    return fit_together((stage,), progress)[0]


def fit_together(stages: Sequence[Stage], progress: Progress) -> list[list[dict[str, float]]]:
    """Train stages of equal length side by side, step by step. On CUDA each has a stream of its own, because
    one small network leaves most of such a device idle. `progress` follows the first.

    Raises:
        TrainingDivergedError: a loss is not finite; the checkpoint of the last epoch is kept.
        DeviceMemoryError: the steps do not fit into the memory of the device.
    """
    first = stages[0]
    if len(stages) > 1 and first.ranks.count > 1:  # streams side by side would mix up their messages
        return [fit(stage, progress) for stage in stages]
    with first.plan.active(), within_memory(first.batch):
        loops = [Loop(stage) for stage in stages]
        if {(s.epochs, s.steps_per_epoch) for s in stages} != {(first.epochs, first.steps_per_epoch)}:
            raise ValueError("stages that train together need the same number of steps")
        pace = Pace(first.plan)
        for epoch in range(min(len(loop.history) for loop in loops), first.epochs):
            open_loops = [loop for loop in loops if len(loop.history) <= epoch]
            begin = time.perf_counter()
            for loop in open_loops:
                loop.open_epoch(epoch)
            for number in range(first.steps_per_epoch):
                for loop in open_loops:
                    loop.step()
                    loop.check(epoch, number)
                pace.count(loops[0].part)
                progress(first.name, epoch * first.steps_per_epoch + number + 1, loops[0].steps)
            for loop in open_loops:
                loop.close_epoch(epoch, time.perf_counter() - begin)
    return [loop.finish() for loop in loops]
