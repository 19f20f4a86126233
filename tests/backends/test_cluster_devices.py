"""Devices of a Dask cluster measure as this machine does, and a worker that is killed costs its time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgekd.backends.feeds import image_feed
from edgekd.cluster import cluster_devices
from edgekd.errors import BackendError, DeviceError, UsageError
from edgekd.executor import Workers
from edgekd.profiler import HERE, Protocol, Variant, run_session
from edgekd.spec import ModelSpec, Preprocessing
from edgekd.stages.calibrate import Wanted, calibrate
from edgekd.target import find_target

from .small_models import SHAPE, residual_net

pytestmark = [pytest.mark.backends, pytest.mark.slow]
QUICK = Protocol(rounds=2, calls=2, timeout_s=120)
# A command of a card that kills the worker that runs it, the first time.
KILL = "[ -e {marker} ] || {{ touch {marker}; kill -9 $(cut -d' ' -f4 /proc/$PPID/stat); }}"


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    """A cluster of two workers, both of them on an AVX2 machine."""
    distributed = pytest.importorskip("distributed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("device")))
        with (
            distributed.LocalCluster(
                n_workers=2,
                threads_per_worker=1,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",
                resources={"avx2": 1},
            ) as made,
            Workers("dask://" + made.scheduler_address.removeprefix("tcp://")) as found,
        ):
            yield found


def test_a_session_on_a_worker_is_one_of_this_code_and_nothing_stays(
    workers: Workers, tmp_path: Path
) -> None:
    model = residual_net(tmp_path / "net.onnx")
    variants = [Variant("ref", "onnxruntime", str(model)), Variant("aa", "onnxruntime", str(model))]
    (device, other) = cluster_devices(workers, ("x86-avx2", "avx2"), sensors=('echo "temp=50.5\'C"',))
    assert device == other
    there = run_session(variants, protocol=QUICK, inputs=image_feed(SHAPE), device=device)
    here = run_session(variants, protocol=QUICK, inputs=image_feed(SHAPE), device=HERE)
    assert list(there.variants) == ["ref", "aa"]
    assert there.environment["versions"] == here.environment["versions"]
    assert there.environment["host"] == f"avx2 of dask://{workers.cluster}"
    assert there.environment["temp_c_after"] == 50.5
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    broken = [Variant("a", "onnxruntime", str(tmp_path / "broken.onnx"))]
    with pytest.raises(BackendError, match=rf"avx2 of dask://.*{tmp_path}/broken"):
        run_session(broken, protocol=QUICK, inputs=image_feed(SHAPE), device=device)


def test_a_table_of_layers_survives_a_worker_that_is_killed_while_it_measures(
    workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spec = ModelSpec(Preprocessing(16, 16, "rgb", (0.5,) * 3, (0.5,) * 3), ("a", "b"))
    wanted, target = Wanted("mobile-cnn", spec, "fp32", candidates=1, networks=0), find_target("avx2")
    once = KILL.format(marker=tmp_path / "killed")
    tables: list[dict[str, Any]] = []
    for prepare in ((), (once,)):
        devices = cluster_devices(workers, (target.id, *target.aliases), prepare=prepare)
        tables.append(calibrate(target, devices, wanted, lambda _: None))
    assert (tmp_path / "killed").exists()
    assert tables[0]["entries_ms"].keys() == tables[1]["entries_ms"].keys()
    assert all(ms > 0 for table in tables for ms in table["entries_ms"].values())


def test_a_device_that_no_worker_is_and_processes_of_one_machine_are_refused(workers: Workers) -> None:
    with pytest.raises(DeviceError, match="has the resource 'rpi5-8gb' or 'rpi5'; there are: avx2") as caught:
        cluster_devices(workers, ("rpi5-8gb", "rpi5"))
    assert "--resources 'rpi5=1'" in caught.value.hint
    with pytest.raises(UsageError, match="one measurement at a time"):
        cluster_devices(Workers("local:2"), ("rpi5",))
