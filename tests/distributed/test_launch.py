"""Launches end, also those whose ranks would not."""

import re
import time
from pathlib import Path

import pytest

from tests.distributed.launch import launch


@pytest.mark.parametrize("fresh", [False, True])
def test_ranks_that_wait_for_one_another_are_stopped_and_say_where(tmp_path: Path, fresh: bool) -> None:
    with pytest.raises(AssertionError, match=r"the ranks made no progress for 5 s:\nrank 0: ") as raised:
        launch("hanging_script.py", 2, tmp_path, "wait_for_the_other", idle_s=5, fresh=fresh)
    first, last = str(raised.value).split("rank 1: ")
    assert "in wait_for_the_other" in first
    assert "in barrier" in first
    assert "in stay_away" in last


def test_what_a_stopped_rank_has_started_is_stopped_too(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="made no progress") as raised:
        launch("hanging_script.py", 1, tmp_path, "start_another", idle_s=2)
    [number] = re.findall(r"started (\d+)", str(raised.value))
    while not has_ended(int(number)):  # the system takes a moment, or the test's limit ends it
        time.sleep(0.01)


def has_ended(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_a_rank_that_reports_nothing_is_not_taken_for_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "rank0.pt").write_bytes(b"of another launch")
    with pytest.raises(FileNotFoundError, match=r"rank0\.pt"):
        launch("hanging_script.py", 1, tmp_path, "say_nothing")


def test_ranks_that_work_for_too_long_are_stopped_too(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="the ranks have not ended after 2 s") as raised:
        launch("hanging_script.py", 2, tmp_path, "work", timeout_s=2, idle_s=1)
    assert str(raised.value).count("in work") == 2


def test_ranks_that_write_are_let_be(tmp_path: Path) -> None:  # after hangs, too
    assert launch("hanging_script.py", 2, tmp_path, "write", idle_s=4) == ["ended", "ended"]
