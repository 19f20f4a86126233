"""Methods on logits: golden values and schedules, and the state that some of them carry."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from edgekd.distillers import Context, Distiller, Setting, methods
from edgekd.distillers.ctkd import Ctkd, curriculum
from edgekd.distillers.ensemble import mean_logits
from edgekd.distillers.gate import Gate
from edgekd.distillers.mlkd import batch_correlation, class_correlation
from edgekd.distillers.pskd import pskd_loss
from edgekd.distillers.slices import Slices
from edgekd.distillers.ssld import symmetric_kl
from edgekd.distillers.swing import confidence_gap, swing_loss
from edgekd.distillers.taid import Taid, taid_loss
from edgekd.errors import UsageError
from edgekd.layout import find_layout
from edgekd.nets import Batch, Outputs, softened_kl
from edgekd.taps import Tapped
from edgekd.tasks import classification

Loss = Callable[[Tensor], Tensor]
NAMES = ("ctkd", "mlkd", "ssld", "taid", "pskd", "gate", "swing", "slices", "ensemble")
LABELS = torch.tensor([0, 3, 5, 2])
INDEX = torch.arange(4)
NUMBERS = torch.arange(1, 25, dtype=torch.float64).reshape(4, 6)
STUDENT, TEACHER = 2 * torch.sin(0.7 * NUMBERS), 3 * torch.cos(0.5 * NUMBERS)
PAST = torch.softmax(torch.cos(0.9 * NUMBERS), 1)
SETTING = Setting(samples=8, classes=6, labels=torch.tensor([0, 3, 5, 2, 1, 1, 4, 0]), seed=0)


def now(epoch: float = 0, epochs: int = 10, *, steps: int = 100, step: float = 0) -> Context:
    moment = [torch.tensor(float(value), dtype=torch.float64) for value in (epoch, step)]
    return Context(moment[0], moment[1], epochs, steps, torch.Generator().manual_seed(0))


def batch(labels: Tensor = LABELS, index: Tensor = INDEX) -> Batch:
    return Batch(torch.zeros(len(labels), 3), labels, index)


def made(name: str, **options: Any) -> Any:
    """A method with float64 state, built for the golden inputs."""
    (method,) = methods(name, {name: options})
    method.build(Outputs(STUDENT), Outputs(TEACHER, exits=(TEACHER,)), SETTING)
    return method.double()


def value(method: Distiller, student: Tensor = STUDENT, context: Context | None = None) -> Tensor:
    found: Tensor = method(Outputs(student), Outputs(TEACHER), batch(), context or now())
    return found


def assert_golden(entry: dict[str, Any], loss: Loss) -> None:
    """The value, and the norm of the gradient by the student's logits."""
    student = STUDENT.clone().requires_grad_()
    found = loss(student)
    (gradient,) = torch.autograd.grad(found, student)
    assert found.item() == pytest.approx(entry["value"], rel=1e-6)
    assert float(gradient.norm()) == pytest.approx(entry["grad_l2"]["zs"], rel=1e-6)


def _taid_rows(student: Tensor) -> Tensor:
    rows = torch.tensor([0, 1, 3])  # the mask [1, 1, 0, 1]
    return taid_loss(student[rows], TEACHER[rows], torch.tensor(0.4, dtype=torch.float64))


def _pskd(student: Tensor) -> Tensor:
    method = made("pskd", alpha=0.6)
    method.past[:4] = PAST
    return value(method, student, now(epoch=9))


def _gate(student: Tensor) -> Tensor:
    ours = Outputs(student, peer=Outputs(TEACHER.roll(1, 0)))
    method = made("gate")
    found: Tensor = method(ours, method.target(ours, Outputs(TEACHER), batch(), now()), batch(), now())
    return found


GOLDEN: dict[str, Loss] = {
    "ssld_symkl": lambda student: value(made("ssld"), student),
    "mlkd_cc_T4": lambda student: class_correlation(student, TEACHER, 4.0),
    "mlkd_bc_T4": lambda student: batch_correlation(student, TEACHER, 4.0),
    "pskd_alpha0.6": _pskd,
    "taid_t0.4_mask1101": _taid_rows,
    "taid_t1": lambda student: value(made("taid", t_start=1.0), student),
    "dp_gate_supervised": _gate,
}


@pytest.mark.parametrize("key", GOLDEN)
def test_value_and_gradient_are_the_golden_ones(key: str, golden: dict[str, Any]) -> None:
    assert_golden(golden["losses"][key], GOLDEN[key])


@pytest.mark.parametrize("key", ["kd_T1", "kd_T2", "kd_T4"])
def test_softened_kl_is_kd(key: str, golden: dict[str, Any]) -> None:
    entry = golden["losses"][key]
    assert_golden(entry, lambda student: softened_kl(student, TEACHER, entry["params"]["T"]).mean())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_asks_for_values_where_a_graph_is_captured(name: str) -> None:
    """Tensors without values: a look at one, or a shape that depends on one, raises."""
    method, context = made(name).float(), now(epochs=4)
    context.epoch, context.step = context.epoch.float(), context.step.float()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        logits = torch.randn(4, 6, requires_grad=True)
        student = Outputs(logits, peer=Outputs(torch.randn(4, 6)))
        given = Batch(torch.randn(4, 3), mode.from_tensor(LABELS), mode.from_tensor(INDEX))
        for key, buffer in method.named_buffers():
            method._buffers[key] = mode.from_tensor(buffer)
        teacher = Outputs(torch.randn(4, 6), exits=(torch.randn(4, 6),))
        loss = method(student, method.target(student, teacher, given, context), given, context)
        loss.backward()
        method.after_step(loss.detach(), context)
        assert logits.grad is not None
        assert loss.shape == ()


# --- curriculum temperature


def test_ctkd_starts_at_the_published_temperature(golden: dict[str, Any]) -> None:
    method = made("ctkd")
    expected = golden["losses"]["ctkd_temperature"]["value"]
    temperature = method.temperature(method.theta).item()
    assert temperature == pytest.approx(expected, rel=1e-6)
    assert value(method).item() == pytest.approx(softened_kl(STUDENT, TEACHER, temperature).mean().item())


def test_ctkd_curriculum_is_the_golden_one(golden: dict[str, Any]) -> None:
    epochs = torch.arange(13, dtype=torch.float64)
    expected = golden["losses"]["ctkd_schedule"]["value"]
    assert curriculum(epochs, 10).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_ctkd_theta_climbs_what_the_student_descends() -> None:
    def gradient(method: Ctkd, epoch: float) -> float:
        (found,) = torch.autograd.grad(value(method, context=now(epoch)), method.theta)
        return found.item()

    method = made("ctkd")
    plain = method.theta.detach().clone().requires_grad_()
    loss = softened_kl(STUDENT, TEACHER, method.temperature(plain)).mean()
    (slope,) = torch.autograd.grad(loss, plain)
    assert abs(slope.item()) > 1e-4
    assert gradient(method, 0) == 0
    assert gradient(method, 5) == pytest.approx(-0.5 * slope.item())
    assert gradient(method, 50) == pytest.approx(-slope.item())


# --- multi-level logits


def test_mlkd_sums_kd_and_both_correlations_over_its_temperatures() -> None:
    parts = [
        softened_kl(STUDENT, TEACHER, t).mean()
        + class_correlation(STUDENT, TEACHER, t)
        + batch_correlation(STUDENT, TEACHER, t)
        for t in (2.0, 3.0, 4.0, 5.0, 6.0)
    ]
    assert value(made("mlkd")).item() == pytest.approx(float(sum(parts)), rel=1e-9)


@pytest.mark.parametrize(("correlation", "factor"), [(class_correlation, 4), (batch_correlation, 2)])
def test_mlkd_correlations_grow_with_the_batch_as_documented(
    correlation: Callable[[Tensor, Tensor, float], Tensor], factor: int
) -> None:
    once = correlation(STUDENT, TEACHER, 4.0)
    twice = correlation(STUDENT.repeat(2, 1), TEACHER.repeat(2, 1), 4.0)
    assert twice.item() == pytest.approx(factor * once.item(), rel=1e-9)


# --- symmetric KL


def test_ssld_is_symmetric_and_adds_no_cross_entropy() -> None:
    assert symmetric_kl(STUDENT, TEACHER).item() == pytest.approx(symmetric_kl(TEACHER, STUDENT).item())
    assert made("ssld").hard_weight == 0


# --- temporally adaptive interpolation


@pytest.mark.parametrize("steps", [1000, 1_000_000])
def test_taid_t_follows_the_golden_trajectory(steps: int, golden: dict[str, Any]) -> None:
    method = made("taid", reference_steps=steps)
    method.t.fill_(0.4)  # was rounded to float32
    found = []
    for k in range(8):
        method.after_step(torch.tensor(3 / (1 + 0.1 * k), dtype=torch.float64), now(steps=steps, step=k))
        found.append(method.t.item())
    expected = golden["losses"]["taid_t_trajectory"][f"value_total_{steps}"]
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(set(found)) > 6


def _run_of_taid(method: Taid, losses: list[float]) -> list[float]:
    found = []
    for k, loss in enumerate(losses):
        method.after_step(torch.tensor(loss), now(steps=len(losses), step=k))
        found.append(method.t.item())
    return found


def test_taid_adapts_in_short_runs_too_and_ends_at_the_teacher() -> None:
    falling = [3 * 0.9**k for k in range(100)]
    line = _run_of_taid(made("taid", reference_steps=100), falling)
    adaptive = _run_of_taid(made("taid"), falling)
    assert line == pytest.approx([0.4 + 0.6 * k / 100 for k in range(100)], rel=1e-6)
    assert adaptive[50] > line[50] + 0.05
    assert adaptive == sorted(adaptive)
    assert adaptive[99] > 0.98
    assert max(_run_of_taid(made("taid", t_end=0.8), falling)) == pytest.approx(0.8)


def test_taid_moves_faster_while_the_loss_falls() -> None:
    falling = _run_of_taid(made("taid"), [3 * 0.5**k for k in range(20)])
    rising = _run_of_taid(made("taid"), [3 * 1.5**k for k in range(20)])
    assert falling[19] > rising[19] + 1e-3


def test_taid_at_its_end_is_cross_entropy_with_the_teacher() -> None:
    end = torch.tensor(1.0, dtype=torch.float64)
    expected = F.cross_entropy(STUDENT, torch.softmax(TEACHER, 1))
    assert taid_loss(STUDENT, TEACHER, end).item() == pytest.approx(expected.item())
    target = TEACHER.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(taid_loss(target, TEACHER, end), target)
    assert float(gradient.norm()) < 1e-12


# --- progressive self-distillation


def test_pskd_share_of_the_past_is_the_golden_schedule(golden: dict[str, Any]) -> None:
    found = [made("pskd").share(now(epoch, epochs=5)).item() for epoch in range(5)]
    assert found == pytest.approx(golden["losses"]["pskd_alpha_schedule"]["value"], rel=1e-6)


def test_pskd_before_anything_was_seen_is_cross_entropy() -> None:
    expected = F.cross_entropy(STUDENT, LABELS).item()
    for epoch in (0, 5):
        assert value(made("pskd"), context=now(epoch)).item() == pytest.approx(expected)
    nothing = torch.zeros((), dtype=torch.float64)
    assert pskd_loss(STUDENT, LABELS, PAST, nothing).item() == pytest.approx(expected)


def _step(method: Distiller, logits: Tensor, rows: Tensor, epoch: float) -> float:
    """One step on these rows of a data set of four."""
    given = batch(LABELS[rows], INDEX[rows])
    loss = method(Outputs(logits[rows]), Outputs(TEACHER[rows]), given, now(epoch))
    method.after_step(loss.detach(), now(epoch))
    return float(loss.detach())


@pytest.mark.parametrize("name", ["pskd", "kd+pskd"])
def test_pskd_remembers_by_sample_whatever_the_order(name: str) -> None:
    own = methods(name)[-1]
    own.build(Outputs(STUDENT), Outputs(TEACHER), SETTING)
    own.double()
    past = own.get_buffer("past")
    untouched = past[4:].clone()
    for rows in (torch.tensor([2, 0]), torch.tensor([3, 1])):
        _step(own, STUDENT, rows, 0)
    assert torch.allclose(past[:4], torch.softmax(STUDENT, 1))
    assert torch.equal(past[4:], untouched)
    shuffled = _step(own, TEACHER, torch.tensor([3, 1, 0, 2]), 4)
    share = torch.tensor(0.4, dtype=torch.float64)
    assert shuffled == pytest.approx(
        pskd_loss(TEACHER, LABELS, torch.softmax(STUDENT, 1), share).item(), rel=1e-6
    )


def test_pskd_reads_the_past_and_not_the_present() -> None:
    method = made("pskd")
    first = _step(method, STUDENT, INDEX, 4)
    assert _step(method, STUDENT, INDEX, 4) != pytest.approx(first)


def test_pskd_may_store_half_the_bits() -> None:
    (method,) = methods("pskd", {"pskd": {"half": True}})
    method.build(Outputs(STUDENT), Outputs(TEACHER), SETTING)
    loss = _step(method, STUDENT.float(), INDEX, 4)
    assert method.get_buffer("past").dtype == torch.float16
    assert loss == pytest.approx(_step(made("pskd"), STUDENT, INDEX, 4), rel=1e-5)


@pytest.mark.parametrize("name", ["pskd", "taid", "slices"])
def test_what_a_method_remembers_survives_a_checkpoint(name: str) -> None:
    method, resumed = made(name), made(name)
    for logits in (STUDENT, 2 * STUDENT, STUDENT.flip(1)):
        _step(method, logits, INDEX, 4)
    fresh = _step(copy.deepcopy(resumed), STUDENT, INDEX, 5)
    resumed.load_state_dict(method.state_dict())
    ours, theirs = _step(method, STUDENT, INDEX, 5), _step(resumed, STUDENT, INDEX, 5)
    assert ours == theirs
    for key, buffer in method.named_buffers():
        assert torch.equal(buffer, resumed.get_buffer(key)), key
    if name != "slices":  # one specialist: its own running loss is its measure
        assert ours != pytest.approx(fresh)


# --- data-partition gate


def _wrapped() -> tuple[nn.Module, Any, Tensor]:
    """A student with every tap of a convolutional network, wrapped; and its inputs."""
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5))
    network, inputs = nn.Sequential(*body, nn.Linear(64, 6)), torch.randn(4, 3, 6, 6)
    layout = find_layout(network, inputs, 6)
    tapped = Tapped(network, layout, layout.taps)
    return network, Gate().wrap(tapped, tapped(inputs), None).train(), inputs


def test_the_gate_carries_a_copy_that_does_not_learn() -> None:
    network, wrapped, inputs = _wrapped()
    before = wrapped(inputs)
    assert not before.peer.logits.requires_grad
    assert before.features.requires_grad
    assert before.preactivations[0].requires_grad
    assert torch.equal(before.peer.logits, wrapped(inputs).peer.logits)  # no dropout, no batch statistics
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in network.parameters()}
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(1.0)
    assert torch.equal(before.peer.logits, wrapped(inputs).peer.logits)


def test_the_gate_deploys_the_student_alone_and_keeps_the_copy_in_checkpoints() -> None:
    network, wrapped, inputs = _wrapped()
    with torch.no_grad():
        network[0].weight.mul_(2.0)  # type: ignore[index]
    assert wrapped.deploy() is network
    seen = wrapped.eval()(inputs)
    assert torch.allclose(seen.logits, network(inputs), atol=1e-5)
    assert not torch.allclose(seen.peer.logits, seen.logits, atol=1e-2)
    assert sum(key.startswith("frozen") for key in wrapped.state_dict()) == len(network.state_dict())


def test_the_gate_refuses_a_student_that_another_method_changed() -> None:
    _, wrapped, inputs = _wrapped()
    with pytest.raises(UsageError, match="'gate' changes the student"):
        Gate().wrap(wrapped, wrapped(inputs), None)


@pytest.mark.parametrize("supervised", [True, False])
def test_the_gate_takes_each_row_from_the_surer_model(supervised: bool) -> None:
    method = made("gate", supervised=supervised)
    assert method.needs.labels == supervised
    teacher, frozen = TEACHER.clone(), TEACHER.roll(1, 0)
    student = Outputs(STUDENT, peer=Outputs(frozen))
    target = method.target(student, Outputs(teacher), batch(), now()).logits
    for row, label in enumerate(LABELS.tolist()):
        pair = [torch.softmax(logits[row], 0) for logits in (teacher, frozen)]
        sure = [float(p[label] if supervised else p.max()) for p in pair]
        assert torch.equal(target[row], teacher[row] if sure[0] > sure[1] else frozen[row])
    assert not torch.equal(target, teacher)
    assert not torch.equal(target, frozen)


def test_the_gate_asks_nothing_of_a_student_that_knows_better() -> None:
    method = made("gate")
    right = 9 * F.one_hot(LABELS, 6).double()
    student = Outputs(right, peer=Outputs(right))
    target = method.target(student, Outputs(TEACHER), batch(), now())
    assert method(student, target, batch(), now()).item() == pytest.approx(0, abs=1e-12)


def test_the_gate_says_what_is_missing_without_its_copy() -> None:
    with pytest.raises(UsageError, match="frozen copy"):
        made("gate").target(Outputs(STUDENT), Outputs(TEACHER), batch(), now())


# --- swing


def test_swing_with_samples_that_are_not_private_is_kd() -> None:
    method = made("swing", scores=[0.0] * 8)
    assert value(method).item() == pytest.approx(softened_kl(STUDENT, TEACHER, 4.0).mean().item())


def test_swing_without_noise_is_kd_at_each_samples_temperature() -> None:
    method = made("swing", scores=[0.0, 0.25, 0.5, 1.0, 0.0, 0.0, 0.0, 0.0], noise=0.0)
    rows = [softened_kl(STUDENT[[n]], TEACHER[[n]], t) for n, t in enumerate((4.0, 5.0, 6.0, 8.0))]
    assert value(method).item() == pytest.approx(float(torch.cat(rows).mean()))


def test_swing_target_is_a_distribution_whatever_the_noise() -> None:
    teacher = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]]).log()
    noise = torch.tensor([[0.7, -0.4, 0.1], [-1.0, -1.0, -1.0]])
    found = swing_loss(torch.zeros(2, 3), teacher, torch.ones(2), noise)
    expected = sum(q * math.log(3 * q) for q in (0.8, 0.2))  # of 1.2, 0, 0.3; and nothing of the second
    assert found.item() == pytest.approx(expected / 2, rel=1e-6)


def test_swing_tells_less_of_a_private_sample() -> None:
    """How sure a student that can fit each sample becomes of what the teacher memorised."""

    def surest(score: float) -> float:
        method = made("swing", scores=[score] * 8)
        logits = torch.zeros(4, 6, dtype=torch.float64, requires_grad=True)
        canary = Outputs(20 * F.one_hot(LABELS, 6).double())
        descent = torch.optim.Adam([logits], lr=0.3)
        for step in range(300):
            context = now(step=step)
            context.generator.manual_seed(step)
            descent.zero_grad()
            method(Outputs(logits), canary, batch(), context).backward()
            descent.step()
        return float(torch.softmax(logits.detach() / 4, 1)[INDEX, LABELS].mean())

    assert surest(1.0) < surest(0.0) - 0.2


def test_swing_draws_from_the_context_only() -> None:
    method = made("swing", scores=[1.0] * 8)
    global_state = torch.get_rng_state()
    context = now()
    first, second = value(method, context=context).item(), value(method, context=context).item()
    assert first != second
    assert value(method).item() == first
    assert torch.equal(torch.get_rng_state(), global_state)


def test_swing_noise_is_a_laplace_of_the_stated_scale() -> None:
    method = made("swing", scores=[1.0] * 8, noise=2.5, low=1.0, high=1.0)
    flat = torch.zeros(4, 5000, dtype=torch.float64)
    seen: list[Tensor] = []

    def keep(student: Tensor, teacher: Tensor, temperature: Tensor, noise: Tensor) -> Tensor:
        seen.append(noise)
        return swing_loss(student, teacher, temperature, noise)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgekd.distillers.swing.swing_loss", keep)
        method(Outputs(flat), Outputs(flat), batch(), now())
    (noise,) = seen
    assert float(noise.mean()) == pytest.approx(0, abs=5e-5)
    assert float(noise.abs().mean()) == pytest.approx(0.001, rel=0.05)
    assert float(noise.std()) == pytest.approx(0.001 * math.sqrt(2), rel=0.05)


def test_swing_takes_the_gap_where_no_scores_are_given() -> None:
    teacher = torch.tensor([[0.8, 0.2], [0.8, 0.2], [0.6, 0.4]]).log()
    student = torch.tensor([[0.2, 0.8], [0.9, 0.1], [0.3, 0.7]]).log()
    assert confidence_gap(student, teacher).tolist() == pytest.approx([0.75, 0.0, 0.5], abs=1e-6)


@pytest.mark.parametrize("scores", [[0.5] * 7, [0.5] * 7 + [1.5], [-0.1] * 8])
def test_swing_refuses_scores_that_do_not_fit(scores: list[float]) -> None:
    with pytest.raises(UsageError, match="scores") as caught:
        made("swing", scores=scores)
    assert "8 training samples" in caught.value.hint


# --- slices


def _divergence(classes: list[int], teacher: Tensor = TEACHER) -> Tensor:
    return softened_kl(STUDENT[:, classes], teacher[:, classes], 4.0)


def test_slices_without_subsets_is_kd() -> None:
    expected = softened_kl(STUDENT, TEACHER, 4.0).mean().item()
    assert value(made("slices"), context=now(step=100)).item() == pytest.approx(expected)


def test_slices_teach_a_sample_by_the_specialists_of_its_label() -> None:
    subsets = [[0, 1, 2], [3, 5]]  # class 4 has no specialist
    labels = torch.tensor([0, 3, 4, 2])
    found = made("slices", subsets=subsets)(Outputs(STUDENT), Outputs(TEACHER), batch(labels), now(step=100))
    own, other = _divergence(subsets[0]), _divergence(subsets[1])
    assert found.item() == pytest.approx(float(own[0] + other[1] + own[3]) / 4)


def test_slices_take_whole_or_narrow_specialists() -> None:
    subsets = [[0, 2, 4], [5, 3, 1]]
    method = methods("slices", {"slices": {"subsets": subsets, "specialists": True}})[0].double()
    narrow = Outputs(TEACHER[:, subsets[0]], exits=(3 * TEACHER,))
    method.build(Outputs(STUDENT), narrow, SETTING)
    method.double()
    found = method(Outputs(STUDENT), narrow, batch(), now(step=100)).item()
    own, other = _divergence(subsets[0]), _divergence(subsets[1], 3 * TEACHER)
    assert found == pytest.approx(float(own[0] + other[1] + other[2] + own[3]) / 4)


def test_slices_begin_with_the_easy_samples() -> None:
    each = _divergence(list(range(6)))
    easy = each * (each <= each.mean())
    assert 0 < int((easy > 0).sum()) < 4
    method = made("slices")
    assert value(method, context=now(step=0)).item() == pytest.approx(float(easy.mean()))
    losses = [value(method, context=now(step=step)).item() for step in range(0, 101, 10)]
    assert losses == sorted(losses)
    assert losses[-1] == pytest.approx(float(each.mean()))


def test_slices_weigh_specialists_by_their_running_loss() -> None:
    subsets = [[0, 2], [3, 5]]
    method: Slices = made("slices", subsets=subsets, decay=0.0)
    given = Outputs(STUDENT), Outputs(TEACHER), batch(torch.tensor([0, 2, 0, 5])), now(step=100)
    method(*given)
    method.after_step(torch.tensor(0.0), now())
    own, other = _divergence(subsets[0])[:3], _divergence(subsets[1])[3:]
    scales = torch.stack([own.mean(), other.mean()])
    assert method.running.tolist() == pytest.approx(scales.tolist())
    share = (scales.mean() / scales).clamp(max=10)
    expected = float(share[0] * own.sum() + share[1] * other.sum()) / 4
    assert method(*given).item() == pytest.approx(expected)


def test_slices_keep_the_running_loss_of_a_specialist_that_saw_nothing() -> None:
    method: Slices = made("slices", subsets=[[0, 1, 2, 3, 5], [4, 5]], decay=0.5)
    labels = torch.tensor([0, 3, 1, 2])
    method(Outputs(STUDENT), Outputs(TEACHER), batch(labels), now(step=100))
    method.after_step(torch.tensor(0.0), now())
    assert method.running[0].item() != 1
    assert method.running[1].item() == 1


@pytest.mark.parametrize(
    ("subsets", "reason"),
    [([[0, 1], [2]], "subset 1"), ([[0, 0, 1]], "different"), ([[0, 6]], "outside"), ([[-1, 2]], "outside")],
)
def test_slices_refuse_subsets_that_cannot_be(subsets: list[list[int]], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        made("slices", subsets=subsets)


@pytest.mark.parametrize("subsets", [[[0, 1], [2, 3], [4, 5]], [[0, 1]]])
def test_slices_refuse_specialists_that_do_not_fit(subsets: list[list[int]]) -> None:
    with pytest.raises(UsageError, match="specialists' logits"):
        made("slices", subsets=subsets, specialists=True)


# --- ensemble


def test_an_ensemble_averages_probabilities_or_logits() -> None:
    pair = (TEACHER, 2 * STUDENT + 1)
    arithmetic = torch.softmax(mean_logits(pair, "probabilities"), 1)
    assert torch.allclose(arithmetic, (torch.softmax(pair[0], 1) + torch.softmax(pair[1], 1)) / 2)
    assert torch.allclose(mean_logits(pair, "logits"), (pair[0] + pair[1]) / 2)


@pytest.mark.parametrize("of", ["probabilities", "logits"])
def test_an_ensemble_teaches_all_terms_its_mean(of: str) -> None:
    method = made("ensemble", of=of)
    several = Outputs(TEACHER, exits=(TEACHER.flip(1), STUDENT))
    target = method.target(Outputs(STUDENT), several, batch(), now())
    mean = mean_logits((TEACHER, TEACHER.flip(1), STUDENT), of)
    assert torch.equal(target.logits, mean)
    assert target.exits == ()
    found = method(Outputs(STUDENT), target, batch(), now()).item()
    assert found == pytest.approx(softened_kl(STUDENT, mean, 4.0).mean().item())


def test_an_ensemble_of_one_or_of_an_unknown_mean_is_refused() -> None:
    (method,) = methods("ensemble")
    with pytest.raises(UsageError, match="several teachers"):
        method.build(Outputs(STUDENT), Outputs(TEACHER), SETTING)
    with pytest.raises(UsageError, match="'logit'") as caught:
        methods("ensemble", {"ensemble": {"of": "logit"}})
    assert caught.value.hint == "did you mean 'logits'?"


# --- agreement


def test_agreement_is_the_golden_one(golden: dict[str, Any]) -> None:
    """There a positive flip is what the student would gain by answering as the teacher does."""
    expected = golden["losses"]["agreement"]["value"]
    student, teacher, labels = STUDENT.numpy(), TEACHER.numpy(), LABELS.numpy()
    found = {
        "top1_agreement": classification.top1_agreement(student, teacher),
        "one_minus_tvd": 1 - classification.total_variation(teacher, student),
        "kl_t_s": classification.kl_divergence(teacher, student),
        "nll": classification.negative_log_likelihood(student, labels),
        "brier": classification.brier_score(student, labels),
        "positive_flips": classification.positive_flips(student, teacher, labels),
        "negative_flips": classification.negative_flips(student, teacher, labels),
    }
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_kappa_is_agreement_beyond_chance() -> None:
    teacher, student = np.array([0, 5, 0, 5]), np.array([1, 4, 0, 1])
    assert classification.cohen_kappa(teacher, student) == pytest.approx((0.25 - 0.125) / (1 - 0.125))
    assert classification.cohen_kappa(teacher, teacher) == 1
    assert classification.cohen_kappa(np.array([0, 1]), np.array([1, 0])) == -1
    assert classification.cohen_kappa(np.array([True, True]), np.array([True, True])) == 1
    assert classification.cohen_kappa(np.array([True, True]), np.array([False, False])) == 0


def test_class_agreement_is_of_the_teachers_classes() -> None:
    teacher = np.eye(4, dtype=np.float32)[[0, 0, 1, 2]]
    student = np.eye(4, dtype=np.float32)[[0, 1, 1, 3]]
    shares = classification.class_agreement(teacher, student)
    assert shares[:3].tolist() == [0.5, 1.0, 0.0]
    assert np.isnan(shares[3])


def test_confidence_correlation_is_spearmans() -> None:
    sure = np.array([[x, 0.0] for x in (1, 2, 2, 4)], dtype=np.float32)
    other = np.array([[x, 0.0] for x in (10, 40, 20, 30)], dtype=np.float32)
    ranks = np.corrcoef([1, 2.5, 2.5, 4], [1, 4, 2, 3])[0, 1]
    assert classification.confidence_correlation(sure, other) == pytest.approx(ranks)
    assert classification.confidence_correlation(sure, sure**3) == pytest.approx(1)
    assert np.isnan(classification.confidence_correlation(sure, np.ones_like(sure)))


def test_fidelity_of_a_model_to_itself_is_perfect() -> None:
    teacher, labels = TEACHER.numpy().astype(np.float32), LABELS.numpy()
    same = classification.fidelity(teacher, teacher, labels)
    zero = ("kl_divergence", "total_variation", "negative_flips", "positive_flips")
    one = ("top1_agreement", "cohen_kappa", "error_consistency", "confidence_correlation")
    assert {key: same[key] for key in zero} == dict.fromkeys(zero, 0.0)
    assert {key: same[key] for key in one} == pytest.approx(dict.fromkeys(one, 1.0))
    student = classification.fidelity(teacher, STUDENT.numpy().astype(np.float32), labels)
    assert student["negative_flips"] == 0.25  # the teacher is right of sample 0, the student of none
    assert student["error_consistency"] == 0
