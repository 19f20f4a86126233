"""Rounding that makes up for its errors: the blocked form computes what the paper's columns do."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from onnx import helper

from edgekd.quantize.reconstruct import _patches, _round_columns, _some

DRAW = np.random.default_rng(0)


def _by_columns(
    weights: np.ndarray, scales: np.ndarray, squares: np.ndarray, largest: int, damping: float = 0.01
) -> np.ndarray:
    """GPTQ, algorithm 1, one column after the other."""
    damped = squares.astype(np.float64) + np.diag(np.full(len(squares), damping * np.diag(squares).mean()))
    order = np.argsort(-np.diag(squares), kind="stable")
    upper = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T
    left, codes = weights[:, order].copy(), np.empty_like(weights)
    for q in range(left.shape[1]):
        codes[:, q] = np.clip(np.round(left[:, q] / scales), -largest - 1, largest)
        error = (left[:, q] - codes[:, q] * scales) / upper[q, q]
        left[:, q + 1 :] -= np.outer(error, upper[q, q + 1 :])
    back = np.empty_like(codes)
    back[:, order] = codes
    return back


@pytest.mark.parametrize("columns", [5, 128, 300])
def test_blocks_round_as_single_columns_do(columns: int) -> None:
    inputs = DRAW.normal(size=(1000, columns)).astype(np.float32) @ DRAW.normal(size=(columns, columns))
    squares = (inputs.T @ inputs / len(inputs)).astype(np.float32)
    weights = DRAW.normal(size=(16, columns))
    scales = np.abs(weights).max(1) / 7
    made = _round_columns(weights, scales, squares, 7)
    assert (made == _by_columns(weights, scales, squares, 7)).mean() > 0.99  # a tie may fall either way
    nearest = np.clip(np.round(weights / scales[:, None]), -8, 7)
    lost = [np.square(inputs @ (weights - codes * scales[:, None]).T).mean() for codes in (made, nearest)]
    assert lost[0] < 0.8 * lost[1]


@pytest.mark.parametrize(("groups", "stride", "dilation", "pads"), [(1, 1, 1, 0), (1, 2, 1, 1), (4, 1, 2, 2)])
def test_patches_are_what_a_convolution_multiplies(
    groups: int, stride: int, dilation: int, pads: int
) -> None:
    inputs = DRAW.normal(size=(2, 4, 9, 8)).astype(np.float32)
    weight = DRAW.normal(size=(8, 4 // groups, 3, 3)).astype(np.float32)
    node = helper.make_node(
        "Conv",
        ["x", "w"],
        ["y"],
        group=groups,
        strides=[stride] * 2,
        dilations=[dilation] * 2,
        pads=[pads] * 4,
    )
    exact = torch.nn.functional.conv2d(
        torch.from_numpy(inputs), torch.from_numpy(weight), None, stride, pads, dilation, groups
    ).numpy()
    found = _patches(inputs, weight, node, groups, partial(_some, 10**6, DRAW))  # (G, places, K)
    products = np.einsum("gpk,gok->pgo", found, weight.reshape(groups, 8 // groups, -1)).reshape(-1, 8)
    np.testing.assert_allclose(products, np.moveaxis(exact, 1, 3).reshape(-1, 8), rtol=1e-4, atol=1e-4)
    some = _patches(inputs, weight, node, groups, partial(_some, 5, DRAW))
    assert some.shape == (groups, 5, found.shape[2])
    assert all((found == place[:, None]).all((0, 2)).any() for place in some.transpose(1, 0, 2))
