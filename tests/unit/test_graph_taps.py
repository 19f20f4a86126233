"""Taps of a captured graph are those of the network, and of a quantized one what its layers read."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_taps import CLASSES, ResNet
from torch import Tensor, fx, nn

from edgekd.errors import UnsupportedModelError, UsageError
from edgekd.graph_taps import TappedGraph
from edgekd.layout import Layout, find_layout
from edgekd.nets import evaluate
from edgekd.quantize.capture import capture
from edgekd.quantize.fakequant import calibrate, find_sites, insert
from edgekd.quantize.quantizers import ActivationQuantizer
from edgekd.quantize.scheme import QuantScheme
from edgekd.recipe import load_recipe
from edgekd.stages.curriculum import check_curriculum
from edgekd.taps import Tapped

EVERYTHING = ["logits", "embedding", "features", "stages", "preactivations"]
SCHEME = QuantScheme("s8", symmetric=True, weight_max=127, quantize_output=False)


def inputs(count: int = 6) -> Tensor:
    return torch.randn(count, 3, 24, 24, generator=torch.Generator().manual_seed(1))


def network(rectify: Callable[[Tensor], Tensor]) -> tuple[nn.Module, Layout, fx.GraphModule]:
    torch.manual_seed(0)
    model = ResNet(rectify).eval()
    layout = find_layout(model, inputs(2), CLASSES)
    return model, layout, capture(model, (3, 24, 24))


def in_place(x: Tensor) -> Tensor:
    return F.relu(x, inplace=True)


@pytest.mark.parametrize("rectify", [torch.relu, in_place, F.relu6, F.hardswish])
def test_a_captured_graph_shows_what_the_network_shows(rectify: Callable[[Tensor], Tensor]) -> None:
    model, layout, graph = network(rectify)
    with torch.no_grad():
        expected = Tapped(model, layout, EVERYTHING)(inputs())
        got = TappedGraph(graph, layout, EVERYTHING)(inputs())
    assert len(got.stages) == len(expected.stages) == 3
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.embedding, expected.embedding, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.stages, expected.stages, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(got.preactivations, expected.preactivations, atol=1e-5, rtol=1e-4)


def test_of_a_quantized_graph_the_taps_lie_on_the_grids_and_training_them_trains_it() -> None:
    _, layout, graph = network(torch.relu)
    sites = find_sites(graph, SCHEME)
    made = insert(graph, sites, calibrate(graph, sites, [inputs(32)], SCHEME, "min-max"), SCHEME).eval()
    tapped = TappedGraph(made, layout, EVERYTHING)
    with torch.no_grad():
        outputs = tapped.eval()(inputs())
    torch.testing.assert_close(outputs.logits, evaluate(made, inputs()))
    steps = [module.grid().scale for module in made.modules() if isinstance(module, ActivationQuantizer)]
    for tap in (*outputs.stages, outputs.embedding):
        codes = [tap / scale for scale in steps]
        assert any((code - code.round()).abs().max() < 1e-3 for code in codes)
    before = {name: value.clone() for name, value in made.named_parameters()}
    tapped.train()
    tapped(inputs()).stages[0].square().mean().backward()
    torch.optim.SGD(tapped.parameters(), 1.0).step()
    moved = {name for name, value in made.named_parameters() if not torch.equal(value, before[name])}
    assert "stem.weight" in moved and "fc.weight" not in moved
    assert tapped.deploy() is made and not made.training


def test_a_module_that_left_nothing_in_the_graph_is_named() -> None:
    _, layout, graph = network(torch.relu)
    lost = Layout(layout.classifier, ("layer1", "missing"), (), layout.shapes)
    with pytest.raises(UnsupportedModelError, match="'missing'"):
        TappedGraph(graph, lost, ["stages"])


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"quantize.method": "simkd"}, "'simkd' changes the network"),
        ({"quantize.method": "fitnett"}, "fitnett"),
        ({"quantize.method": "fitnet", "teacher.source": "t.onnx"}, "'fitnet' needs the teacher's"),
        ({"quantize.options": {"kd": {"temperature": 2.0}}}, "quantize.method is not set"),
        ({"quantize.method": "dkd", "quantize.options": {"kd": {}}}, "the method is 'dkd'"),
    ],
)
def test_a_method_that_cannot_teach_a_quantized_student_is_refused_at_the_start(
    settings: dict[str, object], told: str
) -> None:
    with pytest.raises(UsageError, match=told):
        check_curriculum(load_recipe(None, dict(settings)))
