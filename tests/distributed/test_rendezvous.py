"""Ranks of one attempt find each other, whatever an earlier attempt left in torchrun's store."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import PrefixStore, TCPStore

from lightning_lora.distributed.rendezvous import store_of_this_attempt
from tests.distributed.launch import free_port


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """Return the store that torchrun's agent keeps for all attempts."""
    port = free_port()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


def stores(world_size: int, delays_s: list[float]) -> list[Any]:
    """Return what every rank of an attempt gets."""

    def come(rank: int) -> Any:
        time.sleep(delays_s[rank])
        return store_of_this_attempt(rank, world_size, timedelta(seconds=20))["store"]

    with ThreadPoolExecutor(world_size) as pool:
        return list(pool.map(come, range(world_size)))


@pytest.mark.parametrize("delays_s", [[0.0, 0.0, 0.0], [0.3, 0.0, 0.1], [0.0, 0.2, 0.4]])
def test_an_earlier_attempt_does_not_answer(store: TCPStore, delays_s: list[float]) -> None:
    meeting = PrefixStore("lightning_lora/meeting", store)
    for rank in range(4):  # of four ranks, of which one is gone for good
        meeting.set(f"hello/{rank}", f"stale{rank}")
        meeting.set(f"accepted/stale0/{rank}", "")
    meeting.set("plan", json.dumps(["stale0", [f"stale{rank}" for rank in range(4)]]))
    PrefixStore("lightning_lora/stale0", store).set("word", "of the earliest")

    for attempt in ("first", "second"):
        found = stores(3, delays_s)
        assert not any(one.check(["word"]) for one in found)
        found[0].set("word", attempt)
        assert [one.get("word").decode() for one in found] == [attempt] * 3


@pytest.mark.usefixtures("store")
def test_a_missing_rank_is_said() -> None:
    with pytest.raises(TimeoutError, match="rank 1 of 2 did not find all other ranks"):
        store_of_this_attempt(1, 2, timedelta(seconds=1))


def test_without_torchruns_store_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert store_of_this_attempt(0, 2, None) == {}
