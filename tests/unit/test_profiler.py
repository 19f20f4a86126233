"""The measuring protocol: percentile rule, sessions in a fresh process, errors of the worker."""

from __future__ import annotations

import random
import subprocess
import sys
from math import comb
from pathlib import Path

import pytest

from edgekd import profiler, worker
from edgekd.backends.feeds import image_feed
from edgekd.errors import BackendError, MissingExtraError, UsageError
from edgekd.profiler import (
    Latency,
    Protocol,
    Variant,
    discarded,
    environment,
    measure,
    percentile,
    run_session,
)

SHAPE = (3, 8, 8)
FEEDS = image_feed(SHAPE)
ONE = Protocol(rounds=1, calls=1)


@pytest.mark.parametrize(("p", "smallest"), [(50, 11), (90, 64), (95, 130), (99, 662)])
def test_smallest_number_of_calls_for_a_percentile(p: float, smallest: int) -> None:
    assert percentile([1.0] * (smallest - 1), p) is None
    assert percentile([1.0] * smallest, p) == 1.0


@pytest.mark.parametrize(("p", "rank"), [(90, 923), (95, 967), (99, 999)])
def test_rank_reported_of_a_thousand_calls(p: float, rank: int) -> None:
    calls = [float(position) for position in range(1, 1001)]
    random.Random(0).shuffle(calls)
    assert percentile(calls, p) == rank


@pytest.mark.parametrize(("calls", "p"), [(64, 90), (200, 50), (200, 90), (1000, 99), (2000, 99.5)])
def test_discarded_is_the_largest_that_the_binomial_allows(calls: int, p: float) -> None:
    t = discarded(calls, p)
    q = 1 - p / 100

    def at_most(k: int) -> float:
        return sum(comb(calls, i) * q**i * (1 - q) ** (calls - i) for i in range(k + 1))

    assert t is not None
    assert at_most(t) <= 0.01 < at_most(t + 1)


@pytest.mark.parametrize("p", [0, 100, -1])
def test_a_percentile_lies_between_0_and_100(p: float) -> None:
    with pytest.raises(UsageError):
        percentile([1.0] * 100, p)


def test_environment_names_machine_and_software() -> None:
    told = environment()
    assert told["cpu"]
    assert told["cores"] >= 1
    assert len(told["load_average"]) == 3
    assert told["packages"]["numpy"]


def test_variants_need_different_ids_and_threads_the_cores_allowed() -> None:
    twins = [Variant("a", "onnxruntime", "m.onnx")] * 2
    with pytest.raises(UsageError, match="different ids"):
        run_session(twins, protocol=ONE, inputs=FEEDS)
    with pytest.raises(UsageError, match="4096 threads"):
        run_session(twins[:1], protocol=Protocol(threads=4096), inputs=FEEDS)


@pytest.mark.parametrize(
    ("medians", "windows"),
    [([9.0, 5.0, 5.1, 1.0], 3), ([5.0, 5.0], 2), ([float(2**n) for n in range(20)], 10)],
)
def test_warm_up_ends_when_two_windows_agree(
    medians: list[float], windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = list(medians)
    calls = object.__new__(worker._Calls)
    monkeypatch.setattr(calls, "turn", lambda count: ([left.pop(0)] * count, []))
    calls.warm_up()
    assert len(medians) - len(left) == windows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One 1x1 convolution and a global pool."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    onnx = pytest.importorskip("onnx")
    helper, floats = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("Conv", ["images", "w"], ["c"], kernel_shape=[1, 1]),
        helper.make_node("GlobalAveragePool", ["c"], ["g"]),
        helper.make_node("Flatten", ["g"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("images", floats, ["N", *SHAPE])],
        [helper.make_tensor_value_info("logits", floats, ["N", 4])],
        [helper.make_tensor("w", floats, (4, 3, 1, 1), [0.1] * 12)],
    )
    file = tmp_path_factory.mktemp("profiler") / "tiny.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), file)
    return str(file)


@pytest.mark.backends
def test_a_session_records_every_call_of_every_variant(model: str) -> None:
    variants = [
        Variant("ref", "onnxruntime", model),
        Variant("aa", "onnxruntime", model),
        Variant("ov", "openvino", model),
    ]
    result = run_session(variants, protocol=Protocol(rounds=3, calls=2, seed=7), inputs=FEEDS)
    assert list(result.variants) == ["ref", "aa", "ov"]
    for times in result.variants.values():
        for clock in (times.wall_ms, times.cpu_ms):
            assert [len(calls) for calls in clock] == [2, 2, 2]
            assert all(call > 0 for calls in clock for call in calls)
        assert times.load_ms > 0
        assert times.first_call_ms > 0
    told = result.environment
    assert told["precision"] == {"ref": "f32", "aa": "f32", "ov": "f32"}
    assert set(told["versions"]) == {"onnxruntime", "openvino"}
    assert told["threads"] == 1
    assert told["inputs"] == [{"name": "", "dtype": "float32", "shape": [1, *SHAPE]}]
    assert {"load_average_before", "load_average_after", "steal_ticks_before", "steal_ticks_after"} <= set(
        told
    )


@pytest.mark.backends
def test_measure_gives_percentiles_only_with_enough_calls(model: str) -> None:
    protocol = Protocol(rounds=4, calls=3)
    latency = measure([Variant("a", "onnxruntime", model)], protocol=protocol, inputs=FEEDS)["a"]
    assert isinstance(latency, Latency)
    assert latency.runs == 12
    assert latency.wall_p50_ms is not None
    assert latency.wall_p90_ms is None
    assert latency.cpu_p90_ms is None


@pytest.mark.backends
@pytest.mark.parametrize(
    ("variant", "told"),
    [
        (Variant("a", "onnxruntime", "/absent/m.onnx"), "/absent/m.onnx"),
        (Variant("a", "no-such-runtime", "m.onnx"), "unknown backend"),
    ],
)
def test_a_refusal_in_the_worker_is_a_backend_error_here(variant: Variant, told: str, model: str) -> None:
    with pytest.raises(BackendError, match=told):
        run_session([variant], protocol=ONE, inputs=FEEDS)


def test_a_dead_worker_is_told_with_its_last_words() -> None:
    done = subprocess.CompletedProcess([], -11, b"", b"one\ntwo\nSegmentation fault\n")
    with pytest.raises(BackendError, match=r"signal SIGSEGV.*\n.*\nSegmentation fault"):
        profiler._read(done)
    with pytest.raises(BackendError, match="exit code 1"):
        profiler._read(subprocess.CompletedProcess([], 1, b"", b""))


def test_a_missing_package_in_the_worker_stays_a_missing_package() -> None:
    answer = b'{"refusal": {"error": "MissingExtraError", "message": "needs openvino", "hint": "pip"}}'
    with pytest.raises(MissingExtraError, match="needs openvino"):
        profiler._read(subprocess.CompletedProcess([], 0, answer, b""))


def test_a_session_that_takes_too_long_is_ended() -> None:
    variant = Variant("a", "onnxruntime", "/absent/m.onnx")
    with pytest.raises(BackendError, match="did not end within"):
        run_session([variant], protocol=Protocol(timeout_s=0.001), inputs=FEEDS)


def test_the_profiler_and_the_runtimes_do_not_load_torch() -> None:
    code = (
        "import sys; from edgekd.backends import backend, backend_names; import edgekd.profiler\n"
        "from edgekd.errors import MissingExtraError\n"
        "for name in backend_names():\n"
        "    try: backend(name).version()\n"
        "    except MissingExtraError: pass\n"
        "assert 'torch' not in sys.modules"
    )
    root = Path(profiler.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)
