"""Ranks that start again on a store that earlier ones have written to."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from trainer.rendezvous import fresh_store

LONG, SHORT = timedelta(seconds=20), timedelta(seconds=0.2)


def meet(store: HashStore, delays: list[float]) -> str:
    """What all ranks, come one by one, read where the last of them wrote."""

    def join(rank: int) -> str:
        time.sleep(delays[rank])
        mine = fresh_store(store, rank, len(delays), LONG)
        if rank == len(delays) - 1:
            assert not mine.check(["address"]), "an earlier rank's"
            mine.set("address", f"{time.monotonic()}")
        return mine.get("address").decode()

    with ThreadPoolExecutor(len(delays)) as pool:
        (address,) = set(pool.map(join, range(len(delays))))
    return address


@pytest.mark.parametrize("delays", [[0, 0, 0], [0.2, 0, 0.1], [0, 0.1, 0.2]], ids=str)
def test_each_start_is_its_own(delays: list[float]) -> None:
    store = HashStore()
    assert len({meet(store, delays) for _ in range(4)}) == 4


def test_a_rank_that_died_while_meeting_is_not_taken_for_a_new_one() -> None:
    store = HashStore()
    store.set("greeting/1", "of the dead")
    with pytest.raises(TimeoutError, match=r"ranks \[1\] did not come"):
        fresh_store(store, 0, 2, SHORT)
    assert meet(store, [0, 0.3])


def test_a_rank_without_rank_0_gives_up() -> None:
    with pytest.raises(TimeoutError, match="rank 0 did not come"):
        fresh_store(HashStore(), 1, 2, SHORT)
