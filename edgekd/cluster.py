"""Devices that are resources of a Dask cluster: measured by their workers as those behind ssh are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from edgekd.errors import BackendError, DeviceError, UsageError
from edgekd.executor import Workers
from edgekd.remote import Remote


@dataclass(frozen=True)
class ClusterDevice(Remote):
    """A worker with the resource `resource`; with several workers, whichever is free."""

    workers: Workers
    resource: str
    python: str = "python3"
    prepare: tuple[str, ...] = ()
    sensors: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.resource} of dask://{self.workers.cluster}"

    def send(self, script: str, sent: IO[bytes], timeout_s: float) -> subprocess.CompletedProcess[bytes]:
        job = (script, sent.read(), timeout_s)
        for _, done in self.workers.run(_there, [job], needs=lambda _: self.resource):
            if done is not None:
                return done
        raise DeviceError(
            f"{self.name}: its worker died twice while it measured", "look at the memory of the device"
        )


def _there(job: tuple[str, bytes, float]) -> subprocess.CompletedProcess[bytes]:
    """On the worker: its own Python is the first."""
    script, sent, timeout_s = job
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    words = ["sh", "-c", script]
    try:
        return subprocess.run(
            words,
            input=sent,
            capture_output=True,
            timeout=timeout_s,
            env=os.environ | {"PATH": path},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise BackendError(f"the device gave no answer within {error.timeout:g} s") from error


def cluster_devices(
    workers: Workers, names: Sequence[str], prepare: Sequence[str] = (), sensors: Sequence[str] = ()
) -> list[ClusterDevice]:
    """One device for each worker of the cluster that has a resource of the first name that any has.

    Raises:
        UsageError: the executor is no cluster.
        DeviceError: no worker has such a resource.
    """
    if not workers.cluster:
        raise UsageError(
            "one measurement at a time runs on a machine: several processes of it cannot share them",
            "--executor dask://HOST:PORT shares them among devices",
        )
    known = workers.devices()
    name = next((name for name in names if name in known), "")
    if not name:
        raise DeviceError(
            f"no worker of dask://{workers.cluster} has the resource {' or '.join(map(repr, names))}; "
            f"there are: {', '.join(sorted(set(known))) or 'none'}",
            f"on the device: dask worker tcp://{workers.cluster} --nthreads 1 --resources '{names[-1]}=1'",
        )
    return [ClusterDevice(workers, name, prepare=tuple(prepare), sensors=tuple(sensors))] * known.count(name)
