"""What stands behind a TensorRT engine on a device, as far as it runs without one: the CUDA runtime's calls,
what is built and kept, the errors. No engine is executed here."""

from __future__ import annotations

import ctypes
import re
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from edgekd import worker
from edgekd.backends import cudart, engines
from edgekd.backends.tensorrt import _has_gpu, _profiler
from edgekd.errors import BackendError, UsageError
from edgekd.gating.compare import round_values
from edgekd.profiler import SessionResult, VariantTimes, latency

from .small_models import residual_net

pytestmark = [pytest.mark.backends, pytest.mark.slow]
no_gpu = pytest.mark.skipif(_has_gpu(), reason="has a GPU")
DEVICE = ("10.3.0", "8.7", "12060, R36")


def _header() -> str:
    """``cuda_runtime_api.h`` of the package nvidia-cuda-runtime."""
    try:
        files = metadata.files("nvidia-cuda-runtime") or []
    except metadata.PackageNotFoundError:
        pytest.skip("needs the package nvidia-cuda-runtime")
    return Path(str(next(f for f in files if f.name == "cuda_runtime_api.h").locate())).read_text()


def _kind(parameter: str) -> Any:
    """The ctypes form of a C parameter: streams and events are pointers."""
    if parameter.count("*") == 2 or re.match(r"cuda(Stream|Event)_t \*", parameter):
        return cudart._PLACE
    if parameter.startswith("float *"):
        return ctypes.POINTER(ctypes.c_float)
    if parameter.startswith("int *"):
        return cudart._INTS
    if "*" in parameter or re.match(r"cuda(Stream|Event)_t ", parameter):
        return ctypes.c_void_p
    return ctypes.c_size_t if parameter.startswith("size_t ") else ctypes.c_int  # and enums


@pytest.mark.parametrize("name", cudart.SIGNATURES)
def test_calls_have_the_signatures_of_the_header(name: str) -> None:
    found = re.search(rf"cudaError_t CUDARTAPI {name}\(([^;]*)\);", _header())
    assert found is not None
    parameters = [part.strip().removeprefix("const ") for part in found[1].split(",")]
    assert tuple(_kind(re.sub(r"\s*__dv\(.*", "", part)) for part in parameters) == cudart.SIGNATURES[name]


@no_gpu
def test_without_a_driver_cuda_says_so() -> None:
    _header()  # the library travels with it
    for ask in (cudart.device_count, cudart.compute_capability, cudart.Stream, lambda: cudart.allocate(16)):
        with pytest.raises(BackendError, match=r"CUDA: cuda\w+: .*(driver|device).* \(error \d+\)"):
            ask()
    assert cudart.driver().startswith("0")


def test_a_machine_without_the_library_is_told_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cudart, "_NAMES", ("libabsent.so",))
    monkeypatch.setattr("ctypes.util.find_library", lambda _: None)
    cudart.load.cache_clear()
    with pytest.raises(BackendError, match="no CUDA runtime is found") as caught:
        cudart.device_count()
    assert "JetPack" in caught.value.hint
    cudart.load.cache_clear()


def test_an_engine_belongs_to_model_version_gpu_driver_and_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "a.onnx").write_bytes(b"a")
    (tmp_path / "b.onnx").write_bytes(b"b")
    others = [("10.4.0", *DEVICE[1:]), (DEVICE[0], "8.9", DEVICE[2]), (*DEVICE[:2], "12080, R36")]
    kept = [engines.Kept(device) for device in (DEVICE, *others)]
    places = {one.path(tmp_path / "a.onnx", 1) for one in kept}
    places |= {kept[0].path(tmp_path / "b.onnx", 1), kept[0].path(tmp_path / "a.onnx", None)}
    assert len(places) == 6
    assert len({one.timing for one in kept}) == 4
    assert engines.Kept(DEVICE).path(tmp_path / "a.onnx", 1) in places


def test_an_engine_is_kept_once_it_loads_and_built_again_when_it_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = tmp_path / "m.onnx"
    model.write_bytes(b"model")
    kept, built = engines.Kept(DEVICE), list[int]()

    def make() -> bytes:
        built.append(1)
        return b"good"

    def load(plan: bytes) -> str:
        if plan != b"good":
            raise BackendError("does not load")
        return plan.decode()

    assert [kept.engine(model, 1, make, load) for _ in range(2)] == ["good", "good"]
    assert len(built) == 1
    kept.path(model, 1).write_bytes(b"torn")
    assert kept.engine(model, 1, make, load) == "good"
    assert len(built) == 2
    with pytest.raises(BackendError, match="does not load"):
        kept.engine(model, 8, lambda: b"bad", load)
    assert not kept.path(model, 8).exists()
    assert [path.name for path in kept.timing.parent.iterdir()] == [kept.path(model, 1).name]


def test_a_cache_that_cannot_be_written_costs_building_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "edgekd").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "m.onnx").write_bytes(b"model")
    made = engines.Kept(DEVICE).engine(tmp_path / "m.onnx", 1, lambda: b"plan", bytes.decode)
    assert made == "plan"


@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops in TensorRT-RTX:DeprecationWarning")
def test_the_builder_takes_and_leaves_the_times_of_kernels(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    model, timing = residual_net(tmp_path / "s8.onnx", "s8"), tmp_path / "cache" / "timing.cache"
    timing.parent.mkdir()
    timing.write_bytes(b"not one")
    plan, warnings, message = engines.build("tensorrt_rtx", model, built="SM86", timing=timing)
    assert plan.nbytes > 0, message
    assert any("timing cache" in text for text in warnings)
    assert timing.read_bytes() != b"not one"
    assert [path.name for path in timing.parent.iterdir()] == ["timing.cache"]


@no_gpu
def test_an_engine_does_not_load_without_its_gpu(tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    plan, _, _ = engines.build("tensorrt_rtx", residual_net(tmp_path / "s8.onnx", "s8"), built="SM86")
    runtime = trt.Runtime(engines.messages("tensorrt_rtx"))
    assert runtime.deserialize_cuda_engine(bytes(plan)) is None
    assert "Cuda Runtime" in engines.last_error("tensorrt_rtx")


def test_the_profiler_is_one_of_tensorrts_own_and_keeps_every_call() -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    profiler = _profiler(trt)
    for ms in (1.0, 3.0):
        profiler.report_layer_time("conv", ms)
    assert isinstance(profiler, trt.IProfiler)
    assert profiler.taken == {"conv": [1.0, 3.0]}


def test_times_of_the_gpu_stand_beside_those_of_the_wall() -> None:
    calls = [[2.0] * 32, [3.0] * 32]
    times = VariantTimes(1.0, 1.0, wall_ms=calls, cpu_ms=calls, device_ms=[[0.5] * 32, [0.7] * 32])
    found = latency(times, {})
    assert (found.wall_p50_ms, found.device_p50_ms, found.device_p90_ms) == (3.0, 0.7, 0.7)
    plain = VariantTimes(1.0, 1.0, wall_ms=calls, cpu_ms=calls)
    assert latency(plain, {}).device_p50_ms is None
    session = SessionResult({"gpu": times, "cpu": plain}, {})
    assert round_values(session, "gpu", "device").tolist() == [0.5, 0.7]
    assert round_values(session, "gpu", "wall").tolist() == [2.0, 3.0]
    with pytest.raises(UsageError, match="--clock device: only tensorrt times itself"):
        round_values(session, "cpu", "device")


def test_throttling_events_of_a_jetson_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, count in ((1, "2"), (3, "5"), (4, "9")):
        (tmp_path / f"oc{number}_event_cnt").write_text(f"{count}\n")
    monkeypatch.setattr(worker, "_THROTTLES", (f"{tmp_path}/absent", f"{tmp_path}/oc[1-3]_event_cnt"))
    assert worker._state()["throttle_count"] == 7
