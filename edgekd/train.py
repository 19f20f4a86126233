"""The only training loop. Distillation and quantization-aware training are two calls of `fit`."""

from __future__ import annotations

import copy
import logging
import math
import pickle
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from edgekd.distillers import Context, Distiller
from edgekd.errors import StorageError, TrainingDivergedError
from edgekd.files import write_atomic
from edgekd.nets import Batch, Outputs
from edgekd.orders import epoch_order
from edgekd.plan import Pace, Plan
from edgekd.tasks.classification import hard_label_loss
from edgekd.views import CachedTeacher, Views

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]  # what, steps done, steps in all
_EAGER_STEPS = 3  # before a CUDA graph is captured: libraries allocate and choose kernels in them


@dataclass
class Stage:
    """One training run: who learns, from what, how long. `checkpoint` makes it resumable at epoch ends.

    `model` maps inputs to `Outputs` or to logits. `teacher`: stored logits of every view, or a network that
    runs in each step, or None. `schedule`: half a cosine after a warm-up, or a tenth of the rate at each of
    `milestones` (shares of the run). The last part of an epoch smaller than a batch is left out; every epoch
    shuffles anew. `ema_decay` 0 keeps the last weights instead of an average.
    """

    name: str
    model: nn.Module
    views: Views
    labels: Tensor
    teacher: CachedTeacher | nn.Module | None
    distillers: tuple[Distiller, ...]
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
    optimizer: Literal["adamw", "sgd"] = "adamw"
    milestones: tuple[float, ...] = ()
    warmup_share: float = 0.1
    hard_weight: float | None = None  # None: the largest of the methods' own

    @property
    def batch(self) -> int:
        """Samples a step."""
        return min(self.batch_size, len(self.labels))

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches an epoch."""
        return len(self.labels) // self.batch


def fit(stage: Stage, progress: Progress) -> list[dict[str, float]]:
    """Train `stage.model` in place; it ends in eval mode with the averaged weights. Returns one row an epoch.

    Raises:
        TrainingDivergedError: the loss is not finite; the checkpoint of the last epoch is kept.
    """
    return fit_together((stage,), progress)[0]


def fit_together(stages: Sequence[Stage], progress: Progress) -> list[list[dict[str, float]]]:
    """Train stages of equal length side by side, step by step. On CUDA each has a stream of its own, because
    one small network leaves most of such a device idle. `progress` follows the first."""
    first = stages[0]
    with first.plan.active():
        loops = [_Loop(stage) for stage in stages]
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
                pace.count(first.batch)
                progress(first.name, epoch * first.steps_per_epoch + number + 1, loops[0].steps)
            for loop in open_loops:
                loop.close_epoch(epoch, time.perf_counter() - begin)
    return [loop.finish() for loop in loops]


class _Loop:
    """The state of one `fit`. `step` has no arguments and reads nothing but tensors, so that it can be
    captured once as a CUDA graph and replayed."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.device = stage, torch.device(stage.plan.device)
        self.model = stage.plan.place(stage.model)
        self.steps = stage.steps_per_epoch * stage.epochs
        self.distillers = nn.ModuleList(stage.distillers).to(self.device)
        self.average = copy.deepcopy(self.model) if stage.ema_decay else self.model
        self.labels = stage.labels.to(self.device)
        self._online = stage.teacher if isinstance(stage.teacher, nn.Module) else None
        if self._online is not None:
            stage.plan.place(self._online).eval().requires_grad_(requires_grad=False)
        self.optimizer = _optimizer(stage, self.distillers)
        self._allocate()
        self.history = self._restore()
        self._seen = 0
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._graph: torch.cuda.CUDAGraph | None = None
        run = torch.compile if stage.plan.compiled else (lambda module: module)
        self._student: Any = run(self.model)
        self._teacher: Any = run(self._online) if self._online is not None else None
        if self._stream is not None:
            torch.cuda.synchronize(self.device)

    def _on_stream(self) -> AbstractContextManager[object]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def finish(self) -> list[dict[str, float]]:
        """Hand the averaged weights over."""
        model = self.stage.model
        model.load_state_dict(self.average.state_dict())
        # Exporters write stride arithmetic into the graph for weights that are not contiguous.
        model.cpu().eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        return self.history

    def _allocate(self) -> None:
        """Everything that a step reads and that changes from step to step."""
        stage, device = self.stage, self.device
        self._order = torch.zeros(stage.steps_per_epoch, stage.batch, dtype=torch.int64, device=device)
        self._position = torch.zeros((), dtype=torch.int64, device=device)
        self._targets: Tensor | None = None
        self._step = torch.zeros((), device=device)
        self.context = Context(
            torch.zeros((), device=device),
            self._step,
            stage.epochs,
            self.steps,
            torch.Generator(device).manual_seed(stage.seed),
        )
        rates = [
            _schedule(step / self.steps, stage.warmup_share, stage.milestones) for step in range(self.steps)
        ]
        self._rates = torch.tensor(rates, device=device)
        decays = [1 - min(stage.ema_decay, (step + 1) / (step + 10)) for step in range(self.steps)]
        self._average_shares = torch.tensor(decays, device=device)
        self._terms = torch.zeros(1 + len(stage.distillers), device=device)  # sums over the epoch; CE first
        self._loss = torch.zeros((), device=device)  # of the last step
        mine = [*self.average.parameters(), *(b for b in self.average.buffers() if b.is_floating_point())]
        new = [*self.model.parameters(), *(b for b in self.model.buffers() if b.is_floating_point())]
        self._averaged = (mine, new) if self.average is not self.model else ([], [])

    def open_epoch(self, epoch: int) -> None:
        with self._on_stream():
            self._open_epoch(epoch)

    def _open_epoch(self, epoch: int) -> None:
        stage = self.stage
        stage.training_mode(self.model)
        self.distillers.train()
        view = stage.views.of_epoch(epoch)
        if isinstance(stage.teacher, CachedTeacher):
            logits = stage.teacher.of(view)
            if self._targets is None:
                self._targets = torch.empty_like(logits)
            self._targets.copy_(logits)
        else:
            stage.views.select(view)
        generator = torch.Generator().manual_seed((stage.seed << 20) + epoch)
        paired = any(distiller.needs.some_labels for distiller in stage.distillers)
        self._order.copy_(epoch_order(stage.labels, self._order.shape, generator, paired=paired))
        self._position.zero_()
        self._step.fill_(epoch * stage.steps_per_epoch)
        self.context.epoch.fill_(epoch)
        self.context.generator.manual_seed((stage.seed << 20) + epoch)
        self._terms.zero_()

    def step(self) -> None:
        """One optimiser step: eager, or the replay of a captured graph."""
        with self._on_stream():
            if not self.stage.plan.graphed or self._seen < _EAGER_STEPS:
                self._work()
            else:
                if self._graph is None:
                    self._graph = torch.cuda.CUDAGraph()
                    self._graph.register_generator_state(self.context.generator)
                    with torch.cuda.graph(self._graph, stream=self._stream):
                        self._work()
                self._graph.replay()
        self._seen += 1

    def _work(self) -> None:
        stage = self.stage
        index = self._order.index_select(0, self._position.view(1)).view(-1)
        batch = Batch(stage.plan.arrange(stage.views.batch(index)), self.labels[index], index)
        for distiller in stage.distillers:
            batch = distiller.augment(batch, self._student, self._teacher, self.context)
        with stage.plan.autocast():
            student = _outputs(self._student(batch.inputs))
            teacher = self._taught(batch)
        loss = self._loss_of(student, teacher, batch)
        self._set_rate()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self._update_average()
        self._loss.copy_(loss.detach())
        for distiller, value in zip(stage.distillers, self._values, strict=True):
            distiller.after_step(value.detach(), self.context)
        self._position += 1
        self._step += 1

    def _taught(self, batch: Batch) -> Outputs:
        if self._targets is not None:
            return Outputs(self._targets[batch.index])
        if self._teacher is None:
            return Outputs(batch.inputs.new_zeros(len(batch.inputs), 1))
        with torch.no_grad():
            return _outputs(self._teacher(batch.inputs))

    def _loss_of(self, student: Outputs, teacher: Outputs, batch: Batch) -> Tensor:
        stage = self.stage
        for distiller in stage.distillers:
            teacher = distiller.target(student, teacher, batch, self.context)
        hard_weight = stage.hard_weight
        if hard_weight is None:
            hard_weight = max((d.hard_weight for d in stage.distillers), default=1.0)
        hard = hard_label_loss(student.logits, batch.labels) if hard_weight else self._loss * 0
        self._values = [distiller(student, teacher, batch, self.context) for distiller in stage.distillers]
        parts = [hard_weight * stage.views.labelled * hard]
        parts += [d.weight * value for d, value in zip(stage.distillers, self._values, strict=True)]
        stacked = torch.stack(parts)
        self._terms += stacked.detach()
        return stacked.sum()

    def _now(self, table: Tensor) -> Tensor:
        """The entry of this step; indexing with a tensor would wait for the device."""
        return table.index_select(0, self._step.long().view(1)).squeeze(0)

    def _set_rate(self) -> None:
        """The rate is a tensor that the optimiser reads."""
        for group in self.optimizer.param_groups:
            group["lr"].copy_(group["peak"] * self._now(self._rates))

    @torch.no_grad()
    def _update_average(self) -> None:
        """Exponential moving average of weights; buffers (batch norm statistics) are averaged alike."""
        mine, new = self._averaged
        if not mine:
            return
        change = torch._foreach_sub(new, mine)
        torch._foreach_mul_(change, self._now(self._average_shares))
        torch._foreach_add_(mine, change)

    def check(self, epoch: int, number: int) -> None:
        """Stop at a loss that is not finite: at once on a CPU, at the end of the epoch on other devices,
        where looking costs more than the step."""
        last = number == self.stage.steps_per_epoch - 1
        if self.device.type != "cpu" and not last:
            return
        if self._stream is not None:
            self._stream.synchronize()
        loss = float(self._loss if self.device.type == "cpu" else self._terms.sum())
        if math.isfinite(loss):
            return
        stage = self.stage
        names = ["labels", *(type(d).__name__.lower() for d in stage.distillers)]
        values = self._terms.tolist()
        culprits = [name for name, value in zip(names, values, strict=True) if not math.isfinite(value)]
        step = epoch * stage.steps_per_epoch + number + 1
        raise TrainingDivergedError(
            f"{stage.name}: the loss became {loss} {'at' if self.device.type == 'cpu' else 'before'} "
            f"step {step} (epoch {epoch + 1}), in the term of: {', '.join(culprits)}",
            f"the checkpoint of epoch {epoch} is kept; lower the rate: "
            f"--set {stage.name}.learning_rate={stage.learning_rate / 3:.1g}",
        )

    def close_epoch(self, epoch: int, seconds: float) -> None:
        stage = self.stage
        if self._stream is not None:
            self._stream.synchronize()
        row = {
            "epoch": epoch + 1.0,
            "loss": float(self._terms.sum()) / stage.steps_per_epoch,
            "seconds": seconds,
            "learning_rate": stage.learning_rate * float(self._rates[int(self._step) - 1]),
        }
        if stage.selection is not None:
            inputs, labels = stage.selection
            row["selection_accuracy"] = float(
                (evaluate(self.average, inputs).argmax(1) == labels).float().mean()
            )
        self.history.append(row)
        log.info("%s epoch %d: %s", stage.name, epoch + 1, row)
        if stage.checkpoint is not None:
            state = {
                "model": self.model.state_dict(),
                "average": self.average.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "distillers": self.distillers.state_dict(),
                "history": self.history,
                "plan": asdict(stage.plan),
            }
            write_atomic(stage.checkpoint, lambda path: torch.save(state, path))

    def _restore(self) -> list[dict[str, float]]:
        state = load_checkpoint(self.stage.checkpoint)
        if state is None:
            return []
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.distillers.load_state_dict(state["distillers"])
        log.info("%s resumes after epoch %d", self.stage.name, len(state["history"]))
        history: list[dict[str, float]] = state["history"]
        return history


def _outputs(made: Outputs | Tensor) -> Outputs:
    return made if isinstance(made, Outputs) else Outputs(made)


def _optimizer(stage: Stage, distillers: nn.Module) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum 0.9; no weight decay on biases, batch norm and quantizer scales
    (everything with one dimension). Adapters of the methods train along."""
    trained = [p for p in (*stage.model.parameters(), *distillers.parameters()) if p.requires_grad]
    matrices = [p for p in trained if p.dim() > 1]
    vectors = [p for p in trained if p.dim() <= 1]
    cuda = stage.plan.device != "cpu"
    groups: list[dict[str, Any]] = []
    for parameters, decay in ((matrices, stage.weight_decay), (vectors, 0.0)):
        rate = torch.tensor(stage.learning_rate, device=stage.plan.device)
        groups.append({"params": parameters, "weight_decay": decay, "peak": stage.learning_rate, "lr": rate})
    groups = [group for group in groups if group["params"]]
    if stage.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=stage.learning_rate, momentum=0.9, fused=True)
    return torch.optim.AdamW(groups, lr=stage.learning_rate, fused=True, capturable=cuda)


def _schedule(share: float, warmup: float, milestones: tuple[float, ...] = ()) -> float:
    """The rate as a share of its peak. Linear warm-up, then half a cosine to zero (Loshchilov & Hutter 2017,
    arXiv:1608.03983, eq. 5); with `milestones`, a tenth at each of them."""
    if milestones:
        return float(0.1 ** sum(share >= milestone for milestone in milestones))
    if share < warmup:
        return 0.05 + 0.95 * share / warmup
    return 0.5 * (1 + math.cos(math.pi * (share - warmup) / (1 - warmup)))


def evaluate(model: nn.Module, inputs: Tensor, batch_size: int = 250) -> Tensor:
    """float32 (N, classes) logits in eval mode without gradients, on the CPU."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    device = next((p.device for p in model.parameters()), inputs.device)
    with torch.inference_mode():
        parts = [_outputs(model(part.to(device))).logits.float() for part in torch.split(inputs, batch_size)]
    for module, mode in training.items():
        module.training = mode
    return torch.cat(parts).cpu().clone()


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
