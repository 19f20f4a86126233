"""Stage 5: from torch to a float ONNX file that carries its own preprocessing and classes."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from pathlib import Path

import onnx
import torch
from onnx import helper
from torch import fx

from edgekd.errors import UnsupportedModelError
from edgekd.files import write_bytes
from edgekd.quantize.means import pool_in_one_node
from edgekd.spec import ModelSpec

OPSET = 21  # 22 at most: from 23 on attention becomes one node that TensorRT has no kernel for


def to_onnx(graph: fx.GraphModule | torch.nn.Module, spec: ModelSpec) -> onnx.ModelProto:
    """A checked float ONNX model with a free batch axis. Tensors keep the names of the traced graph.

    Raises:
        UnsupportedModelError: an operator has no ONNX form.
    """
    example = torch.zeros(2, *spec.input_shape)
    batch = torch.export.Dim("batch", min=1, max=65536)
    chatter = logging.getLogger("torch.onnx")
    level = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # of the exporter's own internals
            program = torch.export.export(graph, (example,), dynamic_shapes=({0: batch},))
            exported = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=OPSET,
                external_data=False,
                input_names=[spec.input_name],
                output_names=[spec.output_name],
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError, ValueError) as error:
        raise UnsupportedModelError(
            f"the network cannot be exported: {str(error).splitlines()[0]}"
        ) from error
    finally:
        chatter.setLevel(level)
    assert exported is not None
    model: onnx.ModelProto = exported.model_proto
    pool_in_one_node(model)
    _strip(model)
    describe(model, spec)
    onnx.checker.check_model(model, full_check=True)
    return model


def _strip(model: onnx.ModelProto) -> None:
    """Drop the exporter's traces, which hold paths of this machine, and constants nobody reads."""
    graph = model.graph
    for part in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    del graph.metadata_props[:], graph.value_info[:]
    read = {name for node in graph.node for name in node.input}
    unused = [tensor for tensor in graph.initializer if tensor.name not in read]
    for tensor in unused:
        graph.initializer.remove(tensor)
    del model.metadata_props[:]


def describe(model: onnx.ModelProto, spec: ModelSpec) -> None:
    """Write task, preprocessing and classes into the file, so that it is usable alone."""
    p = spec.preprocessing
    helper.set_model_props(
        model,
        {
            "task": "image-classification",
            "labels": json.dumps(list(spec.classes)),
            "preprocess": json.dumps(
                {
                    "resize": [p.height, p.width],
                    "mode": p.mode,
                    "color": p.color,
                    "scale": p.scale,
                    "mean": list(p.mean),
                    "std": list(p.std),
                }
            ),
        },
    )
    model.producer_name = "edgekd"


def save(model: onnx.ModelProto, path: Path) -> None:
    """Write an ONNX file atomically."""
    write_bytes(path, model.SerializeToString(deterministic=True))
