"""From a trained network to integer graphs: nothing is lost on the way, and what is lost is noticed."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from samples import CLASSES, SIZE, shapes, train_teacher
from torch import Tensor, fx, nn

from edgekd import export
from edgekd.backends import backend
from edgekd.errors import ParityError, RecipeError, UnsupportedModelError
from edgekd.quantize import writing
from edgekd.quantize.bias import correct_biases
from edgekd.quantize.capture import capture
from edgekd.quantize.fakequant import (
    Sites,
    activation_bits,
    calibrate,
    find_sites,
    insert,
    largest_codes,
    parameters_of,
    with_values_of,
)
from edgekd.quantize.lower import FORMS, Form, lower
from edgekd.quantize.qdq import add_pair
from edgekd.quantize.quantizers import ActivationQuantizer, WeightQuantizer, freeze_after
from edgekd.quantize.scheme import Grid, QuantScheme, scheme_for
from edgekd.quantize.spare import sensitivity_of, spare_layers
from edgekd.spec import ModelSpec, Preprocessing
from edgekd.stages.export import _check
from edgekd.stages.quantize import FILE, _save, load_quantized, rebuild
from edgekd.target import all_targets, find_target
from edgekd.train import evaluate

SPEC = ModelSpec(Preprocessing(SIZE, SIZE, "grey", (0.0,), (1.0,)), CLASSES)
SCHEMES = {
    "symmetric": QuantScheme("s8", symmetric=True, weight_max=127, quantize_output=False),
    "relu from zero": QuantScheme("u8", symmetric=False, weight_max=127, quantize_output=True),
    "reduced range": QuantScheme("u8", symmetric=False, weight_max=63, quantize_output=True),
}


class Net(nn.Module):
    """Convolutions with batch norm, a residual addition, pooling and a view before the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.body = nn.Sequential(
            nn.Conv2d(16, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 16, 3, 1, 1), nn.BatchNorm2d(16),
        )  # fmt: skip
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = torch.relu(y + self.body(y))
        logits: Tensor = self.classifier(torch.flatten(self.pool(y), 1))
        return logits


def inputs(count: int = 256) -> Tensor:
    return torch.from_numpy(shapes(count, 5)[0])[:, None].float() / 255


@dataclass
class Case:
    graph: fx.GraphModule
    onnx: onnx.ModelProto
    model: nn.Module


@pytest.fixture(scope="module")
def case() -> Case:
    torch.manual_seed(0)
    model = train_teacher(Net(), steps=100)
    graph = capture(copy.deepcopy(model), SPEC.input_shape)
    return Case(graph, export.to_onnx(graph, SPEC), model)


def quantized(case: Case, scheme: QuantScheme) -> tuple[fx.GraphModule, Sites]:
    sites = find_sites(case.graph, scheme)
    grids = calibrate(case.graph, sites, [inputs(64)], scheme, "mse")
    return insert(case.graph, sites, grids, scheme).eval(), sites


def lowered(case: Case, scheme: QuantScheme, kind: Form, split: bool = False) -> onnx.ModelProto:
    graph, sites = quantized(case, scheme)
    return lower(case.onnx, parameters_of(graph, sites), sites, kind, split_relu=split)


def run_onnx(model: onnx.ModelProto, path: Path) -> np.ndarray:
    export.save(model, path)
    return backend("onnxruntime").open(path, optimize=False).run(inputs().numpy())  # type: ignore[call-arg]


# ---------------------------------------------------------------- folding


def test_folding_batch_norm_keeps_the_logits(case: Case) -> None:
    torch.testing.assert_close(
        evaluate(case.graph, inputs()), evaluate(case.model, inputs()), rtol=1e-5, atol=1e-4
    )
    assert "batch_norm" not in str(case.graph.graph)
    assert not [name for name, _ in case.graph.named_buffers()]


def test_folding_follows_the_formula_in_double_precision() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=True), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 16, 2)
    )
    draw = torch.Generator().manual_seed(0)
    norm: Any = model[1]
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        tensor.data = torch.randn(3, generator=draw)
    norm.running_var = torch.rand(3, generator=draw) + 0.1
    model = model.eval()
    factor = (norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()).detach()
    conv: Any = model[0]
    weight = conv.weight.detach().double() * factor.view(-1, 1, 1, 1)
    bias = (conv.bias.detach().double() - norm.running_mean.double()) * factor + norm.bias.detach().double()
    graph = capture(copy.deepcopy(model), (2, 6, 6))
    found = dict(graph.named_parameters())
    (name,) = [name for name in found if name.endswith("folded_bias")]
    torch.testing.assert_close(found[name].double(), bias, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        found[name.replace("folded_bias", "weight")].double(), weight, rtol=1e-5, atol=1e-6
    )


def test_a_network_with_branches_on_values_is_refused() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :2] if x.sum() > 0 else x.flatten(1)[:, 2:4]

    with pytest.raises(UnsupportedModelError) as caught:
        capture(Branching(), (1, 4, 4))
    assert "cannot be traced" in caught.value.message


def test_a_network_without_weights_is_refused() -> None:
    graph = capture(nn.Sequential(nn.ReLU(), nn.Flatten()), (1, 4, 4))
    with pytest.raises(UnsupportedModelError, match="no convolution"):
        find_sites(graph, SCHEMES["symmetric"])


# ---------------------------------------------------------------- grids


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("grid", [Grid(0.1, 0, -128, 127), Grid(0.1, 128, 0, 255), Grid(0.1, 0, 0, 255)])
def test_moving_a_grid_keeps_its_real_values(grid: Grid, signed: bool) -> None:
    moved = grid.shifted(signed)
    assert (moved.qmin, moved.qmax) == ((-128, 127) if signed else (0, 255))

    def reals(g: Grid) -> list[float]:
        return [g.scale * (q - g.zero_point) for q in range(g.qmin, g.qmax + 1)]

    assert reals(moved) == reals(grid)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (0.0, 6.0), (-3.0, 0.5), (0.0, 0.0)])
def test_a_grid_covers_the_range_and_holds_zero(scheme: str, low: float, high: float) -> None:
    grid = SCHEMES[scheme].grid(low, high)
    ends = [grid.scale * (q - grid.zero_point) for q in (grid.qmin, grid.qmax)]
    assert ends[0] <= low + grid.scale
    assert ends[1] >= high - grid.scale
    assert grid.qmin <= grid.zero_point <= grid.qmax
    if SCHEMES[scheme].symmetric:
        assert grid.zero_point == 0
    elif low >= 0:
        assert (grid.zero_point, grid.qmin) == (0, 0)  # a ReLU is the clamp at the lower end


@pytest.mark.parametrize("name", all_targets())
def test_every_card_has_a_scheme_or_says_why_not(name: str) -> None:
    card = all_targets()[name]
    try:
        scheme = scheme_for(card)
    except RecipeError as error:
        assert name in error.message
        return
    assert scheme.dialect == card.quant.dialect
    assert scheme.weight_max == (63 if card.quant.weights.reduce_range else 127)
    assert scheme.symmetric == (card.quant.dialect == "trt-s8sym") or card.device_class != "nvidia-jetson"


def test_a_card_with_asymmetric_weights_is_refused() -> None:
    import msgspec

    card = find_target("jetson")
    weights = msgspec.structs.replace(card.quant.weights, symmetric=False)
    with pytest.raises(RecipeError) as caught:
        scheme_for(msgspec.structs.replace(card, quant=msgspec.structs.replace(card.quant, weights=weights)))
    assert "quant.weights" in caught.value.message


# ---------------------------------------------------------------- fake quantization


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_view_shares_the_grid_of_its_source(case: Case, scheme: str) -> None:
    graph, sites = quantized(case, SCHEMES[scheme])
    assert sites.same_as
    parameters = parameters_of(graph, sites)
    for view, root in sites.same_as.items():
        assert parameters.activations[view] == parameters.activations[root]
    modules = [m for m in graph.modules() if isinstance(m, ActivationQuantizer)]
    assert len(modules) == len(sites.activations) - len(sites.same_as)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_layer_reads_quantized_values_and_weights(case: Case, scheme: str) -> None:
    graph, sites = quantized(case, SCHEMES[scheme])
    layers = [n for n in graph.graph.nodes if str(n.target) in ("aten.conv2d.default", "aten.linear.default")]
    assert len(layers) == len(sites.weights) == 4
    for layer in layers:
        assert [node.op for node in layer.args[:2]] == ["call_module", "call_module"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_and_evaluation_round_alike(case: Case, scheme: str) -> None:
    graph, _ = quantized(case, SCHEMES[scheme])
    with torch.no_grad():
        trained, evaluated = graph.train()(inputs(64)), graph.eval()(inputs(64))
    torch.testing.assert_close(trained, evaluated, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scale_learns(case: Case, scheme: str) -> None:
    graph, _ = quantized(case, SCHEMES[scheme])
    graph.train()(inputs(64)).square().mean().backward()
    scales = {name: p for name, p in graph.named_parameters() if name.endswith("log_scale")}
    assert scales
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in scales.values())


@pytest.mark.parametrize("weight_max", [63, 127])
def test_weight_codes_stay_within_their_bound(weight_max: int) -> None:
    weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    made = WeightQuantizer(weight, weight_max).eval()
    made.requires_grad_(False)
    scales = made.log_scale.exp().view(-1, 1, 1, 1)
    codes = made(weight) / scales
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
    assert codes.abs().flatten(1).amax(1).round().tolist() == [weight_max] * 5
    assert (made(100 * weight) / scales).max().round() == weight_max


def test_calibration_does_not_depend_on_the_split_into_batches(case: Case) -> None:
    scheme = SCHEMES["relu from zero"]
    sites = find_sites(case.graph, scheme)
    whole = calibrate(case.graph, sites, [inputs(64)], scheme, "mse")
    parts = calibrate(case.graph, sites, inputs(64).split(16), scheme, "mse")
    assert whole.keys() == parts.keys() == sites.activations.keys()
    for name, grid in whole.items():
        assert parts[name].scale == pytest.approx(grid.scale, rel=1e-4)


def test_inserting_quantizers_leaves_the_float_graph_alone(case: Case) -> None:
    before = evaluate(case.graph, inputs(8))
    graph, _ = quantized(case, SCHEMES["symmetric"])
    with torch.no_grad():
        for parameter in graph.parameters():
            parameter.zero_()
    assert torch.equal(before, evaluate(case.graph, inputs(8)))


def test_quantized_parameters_are_read_back_as_written(case: Case, tmp_path: Path) -> None:
    scheme = SCHEMES["reduced range"]
    graph, sites = quantized(case, scheme)
    written = parameters_of(graph, sites)
    _save(tmp_path / "q.safetensors", written, sites, scheme)
    read, read_sites, read_scheme = load_quantized(tmp_path / "q.safetensors")
    assert (read_sites, read_scheme) == (sites, scheme)
    assert (read.activations, read.weight_bounds) == (written.activations, written.weight_bounds)
    for ours, theirs in ((read.tensors, written.tensors), (read.weight_scales, written.weight_scales)):
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


# ---------------------------------------------------------------- lowering


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", FORMS)
def test_the_integer_graph_computes_what_torch_computes(
    case: Case, scheme: str, kind: Form, tmp_path: Path
) -> None:
    exact = evaluate(quantized(case, SCHEMES[scheme])[0], inputs()).numpy()
    model = lowered(case, SCHEMES[scheme], kind)
    export.save(model, tmp_path / "q.onnx")
    found = _check(tmp_path / "q.onnx", inputs().numpy(), exact, None, 0.995)
    assert found["top1_agreement"] >= 0.995


class _Gated(nn.Module):
    """Layers a user's network may have: a gate, a concatenation, dropout, any activation."""

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), activation())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Hardsigmoid())
        self.head = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(16, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        logits: Tensor = self.head(torch.cat([y, y * self.gate(y)], 1)).mean((2, 3))
        return logits


@pytest.mark.slow
@pytest.mark.parametrize(
    "activation",
    [nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.ELU, nn.Mish],
)
def test_layers_of_other_networks_become_integers_too(activation: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = train_teacher(_Gated(activation), steps=10)
    graph = capture(model, SPEC.input_shape)
    case = Case(graph, export.to_onnx(graph, SPEC), model)
    exact = evaluate(quantized(case, SCHEMES["symmetric"])[0], inputs()).numpy()
    for kind in FORMS:
        model_of_kind = lowered(case, SCHEMES["symmetric"], kind, kind == "uint8")
        difference = np.abs(run_onnx(model_of_kind, tmp_path / f"{kind}.onnx") - exact)
        assert difference.mean() < 1e-4 * np.ptp(exact)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", FORMS)
def test_quantize_and_dequantize_nodes_are_counted(case: Case, scheme: str, kind: Form) -> None:
    _, sites = quantized(case, SCHEMES[scheme])
    nodes = [node.op_type for node in lowered(case, SCHEMES[scheme], kind).graph.node]
    pairs = len(sites.activations) - (len(sites.same_as) if kind == "openvino" else 0)
    assert nodes.count("QuantizeLinear") == pairs
    assert nodes.count("DequantizeLinear") == pairs + len(sites.weights)
    assert "BatchNormalization" not in nodes


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_are_stored_in_int8_and_biases_in_float(case: Case, scheme: str) -> None:
    stored = {
        t.name: numpy_helper.to_array(t) for t in lowered(case, SCHEMES[scheme], "int8").graph.initializer
    }
    codes = [value for name, value in stored.items() if value.dtype == np.int8 and value.ndim > 1]
    assert len(codes) == 4
    assert max(int(np.abs(value.astype(int)).max()) for value in codes) <= SCHEMES[scheme].weight_max + 1
    biases = [value for name, value in stored.items() if name.endswith("bias")]
    assert len(biases) == 4
    assert all(value.dtype == np.float32 for value in biases)


@pytest.mark.parametrize("kind", FORMS)
def test_zero_points_of_a_symmetric_scheme_are_the_middle(case: Case, kind: Form) -> None:
    stored = lowered(case, SCHEMES["symmetric"], kind).graph.initializer
    zeros = {int(numpy_helper.to_array(t)) for t in stored if t.name.endswith("_zero_point") and not t.dims}
    assert zeros == {128 if kind == "uint8" else 0}


def test_for_openvino_the_mean_is_one_node_and_grids_around_zero_have_the_zero_point_0(case: Case) -> None:
    model = lowered(case, SCHEMES["relu from zero"], "openvino")
    nodes = {node.op_type: node for node in model.graph.node}
    assert "Reshape" not in nodes and nodes["ReduceMean"].output[0] == nodes["Gemm"].input[0].removesuffix(
        "_dequantized"
    )
    stored = model.graph.initializer
    zeros = [numpy_helper.to_array(t) for t in stored if t.name.endswith("_zero_point") and not t.dims]
    assert not any(zero.any() for zero in zeros)
    assert {zero.dtype for zero in zeros} == {np.dtype(np.int8), np.dtype(np.uint8)}


def test_all_forms_hold_the_same_real_values(case: Case, tmp_path: Path) -> None:
    for scheme in SCHEMES.values():
        found = {kind: run_onnx(lowered(case, scheme, kind), tmp_path / f"{kind}.onnx") for kind in FORMS}
        assert np.array_equal(found["int8"], found["uint8"])
        off = np.abs(found["openvino"] - found["uint8"])  # a mean that is summed in another order
        assert (off > 1e-6 * np.ptp(found["uint8"])).mean() < 0.01


def test_a_second_pair_before_relu_changes_no_value(case: Case, tmp_path: Path) -> None:
    plain = lowered(case, SCHEMES["symmetric"], "uint8")
    split = lowered(case, SCHEMES["symmetric"], "uint8", split=True)
    kinds = [[node.op_type for node in model.graph.node].count("QuantizeLinear") for model in (plain, split)]
    assert kinds[1] == kinds[0] + 3  # one for each ReLU
    assert np.array_equal(run_onnx(plain, tmp_path / "a.onnx"), run_onnx(split, tmp_path / "b.onnx"))


def test_lowering_leaves_the_float_file_alone(case: Case) -> None:
    before = case.onnx.SerializeToString(deterministic=True)
    lowered(case, SCHEMES["symmetric"], "int8")
    assert case.onnx.SerializeToString(deterministic=True) == before


def _initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def _set(tensor: onnx.TensorProto, value: np.ndarray) -> None:
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))


def _forget_zero_points(model: onnx.ModelProto) -> None:
    """As if the way from int8 to uint8 moved the zero points of one side only."""
    model.graph.initializer.append(onnx.helper.make_tensor("wrong", onnx.TensorProto.UINT8, [], [120]))
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and not node.input[0].endswith("_int8"):
            node.input[2] = "wrong"


def _drop_bias(model: onnx.ModelProto) -> None:
    for tensor in model.graph.initializer:
        if tensor.name.endswith("bias"):
            _set(tensor, np.zeros_like(numpy_helper.to_array(tensor)))


def _double_a_scale(model: onnx.ModelProto) -> None:
    name = next(t.name for t in model.graph.initializer if t.name.endswith("weight_scale"))
    tensor = _initializer(model, name)
    _set(tensor, 2 * numpy_helper.to_array(tensor))


@pytest.mark.parametrize("fault", [_forget_zero_points, _drop_bias, _double_a_scale])
def test_a_wrong_number_in_the_file_is_noticed(case: Case, fault: object, tmp_path: Path) -> None:
    exact = evaluate(quantized(case, SCHEMES["symmetric"])[0], inputs()).numpy()
    model = lowered(case, SCHEMES["symmetric"], "uint8")
    fault(model)  # type: ignore[operator]
    export.save(model, tmp_path / "q.onnx")
    with pytest.raises(ParityError) as caught:
        _check(tmp_path / "q.onnx", inputs().numpy(), exact, None, 0.995)
    assert "q.onnx does not compute what the torch model computes" in caught.value.message
    assert caught.value.exit_code == 15


def test_a_wrong_number_in_the_float_file_is_noticed(case: Case, tmp_path: Path) -> None:
    model = copy.deepcopy(case.onnx)
    tensor = next(t for t in model.graph.initializer if t.name.endswith("bias"))
    _set(tensor, numpy_helper.to_array(tensor) + np.float32(0.05))
    export.save(model, tmp_path / "float.onnx")
    with pytest.raises(ParityError):
        _check(tmp_path / "float.onnx", inputs().numpy(), evaluate(case.graph, inputs()).numpy(), 1e-3, 0.999)


def test_a_lost_pair_is_noticed(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    real = add_pair
    calls: list[str] = []

    def forgetful(graph: onnx.GraphProto, source: str, dequantized: str, *how: Any) -> None:
        calls.append(source)
        if len(calls) != 2:
            real(graph, source, dequantized, *how)
        else:
            graph.node.append(onnx.helper.make_node("Identity", [source], [dequantized]))

    monkeypatch.setattr(writing, "add_pair", forgetful)
    with pytest.raises(ParityError, match="QuantizeLinear nodes, expected"):
        lowered(case, SCHEMES["symmetric"], "int8")


def test_a_parameter_that_the_file_lacks_is_named(case: Case) -> None:
    model = copy.deepcopy(case.onnx)
    _initializer(model, "classifier.bias").name = "renamed"
    graph, sites = quantized(case, SCHEMES["symmetric"])
    with pytest.raises(ParityError, match=r"classifier\.bias"):
        lower(model, parameters_of(graph, sites), sites, "int8")


# ---------------------------------------------------------------- the float file


def test_the_float_file_tells_its_task_and_nothing_of_this_machine(case: Case) -> None:
    found = {entry.key: entry.value for entry in case.onnx.metadata_props}
    assert found["task"] == "image-classification"
    assert json.loads(found["labels"]) == list(CLASSES)
    assert json.loads(found["preprocess"])["resize"] == [SIZE, SIZE]
    assert str(Path(__file__).parent).encode() not in case.onnx.SerializeToString()


def test_the_float_file_takes_any_batch(case: Case, tmp_path: Path) -> None:
    export.save(case.onnx, tmp_path / "float.onnx")
    session = backend("onnxruntime").open(tmp_path / "float.onnx")
    exact = evaluate(case.model, inputs(7)).numpy()
    for count in (1, 3, 7):
        np.testing.assert_allclose(
            session.run(inputs(7)[:count].numpy()), exact[:count], rtol=1e-4, atol=1e-4
        )


def test_the_float_file_has_no_operator_that_integer_runtimes_lack(case: Case) -> None:
    kinds = {node.op_type for node in case.onnx.graph.node}
    assert kinds <= {"Conv", "Relu", "Add", "GlobalAveragePool", "Reshape", "Flatten", "Gemm", "MatMul"}
    assert all(entry.version <= 22 for entry in case.onnx.opset_import if entry.domain == "")


def test_one_sample_of_a_small_set_may_differ(case: Case, tmp_path: Path) -> None:
    exact = evaluate(case.graph, inputs(40)).numpy()
    best, second = np.argsort(-exact[0])[:2]
    exact[0, [best, second]] = exact[0, [second, best]]
    export.save(case.onnx, tmp_path / "float.onnx")
    found = _check(tmp_path / "float.onnx", inputs(40).numpy(), exact, None, 0.999)
    assert found["top1_agreement"] == pytest.approx(1 - 1 / 40)


# ---------------------------------------------------------------- fewer bits, damping


@pytest.mark.parametrize("bits", [6, 4, 3])
def test_fewer_bits_reach_the_integer_file_and_spare_the_first_and_last_layer(case: Case, bits: int) -> None:
    scheme = SCHEMES["relu from zero"]
    sites = find_sites(case.graph, scheme)
    grids = calibrate(case.graph, sites, [inputs(64)], scheme, "mse")
    largest = largest_codes(case.graph, sites, scheme, bits, {})
    graph = insert(case.graph, sites, grids, scheme, largest).eval()
    model = lower(case.onnx, parameters_of(graph, sites), sites, "uint8")
    codes = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.name.endswith("_int8")}
    reach = [int(np.abs(codes[f"{name}_int8"]).max()) for name in sites.weights]
    assert reach[0] == reach[-1] == 127
    assert all(2 ** (bits - 2) < value <= 2 ** (bits - 1) for value in reach[1:-1])


def test_bits_of_a_named_layer_and_an_unknown_name(case: Case) -> None:
    scheme = SCHEMES["relu from zero"]
    sites = find_sites(case.graph, scheme)
    found = largest_codes(case.graph, sites, scheme, 8, {"classifier": 4})
    assert [found[name] for name in sites.weights] == [127, 127, 127, 7]
    with pytest.raises(RecipeError, match="no weight is called 'clasifier'"):
        largest_codes(case.graph, sites, scheme, 8, {"clasifier": 4})


def test_a_low_bit_scale_starts_at_the_least_squared_error() -> None:
    weight = torch.randn(4, 200, generator=torch.Generator().manual_seed(0))
    chosen = WeightQuantizer(weight, 3).eval()
    widest = WeightQuantizer(weight, 3).eval()
    widest.log_scale.data = (weight.abs().amax(1) / 3).log()
    with torch.no_grad():
        errors = [(module(weight) - weight).square().sum(1) for module in (chosen, widest)]
    assert (errors[0] < 0.8 * errors[1]).all()


def test_damping_adds_the_gradient_of_its_squared_distance() -> None:
    weight = torch.tensor([[0.3, -1.0, 0.06]], requires_grad=True)
    plain, damped = WeightQuantizer(weight, 7), WeightQuantizer(weight, 7, damping=0.5)
    gradients: list[Any] = []
    for module in (plain, damped):
        weight.grad = None
        module.train()(weight).sum().backward()
        gradients.append(weight.grad)
    rounded = plain(weight).detach()
    torch.testing.assert_close(gradients[1] - gradients[0], 2 * 0.5 * (weight - rounded).detach())
    torch.testing.assert_close(damped(weight), plain(weight))


# ---------------------------------------------------------------- layers that stay in float


class Uneven(nn.Module):
    """The second layer reads values of very different size, which one grid cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, 1, 1)
        self.hard = nn.Conv2d(8, 8, 1)
        self.last = nn.Linear(8, 4)
        with torch.no_grad():
            self.first.weight[0] *= 3e4
            self.hard.weight[:, 0] /= 3e4

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.hard(torch.relu(self.first(x))))
        logits: Tensor = self.last(torch.flatten(torch.nn.functional.adaptive_avg_pool2d(y, 1), 1))
        return logits


@pytest.mark.slow
def test_the_layer_that_breaks_is_found_spared_and_float_in_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    scheme = SCHEMES["relu from zero"]
    graph = capture(Uneven(), SPEC.input_shape)
    sites = find_sites(graph, scheme)
    grids = calibrate(graph, sites, [inputs(64)], scheme, "min-max")
    exact = evaluate(graph, inputs(64))

    def damage(places: Sites) -> float:
        made = insert(graph, places, grids, scheme)
        return float((evaluate(made, inputs(64)) - exact).square().mean())

    whole = damage(sites)
    healed = sensitivity_of(sites, damage, lambda *_: None)
    spared = spare_layers(sites, healed, lambda places: damage(places) < 0.5 * whole)
    assert max(healed, key=lambda row: row.damage).name == "hard.weight"
    assert spared is not None and spared.weights == ("first.weight", "last.weight")
    trained = insert(graph, sites, grids, scheme)
    with torch.no_grad():
        for value in trained.parameters():
            value.mul_(1.1)
    model = with_values_of(trained, insert(graph, spared, grids, scheme)).eval()
    left = next(name for name in sites.weights if name not in spared.weights)
    assert torch.equal(model.get_parameter(left), 1.1 * graph.get_parameter(left))
    assert torch.equal(model.get_parameter("weight_first_weight.log_scale"),
                       trained.get_parameter("weight_first_weight.log_scale"))  # fmt: skip
    model_onnx = lower(export.to_onnx(graph, SPEC), parameters_of(model, spared), spared, "uint8")
    _save(tmp_path / FILE, parameters_of(model, spared), spared, scheme)
    run = SimpleNamespace(run=SimpleNamespace(folder=tmp_path), captured=graph)
    torch.testing.assert_close(evaluate(rebuild(run), inputs()), evaluate(model, inputs()))  # type: ignore[arg-type]
    stored = {tensor.name for tensor in model_onnx.graph.initializer}
    assert "hard.weight" in stored and "hard.weight_int8" not in stored
    np.testing.assert_allclose(
        run_onnx(model_onnx, tmp_path / "q.onnx"), evaluate(model, inputs()).numpy(), atol=4e-3
    )


# ---------------------------------------------------------------- fewer bits of activations, learnt offsets


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("bits", [6, 4])
@pytest.mark.parametrize("name", ["symmetric", "relu from zero"])
def test_narrow_activations_compute_the_same_in_their_8_bit_file(
    case: Case, tmp_path: Path, name: str, bits: int, kind: Form
) -> None:
    scheme = SCHEMES[name]
    sites = find_sites(case.graph, scheme)
    wanted = activation_bits(sites, bits, {})
    grids = calibrate(case.graph, sites, [inputs(64)], scheme, "mse", wanted)
    graph = insert(case.graph, sites, grids, scheme).eval()
    narrow = [grid for grid in grids.values() if grid.narrow]
    assert narrow and all(grid.qmax - grid.qmin + 1 == 2**bits for grid in narrow)
    split = scheme.symmetric and kind == "uint8"
    model = lower(case.onnx, parameters_of(graph, sites), sites, kind, split_relu=split)
    assert sum(node.op_type == "Clip" for node in model.graph.node) == len(narrow)
    codes = model.graph.initializer
    if scheme.symmetric and kind == "int8":  # what TensorRT reads: zero points of 0
        zeros = [numpy_helper.to_array(t) for t in codes if t.name.endswith("_zero_point")]
        assert all(not zero.any() for zero in zeros)
    # A value on the edge of two codes may round either way: seldom, and then by one coarse step.
    difference = np.abs(run_onnx(model, tmp_path / "q.onnx") - evaluate(graph, inputs()).numpy())
    assert np.median(difference) < 1e-5 and (difference > 1e-3).mean() < 0.03


def test_a_tensor_has_the_most_bits_that_its_readers_ask_for(case: Case) -> None:
    sites = find_sites(case.graph, SCHEMES["relu from zero"])
    bits = activation_bits(sites, 4, {})
    roots = [name for name in sites.activations if name not in sites.same_as]
    first, *_ = roots
    assert set(bits) == set(roots) and bits[first] == 8  # the image
    assert min(bits.values()) == 4
    last = sites.origins[next(n for n, o in sites.origins.items() if "classifier.weight" in o.parameters)]
    assert [bits[sites.same_as.get(name, name)] for name in last.inputs] == [8]
    named = activation_bits(sites, 8, {"body.0": 6})
    assert sorted(set(named.values())) == [6, 8]
    with pytest.raises(RecipeError, match=r"layer_activation_bits: no weight is called 'bodi'"):
        activation_bits(sites, 8, {"bodi": 4})


def test_an_offset_is_learnt_where_values_are_negative_and_lowers_what_rounding_costs() -> None:
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.4
    scheme = replace(SCHEMES["relu from zero"], learn_offsets=True)
    grid = scheme.grid(-4.0, 4.0, 4)
    quantizer = ActivationQuantizer(grid, learn_offset=True).train()
    optimizer = torch.optim.Adam(quantizer.parameters(), 0.02)
    for _ in range(150):
        loss = (quantizer(values) - values).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learnt, fixed = quantizer.grid(), ActivationQuantizer(grid).train()
    assert learnt.zero_point < grid.zero_point and learnt.qmin <= learnt.zero_point <= learnt.qmax
    optimizer = torch.optim.Adam([fixed.log_scale], 0.02)
    for _ in range(150):
        other = (fixed(values) - values).square().mean()
        optimizer.zero_grad()
        other.backward()
        optimizer.step()
    assert fixed.grid().zero_point == grid.zero_point
    with torch.no_grad():
        cost, alone = ((made.eval()(values) - values).square().mean() for made in (quantizer, fixed))
    assert cost < 0.8 * alone


def test_offsets_cannot_be_learnt_where_zero_points_are_zero() -> None:
    with pytest.raises(RecipeError, match="learn_offsets: the dialect 'trt-s8sym'"):
        scheme_for(find_target("jetson"), learn_offsets=True)


def test_from_the_share_on_only_weights_move(case: Case) -> None:
    graph, _ = quantized(case, SCHEMES["relu from zero"])
    freeze_after(0.5)(graph, 0.49)
    assert all(p.requires_grad for n, p in graph.named_parameters() if n.endswith("log_scale"))
    freeze_after(0.5)(graph, 0.5)
    still = {name for name, p in graph.named_parameters() if not p.requires_grad}
    assert {n for n, _ in graph.named_parameters() if n.endswith("log_scale")} <= still
    assert "classifier.weight" not in still


def test_corrected_biases_restore_the_channels_means(case: Case) -> None:
    scheme = SCHEMES["relu from zero"]
    sites = find_sites(case.graph, scheme)
    grids = calibrate(case.graph, sites, [inputs(64)], scheme, "min-max")
    made = insert(case.graph, sites, grids, scheme, largest_codes(case.graph, sites, scheme, 3, {}))

    def error(graph: fx.GraphModule) -> float:
        return float((evaluate(graph, inputs()).mean(0) - evaluate(case.graph, inputs()).mean(0)).abs().max())

    before, weight = error(made), made.get_parameter("body.0.weight").clone()
    correct_biases(made, case.graph, inputs(128))
    assert error(made) < 0.5 * before
    assert torch.equal(weight, made.get_parameter("body.0.weight"))
