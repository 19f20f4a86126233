"""The networks that scores are judged on are those that were trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from edgekd.nets import count_macs, count_parameters
from edgekd.probing import initialise
from edgekd.proxies import Trial, proxy, proxy_class, proxy_names

TOOLS = Path(__file__).parents[2] / "tools" / "bench"
LARGEST = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|nor_conv_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|"
DEAD = "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|"
PARTLY = "|nor_conv_3x3~0|+|none~0|none~1|+|skip_connect~0|avg_pool_3x3~1|nor_conv_1x1~2|"


@pytest.fixture(scope="module")
def nb201() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        import nb201_net

        yield nb201_net


@pytest.fixture(scope="module")
def truth(nb201: ModuleType) -> ModuleType:
    import search_truth

    return search_truth


def test_the_largest_cell_has_the_published_costs(nb201: ModuleType) -> None:
    model = nb201.Nb201(LARGEST, 10)
    assert count_parameters(model) == 1_531_546
    assert count_macs(model, (3, 32, 32)) == 220_119_680


def test_dead_branches_are_not_among_the_live_macs(nb201: ModuleType) -> None:
    """Node 2 of `PARTLY` is zero, so its 1x1 convolution to the output counts for nothing; the 3x3 lives."""
    model = nb201.Nb201(PARTLY, 10)
    trial = Trial(model, torch.zeros(1, 3, 32, 32), classes=10)
    raw, live = (proxy(name).measure(trial)[name] for name in ("macs", "live-macs"))
    assert raw - live == 5 * sum(width**2 * size**2 for width, size in ((16, 32), (32, 16), (64, 8)))


@pytest.mark.parametrize("name", [n for n in proxy_names() if "teacher" not in proxy_class(n).needs])
def test_a_cell_of_zeros_has_a_finite_score(name: str, nb201: ModuleType) -> None:
    model = initialise(nb201.Nb201(DEAD, 10), torch.Generator().manual_seed(0), "kaiming")
    trial = Trial(model, torch.randn(8, 3, 16, 16), torch.arange(8), classes=10)
    assert all(math.isfinite(value) for value in proxy(name).measure(trial).values())


def test_a_code_of_depths_is_a_cifar_resnet(truth: ModuleType) -> None:
    """Of three blocks a stage: ResNet-20 with 1x1 convolutions as shortcuts."""
    model = truth.cifar_resnet("333")
    convolutions = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    assert convolutions == 432 + 6 * 2304 + (4608 + 5 * 9216 + 512) + (18432 + 5 * 36864 + 2048)
