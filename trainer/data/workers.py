"""The processes that load images: the signals they obey, what they send, what is reported if one dies."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import TypeVar

from torch import Tensor
from torch.utils.data import get_worker_info

DEATH = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: (.+?)\. |exited)")
FULL = "unable to allocate shared memory"
LOST = "the connection to a data worker broke"

_Batch = TypeVar("_Batch")


class WorkerDied(RuntimeError):
    """A data worker died during the training; the message says why, if that is known."""


@contextmanager
def deaths_named(workers: int) -> Iterator[None]:
    """Wraps a training, as torch reports a dead worker at any point of it.

    Raises:
        WorkerDied: in place of that RuntimeError.
    """
    try:
        yield
    except RuntimeError as error:
        reason = _reason(str(error), f"fewer workers (now {workers}) or a smaller batch-size need less")
        if reason is None:
            raise
        raise WorkerDied(f"{reason}; resume auto continues from the last checkpoint") from None


def connected(batches: Iterator[_Batch]) -> Iterator[_Batch]:
    """`batches` of a loader's workers.

    Raises:
        RuntimeError: one died as it handed over a batch, which torch reports as whatever its socket did.
    """
    try:
        yield from batches
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        if str(error).startswith("Caught"):  # by the worker, in its own work
            raise
        raise RuntimeError(LOST) from error


def _reason(message: str, need_less: str) -> str | None:
    shared = f"the shared memory is full (/dev/shm; of Docker, --shm-size): {need_less}"
    if FULL in message:
        return f"a data worker can't hand over its images, as {shared}"
    if message == LOST:
        return f"a data worker has ended, perhaps for lack of memory: {need_less}"
    if not (found := DEATH.search(message)):
        return None
    pid, by = found.groups()
    if by is None:
        return f"data worker {pid} has ended, perhaps for lack of memory: {need_less}"
    if by.startswith("Killed"):
        return f"data worker {pid} was killed, as the system does when memory runs out: {need_less}"
    if by.startswith("Bus error"):
        return f"data worker {pid} was ended by a bus error, as where {shared}"
    return f"data worker {pid} was ended by a signal: {by}"


def hand_over(tensor: Tensor) -> Tensor:
    """`tensor`, in a worker in shared memory.

    Moved there later, by the queue's own thread, it would be lost where that is full, and waited for forever.
    """
    return tensor if get_worker_info() is None else tensor.share_memory_()


def leave_signals_to_main(worker: int) -> None:
    """Ctrl-C, torchrun and Slurm signal whole groups of processes: the main one decides when workers end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    main = multiprocessing.parent_process()
    if main and hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_end_with, args=(main.pid,), daemon=True).start()


def _end_with(main: int | None) -> None:
    """Heed a SIGTERM of the main process alone."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main:
        pass
    os._exit(0)
