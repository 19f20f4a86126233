"""Every training-free score, and the values that its authors' code gives."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.errors import UsageError
from edgekd.nets import Outputs, tapped_forward
from edgekd.proxies import proxy, proxy_names
from edgekd.proxies.diswot import classifier_gradient, relation, semantic, to_width

NAMES = proxy_names()
LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])


def outputs(seed: int, width: int = 12, size: int = 5) -> Outputs:
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(8, width, size, size, generator=draw)
    embedding = features.mean((2, 3))
    return Outputs(embedding @ torch.randn(width, 4, generator=draw), embedding, features)


def integers(*shape: int) -> Tensor:
    return torch.arange(1, math.prod(shape) + 1, dtype=torch.float64).reshape(shape)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_outputs_have_the_same_score(name: str) -> None:
    scores = [proxy(name).terms(outputs(1), outputs(2, 20), LABELS) for _ in range(2)]
    assert scores[0] == scores[1]
    assert scores[0]
    assert all(math.isfinite(value) for value in scores[0].values())


@pytest.mark.parametrize("name", NAMES)
def test_no_student_beats_the_teacher_itself(name: str) -> None:
    teacher = outputs(2)
    best = proxy(name).terms(teacher, teacher, LABELS)
    assert all(value == pytest.approx(0, abs=1e-6) for value in best.values())
    for seed in range(3, 8):
        other = proxy(name).terms(outputs(seed), teacher, LABELS)
        assert all(other[term] < best[term] for term in best)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, 7.0])
def test_a_dead_student_has_a_finite_score(name: str, value: float) -> None:
    dead = Outputs(torch.zeros(8, 4), torch.full((8, 12), value), torch.full((8, 12, 5, 5), value))
    score = proxy(name).terms(dead, outputs(2), LABELS)
    assert all(math.isfinite(part) for part in score.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_black_box_teacher_leaves_terms_out(name: str) -> None:
    box = Outputs(outputs(2).logits)
    full = proxy(name).terms(outputs(1), outputs(2), LABELS)
    score = proxy(name).terms(outputs(1), box, LABELS)
    assert 0 < len(score) < len(full)
    assert score.keys() < full.keys()
    assert all(math.isfinite(part) for part in score.values())


@pytest.mark.parametrize("name", NAMES)
def test_a_student_without_features_is_scored_too(name: str) -> None:
    score = proxy(name).terms(Outputs(outputs(1).logits), outputs(2), LABELS)
    assert score
    assert all(math.isfinite(part) for part in score.values())


def test_relation_is_that_of_the_authors(golden: dict[str, Any]) -> None:
    student = torch.relu(torch.sin(0.3 * integers(4, 8, 4, 4)))
    teacher = torch.relu(torch.cos(0.2 * integers(4, 8, 4, 4)))
    exact = golden["losses"]["diswot_relation"]["value"]
    assert float(relation(student, teacher)) == pytest.approx(exact, rel=2e-4)
    assert exact == -golden["losses"]["sp"]["value"]  # it is the negative of similarity preserving


def test_semantic_is_that_of_the_authors(golden: dict[str, Any]) -> None:
    student, teacher = torch.sin(0.2 * integers(6, 8)), torch.cos(0.3 * integers(6, 8))
    exact = golden["losses"]["diswot_semantic"]["value"]
    assert float(semantic(student, teacher)) == pytest.approx(exact, rel=1e-6)


def test_the_classifiers_gradient_is_that_of_autograd() -> None:
    classifier = nn.Linear(12, 4)
    embedding = outputs(1).embedding
    assert embedding is not None
    logits = classifier(embedding)
    (exact,) = torch.autograd.grad(F.cross_entropy(logits, LABELS), classifier.weight)
    torch.testing.assert_close(classifier_gradient(logits.detach(), embedding, LABELS), exact)


def test_a_projection_to_equal_widths_is_fixed_and_keeps_inner_products() -> None:
    wide = torch.randn(64, 400, generator=torch.Generator().manual_seed(0))
    narrow = to_width(wide, 300)
    assert torch.equal(narrow, to_width(wide, 300))
    assert to_width(wide, 400) is wide
    assert float(narrow.square().sum() / wide.square().sum()) == pytest.approx(1, abs=0.05)


def test_taps_are_the_classifiers_input_and_the_last_map() -> None:
    body = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(body, nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 4))
    inputs = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        found = tapped_forward(model, inputs, 4)
    assert found.embedding is not None
    assert found.features is not None
    assert found.embedding.shape == (3, 9)
    assert found.features.shape == (3, 6, 6, 6)
    assert all(not module._forward_hooks for module in model.modules())


def test_a_convolutional_head_gives_logits_and_no_embedding() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        found = tapped_forward(model, torch.randn(3, 1, 8, 8), 4)
    assert found.logits.shape == (3, 4)
    assert found.embedding is None


def test_an_unknown_score_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError) as caught:
        proxy("diswott")
    assert caught.value.hint == "did you mean 'diswot'?"
