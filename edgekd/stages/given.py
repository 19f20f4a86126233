"""Stage 2 without a search: the student is given, checked against the data, and written down."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from edgekd import export
from edgekd.cost import CostModel
from edgekd.errors import ParityError, StudentError, UnsupportedModelError
from edgekd.files import write_json
from edgekd.nets import count_macs, count_parameters, layer_shapes
from edgekd.quantize.capture import capture
from edgekd.quantize.fakequant import calibrate, find_sites, insert, parameters_of
from edgekd.quantize.lower import FORMS, lower
from edgekd.quantize.scheme import scheme_for
from edgekd.run import fingerprint
from edgekd.search import Candidate
from edgekd.spec import LayerShape
from edgekd.stages.bench import Bench
from edgekd.stages.search import budget_limits, cost_facts, executed_precision, predictor, quantize_mode
from edgekd.stages.student import Blueprint, given_blueprint
from edgekd.tasks.classification import normalise, to_tensor

_REHEARSED_IMAGES = 32
_BYTES = {"fp32": 4, "int8": 1}


def run(bench: Bench) -> dict[str, Any]:
    """Metric `search` without candidates; leaves ``2-student.json``.

    Raises:
        StudentError: it cannot be built, or does not fit the images or classes.
        UnsupportedModelError: a later stage could not trace, export or quantize it.
    """
    source = bench.recipe.search.student
    blueprint = given_blueprint(source)
    student = build_student(bench, blueprint, source)
    check_shape(student, bench, source)
    if blueprint.factory:
        _rehearse(bench, student)
    model = predictor(bench, blueprint.space)
    try:
        candidate, reason = cost_of(bench, blueprint, student, model)
        limits = budget_limits(bench, model)
    finally:
        model.close()
    costs = {
        "parameters": candidate.parameters,
        "macs": candidate.macs,
        "latency_ms": candidate.latency_ms,
        "size_mib": candidate.size_mib,
    }
    _write(bench, blueprint, student, costs)
    excess = candidate.excess(limits)
    latency = (
        f"latency unknown: {reason}"
        if candidate.latency_ms is None
        else f"{candidate.latency_ms:.4f} ms predicted ({model.kind})"
    )
    bench.run.reporter.say(
        f"  student {source}: {candidate.parameters:,} parameters, {candidate.macs / 1e6:.2f} MMACs, "
        f"{latency}; given, not searched"
    )
    if excess:
        parts = ", ".join(f"{name} by {100 * share:.0f} %" for name, share in excess.items())
        bench.run.reporter.say(f"  a search would not have taken it; beyond its budget: {parts}")
    return {
        "search": {
            "score": None,
            "evaluated": 0,
            "dropped": 0,
            **cost_facts(model, limits),
            "given": {"source": source, **costs, "excess": excess, "reason": reason},
            "candidates": [],
            "chosen": None,
            "by_macs": None,
            "by_parameters": None,
            "latency_measured_ms": None,
            "latency_measured_on": None,
            "built_parameters": count_parameters(student),
        },
        "_unverified": list(model.unverified),
    }


def build_student(bench: Bench, blueprint: Blueprint, source: str) -> nn.Module:
    """The network; a genome is checked against its space first.

    Raises:
        StudentError: the genome belongs to a space for another input size.
    """
    if not blueprint.factory:
        choices = bench.space_of(blueprint).choices
        genome = blueprint.genome
        fits = len(genome) == len(choices) and all(
            0 <= gene < options for gene, options in zip(genome, choices, strict=True)
        )
        if not fits:
            height, width, _ = bench.data.shape
            raise StudentError(
                f"student {source}: the genome {list(genome)} is none of the space "
                f"'{blueprint.space}' for images of {height} x {width} pixels, whose genes have "
                f"{list(choices)} options",
                "use the space and the image size that it was found for (search.space, data.image_size)",
            )
    return bench.untrained(blueprint)


def check_shape(student: nn.Module, bench: Bench, source: str) -> None:
    """Two blank images through the network in eval mode.

    Raises:
        StudentError: it refuses them, or does not answer with (2, classes) logits.
    """
    classes, shape = len(bench.spec.classes), (2, *bench.spec.input_shape)
    try:
        with torch.inference_mode():
            logits: object = copy.deepcopy(student).eval()(torch.zeros(shape))
    except Exception as error:  # the user's code may raise anything
        first = (str(error).splitlines() or [""])[0]
        raise StudentError(
            f"student '{source}' refuses float32 images of shape {shape}: {type(error).__name__}: {first}",
            "it must take (N, C, H, W) of the data; --image-size changes H and W",
        ) from error
    if not isinstance(logits, Tensor):
        raise StudentError(
            f"student '{source}' returns {type(logits).__name__}, expected a tensor of logits",
            "return the logits alone, without auxiliary outputs",
        )
    if tuple(logits.shape) != (2, classes) or not logits.is_floating_point():
        raise StudentError(
            f"student '{source}' answers two images with {logits.dtype} of shape {tuple(logits.shape)}, "
            f"expected logits of shape (2, {classes}); the data has {classes} classes: "
            + ", ".join(bench.spec.classes[:12]),
            f"give its last layer {classes} outputs",
        )


def _rehearse(bench: Bench, student: nn.Module) -> None:
    """Trace, export and quantize the untrained network, so that no training is spent on one that a later
    stage refuses.

    Raises:
        UnsupportedModelError: what stage 4 or 5 would say.
    """
    trial = copy.deepcopy(student)
    _unsettle(trial, bench.recipe.seed)
    graph = capture(trial, bench.spec.input_shape)
    float_model = export.to_onnx(graph, bench.spec)
    if quantize_mode(bench) == "none":
        return
    scheme = scheme_for(bench.run.target)
    sites = find_sites(graph, scheme)
    images = to_tensor(bench.data.train_images[:_REHEARSED_IMAGES])
    grids = calibrate(graph, sites, [normalise(images, bench.spec.preprocessing)], scheme, "min-max")
    parameters = parameters_of(insert(graph, sites, grids, scheme), sites)
    try:
        for form in FORMS:
            lower(float_model, parameters, sites, form, split_relu=scheme.symmetric and form == "uint8")
    except ParityError as error:
        raise UnsupportedModelError(
            f"student '{bench.recipe.search.student}' cannot be quantized: {error.message}",
            "--quantize none ships it in float",
        ) from error


def _unsettle(model: nn.Module, seed: int) -> None:
    """Offsets as after training: exporters drop those that are exactly zero, as fresh ones are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if value.is_floating_point() and name.rpartition(".")[2] in ("bias", "running_mean"):
                value.add_(torch.rand(value.shape, generator=generator), alpha=0.01)


def cost_of(
    bench: Bench, blueprint: Blueprint, student: nn.Module, model: CostModel
) -> tuple[Candidate, str]:
    """What it costs, and why its latency is not known where it is not.

    The cost model knows convolutions and linear layers. Where they are not nearly all of the network, its
    sum would be too low, so there is none.
    """
    shape = bench.spec.input_shape
    if not blueprint.factory:
        layers = bench.space_of(blueprint).layers(blueprint.genome)
        cost = model.predict(layers)
        parameters, macs = (sum(getattr(x, key) for x in layers) for key in ("parameters", "macs"))
        reason = "" if cost.latency_ms is not None else model.note
        return Candidate(blueprint.genome, parameters, macs, cost.latency_ms, cost.size_mib, terms={}), reason
    macs, parameters = count_macs(student, shape), count_parameters(student)
    layers = layer_shapes(copy.deepcopy(student), shape)
    size = parameters * _BYTES[executed_precision(bench)] / 2**20
    if not _covers(layers, student, macs):
        reason = "not nearly all of it are convolutions of square kernels and linear layers of one vector"
        return Candidate((), parameters, macs, None, size, terms={}), reason
    latency = model.predict(layers).latency_ms
    return Candidate((), parameters, macs, latency, size, terms={}), "" if latency is not None else model.note


def _covers(layers: tuple[LayerShape, ...], student: nn.Module, macs: int) -> bool:
    """Whether the listed layers are the network: its multiply-accumulates and its weight matrices."""
    mine = [m for m in student.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    listed = sum(module.weight.numel() for module in mine)
    matrices = sum(p.numel() for p in student.parameters() if p.dim() > 1)
    return (
        macs > 0 and abs(sum(layer.macs for layer in layers) / macs - 1) <= 0.05 and listed >= 0.95 * matrices
    )


def _write(bench: Bench, blueprint: Blueprint, student: nn.Module, costs: dict[str, Any]) -> None:
    """``2-student.json``, which `search.student` of another run reads."""
    if blueprint.factory:
        # The digest of the code keeps a checkpoint of other code from being continued.
        named: dict[str, Any] = {
            "factory": blueprint.factory,
            "source_sha256": fingerprint(blueprint.factory),
        }
        described = _describe(layer_shapes(copy.deepcopy(student), bench.spec.input_shape))
    else:
        restrictions = bench.run.target.space
        named = {
            "space": blueprint.space,
            "genome": list(blueprint.genome),
            "channel_multiple": blueprint.channel_multiple or int(float(restrictions.channel_multiple.value)),
            "kernels": list(blueprint.kernels or restrictions.kernels),
            "forbidden_ops": list(
                blueprint.forbidden_ops if blueprint.kernels else restrictions.forbidden_ops
            ),
        }
        described = list(bench.space_of(blueprint).describe(blueprint.genome))
    write_json(bench.run.folder / "2-student.json", {**named, "architecture": described, "candidate": costs})


def _describe(layers: tuple[LayerShape, ...]) -> list[str]:
    """One line a convolution or linear layer, for people."""
    lines = []
    for layer in layers:
        kind = f"conv {layer.kernel}x{layer.kernel}" if layer.op == "conv" else layer.op
        extra = f", stride {layer.stride}" if layer.stride > 1 else ""
        extra += f", {layer.groups} groups" if layer.groups > 1 else ""
        lines.append(f"{kind}, {layer.channels_in} to {layer.channels_out} channels{extra}")
    return lines
