"""Fake quantization of a captured graph: where it goes, how it is calibrated, how its scales are learnt."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from edgekd.errors import RecipeError, UnsupportedModelError
from edgekd.quantize.calibrators import BINS, calibrator
from edgekd.quantize.capture import attribute
from edgekd.quantize.scheme import Grid, QuantScheme

_ATEN = torch.ops.aten
_LEAST_FULL = 63  # the largest code of 7 bits: from there on the largest weight sets the scale
_WEIGHTED = (_ATEN.conv2d.default, _ATEN.conv1d.default, _ATEN.linear.default)
_ADDS = (_ATEN.add.Tensor, _ATEN.add_.Tensor)
_POOLS = (
    _ATEN.adaptive_avg_pool2d.default,
    _ATEN.avg_pool2d.default,
    _ATEN.max_pool2d.default,
    _ATEN.mean.dim,
)
_VIEWS = (
    _ATEN.view.default,
    _ATEN.reshape.default,
    _ATEN.flatten.using_ints,
    _ATEN.squeeze.dim,
    _ATEN.squeeze.dims,
)


@dataclass(frozen=True)
class Origin:
    """How a tensor is made: ATen operator ("input" for the graph's input), tensors read, parameters read."""

    operator: str
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    is_output: bool = False


@dataclass(frozen=True)
class Sites:
    """`activations`: tensor name -> names of all its consumers, which read the quantized value, as in the
    integer graph, where the tensor is stored once; a tensor named in `same_as` shares the grid of the tensor
    it is a view of. `weights`: parameter names. `origins`: how each tensor of the graph is made, by which it
    is found again in an exported file whatever its name there."""

    activations: dict[str, tuple[str, ...]]
    same_as: dict[str, str]
    weights: tuple[str, ...]
    origins: dict[str, Origin]


def find_sites(graph: fx.GraphModule, scheme: QuantScheme) -> Sites:
    """Inputs of every convolution and linear layer, both inputs of every addition, input and output of
    every pooling, and the graph's output where the scheme says so.

    Raises:
        UnsupportedModelError: there is nothing to quantize.
    """
    quantized: dict[fx.Node, None] = {}  # in order, each once
    weights: list[str] = []
    same_as: dict[str, str] = {}

    def mark(producer: fx.Node) -> None:
        quantized[producer] = None
        root = producer
        while root.target in _VIEWS and isinstance(root.args[0], fx.Node):
            root = root.args[0]
        if root is not producer:
            same_as[producer.name] = root.name
            quantized[root] = None

    for node in graph.graph.nodes:
        if node.target in _WEIGHTED:
            mark(node.args[0])
            weights.append(str(node.args[1].target))
        elif node.target in _ADDS and all(isinstance(a, fx.Node) and a.op != "get_attr" for a in node.args):
            for producer in dict.fromkeys(node.args):
                mark(producer)
        elif node.target in _POOLS:
            mark(node.args[0])
            quantized[node] = None
        elif node.op == "output" and scheme.quantize_output:
            mark(node.args[0])
    if not weights:
        raise UnsupportedModelError("the network has no convolution and no linear layer to quantize")
    return Sites(
        {node.name: tuple(user.name for user in node.users) for node in quantized},
        same_as,
        tuple(dict.fromkeys(weights)),
        _origins(graph),
    )


def _origins(graph: fx.GraphModule) -> dict[str, Origin]:
    nodes = list(graph.graph.nodes)
    result = nodes[-1].args[0]
    made = {}
    for node in nodes:
        if node.op == "placeholder":
            made[node.name] = Origin("input", (), ())
        elif node.op == "call_function":
            read = node.all_input_nodes
            made[node.name] = Origin(
                str(node.target).split(".")[1].rstrip("_"),
                tuple(n.name for n in read if n.op != "get_attr"),
                tuple(str(n.target) for n in read if n.op == "get_attr"),
                node is result,
            )
    return made


def calibrate(
    graph: fx.GraphModule, sites: Sites, batches: Iterable[Tensor], scheme: QuantScheme, method: str
) -> dict[str, Grid]:
    """A grid for each activation, from two streaming passes (range, then histogram); memory does not grow
    with the number of batches."""
    choose = calibrator(method)
    names = [name for name in sites.activations if name not in sites.same_as]
    low = dict.fromkeys(names, np.inf)
    high = dict.fromkeys(names, -np.inf)
    batches = list(batches) if not isinstance(batches, list) else batches
    for tensors in _activations(graph, names, batches):
        for name, tensor in tensors.items():
            low[name] = min(low[name], float(tensor.min()))
            high[name] = max(high[name], float(tensor.max()))
    histogram = {name: np.zeros(BINS) for name in names}
    for tensors in _activations(graph, names, batches):
        for name, tensor in tensors.items():
            top = max(high[name], low[name] + 1e-6)
            histogram[name] += torch.histc(tensor, BINS, low[name], top).numpy()
    grids = {}
    for name in names:
        top = max(high[name], low[name] + 1e-6)
        grids[name] = scheme.grid(*choose(histogram[name], low[name], top))
    return grids | {name: grids[root] for name, root in sites.same_as.items()}


class _Recorder(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule, names: list[str]) -> None:
        super().__init__(graph)
        self._names = set(names)
        self.seen: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> object:
        value = super().run_node(n)
        if n.name in self._names and isinstance(value, Tensor):
            self.seen[n.name] = value.float()
        return value


def _activations(
    graph: fx.GraphModule, names: list[str], batches: list[Tensor]
) -> Iterable[dict[str, Tensor]]:
    for batch in batches:
        recorder = _Recorder(graph, names)
        with torch.inference_mode():
            recorder.run(batch)
        yield recorder.seen


class ActivationQuantizer(nn.Module):
    """Rounds to a grid whose scale is learnt, straight-through inside the range (LSQ, Esser et al. 2020,
    arXiv:1902.08153, eq. 1 to 3). The parameter is the logarithm of the scale, so one step changes it by a
    share of itself whatever its size."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor([grid.scale]).log())
        self.register_buffer("zero_point", torch.tensor([float(grid.zero_point)]))
        self.zero_point: Tensor
        self.qmin, self.qmax, self._zero_point = grid.qmin, grid.qmax, grid.zero_point

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return torch._fake_quantize_learnable_per_tensor_affine(
                x.float(), self.log_scale.exp(), self.zero_point, self.qmin, self.qmax, 1.0
            )
        scale = float(self.log_scale.detach().exp())
        return torch.fake_quantize_per_tensor_affine(x, scale, self._zero_point, self.qmin, self.qmax)

    def grid(self) -> Grid:
        return Grid(float(self.log_scale.detach().exp()), self._zero_point, self.qmin, self.qmax)


class _Damp(torch.autograd.Function):
    """Nothing forward; backward the gradient of ``strength * sum (w - q)^2`` reaches w."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rounded: Tensor, strength: float) -> Tensor:
        ctx.save_for_backward(2 * strength * (weight - rounded))
        return torch.zeros_like(weight)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Tensor, None, None]:
        return ctx.saved_tensors[0], None, None


class WeightQuantizer(nn.Module):
    """Symmetric per output channel, codes of 8 bits or fewer; they reach `weight_max` at the start.

    Of fewer bits, the scale starts where the squared rounding and clipping error is least, not at the
    largest weight. With `damping`, weights are drawn to the middle of their step, so that those of depthwise
    layers do not swing between two codes for ever (Nagel et al. 2022, arXiv:2203.11086, eq. 7; there as a
    loss).
    """

    def __init__(self, weight: Tensor, weight_max: int, damping: float = 0.0) -> None:
        super().__init__()
        reach = weight.detach().abs().flatten(1).amax(1).clamp(min=1e-8)
        start = reach / weight_max if weight_max >= _LEAST_FULL else _least_error(weight, reach, weight_max)
        self.log_scale = nn.Parameter(start.log())
        self._damping = damping
        self.register_buffer("zero_point", torch.zeros(len(weight)))
        self.zero_point: Tensor
        self.weight_max = weight_max

    @property
    def qmin(self) -> int:
        return -128 if self.weight_max == 127 else -self.weight_max - 1

    @property
    def qmax(self) -> int:
        return self.weight_max

    def forward(self, weight: Tensor) -> Tensor:
        if self.training:
            rounded: Tensor = torch._fake_quantize_learnable_per_channel_affine(
                weight, self.log_scale.exp(), self.zero_point, 0, self.qmin, self.qmax, 1.0
            )
            if self._damping:
                rounded = rounded + _Damp.apply(weight, rounded.detach(), self._damping)  # type: ignore[no-untyped-call]
            return rounded
        return torch.fake_quantize_per_channel_affine(
            weight, self.log_scale.exp(), self.zero_point.int(), 0, self.qmin, self.qmax
        )


def _least_error(weight: Tensor, reach: Tensor, weight_max: int) -> Tensor:
    """(channels,) of the scales ``share * reach / weight_max``, those with the least squared error."""
    flat = weight.detach().flatten(1)
    scales = torch.linspace(0.4, 1.0, 25)[:, None] * reach / weight_max
    codes = (flat / scales[..., None]).round().clamp(-weight_max - 1, weight_max)
    errors = (codes * scales[..., None] - flat).square().sum(2)
    return scales.gather(0, errors.argmin(0)[None])[0]


def largest_codes(
    graph: fx.GraphModule, sites: Sites, scheme: QuantScheme, bits: int, named: Mapping[str, int]
) -> dict[str, int]:
    """The largest code of each weight, for `bits` bits; the first and the last layer keep the scheme's own,
    because they are small and everything goes through them. `named`: bits by parameter name, or by a
    beginning or end of it.

    Raises:
        RecipeError: a name that no weight has.
    """
    found = dict.fromkeys(sites.weights, scheme.weight_max)
    ends = {sites.weights[0], sites.weights[-1]}
    for name in sites.weights:
        if bits < 8 and name not in ends:
            found[name] = 2 ** (bits - 1) - 1
    for key, wanted in named.items():
        hits = [name for name in sites.weights if name.startswith(key) or name.endswith(key)]
        if not hits:
            raise RecipeError(
                f"quantize.layer_bits: no weight is called '{key}'", f"there are: {', '.join(sites.weights)}"
            )
        for name in hits:
            found[name] = min(2 ** (wanted - 1) - 1, scheme.weight_max)
    return found


def insert(
    graph: fx.GraphModule,
    sites: Sites,
    grids: dict[str, Grid],
    scheme: QuantScheme,
    largest: Mapping[str, int] | None = None,
    damping: float = 0.0,
) -> fx.GraphModule:
    """A copy of `graph` with quantizers at all sites. A shared grid is one shared module. `largest`: the
    largest code by weight, the scheme's where it is not told."""
    made = copy.deepcopy(fx.GraphModule(graph, _copy(graph.graph)))
    codes = largest or {}
    nodes = {node.name: node for node in made.graph.nodes}
    for name, consumers in sites.activations.items():
        root = sites.same_as.get(name, name)
        module = f"activation_{root}"
        if not hasattr(made, module):
            made.add_submodule(module, ActivationQuantizer(grids[root]))
        producer = nodes[name]
        readers = [nodes[c] for c in consumers]
        with made.graph.inserting_after(producer):
            quantized = made.graph.call_module(module, (producer,))
        for reader in readers:
            reader.replace_input_with(producer, quantized)
    for node in list(made.graph.nodes):
        if node.target in _WEIGHTED and str(node.args[1].target) in sites.weights:
            name = str(node.args[1].target)
            module = "weight_" + name.replace(".", "_")
            made.add_submodule(
                module, WeightQuantizer(attribute(made, name), codes.get(name, scheme.weight_max), damping)
            )
            with made.graph.inserting_before(node):
                quantized = made.graph.call_module(module, (node.args[1],))
            node.args = (node.args[0], quantized, *node.args[2:])
    made.graph.lint()
    made.recompile()
    return made


def _copy(graph: fx.Graph) -> fx.Graph:
    copied = fx.Graph()
    output = copied.graph_copy(graph, {}, return_output_node=False)
    copied.output(output)
    return copied


@dataclass(frozen=True)
class QuantizedParameters:
    """What lowering needs: trained float weights and biases, weight scales per channel, activation grids."""

    tensors: dict[str, np.ndarray]
    weight_scales: dict[str, np.ndarray]
    weight_bounds: dict[str, tuple[int, int]]
    activations: dict[str, Grid]


def parameters_of(quantized: fx.GraphModule, sites: Sites) -> QuantizedParameters:
    """Read the trained numbers out of a fake-quantized graph."""
    tensors = {
        name: value.detach().numpy().copy()
        for name, value in quantized.named_parameters()
        if not name.endswith("log_scale")
    }
    scales, bounds = {}, {}
    for name in sites.weights:
        module = quantized.get_submodule("weight_" + name.replace(".", "_"))
        assert isinstance(module, WeightQuantizer)
        scales[name] = module.log_scale.detach().exp().numpy().copy()
        bounds[name] = (module.qmin, module.qmax)
    grids = {}
    for name in sites.activations:
        module = quantized.get_submodule(f"activation_{sites.same_as.get(name, name)}")
        assert isinstance(module, ActivationQuantizer)
        grids[name] = module.grid()
    return QuantizedParameters(tensors, scales, bounds, grids)
