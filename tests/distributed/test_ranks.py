"""``@on_ranks`` itself: values and errors come back from ranks, and launches end, also those whose ranks would not."""

import os
import re
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import on_ranks


@pytest.fixture
def number() -> int:
    return 7


@pytest.fixture
@on_ranks(2)
def ranks(number: int) -> tuple[int, int, str]:
    return os.getpid(), number, os.environ["RANK"]


def test_a_fixture_is_the_list_of_what_each_rank_returned(ranks: list[tuple[int, int, str]]) -> None:
    assert [(number, rank) for _, number, rank in ranks] == [(7, "0"), (7, "1")]
    assert len({os.getpid(), *(process for process, _, _ in ranks)}) == 3


@on_ranks(1, 2)
def test_a_test_on_several_numbers_of_ranks_runs_on_each(num_ranks: int) -> None:
    assert os.environ["WORLD_SIZE"] == str(num_ranks)


@on_ranks(2)
def fail_on_rank_1() -> None:
    assert os.environ["RANK"] == "0", "not on rank 1"


def test_an_error_of_one_rank_fails_the_test_with_its_traceback() -> None:
    with pytest.raises(AssertionError, match=r"ranks \[1\] failed with \[0, 1\]") as raised:
        fail_on_rank_1()
    assert "in fail_on_rank_1" in str(raised.value)
    assert "AssertionError: not on rank 1" in str(raised.value)


@on_ranks(1)
def end_without_returning() -> None:
    os._exit(0)


def test_a_rank_that_ends_without_returning_is_an_error() -> None:
    with pytest.raises(FileNotFoundError, match=r"rank0\.pt"):
        end_without_returning()


def wait_for_the_other() -> None:
    """Meet all ranks, of which the last one never comes."""
    torch.distributed.init_process_group("gloo")
    if torch.distributed.get_rank() < torch.distributed.get_world_size() - 1:
        torch.distributed.barrier()
    else:
        stay_away()


def stay_away() -> None:
    threading.Event().wait()


WAITING = {fresh: on_ranks(2, idle_s=5, fresh=fresh)(wait_for_the_other) for fresh in (False, True)}


@pytest.mark.parametrize("fresh", WAITING)
def test_ranks_that_wait_for_one_another_are_stopped_and_say_where(fresh: bool) -> None:
    with pytest.raises(AssertionError, match=r"the ranks made no progress for 5 s:\nrank 0: ") as raised:
        WAITING[fresh]()
    first, last = str(raised.value).split("rank 1: ")
    assert "in wait_for_the_other" in first
    assert "in barrier" in first
    assert "in stay_away" in last


@on_ranks(1, idle_s=2)
def start_another() -> None:
    """Wait for a process of this one's own, which never ends."""
    child = subprocess.Popen(["sleep", "infinity"])
    print(f"started {child.pid}", flush=True)
    child.wait()


def test_what_a_stopped_rank_has_started_is_stopped_too() -> None:
    with pytest.raises(AssertionError, match="made no progress") as raised:
        start_another()
    [number] = re.findall(r"started (\d+)", str(raised.value))
    while not has_ended(int(number)):  # the system takes a moment, or the test's limit ends it
        time.sleep(0.01)


def has_ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@on_ranks(2, timeout_s=2, idle_s=1)
def work() -> None:
    while True:
        sum(range(1000))


def test_ranks_that_work_for_too_long_are_stopped_too() -> None:
    with pytest.raises(AssertionError, match="the ranks have not ended after 2 s") as raised:
        work()
    assert str(raised.value).count("in work") == 2


@on_ranks(2, idle_s=4)
def test_ranks_that_write_are_let_be() -> None:  # after hangs, too
    for _ in range(60):
        print("still here", flush=True)
        time.sleep(0.1)
