"""``LoRAAdamW`` on two gloo ranks under every strategy, against AdamW in one process."""

from typing import Any

import pytest
import torch

from tests.distributed.launch import launch
from tests.distributed.optim_script import MAX_NORM, SETTINGS, STRATEGIES, Theirs
from tests.distributed.training import fit, rank_loader, state

# lr 1e-2 / eps 1e-4 turns a rounding of 1e-8 in a gradient into 1e-6 per step, and there are four
STEP_TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
EXACT = {"rtol": 0, "atol": 0}


class Normed(Theirs):
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        self.norms = [*getattr(self, "norms", []), torch.nn.utils.get_total_norm(gradients).item()]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory, single = tmp_path_factory.mktemp("optim"), Normed()
    data = {"train_dataloaders": rank_loader(0, 1)}
    fit(directory / "single", single, "auto", **SETTINGS, loaders=data, max_epochs=2, gradient_clip_val=MAX_NORM)
    return {"single": single, "adapters": state(single), "ranks": launch("optim_script.py", 2, directory)}


@pytest.mark.parametrize("strategy", STRATEGIES)
class TestUnderEveryStrategy:
    def test_four_clipped_steps_equal_adamw_in_one_process(self, run: dict[str, Any], strategy: str) -> None:
        for rank in run["ranks"]:
            torch.testing.assert_close(rank[strategy]["adapters"], run["adapters"], **STEP_TOLERANCE)

    def test_the_norm_is_that_of_the_whole_model_on_every_rank(self, run: dict[str, Any], strategy: str) -> None:
        assert min(run["single"].norms) > MAX_NORM
        for rank in run["ranks"]:
            # gradients as different as a few steps of rounding have made the adapters
            torch.testing.assert_close(rank[strategy]["norms"], run["single"].norms, rtol=1e-4, atol=0)
            assert rank[strategy]["norms"] == run["ranks"][0][strategy]["norms"]

    def test_replicas_are_bit_equal(self, run: dict[str, Any], strategy: str) -> None:
        one, other = (rank[strategy]["adapters"] for rank in run["ranks"])
        torch.testing.assert_close(one, other, **EXACT)

    def test_it_resumes_its_own_file_to_the_bit(self, run: dict[str, Any], strategy: str) -> None:
        for rank in run["ranks"]:
            torch.testing.assert_close(rank[strategy]["resumed"], rank[strategy]["adapters"], **EXACT)

    @pytest.mark.parametrize("way", ["switched", "back"])
    def test_files_pass_between_it_and_adamw(self, run: dict[str, Any], strategy: str, way: str) -> None:
        for rank in run["ranks"]:
            torch.testing.assert_close(rank[strategy][way], run["adapters"], **STEP_TOLERANCE)


def test_the_runs_are_of_tensors_whole_and_in_parts(run: dict[str, Any]) -> None:
    spread = {strategy: run["ranks"][0][strategy]["spread"] for strategy in STRATEGIES}
    assert spread["ddp"] == 0
    assert spread["fsdp_lora, adapters in shards"] > spread["fsdp_lora"]
    assert spread["megatron_lora"] > 0
