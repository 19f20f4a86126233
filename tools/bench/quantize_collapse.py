"""Does a distilled student collapse in int8 where a plain one does not? (lightly-ai/lightly-train#500)

Called by `quantize.py collapse`: one student with the same first weights, images and order, trained on
labels, by `kd` and by `dkd`; then what quantization takes from each, what quantization-aware training by the
same teacher gives back, and how far the ranges of each are from even.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import numpy as np
import torch
from quantize_networks import DEVICE, RATES, Data, accuracy, given_residual, network, read, stage
from torch import Tensor, fx

from edgekd.distillers import methods
from edgekd.plan import Plan
from edgekd.quantize.capture import attribute, capture
from edgekd.quantize.fakequant import (
    Sites,
    activations_of,
    calibrate,
    find_sites,
    insert,
    largest_codes,
)
from edgekd.quantize.scheme import scheme_for
from edgekd.target import find_target
from edgekd.tasks.classification import normalise
from edgekd.train import evaluate, fit
from edgekd.views import CachedTeacher, Views

_VIEWS = 8  # different views whose logits are stored
_TAIL = 0.999


def collapse(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a student, way of training and seed; accuracies 0 to 1."""
    data = read(arguments.shared, arguments.train, arguments.test)
    shape, preprocessing = data.spec.input_shape, data.spec.preprocessing
    answers = capture(given_residual(arguments.shared), shape).to(DEVICE)
    augmented = Views(data.images, preprocessing, "crop-flip", _VIEWS, 0, DEVICE)
    plain = Views(data.images, preprocessing, "none", 1, 0, DEVICE)
    teachers = {
        views: CachedTeacher(lambda inputs: evaluate(answers, inputs), views) for views in (augmented, plain)
    }
    rows = []
    for name in [one for one in arguments.networks if one in ("depthwise", "residual")]:
        for seed in arguments.seed_list:
            for way in ("labels", "kd", "dkd"):
                torch.manual_seed(seed)
                model = network(name, data)
                graphed = DEVICE == "cuda"
                run = stage(
                    model, augmented, data.labels, None if way == "labels" else teachers[augmented],
                    epochs=arguments.epochs, batch_size=128, learning_rate=RATES[name], seed=seed,
                    plan=Plan(channels_last=False, device=DEVICE, graphed=graphed),
                )  # fmt: skip
                if way != "labels":
                    run.distillers = methods(way)
                fit(run, lambda *_: None)
                graph = capture(model.eval(), shape)
                found = {"network": name, "seed": seed, "way": way, "float": accuracy(graph, data)}
                taught = stage(
                    graph,
                    plain,
                    data.labels,
                    teachers[plain],
                    epochs=1,
                    learning_rate=arguments.rate,
                    seed=seed,
                )
                rows.append(found | _quantized(graph, data, taught))
                print(rows[-1], file=sys.stderr)
    return rows


def _quantized(graph: fx.GraphModule, data: Data, taught: Any) -> dict[str, Any]:
    """Accuracy without training, at 8 bits by each calibrator and at 4; and after `taught` at both."""
    scheme = scheme_for(find_target("x86"))
    sites = find_sites(graph, scheme)
    inputs = list(normalise(data.images[:512], data.spec.preprocessing).split(128))
    found: dict[str, Any] = ranges(graph, sites, inputs)
    grids = {}
    for calibrator in ("min-max", "mse"):
        grids = calibrate(graph, sites, inputs, scheme, calibrator)
        found[f"8 bits, {calibrator}"] = accuracy(insert(graph, sites, grids, scheme), data)
    for bits in (8, 4):
        model = insert(graph, sites, grids, scheme, largest_codes(graph, sites, scheme, bits, {}))
        if bits == 4:
            found["4 bits, mse"] = accuracy(model, data)
        taught.model = model
        fit(taught, lambda *_: None)
        found[f"{bits} bits, trained by the teacher"] = accuracy(model, data)
    return found


def ranges(graph: fx.GraphModule, sites: Sites, inputs: list[Tensor]) -> dict[str, float]:
    """`tail`: the largest magnitude of an activation over its 99.9th percentile, the largest of all tensors;
    `weights`: the same of a layer's channels, the largest over the median; `logits`: their range."""
    values: dict[str, list[Tensor]] = {}
    for tensors in activations_of(graph, list(sites.activations), inputs):
        for name, tensor in tensors.items():
            values.setdefault(name, []).append(tensor.abs().flatten())
    tails = [_tail(torch.cat(parts)) for parts in values.values()]
    weights = []
    for name in sites.weights:
        reach = attribute(graph, name).detach().abs().flatten(1).amax(1)
        weights.append(float(reach.max() / reach.median().clamp(min=1e-8)))
    logits = evaluate(graph, torch.cat(inputs))
    return {"tail": max(tails), "weights": max(weights), "logits": float(logits.max() - logits.min())}


def _tail(values: Tensor) -> float:
    held = values.cpu().numpy()
    return float(held.max() / max(np.quantile(held, _TAIL), 1e-8))
