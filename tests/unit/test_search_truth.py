"""The networks that scores are judged on are those that were trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from edgekd.nets import count_macs, count_parameters
from edgekd.probing import initialise
from edgekd.proxies import Trial, proxy, proxy_class, proxy_names
from edgekd.spaces import search_space
from edgekd.spaces.nb201 import architecture
from edgekd.spec import ModelSpec, Preprocessing

TOOLS = Path(__file__).parents[2] / "tools" / "bench"
LARGEST = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|nor_conv_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|"
DEAD = "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|"
PARTLY = "|nor_conv_3x3~0|+|none~0|none~1|+|skip_connect~0|avg_pool_3x3~1|nor_conv_1x1~2|"


@pytest.fixture(scope="module")
def truth() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TOOLS)
        import search_truth

        yield search_truth


def test_the_largest_cell_has_the_published_costs(truth: ModuleType) -> None:
    model = truth.nb201_network(LARGEST, 10)
    assert count_parameters(model) == 1_531_546
    assert count_macs(model, (3, 32, 32)) == 220_119_680


def test_dead_branches_are_not_among_the_live_macs(truth: ModuleType) -> None:
    """Node 2 of `PARTLY` is zero, so its 1x1 convolution to the output counts for nothing; the 3x3 lives."""
    model = truth.nb201_network(PARTLY, 10)
    trial = Trial(model, torch.zeros(1, 3, 32, 32), classes=10)
    raw, live = (proxy(name).measure(trial)[name] for name in ("macs", "live-macs"))
    assert raw - live == 5 * sum(width**2 * size**2 for width, size in ((16, 32), (32, 16), (64, 8)))


@pytest.mark.parametrize("name", [n for n in proxy_names() if "teacher" not in proxy_class(n).needs])
def test_a_cell_of_zeros_has_a_finite_score(name: str, truth: ModuleType) -> None:
    model = initialise(truth.nb201_network(DEAD, 10), torch.Generator().manual_seed(0), "kaiming")
    trial = Trial(model, torch.randn(8, 3, 16, 16), torch.arange(8), classes=10)
    assert all(math.isfinite(value) for value in proxy(name).measure(trial).values())


def test_a_code_of_depths_is_a_cifar_resnet(truth: ModuleType) -> None:
    """Of three blocks a stage: ResNet-20 with 1x1 convolutions as shortcuts."""
    model = truth.cifar_resnet("333")
    convolutions = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    assert convolutions == 432 + 6 * 2304 + (4608 + 5 * 9216 + 512) + (18432 + 5 * 36864 + 2048)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_the_space_keeps_exactly_the_live_part_of_a_cell(seed: int, truth: ModuleType) -> None:
    spec = ModelSpec(Preprocessing(32, 32, "rgb", (0.0,) * 3, (1.0,) * 3), ("a", "b"))
    space = search_space("nb201", spec, 8, (3,))
    genome = tuple(int(gene) for gene in np.random.default_rng(seed).integers(0, 5, 6))
    whole = initialise(
        truth.nb201_network(architecture(genome), 2), torch.Generator().manual_seed(0), "kaiming"
    )
    found = proxy("live-macs").measure(Trial(whole, torch.zeros(1, 3, 32, 32), classes=2))
    norm = next(layer for layer in space.layers(genome) if layer.groups == layer.channels_in == 64)
    assert sum(layer.macs for layer in space.layers(genome)) - norm.macs == found["live-macs"]


def test_the_resnets_of_the_table_are_those_of_the_space(truth: ModuleType) -> None:
    spec = ModelSpec(Preprocessing(32, 32, "rgb", (0.0,) * 3, (1.0,) * 3), tuple(map(str, range(100))))
    space = search_space("cifar-resnet", spec, 8, (3,))
    for code, genome in (("111", (0, 0, 0)), ("375", (1, 3, 2))):
        built = space.build(genome, torch.Generator())
        assert count_parameters(built) == count_parameters(truth.cifar_resnet(code))
