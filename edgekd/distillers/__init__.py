"""One transfer method a file. A method uses some of six parts: taps, target, term, wrap, data policy, stages.

Everything here runs inside captured CUDA graphs too: no shapes that depend on values (no boolean-mask
indexing), no ``.item()``, and what changes from step to step is read from the tensors of `Context`.
"""

from __future__ import annotations

import importlib
import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import msgspec
import torch
from torch import Tensor, nn

from edgekd.errors import UsageError, unknown_name
from edgekd.nets import Batch, Outputs

# Types of the options of methods: what `methods` lets through.
Positive = Annotated[float, msgspec.Meta(gt=0)]
NonNegative = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=1)]
Whole = Annotated[int, msgspec.Meta(ge=0)]

_TABLE = {
    "kd": "edgekd.distillers.kd:Kd",
    "lskd": "edgekd.distillers.lskd:Lskd",
    "dkd": "edgekd.distillers.dkd:Dkd",
    "dist": "edgekd.distillers.dist:Dist",
    "ctkd": "edgekd.distillers.ctkd:Ctkd",
    "mlkd": "edgekd.distillers.mlkd:Mlkd",
    "ssld": "edgekd.distillers.ssld:Ssld",
    "taid": "edgekd.distillers.taid:Taid",
    "pskd": "edgekd.distillers.pskd:Pskd",
    "gate": "edgekd.distillers.gate:Gate",
    "swing": "edgekd.distillers.swing:Swing",
    "slices": "edgekd.distillers.slices:Slices",
    "ensemble": "edgekd.distillers.ensemble:Ensemble",
    "fitnet": "edgekd.distillers.fitnet:FitNet",
    "at": "edgekd.distillers.at:At",
    "sp": "edgekd.distillers.sp:Sp",
    "cc": "edgekd.distillers.cc:Cc",
    "rkd": "edgekd.distillers.rkd:Rkd",
    "pkt": "edgekd.distillers.pkt:Pkt",
    "nst": "edgekd.distillers.nst:Nst",
    "vid": "edgekd.distillers.vid:Vid",
    "ickd": "edgekd.distillers.ickd:Ickd",
    "fsp": "edgekd.distillers.fsp:Fsp",
    "ab": "edgekd.distillers.ab:Ab",
    "ft": "edgekd.distillers.ft:Ft",
    "ofd": "edgekd.distillers.ofd:Ofd",
    "crd": "edgekd.distillers.crd:Crd",
    "reviewkd": "edgekd.distillers.reviewkd:ReviewKd",
    "hcl": "edgekd.distillers.reviewkd:Hcl",
    "mgd": "edgekd.distillers.mgd:Mgd",
    "cwd": "edgekd.distillers.cwd:Cwd",
    "mi": "edgekd.distillers.mi:Mi",
    "trg": "edgekd.distillers.trg:Trg",
    "skt": "edgekd.distillers.skt:Skt",
    "relation": "edgekd.distillers.relation:Relation",
    "semantic": "edgekd.distillers.semantic:Semantic",
    "hidden": "edgekd.distillers.hidden:Hidden",
    "ccc": "edgekd.distillers.ccc:Ccc",
    "ofa": "edgekd.distillers.ofa:Ofa",
    "simkd": "edgekd.distillers.simkd:SimKd",
    "promptkd": "edgekd.distillers.promptkd:PromptKd",
    "dho": "edgekd.distillers.dho:Dho",
    "lsskd": "edgekd.distillers.lsskd:Lsskd",
    "dml": "edgekd.distillers.dml:Dml",
    "bsd": "edgekd.distillers.bsd:Bsd",
    "hard": "edgekd.distillers.hard:Hard",
}
_WEIGHTS = ("weight", "hard_weight")  # options of every method
_ALIASES = {"hints": "fitnet"}  # other names that are in use


@dataclass(frozen=True)
class Needs:
    """What a method asks for; checked before training.

    `teacher`, `student`: names of `edgekd.taps.TAPS`; an empty `teacher` is a method without one.
    `input_gradient`: the loss is differentiated through the teacher down to its input.
    `classifier`: the teacher's last layer is read once, before training.
    `some_labels`: where `labels` is asked for, samples without one (-1) may be among them.
    `mixable`: its targets stay right for images that are mixtures of two (labels are of the stronger one).
    """

    teacher: tuple[str, ...] = ("logits",)
    student: tuple[str, ...] = ("logits",)
    labels: bool = False
    input_gradient: bool = False
    mixable: bool = True
    classifier: bool = False
    some_labels: bool = False

    @property
    def torch_teacher(self) -> bool:
        """Whether logits computed elsewhere, or before, are not enough."""
        return self.input_gradient or any(tap != "logits" for tap in self.teacher)


@dataclass(frozen=True)
class Setting:
    """What is known before the first step. `labels` int64 (samples,), -1 where a sample has none."""

    samples: int
    classes: int
    labels: Tensor
    seed: int


@dataclass
class Context:
    """Where training is. `epoch` and `step` are 0-dim float32 tensors on the device, counting from 0;
    `epochs` and `steps` are the totals. `generator` is the only source of randomness."""

    epoch: Tensor
    step: Tensor
    epochs: int
    steps: int
    generator: torch.Generator


class Distiller(nn.Module):
    """Base of all methods; parameters created in `build` are trained with the student and then dropped.

    `weight` multiplies the term, `hard_weight` the cross-entropy with the labels beside it: published values.
    `capturable` False keeps the steps of a method out of CUDA graphs.
    """

    needs: Needs = Needs()  # of the class; an option may change it for one instance
    weight: float = 1.0
    hard_weight: float = 1.0
    capturable: bool = True

    def build(self, student: Outputs, teacher: Outputs, setting: Setting) -> None:
        """Create adapters and stores for the shapes of these example outputs."""

    def wrap(self, student: nn.Module, outputs: Outputs, teacher: nn.Module | None) -> nn.Module:
        """The student as it is trained: a module from inputs to `Outputs` with a method ``deploy()`` that
        gives the exportable network. `student` and `teacher` are such modules (`edgekd.taps.Tapped`, the
        teacher None where it is a black box), `outputs` is an example of what the student gives. What only
        training needs (`exits`, `peer`, `extra_maps`) is given in training mode."""
        return student

    def augment(self, batch: Batch, student: nn.Module, teacher: nn.Module | None, context: Context) -> Batch:
        """The data policy: the batch that the student sees."""
        return batch

    def target(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Outputs:
        """The teacher's outputs as the terms shall see them."""
        return teacher

    def forward(self, student: Outputs, teacher: Outputs, batch: Batch, context: Context) -> Tensor:
        """The term: mean over the batch, a float32 (or float64) scalar."""
        return student.logits.new_zeros((), dtype=torch.float32)

    def after_step(self, loss: Tensor, context: Context) -> None:
        """Called after the optimiser; `loss` is the detached value of this term."""


def methods(method: str, options: dict[str, dict[str, Any]] | None = None) -> tuple[Distiller, ...]:
    """The parts of a method such as ``dist`` or ``dkd+fitnet``, with options by name.

    An option is an argument of the method's class, or ``weight`` or ``hard_weight``.

    Raises:
        UsageError: a name is not in the table or there twice, or an option is not one of the method or has a
            value that it cannot have.
    """
    options = options or {}
    names = method.split("+")
    for name in names:
        if name not in _TABLE and name not in _ALIASES:
            raise UsageError(*unknown_name("distillation method", name, _TABLE))
    own = [own_name(name) for name in names]
    if twice := [name for name, count in Counter(own).items() if count > 1]:
        raise UsageError(
            f"method '{method}' names '{twice[0]}' more than once",
            f"name it once; its weight is an option: --set distill.options.{twice[0]}.weight=2",
        )
    for name in options:
        if name not in names:
            raise UsageError(f"distill.options names '{name}', the method is '{method}'")
    return tuple(_make(name, options.get(name, {})) for name in names)


def own_name(name: str) -> str:
    """The name in the table of a method that may be called by another one."""
    return _ALIASES.get(name, name)


def plain(name: str) -> bool:
    """Whether a method neither wraps the student nor changes the data: a term or a target only."""
    made_by = method_class(name)
    return made_by.wrap is Distiller.wrap and made_by.augment is Distiller.augment


def method_class(name: str) -> type[Distiller]:
    """The class behind a name of the table."""
    module, _, attribute = _TABLE[own_name(name)].partition(":")
    found: type[Distiller] = getattr(importlib.import_module(module), attribute)
    return found


def _make(name: str, options: dict[str, Any]) -> Distiller:
    made_by = method_class(name)
    types: dict[str, Any] = dict.fromkeys(_WEIGHTS, NonNegative)
    if inspect.signature(made_by).parameters:
        hints = get_type_hints(made_by.__init__, include_extras=True)
        types |= {option: kind for option, kind in hints.items() if option != "return"}
    given = {}
    for option, value in options.items():
        if option not in types:
            raise UsageError(*unknown_name(f"option of method {name}:", option, sorted(types)))
        try:
            given[option] = msgspec.convert(value, types[option])
        except msgspec.ValidationError as error:
            raise UsageError(
                f"option of method {name}: {option} = {value!r}: {error}", f"edgekd methods show {name}"
            ) from error
    made = made_by(**{option: value for option, value in given.items() if option not in _WEIGHTS})
    for option in given.keys() & set(_WEIGHTS):
        setattr(made, option, given[option])
    return made


def distiller_names() -> tuple[str, ...]:
    """Names of all methods."""
    return tuple(_TABLE)


def refuse_unmet(
    distillers: Sequence[Distiller], *, teacher_taps: Sequence[str], student_taps: Sequence[str], labels: bool
) -> None:
    """Check every need before training. `teacher_taps` is ("logits",) for a black box.

    Raises:
        UsageError: names the need that is not met and the methods that fit.
    """

    def unmet(needs: Needs) -> str:
        for owner, wanted, given in (
            ("teacher", needs.teacher, teacher_taps),
            ("student", needs.student, student_taps),
        ):
            for tap in wanted:
                if tap not in given:
                    return f"the {owner}'s {tap}; it gives {', '.join(given) or 'nothing'}"
        if needs.input_gradient and tuple(teacher_taps) == ("logits",):
            return "gradients through the teacher, which a black box does not give"
        if needs.classifier and "embedding" not in teacher_taps:
            return f"the teacher's classifier; it gives {', '.join(teacher_taps)}"
        unlabelled = needs.labels and not needs.some_labels and not labels
        return "labels, and not all of these samples have one" if unlabelled else ""

    for distiller in distillers:
        reason = unmet(distiller.needs)
        if reason:
            name = next(n for n in _TABLE if method_class(n) is type(distiller))
            fit = [n for n in _TABLE if not unmet(method_class(n).needs)]
            raise UsageError(f"method '{name}' needs {reason}", f"methods that fit: {', '.join(fit)}")


def refuse_blends(distillers: Sequence[Distiller], *, blends: bool) -> None:
    """Check that all methods can learn from the images of the views; `blends`: some are mixtures of two.

    Raises:
        UsageError: names the methods that cannot.
    """
    unfit = ", ".join(type(one).__name__.lower() for one in distillers if not one.needs.mixable)
    if blends and unfit:
        raise UsageError(
            f"data.augment blends images ('-mix'), and method {unfit} cannot learn from a blend",
            "--set data.augment=crop",
        )


def refuse_wraps(method: str) -> None:
    """Quantization is learnt by the network that is shipped.

    Raises:
        UsageError: a method that trains another network than the student's own.
    """
    wrapping = [name for name in method.split("+") if method_class(name).wrap is not Distiller.wrap]
    if wrapping:
        fit = [name for name in distiller_names() if method_class(name).wrap is Distiller.wrap]
        raise UsageError(
            f"quantize.method: '{wrapping[0]}' changes the network while it is trained, and what is "
            "quantized has its final form",
            f"methods that fit: {', '.join(fit)}",
        )
