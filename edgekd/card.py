"""The types of a target card (TOML, schema version 1), as ``docs/targets.md`` describes them."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Confidence = Literal["primary", "measured", "policy", "unverified"]
RuntimeName = Literal["onnxruntime", "openvino", "tensorrt", "onnxruntime-web"]
DeviceClass = Literal["nvidia-jetson", "arm-cpu", "x86-cpu", "browser", "intel-gpu", "intel-npu"]
Op = Literal["relu6", "hardswish", "silu", "gelu", "squeeze-excite", "depthwise", "concat"]
Dialect = Literal["trt-s8sym", "x86-u8-relu0", "openvino-u8", "arm-s8", "none"]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Quantity(_Strict, frozen=True):
    """A number or a version with its provenance."""

    value: float | str
    source: str
    confidence: Confidence
    mode: str = ""
    sparse: bool = False
    shape: str = ""
    derivation: str = ""


class Detect(_Strict, frozen=True):
    """What recognises the device: the device tree, or all CPU flags together with the CPU model."""

    source: str = ""
    confidence: Confidence = "unverified"
    devicetree_model: str = ""
    module_ids: tuple[str, ...] = ()
    cpu_flags: tuple[str, ...] = ()
    cpu_model: str = ""
    cuda_capability: Quantity | None = None


class Memory(_Strict, frozen=True):
    unified: bool
    model_budget_mb: Quantity
    capacity_mb: Quantity | None = None


class Compute(_Strict, frozen=True):
    """One processing unit; the first of a card is the preferred one."""

    unit: Literal["cpu", "gpu", "npu", "dla", "wasm"]
    runtime: RuntimeName
    precisions: tuple[str, ...]
    precisions_source: str
    precisions_confidence: Confidence
    threads: int = 1
    isa: tuple[str, ...] = ()
    isa_source: str = ""
    isa_confidence: Confidence = "unverified"
    unsupported: tuple[str, ...] = ()
    facts: dict[str, Quantity] = {}
    peak: dict[str, Quantity] = {}
    achieved: dict[str, Quantity] = {}
    bandwidth: dict[str, Quantity] = {}


class TensorScheme(_Strict, frozen=True):
    """How one kind of tensor is quantized."""

    dtype: Literal["int8", "uint8"]
    symmetric: bool
    granularity: Literal["per-channel", "per-tensor"]
    zero_point: int | None = None
    relu_zero_point: int | None = None
    reduce_range: bool = False


class Quant(_Strict, frozen=True):
    dialect: Dialect
    weights: TensorScheme
    activations: TensorScheme
    source: str
    confidence: Confidence


class Space(_Strict, frozen=True):
    """What the target asks of the student's architecture."""

    channel_multiple: Quantity
    kernels: tuple[int, ...] = (3, 5)
    forbidden_ops: tuple[Op, ...] = ()
    source: str = ""


class Runtime(_Strict, frozen=True):
    options: dict[str, Any] = {}
    ep: tuple[tuple[str, dict[str, Any]], ...] = ()
    device: str = ""
    version_min: Quantity | None = None
    platform_min: Quantity | None = None
    build_on_device: bool = False
    forbid_quant: tuple[str, ...] = ()
    notes: str = ""


class Emulation(_Strict, frozen=True):
    arch: str
    qemu_cpu: str
    qemu_min: Quantity


class Check(_Strict, frozen=True):
    emulation: Emulation | None = None


class Measure(_Strict, frozen=True):
    clock: Literal["cpu", "wall", "device-events"]
    transport: Literal["local", "ssh", "adb", "chromium"]
    prepare: tuple[str, ...] = ()
    sensors: tuple[str, ...] = ()
    max_cv_percent: Quantity | None = None
    reject_if: dict[str, bool | Quantity] = {}


class Calibration(_Strict, frozen=True):
    measured_on: str = ""
    layer_lut: str = ""


class Target(_Strict, frozen=True):
    """A target card. `id` equals the file's stem; `aliases` are short names for ``--target``."""

    schema: Literal[1]
    id: str
    device_class: DeviceClass = msgspec.field(name="class")
    description: str
    detect: Detect
    memory: Memory
    compute: tuple[Compute, ...]
    quant: Quant
    space: Space
    runtime: dict[str, Runtime]
    measure: Measure
    aliases: tuple[str, ...] = ()
    check: Check = Check()
    size: dict[str, Quantity] = {}
    calibration: Calibration = Calibration()

    @property
    def primary(self) -> Compute:
        """The preferred processing unit."""
        return self.compute[0]

    @property
    def compute_capability(self) -> str:
        """CUDA compute capability such as "8.7", or an empty string."""
        quantity = self.detect.cuda_capability
        return "" if quantity is None else str(quantity.value)
