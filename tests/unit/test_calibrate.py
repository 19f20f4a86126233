"""The line from layers measured alone to networks, and what is drawn and written for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from edgekd.backends import backend
from edgekd.cost import Line, layer_key
from edgekd.layer_files import input_of, one_layer
from edgekd.ranking import Values
from edgekd.spaces import search_space
from edgekd.spec import LayerShape, ModelSpec, Preprocessing
from edgekd.stages.calibrate import Wanted, drawn, fit
from edgekd.stages.untrained import write_network
from edgekd.target import find_target

SPEC = ModelSpec(Preprocessing(16, 16, "rgb", (0.5,) * 3, (0.5,) * 3), ("a", "b"))


def features(count: int) -> Values:
    """Rows of `Line.features`: sums, ones, parameters, minus values that cross borders, of that attention."""
    rng = np.random.default_rng(0)
    sums = rng.uniform(0.1, 5, count)
    weights, values = rng.uniform(1e4, 1e6, (2, count))
    return np.stack([sums, np.ones(count), weights, -values, sums * rng.uniform(0, 0.4, count)], 1)


def test_a_line_without_noise_is_found() -> None:
    rows, exact = features(10), Line(0.2, slope=1.2, border_ms=1e-7, weight_ms=3e-7, attention=0.5)
    assert fit(rows, rows @ exact.coefficients).coefficients == pytest.approx(exact.coefficients)


def test_without_attention_its_slope_is_zero() -> None:
    rows, exact = features(10) * [1, 1, 1, 1, 0], Line(0.2, slope=1.2, border_ms=1e-7, weight_ms=3e-7)
    assert fit(rows, rows @ exact.coefficients).coefficients == pytest.approx(exact.coefficients)


def test_a_coefficient_that_would_be_negative_is_left_out() -> None:
    rows = features(10)
    found = fit(rows, rows @ [1.2, -0.05, 3e-7, 0.0, 0.0])
    assert found.offset_ms == 0.0
    assert min(found.slope, found.weight_ms, found.border_ms) >= 0
    assert found.slope == pytest.approx(1.2, rel=0.15)


def test_few_networks_fit_few_coefficients() -> None:
    rows = features(4)
    found = fit(rows, rows @ [1.2, 0.3, 3e-7, 1e-7, 0.1])
    assert (found.border_ms, found.weight_ms, found.attention) == (0.0, 0.0, 0.0)


def test_draws_differ_repeat_and_cover_small_and_large() -> None:
    choices = (4, 1, 5, 3, 3)
    first = drawn(choices, 40, 0)
    assert first == drawn(choices, 40, 0)
    assert len(set(first)) == 40
    assert first != drawn(choices, 40, 1)
    assert all(gene < options for genome in first for gene, options in zip(genome, choices, strict=True))
    sizes = [sum(genome) for genome in first]
    assert min(sizes) <= 2
    assert max(sizes) >= 9
    assert sorted(drawn((2, 2), 40, 0)) == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtypes"),
    [("x86-avx2", {"UINT8"}), ("x86", {"UINT8", "INT8"}), ("rpi5", {"INT8"}), ("jetson", {"INT8"})],
)
def test_an_int8_network_is_quantized_for_its_target(name: str, dtypes: set[str], tmp_path: Path) -> None:
    """As the file of a trained student is: OpenVINO's has zero points of 0 where a grid is even."""
    target, path = find_target(name), tmp_path / "net.onnx"
    space = search_space("repvgg", SPEC, 8, (3,), ())
    network = space.build(tuple(0 for _ in space.choices), torch.Generator().manual_seed(0))
    write_network(network, target, SPEC, "int8", path)
    graph = onnx.load(path).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert kinds["QuantizeLinear"] > kinds["Conv"] > 0
    zeros = {node.input[2] for node in graph.node if node.op_type == "QuantizeLinear"}
    types = {
        onnx.TensorProto.DataType.Name(value.data_type) for value in graph.initializer if value.name in zeros
    }
    assert types == dtypes
    logits = backend("onnxruntime").open(path).run(np.zeros((1, *SPEC.input_shape), np.float32))
    assert logits.shape == (1, 2)


@pytest.mark.slow
def test_a_network_is_written_with_maps_as_after_training(tmp_path: Path) -> None:
    """Large maps saturate attention, whose denormal shares take processors many times as long."""
    space = search_space("hybrid", SPEC, 8, (3,), ())
    network = space.build(tuple(min(1, n - 1) for n in space.choices), torch.Generator().manual_seed(0))
    write_network(network, find_target("x86"), SPEC, "fp32", tmp_path / "net.onnx")
    spreads: list[float] = []
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, __, made: spreads.append(float(made.std())))
    images = torch.randn(64, *SPEC.input_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        network.eval()(images)
    assert len(spreads) > 15
    assert min(spreads) > 0.7
    assert max(spreads) < 2.5


@pytest.mark.parametrize("codes", [None, np.uint8(0), np.int8(-128)])
def test_attention_alone_takes_and_gives_what_it_does_in_a_network(codes: np.generic | None) -> None:
    layer = LayerShape("attention", 8, 8, groups=2, size_in=4)
    kind, shape = input_of(layer, codes)
    graph = onnx.load_from_string(one_layer(layer, codes)).graph
    kinds = Counter(node.op_type for node in graph.node)
    assert (kind, shape) == ("float32" if codes is None else codes.dtype.name, (1, 8, 4, 4))
    converted = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    assert (converted >= {"q", "k", "v"}, kinds["QuantizeLinear"]) == (codes is not None, codes is not None)
    assert (kinds["MatMul"], kinds["Softmax"]) == (2, 1)


def test_the_default_number_of_students_shows_nearly_all_layers_of_a_space() -> None:
    spec = ModelSpec(Preprocessing(32, 32, "rgb", (0.5,) * 3, (0.5,) * 3), ("a", "b"))
    space = search_space("mobile-cnn", spec, 8, (3, 5))

    def layers_of(genomes: Iterable[tuple[int, ...]]) -> set[str]:
        shapes = (layer for genome in genomes for layer in space.layers(genome))
        return {layer_key(layer) for layer in shapes}

    table = layers_of(drawn(space.choices, Wanted("mobile-cnn", spec, "int8").candidates, 0))
    rng = np.random.default_rng(1)
    met = [layers_of([tuple(int(rng.integers(n)) for n in space.choices)]) for _ in range(200)]
    lacking = sum(len(each - table) for each in met) / sum(map(len, met))
    assert lacking < 0.01
