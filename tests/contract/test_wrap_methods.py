"""What each method that changes the student promises of itself."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from wrapped import CLASSES, LABELS, Cnn, case, context, images, tapped, teacher, trained, zs, zt

from edgekd.demo import DemoTeacher
from edgekd.distillers import Setting, methods
from edgekd.distillers.bsd import class_map, pixel_loss
from edgekd.distillers.dho import dho_loss, mixed_log_probabilities
from edgekd.distillers.dml import mutual_loss
from edgekd.distillers.lsskd import joint_labels
from edgekd.distillers.ofa import ofa_loss
from edgekd.errors import UnsupportedModelError, UsageError
from edgekd.nets import Batch, Outputs
from edgekd.taps import Tapped, find_layout


def test_ofa_without_enhancement_is_the_soft_cross_entropy() -> None:
    soft = -(torch.softmax(zt(), 1) * F.log_softmax(zs(), 1)).sum(1).mean()
    assert ofa_loss(zs(), zt(), LABELS, 1.0, 1.0).item() == pytest.approx(soft.item(), rel=1e-12)
    same = zt().requires_grad_()
    (gradient,) = torch.autograd.grad(ofa_loss(same, zt(), LABELS, 1.0, 1.0), same)
    assert float(gradient.abs().max()) < 1e-12


def test_ofa_pushes_the_right_class_the_more_the_surer_the_teacher() -> None:
    unlabelled = torch.full((4,), -1)
    for teacher_logits in (zt(), 3 * zt()):
        student = torch.zeros(4, 6, dtype=torch.float64, requires_grad=True)
        gradients = [
            torch.autograd.grad(ofa_loss(student, teacher_logits, labels, 1.5, 1.0), student)[0]
            for labels in (teacher_logits.argmax(1), unlabelled)
        ]
        top = teacher_logits.argmax(1)[:, None]
        assert (gradients[0].gather(1, top) < gradients[1].gather(1, top)).all()


def test_ofa_takes_a_black_box() -> None:
    (method,) = methods("ofa")
    shown = tapped(Cnn(), *method.needs.student)
    wrapped = method.wrap(shown, shown(images()), None)
    seen = wrapped.train()(images())
    batch = Batch(images(), LABELS, torch.arange(4))
    assert torch.isfinite(method(seen, Outputs(torch.randn(4, CLASSES)), batch, context()))


def test_the_heads_of_ofa_halve_a_map_as_often_as_the_network_does() -> None:
    wrapped: Any = case("ofa", steps=0).wrapped
    halvings = [
        sum(isinstance(m, nn.Conv2d) and m.stride == (2, 2) for m in head.modules()) for head in wrapped.heads
    ]
    assert halvings == [2, 1, 0]
    assert [head.classifier.in_features for head in wrapped.heads] == [24] * 3  # the wider of both networks


def test_simkd_brings_a_larger_map_to_the_teachers_size_before_the_projector() -> None:
    made = case("simkd", tapped(DemoTeacher(widths=(8, 8, 16, 24), blocks=1).eval(), "features"), steps=0)
    assert made.wrapped(images()).features.shape == (4, 24, 7, 7)  # 4x4 is no whole factor of 7x7
    small = nn.Sequential(
        nn.Conv2d(1, 6, 3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES)
    )
    wide = nn.Sequential(
        nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)
    )
    (method,) = methods("simkd")
    shown = tapped(wide, "features", "embedding")
    wrapped = method.wrap(shown, shown(images()), tapped(small, "features"))
    assert wrapped(images()).features.shape == (4, 6, 7, 7)


def test_simkd_still_gives_the_finer_stages() -> None:
    made = case("simkd", steps=0)
    assert isinstance(made.wrapped, Tapped)
    again = Tapped(made.wrapped.deploy(), made.wrapped.layout, ("stages",))
    assert [tuple(m.shape[1:]) for m in again(images()).stages] == list(made.wrapped.layout.shapes)


def test_simkd_refuses_a_classifier_that_does_not_read_the_pooled_map() -> None:
    flat = nn.Sequential(nn.Conv2d(1, 2, 3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(98, CLASSES))
    (method,) = methods("simkd")
    shown = tapped(flat, "features", "embedding")
    with pytest.raises(UnsupportedModelError, match="student's last map has 2 channels"):
        method.wrap(shown, shown(images()), teacher())


def test_the_class_vectors_of_promptkd_see_directions_only() -> None:
    head: Any = trained("promptkd").deploy().get_submodule("classifier").requires_grad_(requires_grad=False)
    embedding = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    logits = head(embedding)
    assert float(logits.abs().max()) <= 100.0001
    with torch.no_grad():
        for parameter in head.projector[2].parameters():
            parameter.mul_(5)
    torch.testing.assert_close(head(embedding), logits)


def test_the_label_head_of_dho_learns_from_labelled_samples_only() -> None:
    labels = torch.tensor([0, -1, -1, 2])
    ours, distilled = zs(), zs()
    first, second = torch.autograd.grad(dho_loss(ours, distilled, zt(), labels, 2.0), (ours, distilled))
    assert (first[1:3] == 0).all()
    assert (first[[0, 3]].norm(dim=1) > 0).all()
    assert (second.norm(dim=1) > 0).all()


@pytest.mark.parametrize("label", [-1, 2])
def test_dho_counts_a_part_without_samples_as_zero(label: int) -> None:
    labels = torch.full((4,), label)
    student = zs()
    kd = F.kl_div(F.log_softmax(student / 2, 1), F.softmax(zt() / 2, 1), reduction="batchmean") * 4
    wanted = 0.5 * kd + (0.5 * F.cross_entropy(student, labels) if label >= 0 else 0)
    assert dho_loss(student, student, zt(), labels, 2.0).item() == pytest.approx(wanted.item(), rel=1e-9)


def test_the_output_of_dho_is_the_logarithm_of_the_mixed_probabilities() -> None:
    made = trained("dho")
    seen = made.wrapped.train()(images())
    labelled, distilled = (z.detach() for z in seen.exits)
    mix = 0.5 * torch.softmax(labelled, 1) + 0.5 * torch.softmax(distilled / 0.5, 1)
    torch.testing.assert_close(seen.logits.detach().exp(), mix, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.softmax(seen.logits.detach(), 1), mix, rtol=1e-5, atol=1e-7)


def test_the_mix_of_dho_survives_what_underflows() -> None:
    far = torch.tensor([[0.0, 500.0, -500.0]], requires_grad=True)
    mixed = mixed_log_probabilities(far, far.flip(1), 0.5, 0.5)
    mixed.sum().backward()
    assert torch.isfinite(mixed).all()
    assert far.grad is not None
    assert torch.isfinite(far.grad).all()
    double = far.detach().double()
    exact = torch.logaddexp(F.log_softmax(double, 1), F.log_softmax(2 * double.flip(1), 1)) + math.log(0.5)
    torch.testing.assert_close(mixed.detach().double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{"w_ce": 0.0}, {"w_ce": 1.0}, {"beta": 0.0}])
def test_an_impossible_mix_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        methods("dho", {"dho": options})


def test_joint_labels_count_class_and_rotation() -> None:
    assert joint_labels(torch.tensor([2, -1]), 4).tolist() == [8, -1, 9, -1, 10, -1, 11, -1]


def test_lsskd_shows_all_rotations_and_answers_for_the_upright_images() -> None:
    made = case("lsskd", steps=0)
    seen: list[Tensor] = []
    wrapped: Any = made.wrapped.train()
    wrapped.student.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    outputs = wrapped(images())
    (views,) = seen
    assert [torch.equal(views[4 * r : 4 * r + 4], torch.rot90(images(), r, (2, 3))) for r in range(4)] == [
        True
    ] * 4
    assert outputs.logits.shape == (4, CLASSES)
    assert [tuple(z.shape) for z in outputs.exits] == [(16, 4 * CLASSES)] * 3
    assert [tuple(m.shape) for m in outputs.extra_maps] == [(16, 16, 7, 7)] * 3
    assert {len(m) for m in outputs.stages} == {4}


def test_in_lsskd_the_deepest_branch_is_taught_by_labels_alone() -> None:
    def gradient(kl_weight: float, hint_weight: float) -> list[Tensor]:
        made = case("lsskd", steps=0, kl_weight=kl_weight, hint_weight=hint_weight)
        made.method.hard_weight = 0.0
        made.term().backward()
        branches: Any = made.wrapped.branches
        return [branches[index].classifier.weight.grad for index in (0, 2)]

    plain, taught = gradient(0.0, 0.0), gradient(1.0, 0.0)
    assert not torch.allclose(plain[0], taught[0])
    torch.testing.assert_close(plain[1], taught[1])


def test_in_lsskd_the_deepest_map_is_not_drawn_to_the_others() -> None:
    (method,) = methods("lsskd")
    logits = torch.randn(4, CLASSES, generator=torch.Generator().manual_seed(0))
    maps = [torch.full((4, 3, size, size), value, requires_grad=True) for size, value in ((4, 1.0), (2, 3.0))]
    batch = Batch(images(), LABELS, torch.arange(4))
    values = [
        method(Outputs(logits, exits=(logits,), extra_maps=extra), Outputs(logits), batch, context())
        for extra in ((), tuple(maps))
    ]
    assert float((values[1] - values[0]).detach()) == pytest.approx(0.01 * 4, rel=1e-4)  # (1 - 3)^2
    values[1].backward()
    assert maps[0].grad is not None
    assert maps[1].grad is None


def test_images_that_are_not_square_cannot_be_rotated() -> None:
    wide = torch.randn(2, 1, 12, 28)
    (method,) = methods("lsskd")
    model = Cnn()
    shown = Tapped(model, find_layout(model, wide, CLASSES), ("stages",))
    with pytest.raises(UnsupportedModelError, match="not square"):
        method.wrap(shown, shown(wide), None)


def test_the_peer_has_other_weights_of_the_same_distribution() -> None:
    wrapped: Any = case("dml", steps=0).wrapped
    for (key, ours), theirs in zip(
        wrapped.student.named_parameters(), wrapped.peer.parameters(), strict=True
    ):
        assert torch.equal(ours.flatten().sort().values, theirs.flatten().sort().values), key
        assert torch.equal(ours, theirs) == (float(ours.detach().std()) == 0), key
    other: Any = case("dml", steps=0, peer_seed=2).wrapped
    assert not torch.equal(other.peer(images()).logits, wrapped.peer(images()).logits)
    assert torch.equal(other.student(images()).logits, wrapped.student(images()).logits)


def test_mutual_learning_holds_the_other_fixed() -> None:
    ours, theirs = zs(), zt().requires_grad_()
    gradient = torch.autograd.grad(mutual_loss(ours, theirs, 1.0), (ours, theirs))
    for mine, other, got in ((ours, theirs, gradient[0]), (theirs, ours, gradient[1])):
        alone = F.kl_div(F.log_softmax(mine, 1), F.softmax(other.detach(), 1), reduction="batchmean")
        torch.testing.assert_close(got, torch.autograd.grad(alone, mine)[0])
    assert mutual_loss(ours, ours, 1.0).item() == pytest.approx(0, abs=1e-12)


def test_the_peer_learns_from_the_labels_itself() -> None:
    (method,) = methods("dml")
    logits = zs().detach()
    batch = Batch(torch.zeros(4, 1, 8, 8), LABELS, torch.arange(4))
    agreed = Outputs(logits, peer=Outputs(logits))
    value = method(agreed, Outputs(logits), batch, context())
    assert value.item() == pytest.approx(F.cross_entropy(logits, LABELS).item(), rel=1e-6)


def test_a_class_map_averages_to_the_logits() -> None:
    network = tapped(Cnn().eval(), "features")
    outputs = network(images())
    maps = class_map(network, outputs)
    assert maps.shape == (4, CLASSES, 7, 7)
    torch.testing.assert_close(maps.mean((2, 3)), outputs.logits)


def test_in_bsd_only_the_worse_pixel_learns() -> None:
    ours = torch.zeros(4, 6, 1, 2, dtype=torch.float64)
    theirs = torch.zeros(4, 6, 1, 2, dtype=torch.float64)
    for row, label in enumerate(LABELS):
        theirs[row, label, 0, 0] = 2.0  # better at the first pixel
        theirs[row, label, 0, 1] = -2.0  # worse at the second
    ours.requires_grad_()
    theirs.requires_grad_()
    first = torch.autograd.grad(pixel_loss(ours, theirs, LABELS), ours)[0]
    assert float(first[..., 0].abs().max()) > 0
    assert float(first[..., 1].abs().max()) == 0
    second = torch.autograd.grad(pixel_loss(theirs, ours, LABELS), theirs)[0]
    assert float(second[..., 0].abs().max()) == 0
    assert float(second[..., 1].abs().max()) > 0
    gradients: Any = torch.autograd.grad(pixel_loss(ours, theirs, LABELS), (ours, theirs), allow_unused=True)
    assert gradients[1] is None
    assert pixel_loss(ours, theirs, torch.full((4,), -1)).item() == 0


def test_in_bsd_only_the_worse_region_learns() -> None:
    (method,) = methods("bsd", {"bsd": {"hint_weight": 0.0, "pixel_weight": 0.0}})
    features = [torch.randn(4, 5, 4, 4, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    maps = torch.zeros(4, CLASSES, 4, 4)
    maps[torch.arange(4), LABELS, :2, :2] = 3.0  # the peer is better in one of the four regions
    logits = torch.zeros(4, CLASSES)
    for feature in features:
        feature.requires_grad_()
    peer = Outputs(logits, features=features[1], stages=(features[1],), extra_maps=(maps,))
    maps = torch.zeros_like(maps)
    maps[:, 0] = 1e-3  # no ties: elsewhere the peer is worse
    maps[torch.arange(4), LABELS, 2:, :] += 1.0
    maps[torch.arange(4), LABELS, :, 2:] += 1.0
    ours = Outputs(logits, features=features[0], stages=(features[0],), extra_maps=(maps,), peer=peer)
    method.build(ours, ours, Setting(100, CLASSES, torch.arange(100) % CLASSES, 0))
    method(ours, Outputs(logits), Batch(images(), LABELS, torch.arange(4)), context()).backward()
    learned = [feature.grad.abs().sum((0, 1)) > 0 for feature in features if feature.grad is not None]
    better = torch.zeros(4, 4, dtype=torch.bool)
    better[:2, :2] = True
    assert torch.equal(learned[0], better)
    assert torch.equal(learned[1], ~better)


def test_in_bsd_a_hint_does_not_move_what_it_is_of() -> None:
    """With projectors that ignore the map they are given, no map has anything to learn."""
    method: Any = methods("bsd", {"bsd": {"region_weight": 0.0, "pixel_weight": 0.0}})[0]
    fine = [torch.randn(4, 5, 4, 4, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    logits = torch.zeros(4, CLASSES)
    ours, theirs = (Outputs(logits, features=m, stages=(m.requires_grad_(),)) for m in fine)
    method.build(ours, ours, Setting(100, CLASSES, torch.arange(100) % CLASSES, 0))
    for projector in method.low:
        nn.init.zeros_(projector.weight)
    batch = Batch(images(), LABELS, torch.arange(4))
    method(replace(ours, peer=theirs), Outputs(logits), batch, context()).backward()
    assert [float(m.grad.abs().max()) for m in fine if m.grad is not None] == [0, 0]


def test_in_bsd_both_networks_learn() -> None:
    made = case("bsd", steps=0)
    made.method.hard_weight = 0.0
    made.term().backward()
    wrapped: Any = made.wrapped
    for network in (wrapped.student, wrapped.peer):
        assert float(network.model.body[0].weight.grad.norm()) > 0
