"""One training: what it is told (`Stage`), and the state that it steps forward (`Loop`)."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edgekd.distillers import Context, Distiller
from edgekd.errors import StorageError, TrainingDivergedError
from edgekd.files import write_atomic
from edgekd.nets import Batch, Outputs, as_outputs, evaluate
from edgekd.optimizer import Kind, make_optimizer, rate_share
from edgekd.orders import epoch_order
from edgekd.plan import Plan
from edgekd.ranks import ALONE, Ranks
from edgekd.tasks.classification import hard_label_loss
from edgekd.views import CachedTeacher, Views

log = logging.getLogger(__name__)
_EAGER_STEPS = 3  # before a CUDA graph is captured: libraries allocate and choose kernels in them


@dataclass
class Stage:
    """One training run: who learns, from what, how long. `checkpoint` makes it resumable at epoch ends.

    `model` maps inputs to `Outputs` or to logits. `teacher`: stored logits of every view, or a network that
    runs in each step, or None. `schedule`: half a cosine after a warm-up, or a tenth of the rate at each of
    `milestones` (shares of the run). The last part of an epoch smaller than a batch is left out; every epoch
    shuffles anew. `ema_decay` 0 keeps the last weights instead of an average. `batch_size` is that of all
    processes together; each has a part of every batch, and the first writes the checkpoint.
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
    optimizer: Kind = "adamw"
    decay_all: bool = False  # weight decay on biases and batch norm too, as most published recipes have it
    milestones: tuple[float, ...] = ()
    warmup_share: float = 0.1
    hard_weight: float | None = None  # None: the largest of the methods' own
    rate_key: str = ""  # recipe key of the learning rate; empty: NAME.learning_rate
    ranks: Ranks = ALONE
    before_step: Callable[[nn.Module, float], None] | None = None  # with the share of the steps done; CPU
    on_epoch: Callable[[str, dict[str, float]], None] | None = None  # with the name and the history's row

    @property
    def batch(self) -> int:
        """Samples a step."""
        return min(self.batch_size, len(self.labels))

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches an epoch."""
        return len(self.labels) // self.batch


class Loop:
    """The state of one `fit`. `step` has no arguments and reads nothing but tensors, so that it can be
    captured once as a CUDA graph and replayed."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.device, self.ranks = stage, torch.device(stage.plan.device), stage.ranks
        self.model = stage.plan.place(stage.model)
        self.steps = stage.steps_per_epoch * stage.epochs
        self.distillers = nn.ModuleList(stage.distillers).to(self.device)
        for module in (self.model, self.distillers):
            self.ranks.spread([*module.parameters(), *module.buffers()])
        self.average = copy.deepcopy(self.model) if stage.ema_decay else self.model
        self.labels = stage.labels.to(self.device)
        self._online = stage.teacher if isinstance(stage.teacher, nn.Module) else None
        if self._online is not None:
            stage.plan.place(self._online).eval().requires_grad_(requires_grad=False)
        self.optimizer = make_optimizer(
            (stage.model, self.distillers), stage.optimizer, stage.learning_rate, stage.weight_decay,
            stage.plan.device, decay_all=stage.decay_all,
        )  # fmt: skip
        self._allocate()
        self.history = self._restore()
        capturable = all(distiller.capturable for distiller in stage.distillers)
        # Messages between processes stay out of graphs.
        self._graphed = stage.plan.graphed and capturable and self.ranks.count == 1
        self._seen, self._resumed = 0, len(self.history) * stage.steps_per_epoch
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
        self._mine = self.ranks.part(stage.batch)
        self.part = len(range(stage.batch)[self._mine])  # samples a step of this process
        self._share = self.part / stage.batch
        self._order = torch.zeros(stage.steps_per_epoch, self.part, dtype=torch.int64, device=device)
        self._position = torch.zeros((), dtype=torch.int64, device=device)
        self._targets: Tensor | None = None
        self._step = torch.zeros((), device=device)
        self.context = Context(
            torch.zeros((), device=device),
            self._step,
            stage.epochs,
            self.steps,
            torch.Generator(device),
        )
        rates = [
            rate_share(step / self.steps, stage.warmup_share, stage.milestones) for step in range(self.steps)
        ]
        self._rates = torch.tensor(rates, device=device)
        decays = [1 - min(stage.ema_decay, (step + 1) / (step + 10)) for step in range(self.steps)]
        self._average_shares = torch.tensor(decays, device=device)
        self._terms = torch.zeros(1 + len(stage.distillers), device=device)  # sums over the epoch; CE first
        self._loss = torch.zeros((), device=device)  # of the last step
        mine = [*self.average.parameters(), *(b for b in self.average.buffers() if b.is_floating_point())]
        new = [*self.model.parameters(), *(b for b in self.model.buffers() if b.is_floating_point())]
        self._averaged = (mine, new) if self.average is not self.model else ([], [])
        # What steps write and no gradient reaches; several processes bring theirs together at epoch ends.
        modules = (self.model, self.average, self.distillers)
        self._written = list({id(b): b for module in modules for b in module.buffers()}.values())
        self._before: list[Tensor] = []

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
        seed = (stage.seed << 20) + epoch
        paired = any(distiller.needs.some_labels for distiller in stage.distillers)
        shape = torch.Size((stage.steps_per_epoch, stage.batch))
        order = epoch_order(stage.labels, shape, torch.Generator().manual_seed(seed), paired=paired)
        self._order.copy_(order[:, self._mine])
        self._position.zero_()
        self._step.fill_(epoch * stage.steps_per_epoch)
        self.context.epoch.fill_(epoch)
        self.context.generator.manual_seed(seed + (self.ranks.rank << 52))
        self._terms.zero_()
        if self.ranks.count > 1:
            self._before = [buffer.clone() for buffer in self._written]

    def step(self) -> None:
        """One optimiser step: eager, or the replay of a captured graph."""
        if self.stage.before_step is not None:
            self.stage.before_step(self.model, (self._resumed + self._seen) / self.steps)
        with self._on_stream():
            if not self._graphed or self._seen < _EAGER_STEPS:
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
            student = as_outputs(self._student(batch.inputs))
            teacher = self._taught(batch)
        loss = self._loss_of(student, teacher, batch)
        self._set_rate()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        numbers = [self._parts, loss.detach(), *(value.detach() for value in self._values)]
        if self.ranks.count > 1:
            numbers = self._combined(numbers)
        self.optimizer.step()
        self._update_average()
        self._terms += numbers[0]
        self._loss.copy_(numbers[1])
        for distiller, value in zip(stage.distillers, numbers[2:], strict=True):
            distiller.after_step(value, self.context)
        self._position += 1
        self._step += 1

    def _combined(self, numbers: list[Tensor]) -> list[Tensor]:
        """Gradients, in place, and `numbers`: means over the whole batch, the same on every process."""
        numbers = [number.clone() for number in numbers]
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        gradients = [parameter.grad for parameter in trained if parameter.grad is not None]
        self.ranks.combine([*gradients, *numbers], self._share)
        return numbers

    def _taught(self, batch: Batch) -> Outputs:
        if self._targets is not None and isinstance(self.stage.teacher, CachedTeacher):
            return self.stage.teacher.outputs(self._targets[batch.index])
        if self._teacher is None:
            return Outputs(batch.inputs.new_zeros(len(batch.inputs), 1))
        with torch.no_grad():
            return as_outputs(self._teacher(batch.inputs))

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
        self._parts = stacked.detach()
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
        kept = f"the checkpoint of epoch {epoch} is kept" if epoch else "no epoch was finished"
        rate = f"{stage.rate_key or f'{stage.name}.learning_rate'}={stage.learning_rate / 3:.1g}"
        lower = f"lower the rate: --set {rate}"
        if step == 1:  # nothing has been learnt yet
            lower = "no rate changes the first step: look at the options of its methods and at the weights"
        raise TrainingDivergedError(
            f"{stage.name}: the loss became {loss} {'at' if self.device.type == 'cpu' else 'before'} "
            f"step {step} (epoch {epoch + 1}), in the term of: {', '.join(culprits)}",
            f"{kept}; {lower}",
        )

    def close_epoch(self, epoch: int, seconds: float) -> None:
        stage = self.stage
        with self._on_stream():
            if self.ranks.count > 1:
                self.ranks.merge(self._written, self._before)
        if self._stream is not None:
            self._stream.synchronize()
        row = {
            "epoch": epoch + 1.0,
            "loss": float(self._terms.sum()) / stage.steps_per_epoch,
            "seconds": seconds,
            "learning_rate": stage.learning_rate * float(self._rates[int(self._step) - 1]),
        }
        if stage.selection is not None and self.ranks.first:
            inputs, labels = stage.selection
            row["selection_accuracy"] = float(
                (evaluate(self.average, inputs).argmax(1) == labels).float().mean()
            )
        row = self.ranks.of_first(row)
        self.history.append(row)
        if stage.on_epoch is not None and self.ranks.first:
            stage.on_epoch(stage.name, row)
        log.info("%s epoch %d: %s", stage.name, epoch + 1, row)
        if stage.checkpoint is not None and self.ranks.first:
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
        done = 0 if state is None else len(state["history"])
        if not self.ranks.all(self.ranks.of_first(done) == done):
            raise StorageError(
                f"the processes find different checkpoints at {self.stage.checkpoint}",
                "put the run's folder where all processes see it: --out FOLDER",
            )
        if state is None:
            return []
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.distillers.load_state_dict(state["distillers"])
        log.info("%s resumes after epoch %d", self.stage.name, len(state["history"]))
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
    except Exception as error:  # bytes that are no pickle make its reader raise anything
        raise StorageError(
            f"cannot read the checkpoint {path}: {type(error).__name__}: {error}", "delete it to train again"
        ) from error
    return state
