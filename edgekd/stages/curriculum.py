"""Which trainings a student goes through: what the recipe says, read out; no training happens here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from edgekd.distillers import (
    Distiller,
    method_class,
    methods,
    plain,
    refuse_blends,
    refuse_unmet,
    refuse_wraps,
)
from edgekd.errors import UsageError
from edgekd.layout import TAPS
from edgekd.recipe import DistillRecipe, PhaseRecipe, Recipe

SUGGEST = "suggest"
DEFAULT = "dist"  # taken where probes do not tell methods apart
_READ_SEVERAL = ("ensemble", "slices")  # methods that look at the further teachers
# Options that differ from the method's own: KD at temperature 2 beats its published 4 on small students.
_TRIED: dict[str, dict[str, dict[str, Any]]] = {
    "dist": {},
    "dkd": {},
    "lskd": {},
    "kd": {"kd": {"temperature": 2.0}},
}


@dataclass(frozen=True)
class Phase:
    """One training: `recipe` is complete and has no phases of its own; `augment` is `data.augment`."""

    recipe: DistillRecipe
    augment: str

    @property
    def mixes(self) -> bool:
        """Whether its images are blends of two."""
        return self.augment.endswith("-mix")

    def facts(self) -> dict[str, Any]:
        """What the record says of it."""
        recipe = self.recipe
        return {
            "method": recipe.method,
            "options": recipe.options,
            "epochs": recipe.epochs,
            "learning_rate": recipe.learning_rate,
            "augment": self.augment,
        }


def phases_of(distill: DistillRecipe, augment: str) -> tuple[Phase, ...]:
    """The trainings of a student, at least one; what a phase leaves open is what `distill` says."""
    base = replace(distill, phases=())
    return tuple(_phase(base, augment, phase) for phase in distill.phases or (PhaseRecipe(),))


def _phase(base: DistillRecipe, augment: str, phase: PhaseRecipe) -> Phase:
    method = phase.method or base.method
    inherited = {name: value for name, value in base.options.items() if name in method.split("+")}
    options = inherited if phase.options is None else phase.options
    if phase.method is None and phase.options is None:
        options = base.options  # a name that is none of the method's is an error, see `methods`
    recipe = replace(
        base,
        method=method,
        options=options,
        epochs=phase.epochs or base.epochs,
        learning_rate=phase.learning_rate or base.learning_rate,
    )
    return Phase(recipe, phase.augment or augment)


def quantized_phase(recipe: Recipe, last: Phase) -> Phase:
    """Quantization-aware training: what `quantize` says, and for the rest the student's `last` training.
    Without a method of its own those of that training are taken that read nothing but logits; else DIST."""
    quantize = recipe.quantize
    logits = [
        name
        for name in last.recipe.method.split("+")
        if method_class(name).needs.teacher == ("logits",) and plain(name)
    ]
    method = quantize.method or "+".join(logits) or DEFAULT
    inherited = {name: value for name, value in last.recipe.options.items() if name in method.split("+")}
    learnt = replace(
        last.recipe,
        method=method,
        options=quantize.options if quantize.method else inherited,
        epochs=quantize.epochs,
        learning_rate=quantize.learning_rate,
        ema_decay=min(last.recipe.ema_decay, 0.99),
    )
    return Phase(learnt, "none")


def tried(distill: DistillRecipe, augment: str) -> dict[str, Phase]:
    """The short trainings that ``suggest`` compares, by method."""
    defaults = _TRIED if not distill.suggest_from else {}
    made = {}
    for method in distill.suggest_from or _TRIED:
        own = defaults.get(method, {})
        given = {name: value for name, value in distill.options.items() if name in method.split("+")}
        options = {name: own.get(name, {}) | given.get(name, {}) for name in {**own, **given}}
        recipe = replace(distill, phases=(), method=method, options=options, epochs=distill.suggest_epochs)
        made[method] = Phase(recipe, augment)
    return made


def check_curriculum(recipe: Recipe) -> tuple[tuple[Distiller, ...], ...]:
    """The methods of every training that the recipe asks for; none where ``suggest`` has its own list, of
    which it leaves out what does not fit.

    Raises:
        UsageError: an unknown method or option; phases beside ``suggest``; further teachers that no method
            reads; blended images where a method cannot learn from them.
    """
    distill, augment = recipe.distill, recipe.data.augment
    if distill.method == SUGGEST and distill.phases:
        raise UsageError(
            "method 'suggest' tries methods for one training, and the recipe has "
            f"{len(distill.phases)} phases",
            "name the method of each phase, or leave distill.phases out",
        )
    _check_quantized(recipe)
    _check_suggested(distill)
    suggested = distill.method == SUGGEST
    phases = tuple(tried(distill, augment).values()) if suggested else phases_of(distill, augment)
    names = {name for phase in phases for name in phase.recipe.method.split("+")}
    for name in distill.options:
        if name not in names:
            raise UsageError(f"distill.options names '{name}', the methods are {', '.join(sorted(names))}")
    if recipe.teacher.others and not names & set(_READ_SEVERAL):
        raise UsageError(
            f"teacher.others names {len(recipe.teacher.others)} teachers more, which the methods "
            f"{' and '.join(_READ_SEVERAL)} read; the method is '{' then '.join(sorted(names))}'",
            f"--method ensemble, or ensemble+{sorted(names)[0]}",
        )
    parts = tuple(methods(phase.recipe.method, phase.recipe.options) for phase in phases)
    for phase, distillers in zip(phases, parts, strict=True):
        refuse_blends(distillers, blends=phase.mixes)
    return () if suggested and not distill.suggest_from else parts


def _check_suggested(distill: DistillRecipe) -> None:
    """Refuse ``suggest`` beside other methods, and fewer methods than a comparison needs."""
    named = [distill.method, *(phase.method or "" for phase in distill.phases), *distill.suggest_from]
    for number, method in enumerate(named):
        if SUGGEST in method.split("+") and (number or method != SUGGEST):
            raise UsageError(
                f"'{method}': 'suggest' chooses the method of the whole training and stands alone",
                '--method suggest --set \'distill.suggest_from=["dist","kd+fitnet"]\'',
            )
    if distill.method == SUGGEST and distill.suggest_from and len(set(distill.suggest_from)) < 2:
        raise UsageError(
            f"distill.suggest_from names '{distill.suggest_from[0]}' alone, and there is nothing to compare",
            f"name two or more, or take it: --method {distill.suggest_from[0]}",
        )


def _check_quantized(recipe: Recipe) -> None:
    """Refuse a method of quantization-aware training that does not exist or cannot be used there."""
    quantize = recipe.quantize
    if unread := sorted(quantize.options.keys() - set(quantize.method.split("+"))):
        told = f"the method is '{quantize.method}'" if quantize.method else "quantize.method is not set"
        raise UsageError(f"quantize.options names '{unread[0]}', {told}", "edgekd methods list")
    if not quantize.method:
        return
    parts = methods(quantize.method, quantize.options)
    refuse_wraps(quantize.method)
    teacher_taps = ("logits",) if recipe.teacher.source.endswith(".onnx") else TAPS
    refuse_unmet(parts, teacher_taps=teacher_taps, student_taps=TAPS, labels=True)
