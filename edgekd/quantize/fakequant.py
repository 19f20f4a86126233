"""Fake quantization of a captured graph: where it goes, how it is calibrated, how its scales are learnt."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from edgekd.errors import RecipeError, UnsupportedModelError
from edgekd.quantize.calibrators import BINS, calibrator
from edgekd.quantize.capture import attribute
from edgekd.quantize.quantizers import ActivationQuantizer, WeightQuantizer
from edgekd.quantize.scheme import Grid, QuantScheme

_ATEN = torch.ops.aten
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


_QUANTIZERS = (ActivationQuantizer, WeightQuantizer)


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
    graph: fx.GraphModule,
    sites: Sites,
    batches: Iterable[Tensor],
    scheme: QuantScheme,
    method: str,
    bits: Mapping[str, int] | None = None,
) -> dict[str, Grid]:
    """A grid for each activation, from two streaming passes (range, then histogram); memory does not grow
    with the number of batches. `bits` by tensor, 8 where it is not told."""
    choose = calibrator(method)
    names = [name for name in sites.activations if name not in sites.same_as]
    low = dict.fromkeys(names, np.inf)
    high = dict.fromkeys(names, -np.inf)
    batches = list(batches) if not isinstance(batches, list) else batches
    for tensors in activations_of(graph, names, batches):
        for name, tensor in tensors.items():
            low[name] = min(low[name], float(tensor.min()))
            high[name] = max(high[name], float(tensor.max()))
    histogram = {name: np.zeros(BINS) for name in names}
    for tensors in activations_of(graph, names, batches):
        for name, tensor in tensors.items():
            top = max(high[name], low[name] + 1e-6)
            histogram[name] += torch.histc(tensor, BINS, low[name], top).numpy()
    grids = {}
    for name in names:
        top = max(high[name], low[name] + 1e-6)
        wanted = (bits or {}).get(name, 8)
        grids[name] = scheme.grid(*choose(histogram[name], low[name], top, 2**wanted), wanted)
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


def activations_of(
    graph: fx.GraphModule, names: list[str], batches: list[Tensor]
) -> Iterable[dict[str, Tensor]]:
    for batch in batches:
        recorder = _Recorder(graph, names)
        with torch.inference_mode():
            recorder.run(batch)
        yield recorder.seen


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
        for name in _named(sites, key, "quantize.layer_bits"):
            found[name] = min(2 ** (wanted - 1) - 1, scheme.weight_max)
    return found


def activation_bits(sites: Sites, bits: int, named: Mapping[str, int]) -> dict[str, int]:
    """Bits of each activation: `bits`, but 8 for the graph's input, what the last layer reads and makes, and
    `named` for what a layer reads, by a beginning or end of its weight's name. A tensor that several layers
    read has the most of theirs.

    Raises:
        RecipeError: a name that no weight has.
    """
    layers = {name: node for node, origin in sites.origins.items() for name in origin.parameters}
    found: dict[str, int] = {}
    for weight in sites.weights:
        wanted = 8 if weight == sites.weights[-1] else bits
        for tensor in sites.origins[layers[weight]].inputs:
            root = sites.same_as.get(tensor, tensor)
            first = sites.origins[root].operator == "input"
            found[root] = max(found.get(root, 0), 8 if first else wanted)
    for tensor, origin in sites.origins.items():
        if tensor in sites.activations:
            root = sites.same_as.get(tensor, tensor)
            found[root] = max(found.get(root, 0), 8) if origin.is_output else found.get(root, bits)
    for key, wanted in named.items():
        for weight in _named(sites, key, "quantize.layer_activation_bits"):
            for tensor in sites.origins[layers[weight]].inputs:
                found[sites.same_as.get(tensor, tensor)] = wanted
    return found


def _named(sites: Sites, key: str, where: str) -> list[str]:
    hits = [name for name in sites.weights if name.startswith(key) or name.endswith(key)]
    if not hits:
        raise RecipeError(f"{where}: no weight is called '{key}'", f"there are: {', '.join(sites.weights)}")
    return hits


def insert(
    graph: fx.GraphModule,
    sites: Sites,
    grids: dict[str, Grid],
    scheme: QuantScheme,
    largest: Mapping[str, int] | None = None,
    damping: float = 0.0,
) -> fx.GraphModule:
    """A copy of `graph` with quantizers at all sites. A shared grid is one shared module. `largest`: the
    largest code by weight, the scheme's where it is not told. Zero points are learnt where the scheme says
    so and the grid has room below zero."""
    made = copy.deepcopy(fx.GraphModule(graph, _copy(graph.graph)))
    codes = largest or {}
    nodes = {node.name: node for node in made.graph.nodes}
    for name, consumers in sites.activations.items():
        root = sites.same_as.get(name, name)
        module = f"activation_{root}"
        if not hasattr(made, module):
            learnt = scheme.learn_offsets and grids[root].zero_point > grids[root].qmin
            made.add_submodule(module, ActivationQuantizer(grids[root], learnt))
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


def with_values_of(other: fx.GraphModule, made: fx.GraphModule) -> fx.GraphModule:
    """`made` with the weights, scales and offsets of `other`, which has quantizers at its sites and more."""
    values = other.state_dict()
    made.load_state_dict({name: values[name] for name in made.state_dict()})
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
        if not isinstance(quantized.get_submodule(name.rpartition(".")[0]), _QUANTIZERS)
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
