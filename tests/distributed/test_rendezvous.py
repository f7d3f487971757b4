"""Ranks of one attempt find each other, whatever an earlier attempt left in the store."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from torch.distributed import HashStore

from lightning_lora.distributed.rendezvous import _agreed_name, store_of_this_attempt


def names(store: HashStore, world_size: int, delays_s: list[float]) -> list[str]:
    def come(rank: int) -> str:
        time.sleep(delays_s[rank])
        return _agreed_name(store, rank, world_size, time.monotonic() + 20)

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(come, range(world_size)))


@pytest.mark.parametrize("delays_s", [[0.0, 0.0, 0.0], [0.3, 0.0, 0.1], [0.0, 0.2, 0.4]])
def test_an_earlier_attempt_does_not_answer(delays_s: list[float]) -> None:
    store = HashStore()
    for rank in range(4):  # of four ranks, of which one is gone for good
        store.set(f"hello/{rank}", f"stale{rank}")
        store.set(f"accepted/stale0/{rank}", "")
    store.set("plan", json.dumps(["stale0", [f"stale{rank}" for rank in range(4)]]))
    first = names(store, 3, delays_s)
    second = names(store, 3, delays_s)
    assert len(set(first)) == len(set(second)) == 1
    assert len({"stale0", first[0], second[0]}) == 3


def test_a_missing_rank_is_said() -> None:
    with pytest.raises(TimeoutError, match="rank 1 of 2 did not find all other ranks"):
        _agreed_name(HashStore(), 1, 2, time.monotonic() + 0.2)


def test_without_torchruns_store_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert store_of_this_attempt(0, 2, None) == {}
