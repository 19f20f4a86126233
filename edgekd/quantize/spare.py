"""Layers of a captured network that are left in float because integers break them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from edgekd.quantize.fakequant import Sites
from edgekd.quantize.sensitivity import Sensitivity, rank, shortest_prefix


def without(sites: Sites, weights: Collection[str], layers: dict[str, str]) -> Sites:
    """The sites with the layers of these weights in float. A tensor that nothing else reads is not quantized
    either; one that others read stays as it is stored for them.

    Args:
        layers: the node of each weight's layer, by weight.
    """
    floats = {layers[name] for name in weights}
    kept = {name: readers for name, readers in sites.activations.items() if set(readers) - floats}
    roots = {sites.same_as[name] for name in kept if name in sites.same_as}
    kept |= {name: sites.activations[name] for name in roots}
    return replace(
        sites,
        activations={name: kept[name] for name in sites.activations if name in kept},
        same_as={name: root for name, root in sites.same_as.items() if name in kept},
        weights=tuple(name for name in sites.weights if name not in weights),
    )


def layer_of(sites: Sites) -> dict[str, str]:
    """The node of each quantized weight's layer."""
    return {
        name: node
        for node, origin in sites.origins.items()
        for name in origin.parameters
        if name in sites.weights
    }


def sensitivity_of(
    sites: Sites, damage: Callable[[Sites], float], step: Callable[[str, int, int], None]
) -> tuple[Sensitivity, ...]:
    """What leaving each layer alone in float heals of the `damage` of all in integers."""
    layers, whole, found = layer_of(sites), damage(sites), []
    for number, name in enumerate(sites.weights):
        step("sensitivity", number, len(sites.weights))
        found.append(Sensitivity(name, "layer", whole - damage(without(sites, [name], layers))))
    step("sensitivity", len(found), len(found))
    return tuple(found)


def spare_layers(
    sites: Sites, healed: Sequence[Sensitivity], good_enough: Callable[[Sites], bool]
) -> Sites | None:
    """The sites with the fewest layers in float that are good enough, None where none are."""
    layers = layer_of(sites)
    ordered = rank(healed)[:-1]  # one layer at least stays in integers
    if not ordered:
        return None
    count = shortest_prefix(ordered, lambda floats: good_enough(without(sites, floats, layers)))
    return None if count is None else without(sites, ordered[:count], layers)
