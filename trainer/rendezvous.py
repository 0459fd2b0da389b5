"""A store that holds nothing from before: what lets restarted ranks find each other and no dead ones.

torchrun keeps one store for all its restarts. A rank may then find there the address of one that was killed,
and wait for it until a timeout of half an hour (seen with gloo in torch 2.13; pytorch/pytorch#135712).
"""

from __future__ import annotations

import time
import uuid
from datetime import timedelta

from torch.distributed import PrefixStore, Store

POLL_SECONDS = 0.02


def fresh_store(store: Store, rank: int, world: int, timeout: timedelta) -> Store:
    """A part of `store` that these `world` processes, and no earlier ones, write to.

    Rank 0 names it and answers every greeting that it sees, old ones as well, until all ranks have thanked it
    for this name.

    Raises:
        TimeoutError: not all ranks came.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    if rank == 0:
        name = uuid.uuid4().hex
        absent = set(range(1, world))
        while absent:
            for other in sorted(absent):
                if store.check([f"thanks/{other}/{name}"]):
                    absent.remove(other)
                elif store.check([f"greeting/{other}"]):
                    greeting = store.get(f"greeting/{other}").decode()
                    store.set(f"answer/{other}/{greeting}", name)
            _wait(deadline, f"ranks {sorted(absent)} did not come")
    else:
        greeting = uuid.uuid4().hex
        store.set(f"greeting/{rank}", greeting)
        while not store.check([f"answer/{rank}/{greeting}"]):
            _wait(deadline, "rank 0 did not come")
        name = store.get(f"answer/{rank}/{greeting}").decode()
        store.set(f"thanks/{rank}/{name}", "1")
    return PrefixStore(name, store)


def _wait(deadline: float, what: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(what)
    time.sleep(POLL_SECONDS)
