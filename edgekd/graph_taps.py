"""Taps of a captured graph: the tensors a transfer method asks for, as the layers behind them read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from edgekd.errors import UnsupportedModelError
from edgekd.layout import Layout
from edgekd.nets import Outputs

_ATEN = torch.ops.aten
_KINDS = (_ATEN.relu, _ATEN.relu_, _ATEN.relu6, _ATEN.relu6_, _ATEN.hardtanh, _ATEN.hardtanh_)
_RECTIFIERS = tuple(kind.default for kind in _KINDS)
_MAPS = {"features", "stages", "preactivations"}


class TappedGraph(nn.Module):
    """A captured network, fake-quantized or not, whose pass gives `Outputs`. Its parameters are those of
    `graph`: training one trains the other. Where a quantizer follows a tensor, its result is what is tapped.

    Args:
        graph: of `edgekd.quantize.capture`, in which each node knows the modules it came from.
        layout: of the network before it was captured.
        wanted: names of `edgekd.layout.TAPS`.

    Raises:
        UnsupportedModelError: a module of the layout left nothing in the graph.
    """

    def __init__(self, graph: fx.GraphModule, layout: Layout, wanted: Sequence[str]) -> None:
        super().__init__()
        self._whole, self.layout, self.wanted = (graph,), layout, frozenset(wanted)
        stages = layout.stages if self.wanted & _MAPS else ()
        tokens = layout.tokens if "tokens" in self.wanted else ()
        made = fx.Graph()
        names: dict[fx.Node, fx.Node] = {}
        logits = made.graph_copy(graph.graph, names)
        found = [names[_last_node(graph, path)] for path in (*stages, *tokens)]
        taps = [_as_read(node) for node in found]
        before = [_as_read(_before_relu(node)) for node in found[: len(stages)]]
        embedding = None
        if "embedding" in self.wanted and layout.classifier is not None:
            embedding = names[_last_node(graph, layout.classifier)].args[0]
        cut = len(stages)
        made.output((logits, embedding, tuple(taps[:cut]), tuple(before), tuple(taps[cut:])))
        _keep_from_in_place(made)
        self.model = fx.GraphModule(graph, made)

    def forward(self, inputs: Tensor) -> Outputs:
        logits, embedding, stages, before, tokens = self.model(inputs)
        before = before if "preactivations" in self.wanted else ()
        return Outputs(logits, embedding, stages[-1] if stages else None, stages, before, tokens=tokens)

    def deploy(self) -> fx.GraphModule:
        """The graph itself."""
        return self._whole[0].eval()


def _last_node(graph: fx.GraphModule, path: str) -> fx.Node:
    """The node that makes what the module at `path` gives (``path@2``: in its second run)."""
    name, _, run = path.partition("@")
    wanted = f"@{int(run) - 1}" if run else ""
    found: fx.Node | None = None
    for node in graph.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        if node.op == "call_function" and any(
            module == name and key.endswith(wanted) and ("@" in key) == bool(wanted)
            for key, (module, _) in stack.items()
        ):
            found = node
    if found is None:
        raise UnsupportedModelError(
            f"the captured network has nothing of its module '{path}', where a method taps it",
            "name other modules with distill.student_taps, or a method on logits with quantize.method",
        )
    return found


def _as_read(node: fx.Node) -> fx.Node:
    """The quantizer behind a node where there is one."""
    quantizers: list[fx.Node] = [user for user in node.users if user.op == "call_module"]
    return next(iter(quantizers), node)


def _before_relu(node: fx.Node) -> fx.Node:
    """What a rectifier was given; any other node itself."""
    from_zero = "hardtanh" not in str(node.target) or (len(node.args) > 1 and node.args[1] == 0)
    given: fx.Node = node.all_input_nodes[0] if node.target in _RECTIFIERS and from_zero else node
    return given


def _keep_from_in_place(graph: fx.Graph) -> None:
    """Copies of tapped tensors that an operator overwrites later."""
    output = next(iter(reversed(graph.nodes)))
    for node in list(output.all_input_nodes):
        if any(_overwrites(user) and user.args[0] is node for user in node.users):
            with graph.inserting_after(node):
                kept = graph.call_function(_ATEN.clone.default, (node,))
            output.replace_input_with(node, kept)


def _overwrites(node: fx.Node) -> bool:
    """Whether an ATen operator works in place, as those do whose name ends with an underscore."""
    return node.op == "call_function" and str(node.target).rpartition(".")[0].endswith("_")
