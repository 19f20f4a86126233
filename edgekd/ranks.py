"""The processes, started by ``torchrun``, that train one student together: each has a part of every batch."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from edgekd.errors import UsageError

_NAMES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_KEY, _TRAIN, _LEAVE = "edgekd", "train", "leave"
_PATIENCE = datetime.timedelta(days=2)  # until the first process reaches the training
_LATENESS = datetime.timedelta(minutes=30)  # between processes that train

T = TypeVar("T")


class Ranks:
    """This process, number `rank` of `count`. One alone (`ALONE`) does nothing here, at no cost."""

    def __init__(self, rank: int = 0, count: int = 1, store: Any = None) -> None:
        """`store`: where processes leave words for each other, a ``torch.distributed`` store."""
        self.rank, self.count, self._store = rank, count, store

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def part(self, total: int) -> slice:
        """Which of `total` samples of a batch are this process's, in turn: parts differ by one at most."""
        return slice(self.rank, total, self.count)

    def threads(self, asked: int) -> int:
        """How many threads a process may use; 0 for one alone: all that turn out to help."""
        return asked if asked or self.count == 1 else max(1, len(os.sched_getaffinity(0)) // self.count)

    # ------------------------------------------------------------ values

    def of_first(self, value: T) -> T:
        """The first process's value, on all of them."""
        if self.count == 1:
            return value
        held: list[Any] = [value]
        dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
        agreed: T = held[0]
        return agreed

    def all(self, flag: bool) -> bool:
        """Whether `flag` is true on all of them; none goes on before all have asked."""
        if self.count == 1:
            return flag
        held = torch.tensor(int(flag))
        dist.all_reduce(held, dist.ReduceOp.MIN)
        return bool(held)

    def collect(self, mine: list[T]) -> list[T]:
        """Items that the processes made in turn (process r those with number r, r + count, ...), in order."""
        if self.count == 1:
            return mine
        held: list[Any] = [None] * self.count
        dist.all_gather_object(held, mine)
        return [held[number % self.count][number // self.count] for number in range(sum(map(len, held)))]

    # ------------------------------------------------------------ tensors, in place

    def spread(self, tensors: Sequence[Tensor]) -> None:
        """Each tensor becomes the first process's."""
        if self.count == 1:
            return
        for tensor in tensors:
            held = tensor.detach().contiguous()
            dist.broadcast(held, 0)
            tensor.detach().copy_(held)

    @torch.no_grad()
    def combine(self, tensors: Sequence[Tensor], share: float) -> None:
        """Each tensor becomes ``sum_r share_r tensor_r`` over the processes r: one message for all."""
        flat = torch.cat([tensor.reshape(-1).float() for tensor in tensors])
        flat *= share
        dist.all_reduce(flat)
        sizes = [tensor.numel() for tensor in tensors]
        for tensor, values in zip(tensors, flat.split(sizes), strict=True):
            tensor.copy_(values.view(tensor.shape))

    @torch.no_grad()
    def merge(self, tensors: Sequence[Tensor], before: Sequence[Tensor]) -> None:
        """Each entry becomes the mean over the processes that changed it since `before`: of running
        statistics that is the mean of all, of a store with a row a sample the row that was written."""
        for tensor, old in zip(tensors, before, strict=True):
            changed = tensor != old
            total = torch.where(changed, tensor.double(), 0.0)
            writers = changed.double()
            dist.all_reduce(total)
            dist.all_reduce(writers)
            tensor.copy_(torch.where(writers > 0, total / writers, old.double()))

    # ------------------------------------------------------------ coming and going

    def call(self) -> None:
        """The first process is about to train: the others come along."""
        if self._store is not None and self.first:
            self._store.set(_KEY, _TRAIN)

    def called(self) -> bool:
        """Wait, on the others, for the word of the first: whether there is anything to train."""
        if self._store is None:
            return False
        self._store.wait([_KEY], _PATIENCE)
        return bool(self._store.get(_KEY) == _TRAIN.encode())

    def leave(self) -> None:
        """All together, after the training."""
        if self.count > 1 and dist.is_initialized():
            self.all(True)
            dist.destroy_process_group()

    @contextmanager
    def dismissed(self) -> Iterator[None]:
        """After the block, the others go that were never called."""
        try:
            yield
        finally:
            if self._store is not None:
                self._store.set(_KEY, _LEAVE)


ALONE = Ranks()


def join(*, cuda: bool) -> Ranks:
    """This process's place among those that ``torchrun`` started; `ALONE` without it. With `cuda`, each
    process takes a device of its own.

    Raises:
        UsageError: there are more processes on this machine than CUDA devices.
    """
    if any(name not in os.environ for name in _NAMES) or int(os.environ["WORLD_SIZE"]) < 2:
        return ALONE
    cuda = cuda and torch.cuda.is_available()
    if cuda:
        local, devices = int(os.environ.get("LOCAL_RANK", os.environ["RANK"])), torch.cuda.device_count()
        if local >= devices:
            raise UsageError(
                f"process {local} of this machine has no CUDA device of its own; there are {devices}",
                f"torchrun --nproc_per_node {devices}, or --set device=cpu",
            )
        torch.cuda.set_device(local)
    store, rank, count = next(rendezvous("env://", timeout=_LATENESS))
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_LATENESS)
    return Ranks(rank, count, store)
