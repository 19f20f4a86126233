"""Steps of matrices have singular values near one; everything else steps as AdamW does."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from edgekd.muon import Muon, orthogonalised
from edgekd.optimizer import make_optimizer


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 4, 36), (2, 36, 4)])
def test_singular_values_become_about_one_and_the_vectors_stay(shape: tuple[int, int, int]) -> None:
    given = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(given, full_matrices=False)
    made = orthogonalised(given)
    assert made.shape == shape
    along = left.mT @ made @ right.mT
    values = along.diagonal(dim1=1, dim2=2)
    assert float((along - torch.diag_embed(values)).abs().max()) < 1e-3
    assert float(values.min()) > 0.3  # the smallest of a square matrix needs more iterations
    assert float(values.max()) < 1.3
    assert float(values.median()) > 0.65


def test_the_scale_of_a_gradient_does_not_matter() -> None:
    given = torch.randn(1, 6, 20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(orthogonalised(1e-3 * given), orthogonalised(given), rtol=1e-3, atol=1e-4)
    assert not orthogonalised(torch.zeros(1, 6, 20)).any()  # a layer that got no gradient stays


def test_one_rate_suits_both_kinds() -> None:
    """The matrix moves by 0.2 of the rate (root mean square), after its decay; the vector as by AdamW."""
    torch.manual_seed(0)
    matrix, vector = nn.Parameter(torch.randn(16, 8, 3, 3)), nn.Parameter(torch.randn(16))
    alone = nn.Parameter(vector.detach().clone())
    rate = torch.tensor(0.01)
    optimizer = Muon(
        [
            {"params": [matrix], "lr": rate, "weight_decay": 0.5, "orthogonal": True},
            {"params": [vector], "lr": rate, "weight_decay": 0.0},
        ],
        capturable=False,
    )
    plain = torch.optim.AdamW([alone], lr=rate, weight_decay=0.0, fused=True)
    for _ in range(3):
        matrix.grad, vector.grad = torch.randn_like(matrix), torch.randn_like(vector)
        alone.grad = vector.grad.clone()
        before = matrix.detach().clone()
        optimizer.step()
        plain.step()
        moved = matrix.detach() - before * (1 - 0.01 * 0.5)
        assert float(moved.square().mean().sqrt()) == pytest.approx(0.01 * 0.2, rel=0.25)
        assert torch.equal(vector, alone)


def test_matrices_step_along_the_momentum_not_the_gradient() -> None:
    """The first step of rank one goes along its only singular pair; after many against it, it has turned."""
    parameter = nn.Parameter(torch.zeros(4, 9))
    groups = [{"params": [parameter], "lr": torch.tensor(0.1), "weight_decay": 0.0, "orthogonal": True}]
    optimizer = Muon(groups, capturable=False)
    pair = torch.outer(torch.ones(4), torch.ones(9))
    parameter.grad = pair.clone()
    optimizer.step()
    expected = -0.1 * 0.2 * math.sqrt(9) * pair / 6
    torch.testing.assert_close(parameter.detach(), expected, rtol=0.35, atol=0.0)
    assert parameter.grad is None


def test_what_mixes_channels_is_orthogonalised() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 1, 1), nn.Flatten()
    )
    groups = make_optimizer([network], "muon", 0.01, 0.2, "cpu").param_groups
    chosen = [p for group in groups if group.get("orthogonal") for p in group["params"]]
    assert [id(p) for p in chosen] == [id(network[0].weight)]
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters()))
