"""One rank of a launch that hangs, works or writes for longer than a test lets it."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from tests.distributed.launch import report


def wait_for_the_other() -> None:
    """Meet all ranks, of which the last one never comes."""
    torch.distributed.init_process_group("gloo")
    if torch.distributed.get_rank() < torch.distributed.get_world_size() - 1:
        torch.distributed.barrier()
    else:
        stay_away()


def stay_away() -> None:
    threading.Event().wait()


def start_another() -> None:
    """Wait for a process of this one's own, which never ends."""
    child = subprocess.Popen(["sleep", "infinity"])
    print(f"started {child.pid}", flush=True)
    child.wait()


def work() -> None:
    while True:
        sum(range(1000))


def write() -> None:
    for _ in range(60):
        print("still here", flush=True)
        time.sleep(0.1)


WAYS = {function.__name__: function for function in (wait_for_the_other, start_another, work, write)}


if __name__ == "__main__":
    if sys.argv[2] != "say_nothing":
        WAYS[sys.argv[2]]()
        report(Path(sys.argv[1]), "ended")
