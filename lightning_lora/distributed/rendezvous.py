"""Find the other ranks again after torchrun has restarted the workers.

torchrun keeps one key-value store for all attempts (torch 2.13). A worker that reads in it what a rank of an earlier
attempt left there connects to a process that is gone: it fails, or waits. Here the ranks of an attempt agree on a name
first, and look for each other under it.
"""

import json
import os
import time
import uuid
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, TCPStore

_POLL_S = 0.05


def store_of_this_attempt(rank: int, world_size: int, timeout: timedelta | None) -> dict[str, Any]:
    """Return ``{"store": ...}`` for ``init_process_group`` under torchrun's shared store, else nothing.

    Called on all ranks.

    Raises:
        TimeoutError: not all ranks came.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or world_size == 1:
        return {}
    timeout = timeout or timedelta(minutes=30)
    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)
    meeting = PrefixStore("lightning_lora/meeting", store)
    name = _agreed_name(meeting, rank, world_size, time.monotonic() + timeout.total_seconds())
    return {"store": PrefixStore(f"lightning_lora/{name}", store)}


def _agreed_name(store: Any, rank: int, world_size: int, deadline: float) -> str:
    """Return a name that is the same on all ranks of this attempt and on none of another.

    Each rank writes a number of its own; rank 0 writes down whose numbers it has read, and a rank that finds its own
    there accepts. Numbers of earlier attempts are accepted by nobody, so rank 0 reads on until all have accepted.
    """
    mine = uuid.uuid4().hex
    store.set(f"hello/{rank}", mine)
    while time.monotonic() < deadline:
        if rank == 0:
            if all(store.check([f"hello/{other}"]) for other in range(world_size)):
                numbers = [store.get(f"hello/{other}").decode() for other in range(world_size)]
                store.set("plan", json.dumps([mine, numbers]))
                if all(store.check([f"accepted/{mine}/{other}"]) for other in range(1, world_size)):
                    return mine
        elif store.check(["plan"]):
            name, numbers = json.loads(store.get("plan"))
            if len(numbers) == world_size and numbers[rank] == mine:
                store.set(f"accepted/{name}/{rank}", "")
                return str(name)
        time.sleep(_POLL_S)
    raise TimeoutError(f"rank {rank} of {world_size} did not find all other ranks; is a node missing?")
