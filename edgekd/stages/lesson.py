"""What a student is taught by: methods with their taps, wraps and adapters, and the form of the teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from edgekd.distillers import (
    Distiller,
    Setting,
    method_class,
    methods,
    refuse_blends,
    refuse_unmet,
    refuse_wraps,
)
from edgekd.errors import UsageError
from edgekd.graph_taps import TappedGraph
from edgekd.layout import Layout
from edgekd.logit_store import LogitStore
from edgekd.nets import Outputs
from edgekd.plan import Plan
from edgekd.ranks import ALONE, Ranks
from edgekd.recipe import DistillRecipe
from edgekd.spec import ModelSpec
from edgekd.taps import Tapped, find_layout
from edgekd.teacher import Teacher
from edgekd.views import CachedTeacher, Views


@dataclass(frozen=True)
class Lesson:
    """`model` is the student as it is trained; `deploy` gives the network that is exported."""

    model: nn.Module
    distillers: tuple[Distiller, ...]

    def deploy(self) -> nn.Module:
        """The student without anything that only training needs."""
        made: nn.Module = self.model.deploy()  # type: ignore[operator]
        return made


@dataclass(frozen=True)
class Classroom:
    """What a lesson is planned from. `labels` int64 of the training images, -1 where there is none. The
    logits of `others`, further teachers, stand in `Outputs.exits` of the teacher's outputs."""

    recipe: DistillRecipe
    teacher: Teacher
    spec: ModelSpec
    labels: Tensor
    seed: int
    mixes: bool
    others: tuple[Teacher, ...] = ()
    keep: Callable[[Sequence[Teacher], Views], LogitStore] | None = None  # None: logits stay in memory
    ranks: Ranks = ALONE

    @property
    def example(self) -> Tensor:
        """Inputs of the right shape."""
        return torch.zeros(2, *self.spec.input_shape)

    @property
    def taught_by(self) -> Tapped | None:
        """A copy of the torch teacher with the taps that the method asks for; None for a black box."""
        if self.teacher.model is None:
            return None
        network = copy.deepcopy(self.teacher.model)
        layout = find_layout(network, self.example, len(self.spec.classes), self.recipe.teacher_taps)
        wanted = {tap for name in self.recipe.method.split("+") for tap in method_class(name).needs.teacher}
        return Tapped(network, layout, sorted(wanted & set(layout.taps)))


def prepare(room: Classroom, student: nn.Module) -> Lesson:
    """Wrap `student` for the recipe's method and build its adapters, on the CPU.

    Raises:
        UsageError: the method needs what this teacher, student or data do not give.
    """
    parts = methods(room.recipe.method, room.recipe.options)
    layout = find_layout(student, room.example, len(room.spec.classes), room.recipe.student_taps)
    return _prepared(room, parts, layout, lambda wanted: Tapped(student, layout, wanted))


def prepare_graph(room: Classroom, student: nn.Module, graph: fx.GraphModule) -> Lesson:
    """The same for `student` captured as `graph` and fake-quantized there.

    Raises:
        UsageError: the method needs what is not given, or changes the network that it trains.
    """
    parts = methods(room.recipe.method, room.recipe.options)
    refuse_wraps(room.recipe.method)
    layout = find_layout(student, room.example, len(room.spec.classes), room.recipe.student_taps)
    return _prepared(room, parts, layout, lambda wanted: TappedGraph(graph, layout, wanted))


def _prepared(
    room: Classroom,
    parts: tuple[Distiller, ...],
    layout: Layout,
    tapped: Callable[[list[str]], Tapped | TappedGraph],
) -> Lesson:
    classes = len(room.spec.classes)
    teacher = room.taught_by
    refuse_unmet(
        parts,
        teacher_taps=("logits",) if teacher is None else teacher.layout.taps,
        student_taps=layout.taps,
        labels=bool((room.labels >= 0).all()),
    )
    refuse_blends(parts, blends=room.mixes)
    model: nn.Module = tapped(sorted({tap for part in parts for tap in part.needs.student}))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(room.seed)
        taught = Outputs(torch.zeros(2, classes)) if teacher is None else _glance(teacher, room.example)
        taught = replace(taught, exits=tuple(other.logits(room.example) for other in room.others))
        for part in parts:
            model = part.wrap(model, _glance(model, room.example), teacher)
        seen = _glance(model, room.example)
        setting = Setting(len(room.labels), classes, room.labels, room.seed)
        for part in parts:
            part.build(seen, taught, setting)
    return Lesson(model, parts)


def _glance(model: nn.Module, inputs: Tensor) -> Outputs:
    """One forward pass in eval mode that leaves no trace."""
    training = {module: module.training for module in model.modules()}
    with torch.no_grad():
        outputs: Outputs = model.eval()(inputs)
    for module, mode in training.items():
        module.training = mode
    return outputs


def teacher_for(
    room: Classroom, lesson: Lesson, views: Views, plan: Plan
) -> CachedTeacher | nn.Module | None:
    """Stored logits where logits are enough; the network itself in every step where they are not."""
    if not any(part.needs.teacher or part.needs.input_gradient for part in lesson.distillers):
        return None
    online = any(part.needs.torch_teacher for part in lesson.distillers)
    network = room.taught_by
    if network is not None and (online or (plan.device != "cpu" and not views.count)):
        blind = [other.name for other in room.others if other.model is None]
        if not blind:
            others = [copy.deepcopy(other.model) for other in room.others if other.model is not None]
            return _Several(network, others) if others else network
        if online:
            raise UsageError(
                f"method '{room.recipe.method}' runs all teachers in every step, and of '{blind[0]}' there "
                "are logits only",
                "choose a method on logits: edgekd methods list",
            )
    teachers = (room.teacher, *room.others)
    first, *rest = (_answers(teacher, plan) for teacher in teachers)
    store = None if room.keep is None else room.keep(teachers, views)
    return CachedTeacher(first, views, others=rest, store=store, ranks=room.ranks)


def _answers(teacher: Teacher, plan: Plan) -> Callable[[Tensor], Tensor]:
    """Logits of a teacher: on the plan's device, unless that is the CPU or the teacher a black box."""
    if plan.device == "cpu" or teacher.model is None:
        return teacher.logits
    return _on_device(teacher.model, plan)


class _Several(nn.Module):
    """A tapped teacher; the logits of further networks are its exits."""

    def __init__(self, first: Tapped, others: Sequence[nn.Module]) -> None:
        super().__init__()
        self.first, self.others = first, nn.ModuleList(others)

    def forward(self, inputs: Tensor) -> Outputs:
        outputs: Outputs = self.first(inputs)
        return replace(outputs, exits=tuple(other(inputs) for other in self.others))


def _on_device(model: nn.Module, plan: Plan) -> Callable[[Tensor], Tensor]:
    """Logits of a torch teacher on the plan's device."""
    model = copy.deepcopy(model).to(plan.device).eval()

    @torch.inference_mode()
    def logits(inputs: Tensor) -> Tensor:
        made: Tensor = model(inputs.to(plan.device))
        return made.float()

    return logits
