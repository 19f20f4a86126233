"""Every distillation method keeps the promises of the room; the golden values come from the authors' code."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from edgekd.distillers import Term, distiller_names, terms
from edgekd.errors import UsageError
from edgekd.nets import Outputs

LABELS = torch.tensor([0, 3, 5, 2])
LATE = 10**6  # an epoch after any warm-up
NAMES = distiller_names()


def integers(*shape: int) -> Tensor:
    return torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).reshape(shape)


def student_logits() -> Tensor:
    return 2 * torch.sin(0.7 * integers(4, 6))


def teacher_logits() -> Tensor:
    return 3 * torch.cos(0.5 * integers(4, 6))


def loss(term: Term, student: Tensor, teacher: Tensor, labels: Tensor = LABELS) -> Tensor:
    return term(Outputs(student), Outputs(teacher), labels, LATE)


def with_options(name: str, **options: float) -> Term:
    made = type(terms(name)[0])(**options)
    assert isinstance(made, type(terms(name)[0]))
    return made


def golden_entries(golden: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    return {key: entry for key, entry in golden["losses"].items() if key.split("_")[0] == name}


def test_the_inputs_are_those_of_the_golden_file(golden: dict[str, Any]) -> None:
    for name, made in (("zs", student_logits()), ("zt", teacher_logits())):
        assert float(made.sum()) == pytest.approx(golden["inputs"][name]["sum"], abs=1e-9)
        assert float(made.square().sum()) == pytest.approx(golden["inputs"][name]["sumsq"], abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_those_of_the_authors(name: str, golden: dict[str, Any]) -> None:
    entries = golden_entries(golden, name)
    assert entries, f"tests/golden/losses.json has no value of {name}"
    for key, entry in entries.items():
        options = {{"T": "temperature"}.get(k, k): value for k, value in entry["params"].items()}
        student = student_logits().requires_grad_()
        value = loss(with_options(name, **options), student, teacher_logits())
        assert value.item() == pytest.approx(entry["value"], rel=1e-6), key
        (gradient,) = torch.autograd.grad(value, student)
        assert float(gradient.norm()) == pytest.approx(entry["grad_l2"]["zs"], rel=1e-6), key


@pytest.mark.parametrize("name", NAMES)
def test_zero_when_student_and_teacher_agree(name: str) -> None:
    """Up to the 1e-8 that the authors of DIST add to a denominator."""
    apart = float(loss(terms(name)[0], student_logits(), teacher_logits()))
    assert abs(float(loss(terms(name)[0], teacher_logits(), teacher_logits()))) <= 2e-6 * apart


@pytest.mark.parametrize("name", NAMES)
def test_positive_when_they_do_not(name: str) -> None:
    assert float(loss(terms(name)[0], student_logits(), teacher_logits())) > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_given_twice_has_the_same_loss(name: str) -> None:
    once = loss(terms(name)[0], student_logits(), teacher_logits())
    twice = loss(
        terms(name)[0], student_logits().repeat(2, 1), teacher_logits().repeat(2, 1), LABELS.repeat(2)
    )
    assert float(twice) == pytest.approx(float(once), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_reaches_the_teacher(name: str) -> None:
    student, teacher = student_logits().requires_grad_(), teacher_logits().requires_grad_()
    loss(terms(name)[0], student, teacher).backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert float(student.grad.norm()) > 0


def extremes() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hot = torch.eye(6)[[0, 3, 5, 2]]
    return {
        "zero": torch.zeros(4, 6),
        "sure": 1e3 * hot,
        "surely not": -1e3 * hot,
        "sure of another class": 1e3 * hot.roll(1, 1),
        "wide": 30 * torch.randn(4, 6, generator=generator),
        "one row": torch.randn(1, 6, generator=generator).expand(4, 6).clone(),
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("student", extremes())
@pytest.mark.parametrize("teacher", extremes())
def test_value_and_gradient_are_finite_in_bfloat16(name: str, student: str, teacher: str) -> None:
    given = extremes()[student].bfloat16().requires_grad_()
    value = loss(terms(name)[0], given, extremes()[teacher].bfloat16())
    value.backward()
    assert torch.isfinite(value)
    assert given.grad is not None
    assert torch.isfinite(given.grad).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_the_loss_is_one_float32_number(name: str, kind: torch.dtype) -> None:
    value = loss(terms(name)[0], student_logits().to(kind), teacher_logits().to(kind))
    assert value.shape == ()
    assert value.dtype == torch.float32


class _Unreadable:
    """Stands for labels that must not be looked at."""

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"labels were read: {name}")

    def __len__(self) -> int:
        raise AssertionError("labels were read")


@pytest.mark.parametrize("name", NAMES)
def test_labels_are_read_only_where_they_are_declared(name: str) -> None:
    term = terms(name)[0]
    unreadable: Any = _Unreadable()
    if term.needs.labels == "none":
        assert torch.isfinite(loss(term, student_logits(), teacher_logits(), unreadable))
    else:
        with pytest.raises((AssertionError, TypeError)):
            loss(term, student_logits(), teacher_logits(), unreadable)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_states_published_weights(name: str) -> None:
    term = terms(name)[0]
    assert term.weight > 0
    assert term.hard_weight >= 0


def test_kd_tends_to_matching_centred_logits() -> None:
    student, teacher = student_logits(), teacher_logits()
    gap = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    limit = float(gap.square().sum(1).mean()) / (2 * 6)
    assert float(loss(with_options("kd", temperature=300.0), student, teacher)) == pytest.approx(
        limit, rel=1e-2
    )


@pytest.mark.parametrize("name", ["kd", "lskd", "dkd"])
def test_the_squared_temperature_keeps_the_loss_at_scale(name: str) -> None:
    losses = [
        float(loss(with_options(name, temperature=t), student_logits(), teacher_logits()))
        for t in (300.0, 600.0)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[0] > 1e-3


def test_lskd_ignores_scale_and_shift_of_the_student() -> None:
    term = terms("lskd")[0]
    exact = loss(term, student_logits(), teacher_logits())
    assert float(loss(term, 7 * student_logits() - 3, teacher_logits())) == pytest.approx(
        float(exact), rel=1e-6
    )


def test_dkd_with_the_weights_of_kd_is_kd() -> None:
    student, teacher = student_logits(), teacher_logits()
    for row, label in enumerate(LABELS):
        one = slice(row, row + 1)
        sure = float(torch.softmax(teacher[one] / 4, 1)[0, label])
        dkd = with_options("dkd", alpha=1.0, beta=1 - sure, temperature=4.0)
        exact = float(loss(with_options("kd", temperature=4.0), student[one], teacher[one]))
        assert float(loss(dkd, student[one], teacher[one], LABELS[one])) == pytest.approx(exact, rel=1e-9)


def test_dist_ignores_scale_and_shift_of_each_probability_row() -> None:
    from edgekd.distillers.dist import dist_loss

    teacher = torch.softmax(teacher_logits(), 1)
    flatter = (0.5 * teacher + 0.5 / 6).log()
    assert float(dist_loss(flatter, teacher.log(), 1.0, 0.0, 1.0)) == pytest.approx(0, abs=1e-6)


def test_dkd_starts_slowly() -> None:
    term = with_options("dkd", warmup_epochs=4)
    values = [
        float(term(Outputs(student_logits()), Outputs(teacher_logits()), LABELS, epoch)) for epoch in range(6)
    ]
    assert [round(value / values[-1], 6) for value in values] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_methods_are_joined_by_a_plus() -> None:
    assert [type(term) for term in terms("kd+dist")] == [type(terms("kd")[0]), type(terms("dist")[0])]


def test_an_unknown_method_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError) as caught:
        terms("kd+lksd")
    assert "unknown distillation method 'lksd'" in caught.value.message
    assert caught.value.hint == "did you mean 'lskd'?"
