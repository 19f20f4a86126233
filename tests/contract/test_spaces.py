"""Every search space: what it says about a student is what the student is, and each one can be shipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd import export
from edgekd.backends import backend
from edgekd.blocks import Reparameterised, deployed
from edgekd.errors import UsageError
from edgekd.nets import count_macs, tapped_forward
from edgekd.quantize.capture import capture
from edgekd.quantize.fakequant import calibrate, find_sites, insert, parameters_of
from edgekd.quantize.lower import FORMS, lower
from edgekd.quantize.scheme import scheme_for
from edgekd.spaces import Genome, SearchSpace, search_space, space_names
from edgekd.spec import ModelSpec, Preprocessing
from edgekd.target import find_target
from edgekd.tasks.classification import top1_agreement
from edgekd.train import evaluate

CLASSES = ("ant", "bee", "cat", "dog", "elk")
INPUTS = [(28, "grey"), (32, "rgb"), (64, "rgb"), (224, "rgb")]
NAMES = space_names()


def spec_of(size: int, color: str) -> ModelSpec:
    channels = 1 if color == "grey" else 3
    return ModelSpec(Preprocessing(size, size, color, (0.0,) * channels, (1.0,) * channels), CLASSES)


def space_of(name: str, size: int, color: str, multiple: int = 8) -> SearchSpace:
    return search_space(name, spec_of(size, color), multiple, (3, 5))


def genomes(space: SearchSpace, count: int, seed: int = 0) -> list[Genome]:
    """The smallest, the largest, and `count` at random."""
    rng = np.random.default_rng(seed)
    drawn = [tuple(int(rng.integers(0, options)) for options in space.choices) for _ in range(count)]
    return [tuple(0 for _ in space.choices), tuple(options - 1 for options in space.choices), *drawn]


def build(space: SearchSpace, genome: Genome, seed: int = 0) -> nn.Module:
    return space.build(genome, torch.Generator().manual_seed(seed))


def folded_parameters(model: nn.Module) -> int:
    """Weights, and one bias an output channel, of every convolution and linear layer."""
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return sum(layer.weight.numel() + len(layer.weight) for layer in layers)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("size", "color"), INPUTS)
def test_a_student_gives_logits_embedding_and_features(name: str, size: int, color: str) -> None:
    space = space_of(name, size, color)
    for genome in genomes(space, 2)[:: 1 if size < 100 else 3]:
        model = build(space, genome).eval()
        with torch.inference_mode():
            found = tapped_forward(model, torch.randn(2, *spec_of(size, color).input_shape), len(CLASSES))
        assert found.logits.shape == (2, len(CLASSES))
        assert torch.isfinite(found.logits).all()
        assert found.embedding is not None
        assert found.features is not None


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("size", "color"), INPUTS)
def test_the_stated_layers_have_the_costs_of_the_network(name: str, size: int, color: str) -> None:
    space = space_of(name, size, color)
    for genome in genomes(space, 2 if size < 100 else 0):
        model, layers = deployed(build(space, genome)), space.layers(genome)
        assert sum(layer.macs for layer in layers) == count_macs(model, spec_of(size, color).input_shape)
        assert sum(layer.parameters for layer in layers) == folded_parameters(model)


@pytest.mark.parametrize("name", NAMES)
def test_the_stated_layers_are_those_that_run_in_their_order(name: str) -> None:
    space = space_of(name, 32, "rgb")
    for genome in genomes(space, 3):
        ran: list[tuple[int, int, int, int, int, int]] = []

        def note(module: nn.Module, args: tuple[Tensor], _: object, ran: list[Any] = ran) -> None:
            if isinstance(module, nn.Conv2d):
                kernel, stride = module.kernel_size[0], module.stride[0]
                shape = (module.in_channels, module.out_channels, kernel, stride, module.groups)
                ran.append((*shape, args[0].shape[-1]))

        model = deployed(build(space, genome)).eval()
        for module in model.modules():
            module.register_forward_hook(note)
        with torch.inference_mode():
            model(torch.zeros(1, 3, 32, 32))
        stated = [
            (layer.channels_in, layer.channels_out, layer.kernel, layer.stride, layer.groups, layer.size_in)
            for layer in space.layers(genome)
            if layer.op == "conv"
        ]
        assert stated == ran


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("size", "color"), INPUTS)
def test_widths_are_multiples_of_the_cards(name: str, size: int, color: str) -> None:
    for multiple in (8, 32):
        space = space_of(name, size, color, multiple)
        for genome in genomes(space, 20):
            widths = {layer.channels_out for layer in space.layers(genome) if layer.op == "conv"}
            assert all(width % multiple == 0 for width in widths)


@pytest.mark.parametrize("name", NAMES)
def test_kernels_are_those_of_the_card(name: str) -> None:
    space = search_space(name, spec_of(32, "rgb"), 8, (3,))
    kernels = {layer.kernel for g in genomes(space, 20) for layer in space.layers(g) if layer.op == "conv"}
    assert kernels <= {1, 3}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("size", "color"), INPUTS)
def test_a_student_is_described_line_by_line(name: str, size: int, color: str) -> None:
    space = space_of(name, size, color)
    for genome in genomes(space, 5):
        lines = space.describe(genome)
        assert len(lines) >= 3
        assert all(line and "\n" not in line for line in lines)
        assert str(len(CLASSES)) in lines[-1]


@pytest.mark.parametrize("name", NAMES)
def test_weights_depend_on_the_generator_and_on_nothing_else(name: str) -> None:
    space = space_of(name, 28, "grey")
    genome = genomes(space, 1)[-1]
    torch.manual_seed(1)
    first = build(space, genome).state_dict()
    torch.manual_seed(2)
    again, other = build(space, genome).state_dict(), build(space, genome, seed=5).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_deployed_form_computes_what_the_trained_one_does(name: str) -> None:
    space, inputs = space_of(name, 32, "rgb"), torch.randn(16, 3, 32, 32)
    for genome in genomes(space, 1)[::2]:  # the smallest, and one at random
        trained = _settled(space, genome, inputs)
        expected = evaluate(trained, inputs)
        shipped = deployed(trained)
        assert not any(isinstance(module, Reparameterised) for module in shipped.modules())
        torch.testing.assert_close(evaluate(shipped, inputs), expected, rtol=1e-3, atol=1e-3)


def test_a_space_whose_convolutions_the_card_forbids_is_refused() -> None:
    for name, kernels, forbidden in (
        ("inverted-residual", (3,), ("depthwise",)), ("hybrid", (3,), ("depthwise",)), ("repvgg", (5,), ()),
    ):  # fmt: skip
        with pytest.raises(UsageError) as caught:
            search_space(name, spec_of(32, "rgb"), 8, kernels, forbidden)
        assert (forbidden or ("3x3",))[0] in caught.value.message
        assert "mobile-cnn" in caught.value.hint


def test_a_card_without_depthwise_convolutions_gets_students_without() -> None:
    space = search_space("mobile-cnn", spec_of(32, "rgb"), 8, (3, 5), ("depthwise",))
    assert all(layer.groups == 1 for genome in genomes(space, 20) for layer in space.layers(genome))


def _settled(space: SearchSpace, genome: Genome, inputs: Tensor) -> nn.Module:
    """A student with batch statistics of `inputs` and logits that are far apart, as after training."""
    model = build(space, genome).train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the mean over all batches
        for part in torch.split(inputs, 16):
            model(part)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(50)
                module.bias.copy_(torch.arange(float(len(module.bias))))
    return model.eval()


@pytest.mark.backends
@pytest.mark.parametrize(
    ("name", "size", "color", "seed"),
    [(name, *how) for name in NAMES for how in ((28, "grey", 1), (32, "rgb", 5))]
    + [("nb201, no edge", 28, "grey", 1)],
)
def test_a_student_can_be_exported_and_quantized_for_every_dialect(
    name: str, size: int, color: str, seed: int, tmp_path: Path
) -> None:
    name, _, edgeless = name.partition(", ")
    space, spec = space_of(name, size, color), spec_of(size, color)
    genome = (0,) * 6 if edgeless else genomes(space, 1, seed)[-1]
    coarse = torch.randn(64, spec.input_shape[0], 4, 4, generator=torch.Generator().manual_seed(seed))
    inputs = F.interpolate(coarse, size=size)
    model = deployed(_settled(space, genome, inputs[:32]))
    graph = capture(model, spec.input_shape)
    float_model = export.to_onnx(graph, spec)
    export.save(float_model, tmp_path / "float.onnx")
    got = backend("onnxruntime").open(tmp_path / "float.onnx").run(inputs.numpy())
    np.testing.assert_allclose(got, evaluate(model, inputs).numpy(), rtol=1e-3, atol=1e-3)
    for card in ("jetson-orin-nano-8gb", "x86-amx-server"):
        scheme = scheme_for(find_target(card))
        sites = find_sites(graph, scheme)
        grids = calibrate(graph, sites, [inputs], scheme, "mse")
        quantized = insert(graph, sites, grids, scheme).eval()
        exact = evaluate(quantized, inputs).numpy()
        for kind in FORMS:
            split = scheme.symmetric and kind == "uint8"
            lowered = lower(float_model, parameters_of(quantized, sites), sites, kind, split_relu=split)
            export.save(lowered, tmp_path / "q.onnx")
            plain = backend("onnxruntime").open(tmp_path / "q.onnx", optimize=False)  # type: ignore[call-arg]
            # The logits of an untrained network tie: one image of 64 may flip (two behind a softmax).
            got = plain.run(inputs.numpy())
            assert top1_agreement(got, exact) >= 1 - (2 if name == "hybrid" else 1) / len(exact)
            assert np.abs(got - exact).mean() <= 0.003 * np.ptp(exact)
            if kind == "openvino" and not scheme.symmetric:  # its integer kernels round elsewhere
                got = backend("openvino").open(tmp_path / "q.onnx").run(inputs.numpy())
                assert np.abs(got - exact).mean() <= 0.03 * np.ptp(exact)


def test_an_unknown_space_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError) as caught:
        search_space("mobile-cn", spec_of(28, "grey"), 8, (3,))
    assert caught.value.hint == "did you mean 'mobile-cnn'?"
