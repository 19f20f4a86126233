"""What the memory banks and negatives of CRD promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from example_outputs import LABELS, SAMPLES, batch, built, cnn, context, value

from edgekd.distillers import Setting, methods
from edgekd.distillers.crd import Crd, nce_loss
from edgekd.errors import UsageError
from edgekd.nets import Outputs


def crd(**options: Any) -> tuple[Crd, Outputs, Outputs]:
    student, teacher = cnn((8,), (4,), 0), cnn((12,), (4,), 1)
    return built("crd", student, teacher, **options), student, teacher


def test_crd_is_the_published_contrast() -> None:
    """Probabilities over (probabilities + K / n), both ways, as the authors write it (without their 1e-7)."""
    method, student, teacher = crd(negatives=7, width=16)
    banks = method.banks.clone()
    picked = torch.cat([batch().index[:, None], method.draw(batch().index, context().generator)], 1)
    assert student.embedding is not None
    assert teacher.embedding is not None
    expected = 0.0
    for projected, bank in (
        (method.project_student(student.embedding), banks[1]),
        (method.project_teacher(teacher.embedding), banks[0]),
    ):
        anchor = projected / projected.norm(dim=1, keepdim=True)
        scores = torch.exp(torch.einsum("nkd,nd->nk", bank[picked], anchor) / 0.07)
        p = scores / (scores.mean() * SAMPLES)
        right, wrong = p[:, 0], p[:, 1:]
        terms = (right / (right + 7 / SAMPLES)).log() + (7 / SAMPLES / (wrong + 7 / SAMPLES)).log().sum(1)
        expected -= float(terms.mean().detach())
    assert float(value(method, student, teacher).detach()) == pytest.approx(expected, rel=1e-5)


def test_crd_draws_negatives_of_other_classes_only() -> None:
    method, *_ = crd(negatives=SAMPLES)
    index = torch.arange(SAMPLES)
    drawn_ = torch.cat([method.draw(index, context(seed=seed).generator) for seed in range(50)], 1)
    assert drawn_.shape == (SAMPLES, 50 * SAMPLES)
    for sample in range(SAMPLES):
        same = (LABELS[sample] == LABELS).nonzero()[:, 0].tolist() if LABELS[sample] >= 0 else [sample]
        assert set(drawn_[sample].tolist()) == set(range(SAMPLES)) - set(same)


def test_crd_draws_among_all_others_where_there_is_one_class() -> None:
    student, teacher = cnn((8,), (4,), 0), cnn((12,), (4,), 1)
    (method,) = methods("crd")
    assert isinstance(method, Crd)
    method.build(student, teacher, Setting(3, 1, torch.zeros(3, dtype=torch.int64), seed=0))
    picked = method.draw(torch.arange(3), context().generator)
    assert not (picked == torch.arange(3)[:, None]).any()


def test_crd_refuses_a_single_sample() -> None:
    with pytest.raises(UsageError, match="two or more"):
        Crd().build(
            cnn((8,), (4,), 0), cnn((8,), (4,), 1), Setting(1, 6, torch.zeros(1, dtype=torch.int64), 0)
        )


def test_crd_keeps_a_bank_by_sample_number() -> None:
    method, student, teacher = crd(momentum=0.25)
    before = method.banks.clone()
    index = (7, 2, 11, 4)
    method(student, teacher, batch(index), context())
    assert student.embedding is not None
    new = F.normalize(method.project_student(student.embedding), dim=1)
    for row, sample in enumerate(index):
        moved = F.normalize(0.25 * before[0, sample] + 0.75 * new[row], dim=0)
        assert torch.allclose(method.banks[0, sample], moved, atol=1e-6)
    others = [sample for sample in range(SAMPLES) if sample not in index]
    assert torch.equal(method.banks[:, others], before[:, others])


def test_crd_goes_on_from_a_checkpoint() -> None:
    method, student, teacher = crd()
    value(method, student, teacher)
    assert torch.isfinite(method.log_normalisers).all()
    resumed, *_ = crd()
    resumed.load_state_dict(method.state_dict())
    assert torch.equal(value(method, student, teacher), value(resumed, student, teacher))
    assert torch.equal(method.banks, resumed.banks)


def test_crd_sets_its_normaliser_once() -> None:
    method, student, teacher = crd()
    value(method, student, teacher)
    first = method.log_normalisers.clone()
    method(cnn((8,), (4,), 5), cnn((12,), (4,), 6), batch((4, 5, 6, 7)), context(seed=9))
    assert torch.equal(method.log_normalisers, first)


def test_crd_contrast_falls_when_the_positive_is_nearer() -> None:
    scores = torch.zeros(2, 5)
    nearer = scores.clone()
    nearer[:, 0] = 3.0
    assert float(nce_loss(nearer, torch.zeros(()), 10)) < float(nce_loss(scores, torch.zeros(()), 10))
