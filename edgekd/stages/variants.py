"""Which files a target's bundle holds, and on which runtime each of them runs here."""

from __future__ import annotations

from dataclasses import dataclass

from edgekd.quantize.scheme import scheme_for
from edgekd.target import Target

X86, ARM = ("x86_64", "AMD64"), ("aarch64", "arm64")


@dataclass(frozen=True)
class Planned:
    """A file of ``5-export`` on a runtime; `precision` is that of the operators not quantized in the file.

    `runs_here` is False for files that only another machine can run. `arch` empty means any.
    """

    id: str
    backend: str
    file: str
    precision: str = "f32"
    arch: tuple[str, ...] = ()
    requires_cpu_flags: tuple[str, ...] = ()
    runs_here: bool = True
    on_device_build: bool = False

    @property
    def quantized(self) -> bool:
        return self.file != "float.onnx"


def planned_variants(target: Target, quantized: bool, bfloat16: bool) -> tuple[Planned, ...]:
    """All variants for a target, quantized ones first.

    int8 graphs differ by runtime: TensorRT takes int8 activations; ONNX Runtime uint8, on arm64 either;
    OpenVINO has a form of its own (`edgekd.quantize.lower`).
    `bfloat16`: this machine's OpenVINO runs bf16 natively.
    """
    plans: list[Planned] = []
    if quantized:
        scheme = scheme_for(target)
        # 8-bit weights times 8-bit activations saturate in 16-bit sums on x86 without VNNI.
        vnni = "avx_vnni" if "avx_vnni" in target.detect.cpu_flags else "avx512_vnni"
        safe = () if scheme.weight_max < 127 else (vnni,)
        if target.device_class == "nvidia-jetson":
            plans.append(
                Planned(
                    "tensorrt-int8", "tensorrt", "int8.onnx", arch=ARM, runs_here=False, on_device_build=True
                )
            )
        if target.device_class in ("nvidia-jetson", "arm-cpu"):
            # A symmetric grid needs the codes between convolution and ReLU that uint8.onnx has: without them
            # ONNX Runtime leaves the convolution in float on aarch64 too.
            file = "uint8.onnx" if scheme.symmetric else "int8.onnx"
            plans.append(Planned("onnxruntime-arm64-int8", "onnxruntime", file, arch=ARM, runs_here=False))
        plans.append(Planned("openvino-int8", "openvino", "openvino.onnx", "f32", X86, safe))
        plans.append(Planned("onnxruntime-int8", "onnxruntime", "uint8.onnx", "f32", X86, safe))
    if bfloat16:
        plans.append(Planned("openvino-bf16", "openvino", "float.onnx", "bf16", X86, ("avx512_bf16",)))
    plans.append(Planned("openvino-f32", "openvino", "float.onnx"))
    plans.append(Planned("onnxruntime-f32", "onnxruntime", "float.onnx"))
    return tuple(plans)
