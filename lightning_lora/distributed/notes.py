"""Tell the other ranks through the process group's store why a rank failed.

A collective waits for all ranks. Gloo ends it when a rank's process ends, with an error that names an address; a rank
that lives on, after its script caught the error, is waited for until the group's timeout. So a thread on every rank
looks for notes, and a rank that waits ends with an error that repeats them.
"""

import os
import sys
import threading
import time
from contextlib import suppress
from typing import Any

import torch
from torch.distributed import DistError, PrefixStore

from lightning_lora.compat.distributed import default_store

PATIENCE_S = 5.0  # how long a rank that failed waits for the others to fail too
END_S = 20.0  # how long a rank may stay in a collective that another rank has left for good
_POLL_S = 0.5


class Notes:
    """The notes of one run. Made on all ranks.

    Args:
        name: the same on all ranks, another one in every run.

    Attributes:
        parted: whether some rank has left without the others, so that no collective can succeed.
    """

    def __init__(self, name: str, rank: int, world_size: int) -> None:
        store = default_store()
        self._store: Any = PrefixStore(f"lightning_lora/notes/{name}", store.clone())  # a thread reads in it
        self._rank, self._world_size = rank, world_size
        self._notes: dict[int, str] = {}
        self._has_left = False
        self._closed = threading.Event()
        self.parted = False
        threading.Thread(target=self._watch, daemon=True).start()

    def close(self) -> None:
        """Stop looking for notes."""
        self._closed.set()

    def leave(self, exception: BaseException, where: str) -> None:
        """Note that this rank ends with an exception, and find out whether all ranks do.

        If not all have left after :data:`PATIENCE_S`, the ranks have parted. An error of a collective that waited for
        another rank is given the words of that rank's note.
        """
        self._has_left = True
        waited = _is_of_a_collective(exception)
        if waited:
            self._explain(exception, where)
        else:
            reason = str(exception).strip()[:500]
            said = f"{type(exception).__name__}: {reason}" if reason else type(exception).__name__
            with suppress(RuntimeError):
                self._store.set(str(self._rank), f"rank {self._rank} raised {said} ({where})")
        with suppress(RuntimeError):  # rank 0, which keeps the store, may have ended
            self._store.add("left", 1)
        # an interrupt may have come between the two halves of a collective
        self.parted = waited or isinstance(exception, KeyboardInterrupt) or not self._all_have_left()
        verdict = "parted" if self.parted else "together"
        with suppress(RuntimeError):
            self.parted = self._store.compare_set("verdict", "", verdict) != b"together"

    def check(self) -> None:
        """Raise ``RuntimeError`` with the notes if another rank has left for good. Costs nothing."""
        if self.parted and not self._has_left:
            raise RuntimeError(self._said())

    def _all_have_left(self) -> bool:
        deadline = time.monotonic() + PATIENCE_S
        with suppress(RuntimeError):
            while time.monotonic() < deadline:
                if self._store.add("left", 0) == self._world_size:
                    return True
                if self._store.check(["verdict"]):
                    return False
                time.sleep(_POLL_S / 10)
        return False

    def _explain(self, exception: BaseException, where: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not self._notes and time.monotonic() < deadline:
            with suppress(RuntimeError):
                self._read()
            time.sleep(_POLL_S / 10)
        first_line = str(exception).partition("\n")[0][:300]
        exception.args = (f"{self._said()}. Rank {self._rank} was waiting for it ({where}): {first_line}",)

    def _said(self) -> str:
        if self._notes:
            return "; ".join(self._notes[rank] for rank in sorted(self._notes))
        return "another rank is gone and left no note: its process was killed, or ran out of memory; see its own output"

    def _read(self) -> None:
        for rank in range(self._world_size):
            if rank != self._rank and rank not in self._notes and self._store.check([str(rank)]):
                self._notes[rank] = self._store.get(str(rank)).decode()

    def _watch(self) -> None:
        with suppress(RuntimeError):
            while not self._closed.wait(_POLL_S):
                self._read()
                if self._store.check(["verdict"]):
                    break
            if self._closed.is_set() or self._store.get("verdict") == b"together":
                return
            self.parted = True
            if not self._closed.wait(END_S) and not self._has_left:
                self._end()

    def _end(self) -> None:
        """End the process: nothing in it can end the collective that it waits in."""
        print(f"{self._said()}. Rank {self._rank} waits for it in vain and ends", file=sys.stderr, flush=True)
        os._exit(1)


def _is_of_a_collective(exception: BaseException) -> bool:
    """Whether an exception is one that a process group raises where another rank is missing."""
    words = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
    return isinstance(exception, DistError) or (
        isinstance(exception, RuntimeError) and any(word in str(exception) for word in words)
    )


def common_notes(strategy: Any) -> "Notes | None":
    """Return the notes of a run that begins, or ``None`` for one process. Called on all ranks."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return None
    name = strategy.broadcast(os.urandom(8).hex())
    return Notes(name, torch.distributed.get_rank(), torch.distributed.get_world_size())
