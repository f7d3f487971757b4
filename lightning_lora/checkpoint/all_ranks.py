"""Raise an error, instead of waiting, where a function that all ranks must call is called on some of them."""

import time
from typing import Any

import torch

from lightning_lora.compat.distributed import default_store

PATIENCE_S = 30.0  # how long rank 0 waits, which `if trainer.is_global_zero:` lets call alone
WAIT_S = 600.0  # how long another rank waits: rank 0 may do some work of its own before it calls
LEAVE_S = 10.0  # how long rank 0 waits for the others to have read the outcome
_POLL_S = 0.02


def meet(function: str) -> None:
    """Wait until all ranks have called this for ``function``. Called on all ranks; exchanges a few bytes.

    The ranks meet in the process group's key-value store, not in a collective: a rank that runs another collective
    would take part in this one by mistake, and a rank that waits alone could not leave it.

    Raises:
        ValueError: some ranks did not call within half a minute of rank 0, or ten minutes of another rank. Ranks that
            call later get the same error.
    """
    if torch.distributed.get_world_size() == 1:
        return
    everyones = default_store()
    store = torch.distributed.PrefixStore(f"lightning_lora/meet/{function}", everyones)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    # each rank counts its meetings in the store; one that was given up is not counted for ranks that were absent
    meeting = store.add(f"past/{rank}", 0)
    while store.check([f"{meeting}"]) and store.get(f"{meeting}") == b"given up":
        meeting += 1
    store.set(f"{meeting}/{rank}", "")
    if store.add(f"{meeting}/count", 1) == size:
        store.compare_set(f"{meeting}", "", "all here")
    deadline = time.monotonic() + (PATIENCE_S if rank == 0 else WAIT_S)
    while not store.check([f"{meeting}"]):
        if time.monotonic() > deadline:
            store.compare_set(f"{meeting}", "", "given up")
        time.sleep(_POLL_S)
    store.add(f"past/{rank}", meeting + 1 - store.add(f"past/{rank}", 0))
    given_up = store.get(f"{meeting}") == b"given up"
    absent = [other for other in range(size) if given_up and not store.check([f"{meeting}/{other}"])]
    _leave(store, f"{meeting}", rank)
    if given_up:
        raise ValueError(
            f"{function} was called on rank {rank}, and not on {'rank' if len(absent) == 1 else 'ranks'} "
            f"{', '.join(map(str, absent)) or 'the others'} in time. The adapters are spread over ranks (by "
            "tensor parallelism, or shard_adapters=True), so all ranks must call it: take it out of "
            "`if trainer.is_global_zero:`. Even so, only rank 0 writes the files"
        )


def _leave(store: torch.distributed.Store, meeting: str, rank: int) -> None:
    """Report that this rank reads no more of a meeting. Rank 0, whose process may keep the store, waits for the others.

    A rank that still reads when that process ends gets "Connection reset by peer".
    """
    left = store.add(f"{meeting}/left", 1)
    deadline = time.monotonic() + LEAVE_S
    while rank == 0 and left < store.add(f"{meeting}/count", 0) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        left = store.add(f"{meeting}/left", 0)


def fail_together(failure: Exception | None) -> None:
    """Raise on every rank what rank 0 raised: the others would wait for it. Called on all ranks."""
    outcome: list[Any] = [None if failure is None else (isinstance(failure, ValueError), str(failure))]
    torch.distributed.broadcast_object_list(outcome, 0)
    if failure is not None:
        raise failure
    if outcome[0] is not None:
        is_value_error, message = outcome[0]
        raise (ValueError if is_value_error else RuntimeError)(message)
