"""A network as a graph of ATen operators with batch norm folded: where quantization and export start."""

from __future__ import annotations

import operator
import warnings

import torch
from torch import Tensor, fx, nn

from edgekd.errors import UnsupportedModelError

_ATEN = torch.ops.aten
_DROPOUTS = (
    _ATEN.dropout.default,
    _ATEN.dropout_.default,
    _ATEN.feature_dropout.default,
    _ATEN.feature_dropout_.default,
    _ATEN.alpha_dropout.default,
)
_CONVOLUTIONS = (_ATEN.conv2d.default, _ATEN.conv1d.default)


def attribute(graph: fx.GraphModule, target: str) -> Tensor:
    """The parameter or buffer at a dotted name."""
    found: Tensor = operator.attrgetter(target)(graph)
    return found


def set_parameter(graph: fx.GraphModule, target: str, value: Tensor) -> None:
    """Replace or add the parameter at a dotted name."""
    owner, _, name = target.rpartition(".")
    graph.get_submodule(owner).register_parameter(name, nn.Parameter(value))


def capture(model: nn.Module, input_shape: tuple[int, int, int]) -> fx.GraphModule:
    """Trace `model` in eval mode for any batch size and fold batch norm into the convolutions before it.

    Node names of the graph become the names of the tensors in the exported ONNX file.

    Raises:
        UnsupportedModelError: the network cannot be traced.
    """
    model = model.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    example = torch.zeros(2, *input_shape)
    batch = torch.export.Dim("batch", min=1, max=65536)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about its own internals while tracing
            program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
            traced = program.module(check_guards=False)
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError, ValueError) as error:
        raise UnsupportedModelError(
            f"the network cannot be traced: {str(error).splitlines()[0]}",
            "it must be a function of one image tensor without Python branches on values",
        ) from error
    copied = fx.Graph()
    output = copied.graph_copy(traced.graph, {}, return_output_node=False)
    copied.output(output[0] if isinstance(output, tuple | list) else output)
    graph = fx.GraphModule(traced, copied)
    _leave_out_dropout(graph)
    _fold_batch_norm(graph)
    return graph


def _leave_out_dropout(graph: fx.GraphModule) -> None:
    """It gives back its input in eval mode, and exporters leave it out: no tensor of it could be found."""
    for node in list(graph.graph.nodes):
        if node.target in _DROPOUTS:
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)


def _fold_batch_norm(graph: fx.GraphModule) -> None:
    """``W <- W g / s``, ``b <- (b - mean) g / s + beta``, s = sqrt(var + eps) (Jacob et al. 2018, eq. 14)."""
    for node in list(graph.graph.nodes):
        if node.target is not _ATEN.batch_norm.default:
            continue
        conv = node.args[0]
        if conv.target not in _CONVOLUTIONS or len(conv.users) != 1:
            continue
        gain, shift, mean, variance = (attribute(graph, str(a.target)) for a in node.args[1:5])
        factor = gain / torch.sqrt(variance + node.args[7])
        weight_name = str(conv.args[1].target)
        weight = attribute(graph, weight_name)
        bias = (
            attribute(graph, str(conv.args[2].target))
            if len(conv.args) > 2 and conv.args[2] is not None
            else 0.0
        )
        set_parameter(graph, weight_name, (weight * factor.view(-1, *[1] * (weight.dim() - 1))).detach())
        bias_name = weight_name.rpartition(".")[0] + ".folded_bias"
        set_parameter(graph, bias_name, ((bias - mean) * factor + shift).detach())
        with graph.graph.inserting_before(conv):
            bias_node = graph.graph.get_attr(bias_name)
        rest = conv.args[3:]
        conv.args = (conv.args[0], conv.args[1], bias_node, *rest)
        node.replace_all_uses_with(conv)
        graph.graph.erase_node(node)
    for node in list(graph.graph.nodes):  # counters of batch norm that only training needs
        if node.op == "call_function" and not node.users and "add_" in str(node.target):
            graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()
