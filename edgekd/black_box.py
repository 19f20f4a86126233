"""What the graph of an ONNX classifier shows beside its logits: the classifier's input, the last maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgekd.files import write_bytes

_AFTER = ("Identity", "Softmax", "LogSoftmax", "Add", "Cast")  # between the classifier and the output
_FLATTENING = (
    "Flatten",
    "Reshape",
    "Squeeze",
    "GlobalAveragePool",
    "ReduceMean",
    "AveragePool",
    "Dropout",
    "Identity",
)


def inner_tensors(model: Any) -> dict[str, str]:
    """Names of the tensors ``embedding``, (N, D), and ``features``, (N, C, H, W); those that can be found.

    The classifier is the last product with a stored weight, with nothing behind it but a bias or a softmax;
    the features are the 4-D tensor that pooling and flattening made its input from.
    """
    makers = {name: node for node in model.graph.node for name in node.output}
    stored = {tensor.name for tensor in model.graph.initializer}
    sizes = _dimensions(model)
    node = makers.get(model.graph.output[0].name)
    while node is not None and node.op_type in _AFTER:
        node = next((makers[name] for name in node.input if name in makers), None)
    if node is None or node.op_type not in ("Gemm", "MatMul") or node.input[1] not in stored:
        return {}
    found: dict[str, str] = {}
    tensor = node.input[0]
    if sizes.get(tensor) == 2:
        found["embedding"] = tensor
    while sizes.get(tensor) != 4 or _pools(makers.get(tensor)):
        before = makers.get(tensor)
        if before is None or before.op_type not in _FLATTENING:
            return found
        tensor = before.input[0]
    return found | {"features": tensor}


def _pools(node: Any) -> bool:
    return node is not None and node.op_type in _FLATTENING


def _dimensions(model: Any) -> dict[str, int]:
    """How many axes each tensor has whose shape is known."""
    known = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    return {value.name: len(value.type.tensor_type.shape.dim) for value in known}


def cut_out(path: Path, folder: Path) -> dict[str, Path]:
    """Files in `folder` that end at each of `inner_tensors` of the file at `path`."""
    import onnx
    from onnx import shape_inference, utils

    model = shape_inference.infer_shapes(onnx.load(path))
    inputs, made = [value.name for value in model.graph.input], {}
    for part, tensor in inner_tensors(model).items():
        made[part] = folder / f"teacher-{part}.onnx"
        shorter = utils.Extractor(model).extract_model(inputs, [tensor])
        write_bytes(made[part], shorter.SerializeToString())
    return made
