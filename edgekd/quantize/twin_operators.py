"""ONNX operators (opset 13 to 22) in torch: ``f(attributes, inputs) -> output`` or a tuple of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import Tensor

from edgekd.errors import UnsupportedModelError

Attributes = dict[str, Any]
Inputs = Sequence[Any]  # Tensor, or None for an input that is left out
_TYPES = {
    TensorProto.FLOAT: torch.float32, TensorProto.DOUBLE: torch.float64, TensorProto.INT64: torch.int64,
    TensorProto.INT32: torch.int32, TensorProto.BOOL: torch.bool,
}  # fmt: skip


# Operators whose inputs but the first say how, not what; constants among them are passed as lists of numbers,
# so that a trace of the graph sees no tensors that shapes depend on.
DIRECTED = {
    "Clip", "Expand", "Pad", "ReduceMax", "ReduceMean", "ReduceSum", "Reshape", "Resize", "Slice", "Split",
    "Squeeze", "Unsqueeze",
}  # fmt: skip


def _list(value: Any) -> list[Any]:
    made = value.tolist() if isinstance(value, Tensor) else value
    return made if isinstance(made, list) else [made]


def _refuse(what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the graph has no torch form: {what}", "leave --qat out: post-training works"
    )


def _padded(a: Attributes, x: Tensor, axes: int, value: float = 0.0) -> tuple[Tensor, list[int]]:
    """The input with what torch cannot pad itself, and the padding that is left for torch."""
    if a.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise _refuse(f"auto_pad={a['auto_pad']}")
    pads = a.get("pads") or [0] * (2 * axes)
    before, after = pads[:axes], pads[axes:]
    if before == after:
        return x, list(before)
    flat = [part for pair in zip(reversed(before), reversed(after), strict=True) for part in pair]
    return F.pad(x, flat, value=value), [0] * axes


def _conv(a: Attributes, i: Inputs) -> Tensor:
    axes = i[1].dim() - 2
    x, padding = _padded(a, i[0], axes)
    run: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]
    bias = i[2] if len(i) > 2 else None
    ones = [1] * axes
    stride, dilation = a.get("strides", ones), a.get("dilations", ones)
    return run(x, i[1], bias, stride, padding, dilation, a.get("group", 1))


def _conv_transpose(a: Attributes, i: Inputs) -> Tensor:
    axes = i[1].dim() - 2
    pads = a.get("pads") or [0] * (2 * axes)
    if pads[:axes] != pads[axes:] or a.get("output_shape") or a.get("auto_pad", "NOTSET") != "NOTSET":
        raise _refuse("ConvTranspose with uneven padding or a given output shape")
    run: Callable[..., Tensor] = (F.conv_transpose1d, F.conv_transpose2d)[axes - 1]
    bias, ones, none = (i[2] if len(i) > 2 else None), [1] * axes, [0] * axes
    extra, dilation = a.get("output_padding", none), a.get("dilations", ones)
    return run(i[0], i[1], bias, a.get("strides", ones), pads[:axes], extra, a.get("group", 1), dilation)


def _gemm(a: Attributes, i: Inputs) -> Tensor:
    left = i[0].T if a.get("transA") else i[0]
    right = i[1].T if a.get("transB") else i[1]
    made: Tensor = a.get("alpha", 1.0) * (left @ right)
    return made if len(i) < 3 or i[2] is None else made + a.get("beta", 1.0) * i[2]


def _pool(a: Attributes, i: Inputs, largest: bool) -> Tensor:
    axes = i[0].dim() - 2
    kernel, ones = a["kernel_shape"], [1] * axes
    counted = bool(a.get("count_include_pad", 0))
    pads = a.get("pads") or [0] * (2 * axes)
    uneven = pads[:axes] != pads[axes:]
    if not largest and uneven and not counted:
        raise _refuse("AveragePool with uneven padding that is not counted")
    x, padding = _padded(a, i[0], axes, float("-inf") if largest else 0.0)
    stride, ceil = a.get("strides", ones), bool(a.get("ceil_mode", 0))
    if largest:
        widest: Callable[..., Tensor] = (F.max_pool1d, F.max_pool2d)[axes - 1]
        return widest(x, kernel, stride, padding, a.get("dilations", ones), ceil)
    mean: Callable[..., Tensor] = (F.avg_pool1d, F.avg_pool2d)[axes - 1]
    return mean(x, kernel, stride, padding, ceil, counted)


def _clip(a: Attributes, i: Inputs) -> Tensor:
    low, high = (_list(i[k])[0] if len(i) > k and i[k] is not None else None for k in (1, 2))
    return torch.clamp(i[0], low, high)


def _axes(a: Attributes, i: Inputs) -> list[int]:
    if len(i) > 1 and i[1] is not None:
        return [int(axis) for axis in _list(i[1])]
    return list(a.get("axes") or [])


def _reduce(run: Callable[..., Tensor]) -> Callable[[Attributes, Inputs], Tensor]:
    def reduce(a: Attributes, i: Inputs) -> Tensor:
        axes = _axes(a, i) or list(range(i[0].dim()))
        return run(i[0], axes, keepdim=bool(a.get("keepdims", 1)))

    return reduce


def _reshape(a: Attributes, i: Inputs) -> Tensor:
    shape = [int(size) for size in _list(i[1])]
    kept = [
        i[0].shape[axis] if size == 0 and not a.get("allowzero") else size for axis, size in enumerate(shape)
    ]
    made: Tensor = i[0].reshape(kept)
    return made


def _unsqueeze(a: Attributes, i: Inputs) -> Tensor:
    made: Tensor = i[0]
    axes = _axes(a, i)
    for axis in sorted(axis % (made.dim() + len(axes)) for axis in axes):
        made = made.unsqueeze(axis)
    return made


def _squeeze(a: Attributes, i: Inputs) -> Tensor:
    axes = _axes(a, i)
    made: Tensor = i[0].squeeze(axes) if axes else i[0].squeeze()
    return made


def _slice(a: Attributes, i: Inputs) -> Tensor:
    starts, ends = _list(i[1]), _list(i[2])
    axes = _list(i[3]) if len(i) > 3 and i[3] is not None else range(len(starts))
    steps = _list(i[4]) if len(i) > 4 and i[4] is not None else [1] * len(starts)
    cut: list[slice] = [slice(None)] * i[0].dim()
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if step < 0:
            raise _refuse("Slice with a negative step")
        cut[axis] = slice(start, end, step)
    made: Tensor = i[0][tuple(cut)]
    return made


def _split(a: Attributes, i: Inputs) -> tuple[Tensor, ...]:
    axis, count = a.get("axis", 0), a["outputs"]
    size = -(-i[0].shape[axis] // count)
    parts = _list(i[1]) if len(i) > 1 and i[1] is not None else size
    made: tuple[Tensor, ...] = torch.split(i[0], parts, axis)
    return made


def _gather(a: Attributes, i: Inputs) -> Tensor:
    axis, index = a.get("axis", 0) % i[0].dim(), i[1].long()
    index = torch.where(index < 0, index + i[0].shape[axis], index)
    shape = (*i[0].shape[:axis], *index.shape, *i[0].shape[axis + 1 :])
    return torch.index_select(i[0], axis, index.reshape(-1)).reshape(shape)


def _layer_norm(a: Attributes, i: Inputs) -> Tensor:
    shape = i[0].shape[a.get("axis", -1) :]
    bias = i[2] if len(i) > 2 else None
    return F.layer_norm(i[0], shape, i[1], bias, a.get("epsilon", 1e-5))


def _batch_norm(a: Attributes, i: Inputs) -> Tensor:
    return F.batch_norm(i[0], i[3], i[4], i[1], i[2], eps=a.get("epsilon", 1e-5))


def _pad(a: Attributes, i: Inputs) -> Tensor:
    if len(i) > 3 and i[3] is not None:
        raise _refuse("Pad of named axes")
    pads, count = _list(i[1]), i[0].dim()
    flat = [part for axis in reversed(range(count)) for part in (pads[axis], pads[axis + count])]
    value = float(_list(i[2])[0]) if len(i) > 2 and i[2] is not None else 0.0
    if a.get("mode", "constant") != "constant":
        if any(flat[4:]):
            raise _refuse(f"Pad by {a['mode']} of more than two axes")
        return F.pad(i[0], flat[:4], mode="replicate" if a["mode"] == "edge" else str(a["mode"]))
    return F.pad(i[0], flat, value=value)


def _resize(a: Attributes, i: Inputs) -> Tensor:
    mode, how = a.get("mode", "nearest"), a.get("coordinate_transformation_mode", "half_pixel")
    known = (mode == "nearest" and how == "asymmetric" and a.get("nearest_mode") == "floor") or (
        mode == "linear" and how in ("half_pixel", "pytorch_half_pixel", "align_corners")
    )
    given = i[3] if len(i) > 3 and i[3] is not None else None
    if given is not None:
        size = [int(part) for part in given.tolist()[2:]]
    else:
        size = [int(s * f) for s, f in zip(i[0].shape[2:], _list(i[2])[2:], strict=True)]
    whole = all(new % old == 0 for new, old in zip(size, i[0].shape[2:], strict=True))
    if mode == "nearest" and whole:
        return F.interpolate(i[0], size, mode="nearest")
    if not known or i[0].dim() != 4:
        raise _refuse(f"Resize by {mode}, {how}")
    if mode == "nearest":
        return F.interpolate(i[0], size, mode="nearest")
    return F.interpolate(i[0], size, mode="bilinear", align_corners=how == "align_corners")


def _cast(a: Attributes, i: Inputs) -> Tensor:
    if a["to"] not in _TYPES:
        raise _refuse(f"Cast to {TensorProto.DataType.Name(a['to'])}")
    made: Tensor = i[0].to(_TYPES[a["to"]])
    return made


def _gelu(a: Attributes, i: Inputs) -> Tensor:
    return F.gelu(i[0], approximate=a.get("approximate", "none"))


def _div(a: Attributes, i: Inputs) -> Tensor:
    whole = not i[0].dtype.is_floating_point
    return torch.div(i[0], i[1], rounding_mode="trunc" if whole else None)


def _constant(a: Attributes, i: Inputs) -> Tensor:
    for key, kind in (("value_int", torch.int64), ("value_ints", torch.int64), ("value_float", torch.float32),
                      ("value_floats", torch.float32)):  # fmt: skip
        if key in a:
            return torch.tensor(a[key], dtype=kind)
    made: Tensor = a["value"]
    return made


OPERATORS: dict[str, Callable[[Attributes, Inputs], Tensor | tuple[Tensor, ...]]] = {
    "Conv": _conv, "ConvTranspose": _conv_transpose, "Gemm": _gemm, "MatMul": lambda a, i: i[0] @ i[1],
    "Add": lambda a, i: i[0] + i[1], "Sub": lambda a, i: i[0] - i[1], "Mul": lambda a, i: i[0] * i[1],
    "Div": _div, "Pow": lambda a, i: i[0] ** i[1], "Sqrt": lambda a, i: torch.sqrt(i[0]),
    "Neg": lambda a, i: -i[0], "Abs": lambda a, i: torch.abs(i[0]), "Exp": lambda a, i: torch.exp(i[0]),
    "Log": lambda a, i: torch.log(i[0]), "Erf": lambda a, i: torch.erf(i[0]),
    "Relu": lambda a, i: torch.relu(i[0]), "Clip": _clip, "Tanh": lambda a, i: torch.tanh(i[0]),
    "LeakyRelu": lambda a, i: F.leaky_relu(i[0], a.get("alpha", 0.01)),
    "PRelu": lambda a, i: torch.where(i[0] < 0, i[0] * i[1], i[0]),
    "Elu": lambda a, i: F.elu(i[0], a.get("alpha", 1.0)),
    "Sigmoid": lambda a, i: torch.sigmoid(i[0]), "Softplus": lambda a, i: F.softplus(i[0]),
    "HardSigmoid": lambda a, i: torch.clamp(a.get("alpha", 0.2) * i[0] + a.get("beta", 0.5), 0, 1),
    "HardSwish": lambda a, i: F.hardswish(i[0]), "Mish": lambda a, i: F.mish(i[0]), "Gelu": _gelu,
    "Softmax": lambda a, i: torch.softmax(i[0], a.get("axis", -1)),
    "LogSoftmax": lambda a, i: torch.log_softmax(i[0], a.get("axis", -1)),
    "GlobalAveragePool": lambda a, i: i[0].mean(list(range(2, i[0].dim())), keepdim=True),
    "GlobalMaxPool": lambda a, i: torch.amax(i[0], list(range(2, i[0].dim())), keepdim=True),
    "AveragePool": lambda a, i: _pool(a, i, largest=False),
    "MaxPool": lambda a, i: _pool(a, i, largest=True),
    "ReduceMean": _reduce(torch.mean), "ReduceSum": _reduce(torch.sum), "ReduceMax": _reduce(torch.amax),
    "Flatten": lambda a, i: i[0].flatten(a.get("axis", 1)) if a.get("axis", 1) else i[0].reshape(1, -1),
    "Reshape": _reshape,
    "Transpose": lambda a, i: i[0].permute(a.get("perm") or list(range(i[0].dim()))[::-1]),
    "Squeeze": _squeeze, "Unsqueeze": _unsqueeze, "Concat": lambda a, i: torch.cat(list(i), a["axis"]),
    "Split": _split, "Slice": _slice, "Gather": _gather, "Pad": _pad, "Resize": _resize, "Cast": _cast,
    "Shape": lambda a, i: torch.tensor(i[0].shape[a.get("start", 0) : a.get("end")], dtype=torch.int64),
    "Expand": lambda a, i: i[0] * torch.ones([int(s) for s in _list(i[1])], dtype=i[0].dtype),
    "Where": lambda a, i: torch.where(i[0], i[1], i[2]), "Identity": lambda a, i: i[0],
    "Constant": _constant, "LayerNormalization": _layer_norm, "BatchNormalization": _batch_norm,
    "InstanceNormalization": lambda a, i: F.instance_norm(
        i[0], weight=i[1], bias=i[2], eps=a.get("epsilon", 1e-5)
    ),
}  # fmt: skip
