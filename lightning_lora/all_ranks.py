"""Meeting of all ranks before they talk: who comes alone is told so in seconds, and not left waiting for the others."""

import time

import torch

PATIENCE_S = 30.0  # of rank 0, which `if trainer.is_global_zero:` lets in alone
WAIT_S = 600.0  # of the others: what one rank does alone before all meet, rank 0 does
_POLL_S = 0.02


def meet(function: str) -> None:
    """Return when all ranks have called this for ``function``.

    The ranks meet in the key-value store of the process group and not by a collective, which a rank that does
    something else would take part in by mistake, and which a rank alone could not leave.

    Raises:
        ValueError: not all came within half a minute of rank 0, or within ten minutes of another. Those that come
            later are told the same.
    """
    if torch.distributed.get_world_size() == 1:
        return
    everyones = torch.distributed.distributed_c10d._get_default_store()
    store = torch.distributed.PrefixStore(f"lightning_lora/meet/{function}", everyones)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    # meetings are counted in the store; one that was given up has no part in the count of those who did not come
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
    if store.get(f"{meeting}") == b"given up":
        absent = [other for other in range(size) if not store.check([f"{meeting}/{other}"])]
        raise ValueError(
            f"{function} was called on rank {rank}, and not on {'rank' if len(absent) == 1 else 'ranks'} "
            f"{', '.join(map(str, absent)) or 'the others'} in time. The adapters are spread over ranks (by "
            "tensor parallelism, or shard_adapters=True), so all ranks must call it: take it out of "
            "`if trainer.is_global_zero:`. Rank 0 alone writes files all the same"
        )
