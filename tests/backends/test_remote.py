"""Remote devices: a real sshd on loopback, its refusals, a device that is lost, and a pool of several."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from edgekd import cli
from edgekd.backends.feeds import external_files, image_feed
from edgekd.backends.tensorrt import _has_gpu
from edgekd.checking import CheckOrder, check_bundle
from edgekd.cost import Roofline, cost_model
from edgekd.errors import BackendError, DeviceError, MissingExtraError, UsageError
from edgekd.gate import LatencyLimits
from edgekd.gating.compare import How, Limits, compare
from edgekd.gating.subject import resolve
from edgekd.profiler import HERE, Device, Here, Protocol, Variant, evaluate, run_session
from edgekd.remote import SshDevice, pooled, sensed, ssh_device
from edgekd.spec import LayerShape, ModelSpec, Preprocessing
from edgekd.stages.calibrate import Wanted, calibrate
from edgekd.target import find_target

from .small_models import SHAPE, residual_net, small_bundle

pytestmark = [pytest.mark.backends, pytest.mark.slow]
SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
QUICK = Protocol(rounds=2, calls=2, timeout_s=60)
CONFIG = """
IdentityFile {folder}/user
IdentitiesOnly yes
UserKnownHostsFile {known}
GlobalKnownHostsFile /dev/null
LogLevel ERROR
"""


@dataclass(frozen=True)
class Server:
    """An sshd of our own, and what a client needs to log in."""

    folder: Path
    port: int

    def config(self, known: str | None = None) -> Path:
        """A client's configuration; `known` replaces the hosts that are known."""
        path = self.folder / "config"
        file = self.folder / "known_hosts"
        if known is not None:
            path, file = self.folder / "other-config", self.folder / "other-hosts"
            file.write_text(known)
        path.write_text(CONFIG.format(folder=self.folder, known=file))
        return path

    def device(self, **changes: object) -> SshDevice:
        made = SshDevice(getpass.getuser(), "127.0.0.1", self.port, sys.executable, self.config())
        return replace(made, **changes)  # type: ignore[arg-type]


def _key(path: Path) -> str:
    words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)]
    subprocess.run(words, check=True, capture_output=True)
    return path.with_suffix(".pub").read_text()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if not Path(SSHD).exists() or os.getuid() != 0:
        pytest.skip("needs sshd, and root to start it")
    folder = tmp_path_factory.mktemp("sshd")
    Path("/run/sshd").mkdir(exist_ok=True)
    host, user = _key(folder / "host"), _key(folder / "user")
    (folder / "keys").write_text(user)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {host}")
    (folder / "tmp").mkdir()
    settings = {
        "Port": port, "ListenAddress": "127.0.0.1", "HostKey": folder / "host", "PidFile": folder / "pid",
        "AuthorizedKeysFile": folder / "keys", "StrictModes": "no", "UsePAM": "no", "PermitRootLogin": "yes",
        "PasswordAuthentication": "no", "SetEnv": f"TMPDIR={folder}/tmp OMP_NUM_THREADS=1", "MaxStartups": 50,
    }  # fmt: skip
    (folder / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
    words = [SSHD, "-D", "-f", str(folder / "sshd_config"), "-E", str(folder / "log")]
    process = subprocess.Popen(words)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        yield Server(folder, port)
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return residual_net(tmp_path_factory.mktemp("models") / "net.onnx")


def _left(server: Server) -> list[str]:
    return [path.name for path in (server.folder / "tmp").iterdir() if path.suffix != ".lock"]


def _session(device: Device, model: Path, **changes: object) -> dict[str, object]:
    variants = [Variant("ref", "onnxruntime", str(model)), Variant("aa", "onnxruntime", str(model))]
    done = run_session(variants, protocol=QUICK, inputs=image_feed(SHAPE), device=device)
    assert list(done.variants) == ["ref", "aa"]
    assert all(call > 0 for times in done.variants.values() for calls in times.wall_ms for call in calls)
    return done.environment


def test_a_session_runs_there_and_nothing_stays(server: Server, model: Path) -> None:
    machine = _session(server.device(), model)
    assert machine["host"] == f"{getpass.getuser()}@127.0.0.1:{server.port}"
    assert machine["versions"] == _session(HERE, model)["versions"]
    assert _left(server) == []


def test_outputs_come_back_and_are_those_of_this_machine(server: Server, model: Path, tmp_path: Path) -> None:
    images = np.random.default_rng(0).standard_normal((5, *SHAPE), dtype=np.float32)
    np.savez(tmp_path / "data.npz", images=images)
    variants = [Variant("a", "onnxruntime", str(model)), Variant("written", "reference", str(model))]
    for name, device in (("here", HERE), ("there", server.device())):
        answers = tmp_path / f"{name}.npz"
        evaluate(variants, data=tmp_path / "data.npz", answers=answers, protocol=QUICK, device=device)
    with np.load(tmp_path / "here.npz") as here, np.load(tmp_path / "there.npz") as there:
        assert here["a"].shape == (5, 10)
        np.testing.assert_array_equal(here["a"], there["a"])
        np.testing.assert_allclose(here["written"], there["a"], atol=1e-5)


def test_a_bundle_is_checked_there(server: Server, tmp_path: Path) -> None:
    result = check_bundle(small_bundle(tmp_path), CheckOrder(server.device()))
    rows = {row["id"]: row for row in result["variants"]}
    here = check_bundle(tmp_path / "model.ekd", CheckOrder(HERE))
    for row in here["variants"]:
        there = rows[row["id"]]
        for key in ("verdict", "reason", "kernels", "float_layers"):
            assert there.get(key) == row.get(key)
    assert rows["f32"]["environment"]["host"] == result["device"] == server.device().name
    assert _left(server) == []


def test_weights_beside_the_model_go_along(server: Server, model: Path, tmp_path: Path) -> None:
    import onnx

    big = tmp_path / "big.onnx"
    onnx.save(onnx.load(model), big, save_as_external_data=True, location="big.weights", size_threshold=0)
    assert external_files(big) == (tmp_path / "big.weights",)
    _session(server.device(), big)
    subject = resolve(big, runtime="", precision="f32", variant="", shapes={})
    assert subject.size_bytes == big.stat().st_size + (tmp_path / "big.weights").stat().st_size
    (tmp_path / "big.weights").unlink()
    with pytest.raises(BackendError, match=r"big\.weights', which is not a file of its folder"):
        external_files(big)


def test_the_gate_on_a_device_compares_accuracy_too(
    server: Server,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images = np.random.default_rng(0).standard_normal((12, *SHAPE), dtype=np.float32)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(12) % 10)
    url = f"ssh://{getpass.getuser()}@127.0.0.1:{server.port}{sys.executable}"
    words: list[object] = [
        model,
        "--reference",
        model,
        "--on",
        url,
        "--ssh-config",
        server.config(),
        "--json",
    ]
    words += ["--restarts", 2, "--max-restarts", 2, "--max-ratio", 9]
    words += ["--data", tmp_path / "data.npz", "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", ["edgekd", "gate", *map(str, words)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    said = capsys.readouterr()
    assert caught.value.code == 0, said.err
    result = json.loads(said.out)
    assert result["device"] == f"{getpass.getuser()}@127.0.0.1:{server.port}"
    assert result["agreement"]["samples"] == 12
    kept = [json.loads(line) for line in (tmp_path / "out" / "sessions.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in kept] == [0, 1]


def test_devices_share_the_sessions_of_a_gate_and_a_lost_one_leaves_its_own_to_the_others(
    server: Server, model: Path, tmp_path: Path
) -> None:
    subject = resolve(model, runtime="", precision="f32", variant="", shapes={})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        devices = (server.device(port=probe.getsockname()[1]), server.device())
        kept, good = tmp_path / "sessions.jsonl", devices[1].name
        how = How(QUICK, devices=devices, kept=kept)
        limits = Limits(LatencyLimits(max_ratio=9, restarts=3, max_restarts=3))
        result = compare(subject, subject, limits, how)
        lines = [json.loads(line) for line in kept.read_text().splitlines()]
        assert result["restarts"] == 3
        assert result["device"] == f"{devices[0].name}, {good}"
        assert sorted(line["seed"] for line in lines) == [0, 1, 2]
        assert {line["device"] for line in lines} == {good}
        with pytest.raises(DeviceError, match="nothing listens there"):
            compare(subject, subject, limits, How(QUICK, devices=devices[:1]))


def test_several_devices_are_profiled_at_once_and_a_lost_one_loses_nothing(
    server: Server, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = f"ssh://{getpass.getuser()}@127.0.0.1:{server.port}{sys.executable}"
    words = ["profile", model, "--calls", 64, "--ssh-config", server.config(), "--json", "--on", good]
    monkeypatch.setattr(sys, "argv", ["edgekd", *map(str, words), "--on", "ssh://nobody@127.0.0.1:1"])
    cli.main()
    found = json.loads(capsys.readouterr().out)
    assert found[f"{getpass.getuser()}@127.0.0.1:{server.port}"]["onnxruntime:net.onnx"]["latency_p90_ms"] > 0
    assert "nothing listens there" in found["nobody@127.0.0.1:1"]["error"]
    monkeypatch.setattr(sys, "argv", ["edgekd", *map(str, words[:-1]), "ssh://nobody@127.0.0.1:1"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 23


def test_a_calibrated_table_is_what_the_search_uses(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spec = ModelSpec(Preprocessing(16, 16, "rgb", (0.5,) * 3, (0.5,) * 3), ("a", "b"))
    wanted = Wanted("mobile-cnn", spec, "fp32", candidates=1, networks=0)
    target = find_target("avx2")
    table = calibrate(target, [server.device(), server.device()], wanted, lambda _: None)
    model = cost_model(target, "fp32")
    assert (model.kind, model.error_percent) == ("layer-table", None)
    assert table["header"]["device"] in model.note
    key, entry = next((k, v) for k, v in table["entries_ms"].items() if k != "empty")
    known = LayerShape(*json.loads(key))
    found = model.predict((known,)).latency_ms
    assert found == pytest.approx(table["entries_ms"]["empty"] + entry)
    assert model.unverified == ()
    assert "lacks" not in model.note
    foreign = model.predict((known, replace(known, channels_out=977))).latency_ms
    assert (foreign is None) == (Roofline(target, "fp32").predict((known,)).latency_ms is None)
    assert "1 layers that the table lacks are estimates" in model.note
    assert model.table is not None
    assert table["path"] == str(model.table.path)


def test_a_table_goes_on_with_the_parts_that_a_lost_device_had_measured(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("edgekd.stages.calibrate._CHUNK", 8)
    spec = ModelSpec(Preprocessing(16, 16, "rgb", (0.5,) * 3, (0.5,) * 3), ("a", "b"))
    wanted, target = Wanted("mobile-cnn", spec, "fp32", candidates=1, networks=0), find_target("avx2")
    lost = server.device(prepare=(f"[ ! -e {tmp_path}/once ] && touch {tmp_path}/once",))  # works one time
    said: list[str] = []
    with pytest.raises(DeviceError, match=r"measure\.prepare failed"):
        calibrate(target, [lost], wanted, said.append)
    (kept,) = (tmp_path / "edgekd").rglob("*.parts")
    (first,) = (json.loads(line) for line in kept.read_text().splitlines())
    assert not list((tmp_path / "edgekd").rglob("*.json"))
    with kept.open("a") as file:
        file.write('{"names": ["empty", "l9')  # cut off
    table = calibrate(target, [server.device()], wanted, said.append)
    count = len(first["names"]) - 1
    assert any(text.startswith(f"{count} of ") and text.endswith("were measured before") for text in said)
    empty, entries = first["found"]["times"]["empty"]["cpu"], list(table["entries_ms"].values())
    assert entries[0] == pytest.approx(max(1e-4, first["found"]["times"]["l0"]["cpu"] - empty))
    assert not kept.exists()


def test_another_device_than_the_cards_is_not_calibrated(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spec = ModelSpec(Preprocessing(16, 16, "rgb", (0.5,) * 3, (0.5,) * 3), ("a", "b"))
    wanted = Wanted("mobile-cnn", spec, "fp32", candidates=1, networks=0)
    with pytest.raises(DeviceError, match="calls itself 'nothing', the card is about 'Raspberry Pi 5"):
        calibrate(find_target("rpi5"), [server.device(prepare=())], wanted, lambda _: None)
    with pytest.raises(UsageError, match="this machine is not a"):
        calibrate(find_target("rpi5"), [HERE], wanted, lambda _: None)
    with pytest.raises(UsageError, match="onnxruntime-web, which edgekd does not time"):
        calibrate(find_target("web"), [HERE], wanted, lambda _: None)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- refusals


def test_a_changed_host_key_is_told(server: Server, model: Path, tmp_path: Path) -> None:
    other = _key(tmp_path / "other")
    device = server.device(config=server.config(f"[127.0.0.1]:{server.port} {other}"))
    with pytest.raises(DeviceError, match="host key is not the one that is known") as caught:
        _session(device, model)
    assert "ssh-keygen -R" in caught.value.hint
    assert caught.value.exit_code == 23


def test_an_unknown_host_key_is_not_accepted(server: Server, model: Path) -> None:
    with pytest.raises(DeviceError, match="host key is not known"):
        _session(server.device(config=server.config("")), model)


def test_a_refused_login_and_a_closed_port_are_told(server: Server, model: Path) -> None:
    with pytest.raises(DeviceError, match="refuses the login"):
        _session(server.device(user="nobody"), model)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = probe.getsockname()[1]
        with pytest.raises(DeviceError, match="nothing listens there"):
            _session(server.device(port=closed), model)


def test_a_device_without_numpy_or_without_the_runtime_is_told_what_to_install(
    server: Server, model: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    venv.create(bare, symlinks=True)
    python = bare / "bin" / "python"
    with pytest.raises(DeviceError, match="its Python has no numpy") as caught:
        _session(server.device(python=str(python)), model)
    assert "pip install numpy onnxruntime" in caught.value.hint
    (site,) = bare.glob("lib/python*/site-packages")
    installed = Path(np.__file__).parents[1]
    for name in ("numpy", "numpy.libs"):
        if (installed / name).exists():
            (site / name).symlink_to(installed / name)
    with pytest.raises(
        MissingExtraError, match=r"127\.0\.0\.1.*'onnxruntime', which is not installed"
    ) as missing:
        _session(server.device(python=str(python)), model)
    assert missing.value.hint == f"there: {python} -m pip install onnxruntime"


def test_a_missing_python_and_a_graph_that_is_refused_are_told(
    server: Server, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(DeviceError, match="there is no such Python"):
        _session(server.device(python="/absent/python3"), model)
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")
    with pytest.raises(BackendError, match=rf"127\.0\.0\.1.*{broken}"):
        _session(server.device(), broken)
    with pytest.raises(BackendError, match=r"cannot read /absent\.onnx"):
        _session(server.device(), Path("/absent.onnx"))
    assert _left(server) == []


@pytest.mark.skipif(_has_gpu(), reason="has a GPU")
def test_a_device_that_cannot_run_tensorrt_says_why(server: Server, model: Path) -> None:
    variants = [Variant("trt", "tensorrt", str(model))]
    with pytest.raises((BackendError, MissingExtraError), match=r"no NVIDIA GPU here|'tensorrt'"):
        run_session(variants, protocol=QUICK, inputs=image_feed(SHAPE), device=server.device())
    assert _left(server) == []


class _FullDisk(SshDevice):
    """A device whose folder for temporary files lies on a disk of 64 KiB."""

    def _script(self, timeout_s: float) -> str:
        return super()._script(timeout_s).replace("${TMPDIR:-/tmp}", "$TMPDIR/full")


def test_a_full_disk_is_told(server: Server, model: Path) -> None:
    full = server.folder / "tmp" / "full"
    full.mkdir()
    try:
        words = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(full)]
        if subprocess.run(words, check=False, capture_output=True).returncode != 0:
            pytest.skip("a small file system cannot be mounted here")
        try:
            device = server.device()
            fields = {name: getattr(device, name) for name in device.__dataclass_fields__}
            with pytest.raises(DeviceError, match="its disk is full"):
                _session(_FullDisk(**fields), model)
            assert [path.name for path in full.iterdir() if path.suffix != ".lock"] == []
        finally:
            subprocess.run(["umount", str(full)], check=True)
    finally:
        full.rmdir()


def test_a_measurement_that_takes_too_long_is_ended_there(server: Server, model: Path) -> None:
    variants = [Variant("ref", "onnxruntime", str(model))]
    protocol = Protocol(rounds=10**6, calls=5, timeout_s=4)
    with pytest.raises(BackendError, match="did not end in time"):
        run_session(variants, protocol=protocol, inputs=image_feed(SHAPE), device=server.device())
    assert _left(server) == []


def test_a_device_that_is_lost_on_the_way_is_an_error(server: Server, model: Path) -> None:
    """The connection's server process is killed while the measurement runs."""
    before = set(_children(server))
    variants = [Variant("ref", "onnxruntime", str(model))]
    protocol = Protocol(rounds=10**6, calls=5, timeout_s=20)
    killer = subprocess.Popen(
        [sys.executable, "-c", _KILLER, str(_pid(server)), *map(str, before)], stdout=subprocess.DEVNULL
    )
    try:
        with pytest.raises(DeviceError, match="connection was lost"):
            run_session(variants, protocol=protocol, inputs=image_feed(SHAPE), device=server.device())
    finally:
        killer.wait()


# Waits for a measuring process below the server, then ends what stands between the two.
_KILLER = """
import os, signal, sys, time
server, before = int(sys.argv[1]), set(map(int, sys.argv[2:]))

def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return set(map(int, file.read().split()))

for _ in range(600):
    for child in children(server) - before:
        try:
            below = [pid for one in children(child) for pid in children(one)] + list(children(child))
        except OSError:
            continue
        for pid in below:
            for last in [pid, *children(pid)]:
                with open(f"/proc/{last}/cmdline") as file:
                    if "edgekd.worker" in file.read():
                        os.kill(child, signal.SIGKILL)
                        sys.exit()
    time.sleep(0.05)
"""


def _pid(server: Server) -> int:
    return int((server.folder / "pid").read_text())


def _children(server: Server) -> list[int]:
    pid = _pid(server)
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


# ---------------------------------------------------------------- card commands, sensors, addresses


def test_the_cards_commands_run_there_and_a_failing_one_is_told(server: Server, model: Path) -> None:
    marker = server.folder / "prepared"
    sensor = 'echo throttled=0x50005; echo "temp=61.2\'C"'
    machine = _session(server.device(prepare=(f"touch {marker}",), sensors=(sensor, "sleep 60")), model)
    assert marker.exists()
    assert machine["temp_c_after"] == 61.2
    assert machine["throttled"] == "0x50005"
    with pytest.raises(DeviceError, match=r"measure.prepare failed.*false"):
        _session(server.device(prepare=("false",)), model)


@pytest.mark.parametrize(
    ("before", "after", "throttled"),
    [("0x0", "0x0", ""), ("0x50000", "0x50000", ""), ("0x0", "0x40000", "0x40000"), ("0x0", "0x4", "0x4")],
)
def test_throttling_counts_now_or_since_measuring_began(before: str, after: str, throttled: str) -> None:
    assert sensed([f"throttled={before}"], [f"throttled={after}"])["throttled"] == throttled


def test_tegrastats_is_read_for_its_temperatures() -> None:
    line = "RAM 2448/7620MB CPU [2%@729] GR3D_FREQ 0% cpu@44.5C gpu@45.031C VDD_IN 4650mW/4650mW"
    told = sensed([line], [line])
    assert told["temp_c_after"] == 45.031
    assert "throttled" not in told


@pytest.mark.parametrize(
    "url",
    ["pi@host", "ssh://host", "ssh://-oProxyCommand=x@host", "ssh://pi@-x", "ssh://pi:secret@host",
     "ssh://pi@host:port", "http://pi@host", "ssh://pi@host?x", "ssh://pi@ho st"],
)  # fmt: skip
def test_an_address_of_another_form_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="--on "):
        ssh_device(url)


def test_an_address_may_name_port_and_python() -> None:
    device = ssh_device("ssh://pi@board:2222/opt/venv/bin/python")
    assert (device.user, device.host, device.port, device.python) == (
        "pi",
        "board",
        2222,
        "/opt/venv/bin/python",
    )
    assert ssh_device("ssh://pi@[fe80::1]").host == "fe80::1"


# ---------------------------------------------------------------- several devices


def test_a_pool_shares_the_work_and_keeps_the_order(server: Server, model: Path) -> None:
    used: list[str] = []

    def work(device: Device, seed: int) -> int:
        variants = [Variant("a", "onnxruntime", str(model))]
        protocol = Protocol(rounds=1, calls=1, seed=seed)
        run_session(variants, protocol=protocol, inputs=image_feed(SHAPE), device=device)
        used.append(device.name)
        return seed

    devices = [server.device(), server.device(host="localhost", config=_both(server))]
    assert pooled(devices, [3, 1, 2], work) == [3, 1, 2]
    assert len(used) == 3


def _both(server: Server) -> Path:
    key = (server.folder / "host.pub").read_text()
    return server.config(f"[127.0.0.1]:{server.port} {key}\n[localhost]:{server.port} {key}")


@dataclass
class _Flaky(Here):
    """A device that is lost after some pieces of work."""

    name: str = ""
    good: int = 0


def test_a_lost_device_leaves_its_work_to_the_others() -> None:
    done: list[tuple[str, int]] = []

    def work(device: Device, item: int) -> int:
        assert isinstance(device, _Flaky)
        if device.good == 0:
            raise DeviceError(f"{device.name}: lost", "look at it")
        device.good -= 1
        done.append((device.name, item))
        return item * item

    assert pooled([_Flaky("a", 1), _Flaky("b", 99)], list(range(6)), work) == [0, 1, 4, 9, 16, 25]
    assert sorted(item for _, item in done) == list(range(6))
    with pytest.raises(DeviceError, match=r"c: lost"):
        pooled([_Flaky("c", 1), _Flaky("d", 1)], list(range(6)), work)


def test_another_error_ends_the_pool() -> None:
    def work(device: Device, item: int) -> int:
        raise BackendError("the graph is refused")

    with pytest.raises(BackendError, match="refused"):
        pooled([_Flaky("a", 1), _Flaky("b", 1)], [1, 2, 3], work)
