"""Launches end, also those whose ranks would not."""

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


def test_ranks_that_work_for_too_long_are_stopped_too(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="the ranks have not ended after 2 s") as raised:
        launch("hanging_script.py", 2, tmp_path, "work", timeout_s=2, idle_s=1)
    assert str(raised.value).count("in work") == 2


def test_ranks_that_write_are_let_be(tmp_path: Path) -> None:  # after hangs, too
    assert launch("hanging_script.py", 2, tmp_path, "write", idle_s=4) == ["ended", "ended"]
