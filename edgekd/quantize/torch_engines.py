"""Quantizers of torch modules, for a comparison: they read the graph in its torch form, and what they make is
exported again. What they do is their own: patterns, ranges and rounding as their documentation has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from edgekd.errors import missing_extra
from edgekd.quantize.observe import Batches
from edgekd.quantize.onnx_file import HIGHEST_OPSET, FloatModel
from edgekd.quantize.twin import Twin, attributes_of
from edgekd.quantize.twin_operators import Attributes


def torchao(model: FloatModel, batches: Batches) -> onnx.ModelProto:
    """torchao's PT2E static quantization with its x86 quantizer: u8 activations, s8 weights per channel."""
    try:
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    except ImportError as error:
        raise missing_extra("torchao", "torchao", "the engine 'torchao'") from error
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())

    def prepare(twin: nn.Module, example: Tensor, shapes: Any) -> Any:
        program = torch.export.export(twin, (example,), dynamic_shapes=shapes)
        return prepare_pt2e(program.module(check_guards=False), quantizer)

    return _quantized(model, batches, prepare, lambda made: convert_pt2e(made, fold_quantize=True))


def neural_compressor(model: FloatModel, batches: Batches) -> onnx.ModelProto:
    """neural-compressor's static quantization of an exported program. Its public `convert` leaves the weights
    in float behind a Q node (3.10); the converter below it folds them."""
    try:
        from neural_compressor.torch.algorithms.pt2e_quant.core import W8A8PT2EQuantizer
        from neural_compressor.torch.export import export
        from neural_compressor.torch.quantization import StaticQuantConfig
        from neural_compressor.torch.quantization import prepare as prepare_static
    except ImportError as error:
        raise missing_extra(
            "neural-compressor", "neural-compressor", "the engine 'neural-compressor'"
        ) from error

    def prepare(twin: nn.Module, example: Tensor, shapes: Any) -> Any:
        program = export(twin, (example,), dynamic_shapes=shapes)
        return prepare_static(program, StaticQuantConfig(act_dtype="uint8"), example_inputs=(example,))

    def convert(made: Any) -> Any:
        return W8A8PT2EQuantizer(None).convert(made, fold_quantize=True)

    return _quantized(model, batches, prepare, convert)


class _InModules(Twin):
    """The torch form with its convolutions, linear layers and rectifiers as modules: quantizers for torch
    find their patterns by the types of modules."""

    def __init__(self, model: FloatModel) -> None:
        super().__init__(model.model)
        self.layers, values = nn.ModuleDict(), model.values
        self._layer_of: dict[str, str] = {}
        for number, node in enumerate(self.nodes):
            made = _module(node, values)
            if made is not None:
                self.layers[str(number)] = made
                self._layer_of[node.name] = str(number)

    def run(self, node: onnx.NodeProto, attributes: Attributes, given: list[Any]) -> Any:
        if node.name in self._layer_of:
            return self.layers[self._layer_of[node.name]](given[0])
        return super().run(node, attributes, given)


def _module(node: onnx.NodeProto, values: Mapping[str, NDArray[Any]]) -> nn.Module | None:
    """The module of a node that is exactly one; None for any other."""
    a = attributes_of(node)
    stored = [torch.from_numpy(np.array(values[name])) if name in values else None for name in node.input]
    if node.op_type == "Relu":
        return nn.ReLU()
    if node.op_type == "Clip" and [None if v is None else float(v) for v in stored[1:]] == [0.0, 6.0]:
        return nn.ReLU6()
    weight = stored[1] if len(stored) > 1 else None
    bias = stored[2] if len(stored) > 2 else None
    if node.op_type == "Conv" and weight is not None and weight.dim() == 4:
        pads = a.get("pads", [0] * 4)
        if pads[:2] != pads[2:] or a.get("auto_pad", "NOTSET") != "NOTSET":
            return None
        group, ones = a.get("group", 1), [1, 1]
        shape = (weight.shape[2], weight.shape[3])
        conv = nn.Conv2d(
            weight.shape[1] * group, weight.shape[0], shape, a.get("strides", ones), pads[:2],
            a.get("dilations", ones), group, bias=bias is not None,
        )  # fmt: skip
        return _filled(conv, weight, bias)
    plain = not a.get("transA") and a.get("alpha", 1.0) == 1 == a.get("beta", 1.0)
    if node.op_type in ("Gemm", "MatMul") and weight is not None and weight.dim() == 2 and plain:
        rows = weight if a.get("transB") else weight.T.contiguous()
        return _filled(nn.Linear(rows.shape[1], rows.shape[0], bias is not None), rows, bias)
    return None


def _filled(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer.weight.data.copy_(weight)
    if bias is not None and layer.bias is not None:
        layer.bias.data.copy_(bias)
    return layer


def _quantized(
    model: FloatModel,
    batches: Batches,
    prepare: Callable[[nn.Module, Tensor, Any], Any],
    convert: Callable[[Any], Any],
) -> onnx.ModelProto:
    """Prepare, run the calibration samples, convert, export under the names of the graph.

    Raises:
        UnsupportedModelError: the graph has no torch form.
    """
    name = model.inputs[0].name
    inputs = [torch.from_numpy(np.ascontiguousarray(feeds[name])) for feeds in batches()]
    free = None if model.batch else ({0: torch.export.Dim("batch", min=1, max=4096)},)
    twin = _InModules(model).eval().requires_grad_(requires_grad=False)
    with torch.no_grad():
        prepared = prepare(twin, inputs[0], free)
        for batch in inputs:
            prepared(batch)
        program = torch.export.export(convert(prepared), (inputs[0],), dynamic_shapes=free)
        made = torch.onnx.export(
            program, (), dynamo=True, opset_version=min(HIGHEST_OPSET, 21), external_data=False,
            input_names=[name], output_names=[model.outputs[0].name], verbose=False,
        )  # fmt: skip
    assert made is not None
    written: onnx.ModelProto = made.model_proto
    return written
