"""The only training loop. Distillation and quantization-aware training are two calls of `fit`."""

from __future__ import annotations

import copy
import logging
import math
import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distillers import Term
from edgekd.errors import StorageError, TrainingDivergedError
from edgekd.files import write_atomic
from edgekd.nets import Outputs
from edgekd.spec import Preprocessing
from edgekd.tasks.classification import hard_label_loss, normalise

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]  # what, steps done, steps in all


@dataclass(frozen=True)
class Plan:
    """How steps run: chosen by a short measurement, then kept for the run so that resuming is exact."""

    threads: int = 1
    bfloat16: bool = False
    channels_last: bool = True
    one_thread_rate: float = 0.0  # images per second of the same plan with one thread; 0: not measured

    def __str__(self) -> str:
        layout = "channels-last" if self.channels_last else "channels-first"
        return (
            f"{'bf16' if self.bfloat16 else 'f32'} {layout}, {self.threads} thread{'s' * (self.threads > 1)}"
        )

    @contextmanager
    def active(self) -> Iterator[None]:
        """Set the thread count for the block."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def autocast(self) -> torch.autocast:
        """Enter anew for every step: autocast keeps its cast copies of the weights until it is left."""
        return torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bfloat16)


class Views:
    """A fixed number of augmented views of a training set, each a function of (seed, view, sample).

    The same view always shows the same pixels, so teacher logits can be cached per view and stay exact.
    """

    def __init__(
        self, images: Tensor, preprocessing: Preprocessing, augment: str, count: int, seed: int
    ) -> None:
        """`images`: uint8 (N, C, H, W). `augment`: "crop-flip", "crop" or "none" (then one view)."""
        self.count = 1 if augment == "none" else count
        self._preprocessing = preprocessing
        self._flip, self._augment, self._seed = augment == "crop-flip", augment, seed
        self._size = images.shape[2:]
        self._margin = 0 if augment == "none" else max(1, round(max(self._size) / 28))
        # Black borders are what a shifted camera sees of nothing; the same constant for every channel.
        self._padded = F.pad(images, (self._margin,) * 4)

    def __len__(self) -> int:
        return len(self._padded)

    def batch(self, view: int, index: Tensor) -> Tensor:
        """Normalised float32 (N, C, H, W) inputs of the samples `index` in view `view`."""
        if self._augment == "none":
            return normalise(self._padded[index], self._preprocessing)
        rows, columns = self._coordinates(view, index)
        samples = self._padded[index[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        return normalise(samples.permute(0, 3, 1, 2), self._preprocessing)

    def _coordinates(self, view: int, index: Tensor) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed((self._seed << 16) + view)
        height, width = self._size
        shift = torch.randint(0, 2 * self._margin + 1, (2, len(self)), generator=generator)
        flip = torch.randint(0, 2, (len(self),), generator=generator).bool() & self._flip
        across = torch.arange(width).expand(len(index), width)
        across = torch.where(flip[index][:, None], width - 1 - across, across)
        return shift[0][index][:, None] + torch.arange(height), shift[1][index][:, None] + across


class CachedTeacher:
    """Teacher logits per view, computed when a view is first met: exact, because views never change."""

    def __init__(self, logits: Callable[[Tensor], Tensor], views: Views, batch_size: int = 256) -> None:
        self._logits, self._views, self._batch_size = logits, views, batch_size
        self._cache: dict[int, Tensor] = {}

    def of(self, view: int) -> Tensor:
        """(N, classes) logits of all samples in a view."""
        if view not in self._cache:
            parts = torch.split(torch.arange(len(self._views)), self._batch_size)
            self._cache[view] = torch.cat([self._logits(self._views.batch(view, part)) for part in parts])
        return self._cache[view]


@dataclass
class Stage:
    """One training run: who learns, from what, how long. `checkpoint` makes it resumable at epoch ends."""

    name: str
    model: nn.Module
    views: Views
    labels: Tensor
    teacher: CachedTeacher
    terms: tuple[Term, ...]
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    ema_decay: float
    seed: int
    plan: Plan
    checkpoint: Path | None = None
    selection: tuple[Tensor, Tensor] | None = None  # normalised inputs and labels, for the progress line
    training_mode: Callable[[nn.Module], None] = field(default=lambda model: model.train() and None)
    warmup_share: float = 0.1


def fit(stage: Stage, progress: Progress) -> list[dict[str, float]]:
    """Train `stage.model` in place; it ends in eval mode with the averaged weights. Returns one row an epoch.

    Raises:
        TrainingDivergedError: the loss is not finite; the checkpoint of the last epoch is kept.
    """
    model = stage.model
    if stage.plan.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = copy.deepcopy(model)
    optimizer = _optimizer(stage)
    history = _restore(stage, average, optimizer)
    steps_per_epoch = len(_batches(torch.arange(len(stage.labels)), stage.batch_size))
    total = steps_per_epoch * stage.epochs
    with stage.plan.active():
        pace = _Pace(stage.plan)
        for epoch in range(len(history), stage.epochs):
            begin = time.perf_counter()
            stage.training_mode(model)
            view = epoch % stage.views.count
            targets = stage.teacher.of(view)
            order = torch.randperm(
                len(stage.labels), generator=torch.Generator().manual_seed((stage.seed << 20) + epoch)
            )
            loss_sum = 0.0
            for number, index in enumerate(_batches(order, stage.batch_size)):
                step = epoch * steps_per_epoch + number
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * _schedule(step / total, stage.warmup_share)
                loss = _step(stage, model, optimizer, view, index, targets[index], epoch)
                if not math.isfinite(loss):
                    raise TrainingDivergedError(
                        f"{stage.name}: the loss became {loss} at step {step + 1} (epoch {epoch + 1})",
                        f"the checkpoint of epoch {epoch} is kept; lower the rate: "
                        f"--set {stage.name}.learning_rate={stage.learning_rate / 3:.1g}",
                    )
                _update_average(average, model, min(stage.ema_decay, (step + 1) / (step + 10)))
                loss_sum += loss * len(index)
                pace.count(len(index))
                progress(stage.name, step + 1, total)
            seconds = time.perf_counter() - begin
            row = {"epoch": epoch + 1.0, "loss": loss_sum / len(stage.labels), "seconds": seconds}
            row["learning_rate"] = optimizer.param_groups[0]["lr"]
            if stage.selection is not None:
                row["selection_accuracy"] = _accuracy(average, *stage.selection)
            history.append(row)
            log.info("%s epoch %d: %s", stage.name, epoch + 1, row)
            _save(stage, average, optimizer, history)
    model.load_state_dict(average.state_dict())
    # Exporters write stride arithmetic into the graph for weights that are not contiguous.
    model.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return history


def _batches(order: Tensor, batch_size: int) -> list[Tensor]:
    """Parts of `batch_size`; a last part of one sample joins the part before, for batch norm needs two."""
    parts = list(torch.split(order, batch_size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


class _Pace:
    """Goes on with one thread where several turn out slower than one was in the probe: two threads wait for
    each other whenever something else takes a core, and a training then takes ten times as long."""

    _STEPS = 10

    def __init__(self, plan: Plan) -> None:
        self._slowest = 0.8 * plan.one_thread_rate if plan.threads > 1 else 0.0
        self._times: list[float] = [time.perf_counter()]
        self._images: list[int] = []

    def count(self, images: int) -> None:
        """Called after each step."""
        if not self._slowest:
            return
        self._times.append(time.perf_counter())
        self._images.append(images)
        if len(self._images) < self._STEPS:
            return
        rate = float(np.median(np.asarray(self._images) / np.diff(self._times)))
        self._times, self._images = [self._times[-1]], []
        if rate < self._slowest:
            log.info("%.0f images a second: something else uses the machine, going on with one thread", rate)
            torch.set_num_threads(1)
            self._slowest = 0.0


def _optimizer(stage: Stage) -> torch.optim.Optimizer:
    """AdamW; no weight decay on biases, batch norm and quantizer scales (everything with one dimension)."""
    matrices = [p for p in stage.model.parameters() if p.requires_grad and p.dim() > 1]
    vectors = [p for p in stage.model.parameters() if p.requires_grad and p.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": stage.weight_decay, "peak": stage.learning_rate},
        {"params": vectors, "weight_decay": 0.0, "peak": stage.learning_rate},
    ]
    return torch.optim.AdamW(groups, lr=stage.learning_rate, fused=True)


def _schedule(share: float, warmup: float) -> float:
    """Linear warm-up, then half a cosine to zero (Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5)."""
    if share < warmup:
        return 0.05 + 0.95 * share / warmup
    return 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))


def _step(
    stage: Stage,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    view: int,
    index: Tensor,
    target: Tensor,
    epoch: int,
) -> float:
    inputs, labels = stage.views.batch(view, index), stage.labels[index]
    if stage.plan.channels_last:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    with stage.plan.autocast():
        student, teacher = Outputs(model(inputs)), Outputs(target)
    loss = max(t.hard_weight for t in stage.terms) * hard_label_loss(student.logits, labels)
    for term in stage.terms:
        loss = loss + term.weight * term(student, teacher, labels, epoch)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


@torch.no_grad()
def _update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Exponential moving average of weights; buffers (batch norm statistics) are averaged alike."""
    mine = [*average.parameters(), *(b for b in average.buffers() if b.is_floating_point())]
    new = [*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())]
    torch._foreach_lerp_(mine, new, 1 - decay)


def _accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    logits = evaluate(model, inputs)
    return float((logits.argmax(1) == labels).float().mean())


def evaluate(model: nn.Module, inputs: Tensor, batch_size: int = 250) -> Tensor:
    """float32 (N, classes) logits in eval mode without gradients."""
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        logits = torch.cat([model(part).float() for part in torch.split(inputs, batch_size)])
    model.train(was_training)
    return logits.clone()


def _save(
    stage: Stage, average: nn.Module, optimizer: torch.optim.Optimizer, history: list[dict[str, float]]
) -> None:
    if stage.checkpoint is None:
        return
    state = {
        "model": stage.model.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "history": history,
        "plan": asdict(stage.plan),
    }
    write_atomic(stage.checkpoint, lambda path: torch.save(state, path))


def _restore(stage: Stage, average: nn.Module, optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    state = load_checkpoint(stage.checkpoint)
    if state is None:
        return []
    stage.model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    log.info("%s resumes after epoch %d", stage.name, len(state["history"]))
    history: list[dict[str, float]] = state["history"]
    return history


def load_checkpoint(path: Path | None) -> dict[str, Any] | None:
    """A checkpoint written by `fit`, or None when there is none yet.

    Raises:
        StorageError: the file is damaged.
    """
    if path is None or not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise StorageError(
            f"cannot read the checkpoint {path}: {error}", "delete it to train again"
        ) from error
    return state


def probe(
    model: nn.Module, inputs: Tensor, threads: int, *, allow_bfloat16: bool = True, seconds: float = 0.5
) -> tuple[Plan, dict[str, float]]:
    """Time forward and backward of a few plans on a copy of `model`; the fastest wins.

    `threads` 0 tries one thread and all that this process may use. Returns the plan, and images per second
    of each.
    """
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    counts = sorted({1, available}) if threads == 0 else [threads]
    forms = [(False, False), (False, True), *([(True, True)] if allow_bfloat16 else [])]
    plans = [Plan(n, half, last) for n in counts for half, last in forms]
    rates: dict[str, float] = {}
    for plan in plans:
        trial = copy.deepcopy(model).train()
        batch = inputs
        if plan.channels_last:
            trial.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            batch = inputs.contiguous(memory_format=torch.channels_last)
        with plan.active():
            times: list[float] = []
            begin = time.perf_counter()
            while len(times) < 3 or (time.perf_counter() - begin < seconds and len(times) < 40):
                start = time.perf_counter()
                with plan.autocast():
                    logits = trial(batch)
                logits.float().square().mean().backward()
                times.append(time.perf_counter() - start)
        rates[str(plan)] = len(inputs) / float(np.median(times[1:]))
    best = max(plans, key=lambda plan: rates[str(plan)])
    alone = rates.get(str(replace(best, threads=1)), 0.0)
    best = replace(best, one_thread_rate=round(alone, 1))
    return best, {name: round(rate, 1) for name, rate in rates.items()}
