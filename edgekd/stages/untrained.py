"""Files of students without training, whose latency is that of trained ones."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from edgekd.blocks import deployed
from edgekd.export import save, to_onnx
from edgekd.layer_files import codes_of
from edgekd.nets import evaluate
from edgekd.quantize.capture import capture
from edgekd.quantize.fakequant import calibrate, find_sites, insert, parameters_of
from edgekd.quantize.lower import lower
from edgekd.quantize.scheme import scheme_for
from edgekd.spec import ModelSpec
from edgekd.target import Target


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
    kind: Literal["uint8", "int8"] = "uint8" if codes_of(target).dtype == np.uint8 else "int8"
    save(lower(to_onnx(graph, spec), parameters_of(quantized, sites), sites, kind), path)
