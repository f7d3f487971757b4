"""One rank fails, stops, or has fewer batches: every rank ends with an error that says which rank did what."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launch import launch

# what ranks differ in without harm to their process group, and last what breaks it
LAUNCHES = [
    ("ddp", "both", "loader", "limit", "stop", "step"),
    ("ddp", "callback"),
    ("ddp", "interrupt"),
    ("fsdp_lora", "both", "loader", "stop", "step"),
    ("fsdp_lora", "validation"),
    ("megatron_lora", "both", "limit", "stop", "rows", "callback"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Path, list[dict[str, Any]]]]:
    found = {}
    for strategy, *cases in LAUNCHES:
        directory = tmp_path_factory.mktemp(strategy)
        ranks = launch("parting_script.py", 2, directory, strategy, *cases)
        found.update({(strategy, case): (directory / case, [rank[case] for rank in ranks]) for case in cases})
    return found


def of(case: str) -> Any:
    return pytest.mark.parametrize("strategy", [strategy for strategy, *cases in LAUNCHES if case in cases])


FAILING = {
    "step": (1, "ValueError", "a batch of rank 1", "in batch 1 of epoch 0"),
    "callback": (0, "OSError", "the disk of rank 0", "in batch 0 of epoch 0"),
    "validation": (0, "ValueError", "a row of rank 0", "in the validation of epoch 0"),
}


@pytest.mark.parametrize(
    ("strategy", "case"), [(strategy, case) for strategy, *cases in LAUNCHES for case in cases if case in FAILING]
)
def test_the_others_are_told_which_rank_failed_where(runs: Any, strategy: str, case: str) -> None:
    _, ranks = runs[strategy, case]
    failed, error, words, where = FAILING[case]
    assert (ranks[failed]["error"], ranks[failed]["message"]) == (error, words)
    told = ranks[1 - failed]
    assert told["error"] == "RuntimeError"
    assert told["message"].startswith(f"rank {failed} raised {error}: {words} ({where}). Rank {1 - failed} was waiting")


@of("interrupt")
def test_an_interrupt_of_one_rank_is_told(runs: Any, strategy: str) -> None:
    _, ranks = runs[strategy, "interrupt"]
    assert ranks[1]["error"] == "SystemExit"  # Lightning's answer to an interrupt
    assert ranks[0]["message"].startswith("rank 1 raised KeyboardInterrupt (in batch 1 of epoch 0). Rank 0 was waiting")


@of("step")
def test_no_step_is_made_of_gradients_that_were_not_reduced(runs: Any, strategy: str) -> None:
    _, ranks = runs[strategy, "step"]
    assert [rank["step"] for rank in ranks] == [1, 1]


SHORT = {
    "loader": ("rank 0 begins batch 2 of epoch 0", "rank 1 validates after 2 batches of epoch 0 (it has no more)"),
    "limit": ("rank 0 validates after 2 batches of epoch 0 (it has no more)", "rank 1 begins batch 2 of epoch 0"),
    "stop": (
        "rank 0 begins batch 2 of epoch 0",
        "rank 1 validates after 2 batches of epoch 0 (trainer.should_stop is set on it)",
    ),
}


@pytest.mark.parametrize(
    ("strategy", "case"), [(strategy, case) for strategy, *cases in LAUNCHES for case in cases if case in SHORT]
)
def test_ranks_at_different_batches_are_told_where_all_are(runs: Any, strategy: str, case: str) -> None:
    _, ranks = runs[strategy, case]
    for rank in ranks:
        assert rank["error"] == "RuntimeError"
        assert rank["message"].startswith(f"the ranks are at different batches: {'; '.join(SHORT[case])}. Give every")


@of("rows")
def test_ranks_that_share_a_model_must_evaluate_as_many_batches(runs: Any, strategy: str) -> None:
    _, ranks = runs[strategy, "rows"]
    for rank in ranks:
        assert "ranks that share a model have different numbers of batches to evaluate: [[1], [2]]" in rank["message"]


@of("both")
def test_ranks_that_fail_alike_still_save_together(runs: Any, strategy: str) -> None:
    directory, ranks = runs[strategy, "both"]
    assert [rank["message"] for rank in ranks] == ["a batch of rank 1"] * 2
    saved = torch.load(directory / "on_exception.ckpt", weights_only=True)
    assert saved["global_step"] == 1
    assert len(saved["lightning_lora"]["random_states"]) == 2


@of("step")
def test_a_rank_that_fails_alone_keeps_its_error_and_what_can_be_saved(runs: Any, strategy: str) -> None:
    directory, ranks = runs[strategy, "step"]
    path = directory / "on_exception.ckpt"
    if strategy == "ddp":  # every rank holds all of it
        assert torch.load(path, weights_only=True)["global_step"] == 1
    else:
        assert not path.exists()
        assert ranks[0]["warned"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp_lora"])
def test_a_rank_ends_that_waits_for_one_whose_script_goes_on(tmp_path: Path, strategy: str) -> None:
    with pytest.raises(AssertionError, match=r"ranks \[0\] failed with \[1, 0\]") as failed:
        launch("parting_script.py", 2, tmp_path, strategy, "step", "stays")
    words = "rank 1 raised ValueError: a batch of rank 1 (in batch 1 of epoch 0). Rank 0 waits for it in vain and ends"
    assert words in str(failed.value)
