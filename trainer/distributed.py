"""One process or many (torchrun): rank, device, shares of a batch, and agreement on when to stop."""

from __future__ import annotations

import inspect
import os
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from trainer.config import Config
from trainer.errors import ConfigError
from trainer.rendezvous import fresh_store


@dataclass(frozen=True)
class Ranks:
    """This process among `world`, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, start: int, stop: int) -> slice:
        """This rank's contiguous part of the range; parts differ by at most one and cover it exactly."""
        size = stop - start
        return slice(start + size * self.rank // self.world, start + size * (self.rank + 1) // self.world)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """`value` of every rank, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def broadcast_(self, tensors: list[torch.Tensor]) -> None:
        """Overwrite `tensors` with those of rank 0."""
        if self.world > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


@contextmanager
def ranks(config: Config) -> Iterator[Ranks]:
    """Join the other processes of torchrun, if any: NCCL between GPUs, gloo between CPUs.

    No DistributedDataParallel may outlive this: its reducer would be the last to let the process group go,
    and would wait, holding the GIL, for gloo's threads, which may want the GIL (seen in torch 2.13: one run
    in ten never ended).
    """
    cuda = config.uses_cuda
    if cuda and not torch.cuda.is_available():
        raise ConfigError("device cuda: there is no CUDA device here")
    try:
        world, local, here = (
            int(os.environ.get(name, default))
            for name, default in (("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
        )
    except ValueError as error:
        raise ConfigError(
            f"WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE are torchrun's numbers: {error}"
        ) from None
    if cuda and here > torch.cuda.device_count():
        raise ConfigError(f"{here} ranks on this machine, but {torch.cuda.device_count()} CUDA devices")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world == 1:
        yield Ranks(0, 1, device)
        return
    try:
        store, rank, world = next(rendezvous("env://"))
    except ValueError as error:  # a variable is missing
        raise ConfigError(f"WORLD_SIZE is {world}, but not by torchrun: {error}") from None
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=fresh_store(store, rank, world, dist.default_pg_timeout),
        rank=rank,
        world_size=world,
        device_id=device if cuda else None,
    )
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
    except BaseException as error:
        cause: BaseException | None = error
        while cause is not None:
            traceback.clear_frames(cause.__traceback__)  # they hold the run
            cause = cause.__context__
        raise
    finally:
        dist.destroy_process_group()


def data_parallel(module: nn.Module) -> DistributedDataParallel:
    """`module`, averaging its gradients over the ranks. Buffers, such as running statistics, stay each rank's
    own: an evaluation sends rank 0's around, instead of every step."""
    options: dict[str, Any] = {"gradient_as_bucket_view": True}
    # torch 2.13 warns of the old name
    new = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    options["forward_sync_buffers" if new else "broadcast_buffers"] = False
    return DistributedDataParallel(module, **options)


def stop_signals() -> list[signal.Signals]:
    """What asks a process to end; SIGHUP (the terminal was closed) not where nohup has it ignored."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # not on Windows
        numbers.append(signal.SIGHUP)
    return numbers


class StopRequest:
    """SIGINT, SIGTERM and SIGHUP, noted and acted upon between steps; all ranks stop at the same step."""

    def __init__(self, ranks: Ranks) -> None:
        self._world = ranks.world
        self._signal = 0
        self._agreed = torch.zeros(1, dtype=torch.int32)
        self._pending: Any = None
        self._old = {number: signal.signal(number, self._note) for number in stop_signals()}

    def _note(self, number: int, frame: Any) -> None:
        self._signal = number

    def poll(self) -> int:
        """Signal that ends the run after this step, or 0; must be called by every rank at every step."""
        if self._world == 1:
            return self._signal
        if self._pending is not None:
            self._pending.wait()  # begun a step ago: all ranks read the same answer, and none waited for it
            if int(self._agreed):
                return int(self._agreed)
        self._agreed.fill_(self._signal)
        self._pending = dist.all_reduce(self._agreed, dist.ReduceOp.MAX, async_op=True)
        return 0

    def close(self) -> None:
        """Give the signals back to who had them before."""
        if self._pending is not None:
            self._pending.wait()
        for number, handler in self._old.items():
            signal.signal(number, handler)
