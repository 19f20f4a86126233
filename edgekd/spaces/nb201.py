"""NAS-Bench-201 (Dong & Yang 2020, arXiv:2001.00326, Fig. 1): one cell, stacked five times at each of three
resolutions. An architecture is its string, such as
``|nor_conv_3x3~0|+|none~0|skip_connect~1|+|avg_pool_3x3~0|nor_conv_1x1~1|nor_conv_3x3~2|``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from edgekd.blocks import Reparameterised, conv_norm, convolution, head_layers, to_multiple, with_weights
from edgekd.spaces import Genome, Restrictions
from edgekd.spec import LayerShape, ModelSpec

WIDTHS, CELLS = (16, 32, 64), 5
OPERATIONS = ("none", "skip_connect", "avg_pool_3x3", "nor_conv_1x1", "nor_conv_3x3")
EDGES = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))  # (from, to), in the order of the string

Edges = tuple[tuple[int, int, str], ...]


def architecture(genome: Genome) -> str:
    """The string of six genes, one an edge."""
    named = [(to, f"{OPERATIONS[gene]}~{source}") for gene, (source, to) in zip(genome, EDGES, strict=True)]
    return "+".join("|" + "|".join(text for to, text in named if to == node) + "|" for node in (1, 2, 3))


def edges_of(text: str) -> Edges:
    """(from, to, operation) of each edge."""
    nodes = [[edge.split("~") for edge in node.strip("|").split("|")] for node in text.split("+")]
    return tuple((int(source), to, name) for to, node in enumerate(nodes, 1) for name, source in node)


def live(edges: Edges) -> Edges:
    """Those that carry something from the image to the cell's output, as a compiled runtime leaves them."""
    fed, used = {0}, {3}
    for source, to, name in edges:
        if name != "none" and source in fed:
            fed.add(to)
    for source, to, name in reversed(edges):
        if name != "none" and to in used:
            used.add(source)
    return tuple(
        edge for edge in edges if edge[2] != "none" and edge[0] in fed & used and edge[1] in fed & used
    )


class _Zero(nn.Module):
    """Gives zeros, through which no gradient passes."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.0


class _Norm(Reparameterised):
    """Batch norm behind no convolution, which integer runtimes have no kernel for; a 1x1 convolution of one
    weight a channel is the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.norm(x)
        return made

    @torch.no_grad()
    def folded(self) -> nn.Module:
        norm = self.norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        conv = nn.Conv2d(norm.num_features, norm.num_features, 1, groups=norm.num_features)
        factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        conv.weight.copy_(factor[:, None, None, None])
        assert conv.bias is not None
        conv.bias.copy_(norm.bias - norm.running_mean * factor)
        return conv.train(self.training)


def _operation(name: str, width: int) -> nn.Module:
    if name in ("nor_conv_1x1", "nor_conv_3x3"):
        return nn.Sequential(nn.ReLU(), *conv_norm(width, width, int(name[-1])))
    if name == "avg_pool_3x3":
        return nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    return {"none": _Zero, "skip_connect": nn.Identity}[name]()


class _Cell(Reparameterised):
    """Four nodes; each is the sum of its edges. Zeros, where none leads to the output."""

    def __init__(self, edges: Edges, width: int) -> None:
        super().__init__()
        self.edges = edges
        self.operations = nn.ModuleList(_operation(name, width) for _, _, name in edges)

    def forward(self, x: Tensor) -> Tensor:
        made = {0: x}
        for (source, to, _), operation in zip(self.edges, self.operations, strict=True):
            part = operation(made[source])
            made[to] = made[to] + part if to in made else part
        return made[3] if 3 in made else x * 0.0

    def folded(self) -> nn.Module:
        return _SharedCell(self).train(self.training)


class _SharedCell(nn.Module):
    """The same, each value computed once: exporters merge equal nodes, and what is quantized must stay."""

    def __init__(self, cell: _Cell) -> None:
        super().__init__()
        self.edges, self.operations = cell.edges, cell.operations

    def forward(self, x: Tensor) -> Tensor:
        known, nodes = {"x": x}, {0: "x"}

        def once(name: str, made: Callable[[], Tensor]) -> str:
            if name not in known:
                known[name] = made()
            return name

        for (source, to, kind), operation in zip(self.edges, self.operations, strict=True):
            part = nodes[source]
            if kind.startswith("nor_conv"):
                assert isinstance(operation, nn.Sequential)
                part = once(f"relu({part})", partial(torch.relu, known[part]))
                part = once(f"conv{source}{to}", partial(operation[1:], known[part]))
            elif kind != "skip_connect":
                part = once(f"{kind}({part})", partial(operation, known[part]))
            if to in nodes:
                total = nodes[to]
                part = once(f"({total}+{part})", partial(torch.add, known[total], known[part]))
            nodes[to] = part
        return known[nodes[3]] if 3 in nodes else x * 0.0


class _Reduction(nn.Module):
    """A residual block of stride 2, its shortcut an average pool and a 1x1 convolution."""

    def __init__(self, width_in: int, width_out: int, odd: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.ReLU(), *conv_norm(width_in, width_out, 3, 2),
            nn.ReLU(), *conv_norm(width_out, width_out, 3),
        )  # fmt: skip
        pool = nn.AvgPool2d(2, ceil_mode=odd, count_include_pad=not odd)  # of the size that the body has
        self.shortcut = nn.Sequential(pool, convolution(width_in, width_out))

    def forward(self, x: Tensor) -> Tensor:
        shortcut, body = self.shortcut(x), self.body(x)
        made: Tensor = shortcut + body
        return made


def network_body(stem: LayerShape, edges: Edges, widths: Sequence[int]) -> list[nn.Module]:
    """Everything before the pooling."""
    body, size = conv_norm(stem.channels_in, stem.channels_out, 3, stem.stride), stem.size_out
    for stage, width in enumerate(widths):
        if stage:
            body.append(_Reduction(widths[stage - 1], width, odd=size % 2 == 1))
            size = -(-size // 2)
        body += [_Cell(edges, width) for _ in range(CELLS)]
    return [*body, _Norm(widths[-1]), nn.ReLU()]


class Nb201:
    """Genome: the operation of each edge of the cell. Edges without use are left out of the network; a cell
    that would give zeros, because no edges lead through it, passes its input on instead.

    Larger images enter a stem of stride 2, and of 4 above 96 px; widths are rounded to the card's multiple.
    """

    needs = ("3x3",)

    def __init__(self, spec: ModelSpec, card: Restrictions) -> None:
        channels, height, width = spec.input_shape
        size, self._classes = max(height, width), len(spec.classes)
        self._widths = [to_multiple(width, card.channel_multiple) for width in WIDTHS]
        stride = 1 if size <= 40 else 2 if size <= 96 else 4
        self._stem = LayerShape("conv", channels, self._widths[0], 3, stride, 1, size)

    @property
    def choices(self) -> tuple[int, ...]:
        return (len(OPERATIONS),) * len(EDGES)

    def layers(self, genome: Genome) -> tuple[LayerShape, ...]:
        edges = _student_edges(genome)
        made, size = [self._stem], self._stem.size_out
        for stage, width in enumerate(self._widths):
            if stage:
                before = self._widths[stage - 1]
                reduced = LayerShape("conv", before, width, 3, 2, 1, size)
                made += [reduced, LayerShape("conv", width, width, 3, size_in=reduced.size_out)]
                made.insert(-2, LayerShape("avgpool", before, before, 2, 2, size_in=size))
                made.insert(-2, LayerShape("conv", before, width, size_in=reduced.size_out))
                size = reduced.size_out
                made.append(LayerShape("add", width, width, size_in=size))
            made += _cell_layers(edges, width, size) * CELLS
        width = self._widths[-1]
        made.append(LayerShape("conv", width, width, groups=width, size_in=size, relu=True))
        return (*made, *head_layers(width, size, self._classes))

    def describe(self, genome: Genome) -> tuple[str, ...]:
        return (
            f"stem 3x3, {self._widths[0]} channels, stride {self._stem.stride}",
            *(f"{CELLS} cells of {width} channels: {architecture(genome)}" for width in self._widths),
            f"linear to {self._classes} classes",
        )

    def build(self, genome: Genome, rng: torch.Generator) -> nn.Module:
        edges = _student_edges(genome)
        body = network_body(self._stem, edges, self._widths)
        return with_weights(body, self._widths[-1], self._classes, rng)


def _student_edges(genome: Genome) -> Edges:
    return live(edges_of(architecture(genome))) or ((0, 3, "skip_connect"),)


def _cell_layers(edges: Edges, width: int, size: int) -> list[LayerShape]:
    made: list[LayerShape] = []
    for _, _, name in edges:
        if name.startswith("nor_conv"):
            made.append(LayerShape("conv", width, width, int(name[-1]), size_in=size))
        elif name == "avg_pool_3x3":
            made.append(LayerShape("avgpool", width, width, 3, size_in=size))
    additions = len(edges) - len({to for _, to, _ in edges})
    return made + [LayerShape("add", width, width, size_in=size)] * additions
