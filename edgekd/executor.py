"""Where work that can be spread runs: in this process, in several, or on the workers of a Dask cluster.

Written ``local``, ``local:4`` (processes) or ``dask://HOST:PORT`` (a scheduler). On a cluster a device is a
resource of capacity 1 of the worker that runs on it (``dask worker … --resources 'rpi5=1'``). Whatever runs
here must bear to be run twice, because it is when its process dies, and no result is taken from a cache.
"""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from edgekd import __version__
from edgekd.errors import DeviceError, UsageError, missing_extra

PATTERN = r"^(local(:[1-9][0-9]*)?|dask://[^/@ ]+:[0-9]+)$"
FORMS = "local, local:PROCESSES or dask://HOST:PORT"
_Item = TypeVar("_Item")
_Made = TypeVar("_Made")
_CONNECT_S = 30
_LOOK_S, _LOOKS = 10, 6  # a cluster without a worker for the work is given up after so many looks
_TURN = threading.Lock()


def in_turn(work: Callable[[_Item], _Made], item: _Item) -> _Made:
    """What another process runs: one piece at a time, however many threads a Dask worker has."""
    with _TURN:
        return work(item)


def _end_with_parent() -> None:
    """A process beside others waits for work for ever, when what started it is killed."""
    parent = parent_process()

    def watch() -> None:
        if parent is not None and wait_for([parent.sentinel]):
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def scheduler_of(executor: str) -> str:
    """The ``HOST:PORT`` of a cluster; "" for this machine.

    Raises:
        UsageError: another form.
    """
    if not re.match(PATTERN, executor):
        raise UsageError(
            f"--executor {executor}: expected {FORMS}",
            "such as --executor local:4, --executor dask://192.168.1.7:8786",
        )
    return executor.removeprefix("dask://") if executor.startswith("dask://") else ""


class Workers:
    """A context in which pieces of work run on an executor; with ``local`` nothing is started.

    `processes` are those of this machine; 1 for a cluster.
    """

    def __init__(self, executor: str) -> None:
        self.cluster = scheduler_of(executor)
        self.processes = 1 if self.cluster else int(executor.partition(":")[2] or 1)
        self._client: Any = None
        self._open: dict[str, Executor] = {}  # by what the work needs
        self._deaths: tuple[type[Exception], ...] = (BrokenProcessPool,)

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        if self._client is not None:
            self._client.close()
            self._client = None

    @property
    def here(self) -> bool:
        """Whether all runs in this process, one after the other."""
        return self.processes == 1 and not self.cluster

    @property
    def client(self) -> Any:
        """The ``distributed.Client`` of the cluster, connected on first use."""
        if self._client is None:
            self._client = dask_client(self.cluster)
            from distributed import KilledWorker

            self._deaths = (KilledWorker,)
        return self._client

    def devices(self) -> list[str]:
        """The resources of the cluster's workers, one entry a worker that has it; without a cluster none."""
        if not self.cluster:
            return []
        workers = self.client.scheduler_info(n_workers=-1)["workers"].values()
        return [name for worker in workers for name in worker["resources"]]

    def blind(self, path: Path) -> list[str]:
        """The workers of the cluster that do not see a file."""
        name = str(path)
        told = self.client.run(lambda: __import__("os").path.isfile(name), on_error="return")
        return sorted(worker for worker, seen in told.items() if seen is False)

    def run(
        self,
        work: Callable[[_Item], _Made],
        items: Iterable[_Item],
        *,
        then: Callable[[_Item, _Made | None], Iterable[_Item]] = lambda item, made: (),
        needs: Callable[[_Item], str] = lambda item: "",
    ) -> Iterator[tuple[_Item, _Made | None]]:
        """Each item with what `work` made of it, as they come. An item that its process dies of, twice, has
        None; the second time it runs alone, because a death takes everything with it that was under way.

        Args:
            then: the items that an outcome makes possible.
            needs: the device, one of `devices`, that an item must run on; "" for any worker.

        Raises:
            DeviceError: the cluster was lost, or has no worker left that fits.
        """
        waiting, running, dead = deque(items), dict[Future[_Made], _Item](), deque[_Item]()
        while waiting or running or dead:
            if self.here:
                item = waiting.popleft()
                made = work(item)
                waiting.extendleft(reversed(list(then(item, made))))
                yield item, made
                continue
            last_try = not waiting and not running
            for item in [dead.popleft()] if last_try else list(waiting):
                running[self._submit(work, item, needs(item))] = item
            waiting.clear()
            for future in self._done(running, needs):
                item, found = running.pop(future), self._outcome(future)
                if not found and not last_try:
                    dead.append(item)
                    continue
                made_there = found[0] if found else None
                waiting.extend(then(item, made_there))
                yield item, made_there

    def _submit(self, work: Callable[[_Item], _Made], item: _Item, needs: str) -> Future[_Made]:
        if needs not in self._open:
            self._open[needs] = self._start(needs)
        try:
            return self._open[needs].submit(in_turn, work, item)
        except BrokenProcessPool as error:  # the death of another item came first
            future: Future[_Made] = Future()
            future.set_exception(error)
            return future

    def _start(self, needs: str) -> Executor:
        if not self.cluster:
            return ProcessPoolExecutor(self.processes, get_context("spawn"), _end_with_parent)
        wanted = {"resources": {needs: 1}} if needs else {}
        made: Executor = self.client.get_executor(pure=False, **wanted)
        return made

    def _done(self, running: dict[Future[_Made], _Item], needs: Callable[[_Item], str]) -> set[Future[_Made]]:
        """Those that ended, at least one.

        Raises:
            DeviceError: the cluster has had no worker that fits for a while.
        """
        looks = 0
        while looks < _LOOKS:
            if done := wait(running, _LOOK_S, FIRST_COMPLETED).done:
                return done
            looks = 0 if self._served({needs(item) for item in running.values()}) else looks + 1
        raise DeviceError(
            f"the cluster at {self.cluster} has no worker left for the work that waits",
            "start workers again (dask worker …); the same command continues",
        )

    def _served(self, needed: set[str]) -> bool:
        """Whether a worker fits one of the needs; processes of this machine do."""
        if not self.cluster:
            return True
        workers = self.client.scheduler_info(n_workers=-1)["workers"].values()
        return any(not need or need in worker["resources"] for need in needed for worker in workers)

    def _outcome(self, future: Future[_Made]) -> list[_Made]:
        """What it made; nothing where its process died."""
        try:
            return [future.result()]
        except self._deaths:
            if not self.cluster:
                self._stop()  # the pool died with its process
            return []
        except CancelledError as error:
            raise DeviceError(
                f"the connection to the Dask scheduler at {self.cluster} was lost",
                "what was done before is kept; run the command again",
            ) from error

    def _stop(self) -> None:
        for executor in self._open.values():
            if isinstance(executor, ProcessPoolExecutor):  # that of a cluster ends with its client
                executor.shutdown(cancel_futures=True)
        self._open.clear()


def dask_client(address: str) -> Any:
    """A ``distributed.Client`` of the scheduler at ``HOST:PORT``, whose workers have this package in the same
    version.

    Raises:
        MissingExtraError: the package distributed is not installed.
        DeviceError: nothing answers at the address, or there are no workers, or not of this version.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise missing_extra("distributed", "dask", f"the executor dask://{address}") from error
    try:
        client = Client(f"tcp://{address}", timeout=_CONNECT_S)
    except (OSError, ValueError, TimeoutError) as error:
        raise DeviceError(
            f"no Dask scheduler answers at {address}: {error}",
            "start one (dask scheduler; dask worker tcp://HOST:8786 --nthreads 1), or use --executor local",
        ) from error
    try:
        client.wait_for_workers(1, timeout=_CONNECT_S)
        told = client.run(lambda: __import__("edgekd").__version__, on_error="return")
    except TimeoutError as error:
        client.close()
        raise DeviceError(
            f"the Dask scheduler at {address} has no workers", f"dask worker tcp://{address} --nthreads 1"
        ) from error
    lost = OSError  # a worker that is gone by now
    others = {at: said for at, said in told.items() if said != __version__ and not isinstance(said, lost)}
    if others:
        client.close()
        worker, version = next(iter(others.items()))
        raise DeviceError(
            f"{len(others)} of {len(told)} Dask workers lack edgekd {__version__}: {worker}: {version}",
            "install the same edgekd in the workers' environment",
        )
    return client
