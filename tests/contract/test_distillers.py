"""Every distillation method keeps the promises of the room; the golden values come from the authors' code."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from edgekd.distillers import (
    Context,
    Distiller,
    Setting,
    distiller_names,
    method_class,
    methods,
    refuse_unmet,
)
from edgekd.errors import UsageError
from edgekd.nets import Batch, Outputs

LABELS = torch.tensor([0, 3, 5, 2])
BATCH = Batch(torch.zeros(4, 1, 8, 8), LABELS, torch.arange(4))
LATE = 10**6  # an epoch after any warm-up
NAMES = distiller_names()
# What does not hold by construction, each with its reason (one method a line).
NOT_ZERO_AT_IDENTITY: dict[str, str] = {
    "taid": "a soft cross-entropy: its minimum is the entropy of the target",
    "pskd": "likewise; and the student is compared with its past, not with the teacher",
    "gate": "here the frozen copy says something else, and where it is surer it is the target",
    "fitnet": "the student's map passes an adapter that has learned nothing yet",
    "vid": "half the logarithm of the variance; and an adapter",
    "cc": "two embeddings, of the student and of the teacher, that are learned apart",
    "ab": "an activation on the right side of zero pays until it is beyond the margin",
    "ft": "an adapter; and the paraphraser's own error",
    "ofd": "an adapter with batch norm",
    "crd": "a contrast with negatives, through random projections",
    "reviewkd": "the fusion is random at first",
    "mgd": "the generator is random at first",
    "mi": "its least value is minus the information, not zero",
    "trg": "its contrast is bounded by the similarity of the other tokens",
    "ofa": "a soft cross-entropy: its minimum is the entropy of the target",
    "dho": "half of it is the cross-entropy with the labels",
    "lsskd": "cross-entropies with the labels; there is no teacher",
    "dml": "the peer's cross-entropy with the labels; there is no teacher",
    "bsd": "likewise",
}
BATCH_COUPLED: dict[str, str] = {  # duplicating the batch changes the loss
    "mlkd": "correlations of the batch: times 2 for samples, times 4 for classes",
    "pskd": "the repeated rows are other samples, with other pasts",
    "swing": "each row draws its own noise",
    "sp": "half: a mean over pairs of samples, of rows of unit length",
    "pkt": "half: a mean over pairs of samples, of rows of sum 1",
    "rkd": "times 1.13 here: more pairs of one sample with itself",
    "cc": "times 0.96 here: neighbours in the batch are multiplied",
    "crd": "each sample draws its own negatives",
    "mgd": "each sample draws its own mask",
    "mi": "pairs of samples; the bound is at most log N",
    "trg": "neighbours and contrasts are sought in the whole batch",
    "relation": "pairs of samples: times 1/2",
}
EARLY: dict[str, str] = {  # tested at the first step, not after the last
    "ab": "acts in the first ninth of training, then is zero",
}


def integers(*shape: int) -> Tensor:
    return torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).reshape(shape)


def student_logits() -> Tensor:
    return 2 * torch.sin(0.7 * integers(4, 6))


def teacher_logits() -> Tensor:
    return 3 * torch.cos(0.5 * integers(4, 6))


def context(epoch: float = LATE) -> Context:
    now = torch.tensor(float(epoch))
    return Context(now, 100 * now, LATE, 100 * LATE, torch.Generator().manual_seed(0))


def outputs(logits: Tensor, seed: int) -> Outputs:
    """Everything a network can give: linear in the logits, so equal rows, zeros and extremes carry over and
    a gradient by any of it reaches the logits."""
    draw = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        weight = torch.randn(logits.shape[1], math.prod(shape), generator=draw) / 2
        made: Tensor = (logits @ weight.to(logits.dtype)).unflatten(1, shape)
        return made

    maps = tuple(drawn(channels, size, size) for channels, size in ((6, 8), (8, 4), (10, 4)))
    tokens, embedding = (drawn(5, 10), drawn(5, 10)), drawn(10)
    return Outputs(
        logits, embedding, maps[-1].relu(), tuple(m.relu() for m in maps), maps, tokens,
        exits=(logits + 0.1,) * 4, peer=Outputs(logits.flip(1), embedding, maps[-1].relu()),
    )  # fmt: skip


def made(name: str, **options: Any) -> Distiller:
    (method,) = methods(name, {name: options})
    return method


def loss(
    method: Distiller, student: Tensor, teacher: Tensor, labels: Tensor = LABELS, *, same: bool = False
) -> Tensor:
    """Value of a method on these logits, its adapters built anew."""
    ours, theirs = outputs(student, 0), outputs(teacher, 0 if same else 1)
    torch.manual_seed(0)
    setting = Setting(samples=8, classes=student.shape[1], labels=torch.arange(8) % 6, seed=0)
    method.build(ours, theirs, setting)
    method.to(torch.float64 if student.dtype is torch.float64 else torch.float32)
    batch = Batch(student.new_zeros(len(student), 1, 8, 8), labels, torch.arange(len(student)))
    now = context(0 if type(method) in [method_class(name) for name in EARLY] else LATE)
    theirs = method.target(ours, theirs, batch, now)
    value: Tensor = method(ours, theirs, batch, now)
    return value


def number(value: Tensor) -> float:
    return float(value.detach())


def golden_entries(golden: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    return {key: entry for key, entry in golden["losses"].items() if key.split("_")[0] == name}


def test_the_inputs_are_those_of_the_golden_file(golden: dict[str, Any]) -> None:
    for name, made in (("zs", student_logits()), ("zt", teacher_logits())):
        assert float(made.sum()) == pytest.approx(golden["inputs"][name]["sum"], abs=1e-9)
        assert float(made.square().sum()) == pytest.approx(golden["inputs"][name]["sumsq"], abs=1e-9)


@pytest.mark.parametrize("name", ["kd", "lskd", "dkd", "dist"])
def test_value_and_gradient_are_those_of_the_authors(name: str, golden: dict[str, Any]) -> None:
    entries = golden_entries(golden, name)
    assert entries, f"tests/golden/losses.json has no value of {name}"
    for key, entry in entries.items():
        options = {{"T": "temperature"}.get(k, k): value for k, value in entry["params"].items()}
        student = student_logits().requires_grad_()
        value = loss(made(name, **options), student, teacher_logits())
        assert value.item() == pytest.approx(entry["value"], rel=1e-6), key
        (gradient,) = torch.autograd.grad(value, student)
        assert float(gradient.norm()) == pytest.approx(entry["grad_l2"]["zs"], rel=1e-6), key


@pytest.mark.parametrize("name", [name for name in NAMES if name not in NOT_ZERO_AT_IDENTITY])
def test_zero_when_student_and_teacher_agree(name: str) -> None:
    """Up to the 1e-8 that the authors of DIST add to a denominator."""
    apart = number(loss(made(name), student_logits(), teacher_logits()))
    assert abs(number(loss(made(name), teacher_logits(), teacher_logits(), same=True))) <= 2e-6 * apart


@pytest.mark.parametrize("name", NAMES)
def test_positive_when_they_do_not(name: str) -> None:
    assert number(loss(made(name), student_logits(), teacher_logits())) > 0.01


@pytest.mark.parametrize("name", [name for name in NAMES if name not in BATCH_COUPLED])
def test_a_batch_given_twice_has_the_same_loss(name: str) -> None:
    once = loss(made(name), student_logits(), teacher_logits())
    twice = loss(made(name), student_logits().repeat(2, 1), teacher_logits().repeat(2, 1), LABELS.repeat(2))
    assert number(twice) == pytest.approx(number(once), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_reaches_the_teacher(name: str) -> None:
    student, teacher = student_logits().requires_grad_(), teacher_logits().requires_grad_()
    loss(made(name), student, teacher).backward()
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


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_value_and_gradient_are_finite_in_bfloat16(name: str) -> None:
    given = {case: value.bfloat16() for case, value in extremes().items()}
    for (student, ours), (teacher, theirs) in itertools.product(given.items(), given.items()):
        learner = ours.clone().requires_grad_()
        value = loss(made(name), learner, theirs)
        value.backward()
        assert torch.isfinite(value), (student, teacher)
        assert learner.grad is not None
        assert torch.isfinite(learner.grad).all(), (student, teacher)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_the_loss_is_one_float32_number(name: str, kind: torch.dtype) -> None:
    value = loss(made(name), student_logits().to(kind), teacher_logits().to(kind))
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
    term = made(name)
    unreadable: Any = _Unreadable()
    if not term.needs.labels:
        assert torch.isfinite(loss(term, student_logits(), teacher_logits(), unreadable))
    else:
        with pytest.raises((AssertionError, TypeError)):
            loss(term, student_logits(), teacher_logits(), unreadable)


@pytest.mark.parametrize("name", NAMES)
def test_a_method_states_published_weights(name: str) -> None:
    term = made(name)
    assert term.weight > 0
    assert term.hard_weight >= 0


def test_kd_tends_to_matching_centred_logits() -> None:
    student, teacher = student_logits(), teacher_logits()
    gap = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))
    limit = float(gap.square().sum(1).mean()) / (2 * 6)
    assert number(loss(made("kd", temperature=300.0), student, teacher)) == pytest.approx(limit, rel=1e-2)


@pytest.mark.parametrize("name", ["kd", "lskd", "dkd"])
def test_the_squared_temperature_keeps_the_loss_at_scale(name: str) -> None:
    losses = [
        number(loss(made(name, temperature=t), student_logits(), teacher_logits())) for t in (300.0, 600.0)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert losses[0] > 1e-3


def test_lskd_ignores_scale_and_shift_of_the_student() -> None:
    term = made("lskd")
    exact = loss(term, student_logits(), teacher_logits())
    assert number(loss(term, 7 * student_logits() - 3, teacher_logits())) == pytest.approx(
        float(exact), rel=1e-6
    )


def test_dkd_with_the_weights_of_kd_is_kd() -> None:
    student, teacher = student_logits(), teacher_logits()
    for row, label in enumerate(LABELS):
        one = slice(row, row + 1)
        sure = float(torch.softmax(teacher[one] / 4, 1)[0, label])
        dkd = made("dkd", alpha=1.0, beta=1 - sure, temperature=4.0)
        exact = number(loss(made("kd", temperature=4.0), student[one], teacher[one]))
        assert number(loss(dkd, student[one], teacher[one], LABELS[one])) == pytest.approx(exact, rel=1e-9)


def test_dist_ignores_scale_and_shift_of_each_probability_row() -> None:
    from edgekd.distillers.dist import dist_loss

    teacher = torch.softmax(teacher_logits(), 1)
    flatter = (0.5 * teacher + 0.5 / 6).log()
    assert float(dist_loss(flatter, teacher.log(), 1.0, 0.0, 1.0)) == pytest.approx(0, abs=1e-6)


def test_dkd_starts_slowly() -> None:
    term = made("dkd", warmup_epochs=4)
    values = [
        float(term(Outputs(student_logits()), Outputs(teacher_logits()), BATCH, context(epoch)))
        for epoch in range(6)
    ]
    assert [round(value / values[-1], 6) for value in values] == [0.25, 0.5, 0.75, 1, 1, 1]


def test_methods_are_joined_by_a_plus() -> None:
    assert [type(term) for term in methods("kd+dist")] == [type(made("kd")), type(made("dist"))]


def test_an_unknown_method_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError) as caught:
        methods("kd+lskdd")
    assert "unknown distillation method 'lskdd'" in caught.value.message
    assert caught.value.hint == "did you mean 'lskd'?"


def test_options_reach_the_method_and_unknown_ones_are_refused() -> None:
    (kd,) = methods("kd", {"kd": {"temperature": 2.0, "weight": 3.0}})
    assert (getattr(kd, "temperature"), kd.weight, kd.hard_weight) == (2.0, 3.0, 0.1)  # noqa: B009
    with pytest.raises(UsageError, match="temprature") as caught:
        methods("kd", {"kd": {"temprature": 2.0}})
    assert caught.value.hint == "did you mean 'temperature'?"
    with pytest.raises(UsageError, match="'dkd'"):
        methods("kd", {"dkd": {}})


def test_an_impossible_combination_is_refused_with_those_that_fit() -> None:
    with pytest.raises(UsageError, match="'dkd' needs labels") as caught:
        refuse_unmet(methods("kd+dkd"), teacher_taps=("logits",), student_taps=("logits",), labels=False)
    assert "kd" in caught.value.hint
    assert "dkd" not in caught.value.hint


class _NoWaiting(TorchDispatchMode):
    """Refuses what cannot be captured as a CUDA graph: waiting for a value, shapes that depend on values."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(word in str(func) for word in ("_local_scalar_dense", "nonzero", "masked_select", "unique")):
            raise AssertionError(f"{func} inside a step")
        if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_):
            assert all(i is None or i.dtype is torch.int64 for i in args[1]), "a mask as an index"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_can_be_captured(name: str) -> None:
    method = made(name)
    student, teacher = student_logits().float(), teacher_logits().float()
    loss(method, student, teacher)  # builds
    ours, theirs = outputs(student.requires_grad_(), 0), outputs(teacher, 1)
    batch = Batch(torch.zeros(4, 1, 8, 8), LABELS, torch.arange(4))
    now = context(3)
    with _NoWaiting():
        value = method(ours, method.target(ours, theirs, batch, now), batch, now)
        value.backward()
        method.after_step(value.detach(), now)
