"""Methods on maps and embeddings: values of the authors' code or by hand, shapes, schedules, refusals."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgekd.distillers import Context, Distiller, Setting, method_class, methods
from edgekd.distillers.ab import boundary_loss
from edgekd.distillers.cc import cc_loss
from edgekd.distillers.fsp import flow
from edgekd.distillers.ft import Ft, factor_loss
from edgekd.distillers.ofd import Level, partial_loss
from edgekd.distillers.pkt import pkt_loss
from edgekd.distillers.rkd import rkd_loss
from edgekd.errors import UnsupportedModelError
from edgekd.nets import Batch, Outputs
from edgekd.taps import Tapped, find_layout

NAMES = ("fitnet", "at", "sp", "cc", "rkd", "pkt", "nst", "vid", "ickd", "fsp", "ab", "ft", "ofd")
STEPS = 400
SETTING = Setting(samples=8, classes=6, labels=torch.arange(8) % 6, seed=0)
BATCH = Batch(torch.zeros(4, 3, 16, 16), torch.zeros(4, dtype=torch.int64), torch.arange(4))
NO_LOGITS = torch.zeros(4, 6, dtype=torch.float64)


def wave(kind: Callable[[Tensor], Tensor], factor: float, *shape: int) -> Tensor:
    counted = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).reshape(shape)
    return kind(factor * counted)


INPUTS = {
    "fs": wave(torch.sin, 0.3, 4, 8, 4, 4).relu(),
    "ft": wave(torch.cos, 0.2, 4, 8, 4, 4).relu(),
    "f2": wave(torch.sin, 0.11, 4, 5, 8, 8).relu(),
    "t2": wave(torch.cos, 0.07, 4, 8, 4, 4).relu(),
    "es": wave(torch.sin, 0.37, 4, 8),
    "et": wave(torch.cos, 0.23, 4, 12),
    "et8": wave(torch.cos, 0.23, 4, 8),
}


def at_step(step: float) -> Context:
    now = torch.tensor(float(step))
    return Context(now / 100, now, STEPS // 100, STEPS, torch.Generator().manual_seed(0))


LATE = at_step(STEPS - 1)


def made(name: str, **options: Any) -> Distiller:
    (method,) = methods(name, {name: options})
    return method


def built(name: str, student: Outputs, teacher: Outputs, **options: Any) -> Distiller:
    method = made(name, **options)
    method.build(student, teacher, SETTING)
    return method.to(student.logits.dtype)


def as_stage(map_: Tensor) -> Outputs:
    return Outputs(NO_LOGITS, stages=(map_,))


def as_features(map_: Tensor) -> Outputs:
    return Outputs(NO_LOGITS, features=map_)


def as_embedding(embedding: Tensor) -> Outputs:
    return Outputs(NO_LOGITS, embedding=embedding)


def as_preactivations(*maps: Tensor) -> Outputs:
    return Outputs(NO_LOGITS, preactivations=maps)


GOLDEN: dict[str, tuple[str, Callable[[Tensor], Outputs]]] = {
    "at_p2": ("at", as_stage),
    "sp": ("sp", as_features),
    "rkd_25_50": ("rkd", as_embedding),
    "nst": ("nst", as_stage),
    "pkt": ("pkt", as_embedding),
    "ickd": ("ickd", as_features),
    "fsp": ("fsp", lambda map_: Outputs(NO_LOGITS, stages=(map_, map_[:, :, ::2, ::2]))),
    "vid": ("vid", as_stage),
}


def published_weights(method: Distiller) -> None:
    """Convolution k of the golden VID holds ``0.1 * sin(factor_k * I(shape))``."""
    convolutions = [module for module in method.modules() if isinstance(module, nn.Conv2d)]
    for convolution, factor in zip(convolutions, (0.31, 0.43, 0.59), strict=True):
        convolution.weight.data = 0.1 * wave(torch.sin, factor, *convolution.weight.shape)


@pytest.mark.parametrize("name", INPUTS)
def test_the_inputs_are_those_of_the_golden_file(name: str, golden: dict[str, Any]) -> None:
    assert float(INPUTS[name].sum()) == pytest.approx(golden["inputs"][name]["sum"], abs=1e-9)
    assert float(INPUTS[name].square().sum()) == pytest.approx(golden["inputs"][name]["sumsq"], abs=1e-9)


def check(value: Tensor, by: Tensor, entry: dict[str, Any]) -> None:
    assert value.item() == pytest.approx(entry["value"], rel=1e-6)
    (gradient,) = torch.autograd.grad(value, by)
    (expected,) = entry["grad_l2"].values()
    assert float(gradient.norm()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("key", GOLDEN)
def test_value_and_gradient_are_those_of_the_authors(key: str, golden: dict[str, Any]) -> None:
    name, outputs = GOLDEN[key]
    entry = golden["losses"][key]
    ours, theirs = (INPUTS[argument].clone() for argument in entry["args"].split(","))
    ours.requires_grad_()
    method = built(name, outputs(ours), outputs(theirs))
    if name == "vid":
        published_weights(method)
    check(method(outputs(ours), outputs(theirs), BATCH, LATE), ours, entry)


def test_correlation_congruence_is_that_of_the_authors(golden: dict[str, Any]) -> None:
    """Of the formula alone: the published embeddings are learned."""
    ours = INPUTS["es"].clone().requires_grad_()
    check(cc_loss(ours, INPUTS["et8"]), ours, golden["losses"]["cc"])


def row(*values: float) -> Tensor:
    """A (1, 1, 1, W) map."""
    return torch.tensor(values, dtype=torch.float64)[None, None, None]


def test_a_hint_by_hand() -> None:
    """Batch norm makes -1 and 1 of the student's -1 and 1 (over 1.00001 ** 0.5), the ReLU 0 and 1."""
    ours, theirs = as_stage(row(-1, 1)), as_stage(row(2, 3))
    method = built("fitnet", ours, theirs)
    for parameter, value in zip(method.parameters(), (1.0, 0.0, 1.0, 0.0), strict=True):
        parameter.data.fill_(value)
    expected = (4 + (3 - 1.00001**-0.5) ** 2) / 2
    assert method(ours, theirs, BATCH, LATE).item() == pytest.approx(expected, rel=1e-9)


def test_activation_boundaries_by_hand() -> None:
    """Wrong sides at distances 3, 1.5, 1.5, 3 from the margin, two right ones beyond it, one within."""
    ours, theirs = row(-2, -0.5, 0.5, 2, 2, -2, 0.5), row(1, 1, -1, 0, 1, -1, 1)
    assert boundary_loss(ours, theirs, 1.0).item() == pytest.approx(9 + 2.25 + 2.25 + 9 + 0.25)
    both = as_preactivations(ours, 0.5 * theirs), as_preactivations(theirs, theirs)
    coarse = 4 * 0.25 + 2 * 0.25 + 1  # 0.5 within the margin, the zero at 1 from it
    assert built("ab", *both)(*both, BATCH, at_step(0)).item() == pytest.approx(3e-3 * (22.75 / 2 + coarse))


def test_factors_by_hand() -> None:
    """Mean squares (3, 4) and (4, 0) have the directions (0.6, 0.8) and (1, 0)."""
    ours = torch.tensor([[6**0.5, 8**0.5], [0, 0]])[None, :, None]
    theirs = torch.tensor([[2.0, 0], [2, 0]])[None, :, None]
    assert factor_loss(ours, theirs).item() == pytest.approx((0.4 + 0.8) / 2)


def test_the_partial_distance_by_hand() -> None:
    """Above zero both sides count, below only a student that is larger; the target ends at the margin, -1."""
    ours, theirs = row(1, 3, 0, -0.7, -0.5, -1.5), row(2, 2, -0.5, -0.5, -3, -3)
    margin = torch.tensor([-1.0], dtype=torch.float64)
    assert partial_loss(ours, theirs, margin).item() == pytest.approx(1 + 1 + 0.25 + 0 + 0.25 + 0)


def test_the_margin_is_the_mean_of_what_is_negative() -> None:
    level = Level(1, 2).double()
    first = torch.cat([row(-1, -3, 2, 4), row(0, 1, 2, 3)], 1)
    assert level.margin(first).tolist() == [-2, 0]
    assert level.margin(first - 1).tolist() == pytest.approx([(-4 * 0.99 - 6) / (2 * 0.99 + 2), -1])
    level.eval()
    kept = level.negative.clone()
    level.margin(first)
    assert torch.equal(level.negative, kept)
    assert "negative" in level.state_dict()


def test_a_finer_stage_weighs_half_in_the_overhaul() -> None:
    def value(*names: str) -> float:
        ours = as_preactivations(*(INPUTS[name] for name in names))
        theirs = as_preactivations(*[INPUTS["ft"]] * len(names))
        method = built("ofd", ours, theirs)
        for convolution in method.modules():
            if isinstance(convolution, nn.Conv2d):
                nn.init.dirac_(convolution.weight)
        found: Tensor = method(ours, theirs, BATCH, LATE)
        return found.item()

    fine, coarse = value("fs"), value("t2")
    assert value("fs", "t2") == pytest.approx(fine / 2 + coarse)
    assert abs(fine - coarse) > 0.1


def test_activation_boundaries_end_after_their_share() -> None:
    ours, theirs = as_preactivations(INPUTS["fs"]), as_preactivations(INPUTS["ft"])
    method = built("ab", ours, theirs, share=0.25)
    values = [method(ours, theirs, BATCH, at_step(step)).item() for step in (0, 99, 100, 399)]
    assert values[0] == values[1] > 0.1
    assert values[2:] == [0, 0]


def gradients(method: Ft, step: float) -> dict[str, float]:
    """Norms by part of `method`, and of the student's map, at a step."""
    map_ = INPUTS["fs"].clone().requires_grad_()
    method.zero_grad()
    method(as_features(map_), as_features(INPUTS["ft"]), BATCH, at_step(step)).backward()
    assert map_.grad is not None
    parts = {
        "paraphrase": method.paraphrase,
        "reconstruct": method.reconstruct,
        "translate": method.translate,
    }
    found = {
        name: math.hypot(*(float(p.grad.norm()) for p in part.parameters() if p.grad is not None))
        for name, part in parts.items()
    }
    return found | {"student": float(map_.grad.norm())}


def test_the_paraphraser_learns_from_its_own_error_only_and_the_student_after_it() -> None:
    method = built("ft", as_features(INPUTS["fs"]), as_features(INPUTS["ft"]), share=0.25)
    assert isinstance(method, Ft)
    before, after = gradients(method, 99), gradients(method, 100)
    assert before["paraphrase"] > 0
    assert before["student"] == before["translate"] == 0
    assert after["student"] > 0
    assert after["translate"] > 0
    for part in ("paraphrase", "reconstruct"):
        assert after[part] == pytest.approx(before[part], rel=1e-12)


@pytest.mark.parametrize("weight", [200.0, 500.0])
def test_the_paraphraser_learns_at_one_rate_whatever_the_weight(weight: float) -> None:
    ours, theirs = as_features(INPUTS["fs"]), as_features(INPUTS["ft"])
    method = built("ft", ours, theirs, weight=weight)
    assert isinstance(method, Ft)
    error = (method.reconstruct(method.paraphrase(INPUTS["ft"])) - INPUTS["ft"]).square().mean()
    assert weight * method(ours, theirs, BATCH, at_step(0)).item() == pytest.approx(error.item())


def test_stages_are_paired_from_the_coarsest() -> None:
    finer = INPUTS["f2"]
    few = Outputs(NO_LOGITS, stages=(finer, INPUTS["fs"]))
    many = Outputs(NO_LOGITS, stages=(wave(torch.sin, 0.9, 4, 3, 16, 16), finer.flip(0), INPUTS["ft"]))
    cut = Outputs(NO_LOGITS, stages=many.stages[1:])
    for name in ("at", "nst"):
        expected = built(name, few, cut)(few, cut, BATCH, LATE)
        for ours, theirs in ((few, many), (many, few)):
            assert built(name, ours, theirs)(ours, theirs, BATCH, LATE).item() == pytest.approx(
                expected.item()
            )


@pytest.mark.parametrize(("hint", "width"), [(1, 8), (2, 5), (3, 3), (9, 3)])
def test_the_hint_counts_maps_from_the_coarsest(hint: int, width: int) -> None:
    stages = tuple(torch.zeros(4, c, s, s, dtype=torch.float64) for c, s in ((3, 16), (5, 8), (8, 4)))
    method = built("fitnet", Outputs(NO_LOGITS, stages=stages), Outputs(NO_LOGITS, stages=stages), hint=hint)
    assert next(method.parameters()).shape == (width, width, 1, 1)
    if hint == 2:
        assert getattr(made("fitnet"), "hint") == 2  # noqa: B009, the published layer


def test_the_larger_map_is_pooled_whichever_it_is() -> None:
    small = INPUTS["f2"].unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5))
    for ours, theirs in ((INPUTS["f2"], INPUTS["t2"]), (INPUTS["t2"], INPUTS["f2"])):
        pooled = [as_stage(small if map_ is INPUTS["f2"] else map_) for map_ in (ours, theirs)]
        expected = made("at")(*pooled, BATCH, LATE).item()
        assert made("at")(as_stage(ours), as_stage(theirs), BATCH, LATE).item() == pytest.approx(expected)


def test_flow_pools_the_finer_map_and_is_divided_by_positions() -> None:
    fine, coarse = torch.ones(1, 2, 4, 4), 3 * torch.ones(1, 5, 2, 2)
    assert torch.equal(flow(fine, coarse), torch.full((1, 2, 5), 3.0))


def test_coincident_samples_pass_no_exploding_gradient() -> None:
    ours = INPUTS["es"].float()[[0, 0, 1, 2]].requires_grad_()
    rkd_loss(ours, INPUTS["et"].float(), 25.0, 50.0).backward()
    assert ours.grad is not None
    assert float(ours.grad.norm()) < 1e3


def test_opposite_samples_have_finite_probabilities() -> None:
    ours = INPUTS["es"].float()
    assert torch.isfinite(pkt_loss(torch.cat([ours, -3 * ours]), torch.cat([ours, ours])))


def network(widths: tuple[int, ...], stride: int) -> nn.Module:
    layers: list[nn.Module] = []
    before = 3
    for rank, width in enumerate(widths):
        layers.append(nn.Conv2d(before, width, 3, stride=2 if rank else stride, padding=1))
        layers += [nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 6))


def tapped(method: type[Distiller], widths: tuple[int, ...], stride: int, seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = network(widths, stride)
    layout = find_layout(model, torch.zeros(1, 3, 16, 16), 6)
    assert len(layout.stages) == len(widths)
    return Tapped(model, layout, method.needs.student).train()


IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(3))
# widths of the student's and the teacher's stages; strides of the first: other resolutions
PAIRS = {
    "narrower, coarser, fewer stages": ((6, 9), 2, (8, 12, 16), 1),
    "wider, finer, more stages": ((8, 12, 16), 1, (6, 9), 2),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "fsp"])
def test_networks_of_other_widths_and_resolutions_train_student_and_adapters_only(
    name: str, pair: str
) -> None:
    widths, stride, teacher_widths, teacher_stride = PAIRS[pair]
    student = tapped(method_class(name), widths, stride, 1)
    teacher = tapped(method_class(name), teacher_widths, teacher_stride, 2)  # trainable on purpose
    ours, theirs = student(IMAGES), teacher(IMAGES)
    method = built(name, ours, theirs)
    now = at_step(0) if name == "ab" else LATE
    value = method(ours, theirs, BATCH, now)
    value.backward()
    assert value.shape == ()
    assert torch.isfinite(value)
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None and float(p.grad.norm()) > 0 for p in student.parameters())
    for key, parameter in method.named_parameters():
        assert parameter.grad is not None, key
        assert torch.isfinite(parameter.grad).all(), key


def test_flow_takes_other_resolutions_and_refuses_other_widths() -> None:
    student, teacher = (tapped(method_class("fsp"), (6, 9), stride, 1) for stride in (2, 1))
    ours, theirs = student(IMAGES), teacher(IMAGES)
    value = built("fsp", ours, theirs)(ours, theirs, BATCH, LATE)
    value.backward()
    assert all(p.grad is None for p in teacher.parameters())
    other = tapped(method_class("fsp"), (6, 10), 1, 1)(IMAGES)
    with pytest.raises(UnsupportedModelError) as caught:
        made("fsp").build(ours, other, SETTING)
    for part in ("'stages'", "(4, 9, 4, 4)", "(4, 10, 8, 8)"):
        assert part in caught.value.message
    assert "fitnet" in caught.value.hint
    alone = Outputs(ours.logits, stages=ours.stages[-1:])
    with pytest.raises(UnsupportedModelError, match="two maps"):
        made("fsp").build(alone, theirs, SETTING)


@pytest.mark.parametrize("name", NAMES)
def test_a_network_without_the_tap_is_refused_by_name(name: str) -> None:
    bare = Outputs(NO_LOGITS)
    (tap,) = method_class(name).needs.student
    with pytest.raises(UnsupportedModelError, match=f"tap '{tap}'"):
        built(name, bare, bare)(bare, bare, BATCH, LATE)


@pytest.mark.parametrize("name", NAMES)
def test_adapters_are_a_function_of_the_seed(name: str) -> None:
    ours, theirs = (tapped(method_class(name), (6, 9), 1, seed)(IMAGES) for seed in (1, 2))
    before = torch.random.get_rng_state()
    states = [copy.deepcopy(built(name, ours, theirs).state_dict()) for _ in range(2)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
