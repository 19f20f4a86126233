"""Files of students without training, whose latency is that of trained ones."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from edgekd.blocks import deployed
from edgekd.export import save, to_onnx
from edgekd.nets import evaluate
from edgekd.quantize.capture import capture
from edgekd.quantize.fakequant import calibrate, find_sites, insert, parameters_of
from edgekd.quantize.lower import FORMS, Form, lower
from edgekd.quantize.scheme import scheme_for
from edgekd.spec import ModelSpec
from edgekd.stages.variants import planned_variants
from edgekd.target import Target


def form_for(target: Target) -> Form:
    """The form of the quantized file that the target's first runtime is given."""
    files = {
        plan.backend: plan.file for plan in reversed(planned_variants(target, True, False)) if plan.quantized
    }
    return next(form for form in FORMS if files[target.primary.runtime] == f"{form}.onnx")


def write_network(network: nn.Module, target: Target, spec: ModelSpec, precision: str, path: Path) -> None:
    """A student with fresh weights as it is deployed: float, or ("int8") quantized on random images for the
    target. `network` is changed."""
    shape = spec.input_shape
    images = torch.randn(16, *shape, generator=torch.Generator().manual_seed(0))
    for module in network.modules():  # maps as after training, or attention is slow: it gives denormal shares
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():  # offsets too: exporters drop those that are exactly zero
        network.train()(images)
        for bias in (value for name, value in network.named_parameters() if name.endswith("bias")):
            bias.add_(0.01)
    network = deployed(network.eval())
    if precision != "int8":
        save(to_onnx(network, spec), path)
        return
    scheme, graph = scheme_for(target), capture(network, shape)
    sites = find_sites(graph, scheme)
    ranges = calibrate(graph, sites, [images], scheme, "min-max")
    quantized = insert(graph, sites, ranges, scheme).eval()
    evaluate(quantized, images)
    form = form_for(target)
    split = scheme.symmetric and form == "uint8"
    save(lower(to_onnx(graph, spec), parameters_of(quantized, sites), sites, form, split_relu=split), path)
