"""MCMI: the authors' values, and what a teacher knows within a class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distillers import Context
from edgekd.nets import Batch, Outputs
from edgekd.stages.preparation import Mcmi, class_centroids, conditional_information

NUMBERS = torch.arange(1, 25, dtype=torch.float64).reshape(4, 6)
LOGITS = {"mcmi_lam0.25": 3 * torch.cos(0.5 * NUMBERS), "mcmi_lam0.25_zs": 2 * torch.sin(0.7 * NUMBERS)}
LABELS = torch.tensor([0, 3, 5, 2])


def loss(logits: Tensor, centroids: Tensor, weight: float) -> Tensor:
    """As the loop puts it together: cross-entropy and the weighted term."""
    method = Mcmi(centroids, weight)
    batch = Batch(torch.zeros(4, 3), LABELS, torch.arange(4))
    moment = torch.zeros(())
    context = Context(moment, moment, 1, 1, torch.Generator())
    term = method(Outputs(logits), Outputs(torch.zeros(4, 1)), batch, context)
    total: Tensor = method.hard_weight * F.cross_entropy(logits, LABELS) + method.weight * term
    return total


@pytest.mark.parametrize("name", LOGITS)
def test_the_loss_has_the_authors_value(golden: dict[str, Any], name: str) -> None:
    entry = golden["losses"][name]
    centroids = torch.softmax(torch.sin(0.4 * torch.arange(1, 37, dtype=torch.float64).reshape(6, 6)), 1)
    logits = LOGITS[name].clone().requires_grad_()
    found = loss(logits, centroids, entry["params"]["lam"])
    assert found.item() == pytest.approx(entry["value"], rel=1e-6)
    if "grad_l2" in entry:
        (gradient,) = torch.autograd.grad(found, logits)
        assert float(gradient.norm()) == pytest.approx(entry["grad_l2"]["zt"], rel=1e-6)


def test_a_centroid_is_the_mean_of_its_class_and_unlabelled_samples_have_no_part() -> None:
    logits = torch.log(torch.tensor([[0.8, 0.1, 0.1], [0.6, 0.2, 0.2], [0.1, 0.1, 0.8], [0.3, 0.4, 0.3]]))
    labels = torch.tensor([0, 0, 2, -1])
    centroids = class_centroids(logits, labels)
    assert centroids[0].tolist() == pytest.approx([0.7, 0.15, 0.15])
    assert centroids[1].tolist() == pytest.approx([1 / 3] * 3)
    assert centroids[2].tolist() == pytest.approx([0.1, 0.1, 0.8])
    by_hand = (
        0.8 * torch.log(torch.tensor(0.8 / 0.7)) + 0.2 * torch.log(torch.tensor(0.1 / 0.15))
        + 0.6 * torch.log(torch.tensor(0.6 / 0.7)) + 0.4 * torch.log(torch.tensor(0.2 / 0.15))
    ) / 3  # fmt: skip
    assert float(conditional_information(logits, labels, centroids)) == pytest.approx(
        float(by_hand), rel=1e-4
    )


def test_what_says_the_same_of_a_whole_class_has_no_information_within_it() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [-1.0, 1.0], [-1.0, 1.0]])
    assert float(conditional_information(logits, labels, class_centroids(logits, labels))) < 1e-6


def test_a_saturated_teacher_and_no_label_at_all_stay_finite() -> None:
    logits = 1000 * torch.eye(3)
    centroids = class_centroids(logits, torch.tensor([0, 1, 2]))
    swapped = conditional_information(logits, torch.tensor([1, 2, 0]), centroids)
    assert bool(torch.isfinite(swapped))
    assert float(conditional_information(logits, torch.tensor([-1, -1, -1]), centroids)) == 0.0
