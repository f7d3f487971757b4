"""``fsdp_lora`` in the Trainer on 2 and 4 gloo ranks against one process and against DDP."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_lora import LoRACallback, adapter_state_dict, disabled, load_peft
from tests import models, runs
from tests.distributed import fsdp_script
from tests.distributed.fsdp_script import PROMPTS
from tests.distributed.launch import Launches
from tests.distributed.training import Recorded, alone, fit

# lr 1e-2 / eps 1e-4 turns a rounding of 1e-8 in a gradient into 1e-6 per step, and there are eight
STEP_TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
GRADIENT_TOLERANCE = {"rtol": 1e-4, "atol": 1e-7}  # other order of sums
EXACT = {"rtol": 0.0, "atol": 0.0}
ADAPTERS = 4096  # elements, of 28 tensors: r=4 on the 14 linear layers of the tiny Llama
TOGETHER = {"_LoRALinearsBackward": 6, "_GatedMLPBackward": 2, "_RMSNormBackward": 4}
EMBEDDING, BLOCK = 3200, 9280  # elements


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def single(directory: Path) -> Recorded:
    """Two epochs on one process."""
    return alone(directory=directory / "single", max_epochs=2)


@pytest.fixture(scope="module")
def found(directory: Path, single: Recorded) -> Launches:
    return Launches("fsdp_script.py", directory, first="straight")


def one_process(module: Any = None, **settings: Any) -> Any:
    module = module or Recorded()
    fit(None, module, "auto", **settings)
    return module


both = pytest.mark.parametrize("num_ranks", [2, 4])


@both
class TestTraining:
    def test_every_gradient_equals_one_process(self, found: Launches, single: Recorded, num_ranks: int) -> None:
        gradients = found(num_ranks, "straight")[0]["gradients"]
        torch.testing.assert_close(gradients, single.gradients, **GRADIENT_TOLERANCE)

    def test_eight_optimizer_steps_equal_one_process(self, found: Launches, single: Recorded, num_ranks: int) -> None:
        expected = adapter_state_dict(single)
        torch.testing.assert_close(found(num_ranks, "straight")[0]["adapters"], expected, **STEP_TOLERANCE)

    def test_the_mean_loss_of_every_step_equals_one_process(
        self, found: Launches, single: Recorded, num_ranks: int
    ) -> None:
        losses = torch.tensor([rank["losses"] for rank in found(num_ranks, "straight")]).mean(0)
        torch.testing.assert_close(losses[:8], torch.tensor(single.losses), **STEP_TOLERANCE)

    def test_layers_are_computed_together_as_in_one_process(
        self, found: Launches, single: Recorded, num_ranks: int
    ) -> None:
        # two blocks: q, k, v together, and o; the MLP; two norms; then the last norm. Behind a frozen embedding there is
        # no gradient to gather: q, k and v of the first block stay apart, and its first norm as it is
        assert single.functions == TOGETHER
        assert all(rank["functions"] == TOGETHER for rank in found(num_ranks, "straight"))

    def test_replicas_are_bit_equal(self, found: Launches, num_ranks: int) -> None:
        first, *others = found(num_ranks, "straight")
        for rank in others:
            torch.testing.assert_close(rank["adapters"], first["adapters"], **EXACT)

    def test_the_base_is_in_shards_and_the_adapters_are_not(self, found: Launches, num_ranks: int) -> None:
        names = found(num_ranks, "straight")[0]["sharded"]
        assert len(names) == 20  # 9 per block, embedding, head; the final norm is too small
        assert not any(".lora_" in name for name in names)

    def test_a_second_fit_goes_on(self, found: Launches, num_ranks: int) -> None:
        losses = torch.tensor([rank["third_epoch"] for rank in found(num_ranks, "straight")]).mean(0)
        # Adam's moments start anew in a second fit, and so they do in one process
        again = one_process(max_epochs=2)
        again.trainer.fit_loop.max_epochs = 3
        again.trainer.fit(again, fsdp_script.rank_loader(0, 1))
        torch.testing.assert_close(losses, torch.tensor(again.losses[8:]), **STEP_TOLERANCE)


class TestTraffic:
    @both
    def test_a_step_gathers_the_base_and_reduces_the_adapters_once(self, found: Launches, num_ranks: int) -> None:
        n = num_ranks
        unit = {"embedding": -(-100 // n) * 32, "block": BLOCK // n, "head": -(-100 // n) * 32}
        # forward: embedding, two blocks, head; backward: the first block again
        gathers = [unit["embedding"], unit["block"], unit["block"], unit["head"], unit["block"]]
        for rank in found(num_ranks, "straight"):
            steps = rank["traffic"][1:8]
            # validation leaves the last block and the head gathered: the first step of an epoch saves those two
            for step in steps[:3] + steps[4:]:
                assert step == {
                    "all_gather": gathers,
                    "reduce_scatter": [],
                    "all_reduce": [ADAPTERS + 28],
                    "broadcast": [],
                }
            assert rank["traffic"][0]["all_gather"] == [*gathers[:2], gathers[4]]

    def test_accumulation_reduces_once_per_step(self, found: Launches) -> None:
        options = found(2, "options")[0]
        assert [step["all_reduce"] for step in options["accumulated_traffic"]] == [[], [ADAPTERS + 28]] * 2
        single = one_process(accumulate_grad_batches=2, gradient_clip_val=0.05)
        torch.testing.assert_close(options["accumulated"], dict(adapter_state_dict(single)), **STEP_TOLERANCE)

    @both
    def test_a_save_gathers_nothing(self, found: Launches, num_ranks: int) -> None:
        for rank in found(num_ranks, "straight"):
            assert not any(rank["saving"].values())

    def test_replicated_heads_are_broadcast_from_rank_0(self, found: Launches) -> None:
        first, other = (rank["headed"] for rank in found(2, "options"))
        trained = {name: value for name, value in other.items() if "running" not in name}
        torch.testing.assert_close(trained, {name: first[name] for name in trained}, **EXACT)
        assert len(found(2, "options")[0]["saved_head"]) == 7


class TestCheckpoints:
    @both
    def test_one_file_holds_the_adapters_alone(self, found: Launches, directory: Path, num_ranks: int) -> None:
        ranks, written = found(num_ranks, "straight"), found.directory(num_ranks) / "fsdp"
        assert sorted(path.name for path in written.iterdir()) == ["epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt"]
        saved = torch.load(written / "epoch=1.ckpt", weights_only=True)
        theirs = {name.removeprefix("model."): value for name, value in saved["state_dict"].items()}
        torch.testing.assert_close(theirs, ranks[0]["adapters"], **EXACT)
        assert all(type(value) is torch.Tensor for value in theirs.values())
        single = torch.load(directory / "single" / "epoch=1.ckpt", weights_only=True)
        assert saved.keys() == single.keys()
        base, expected = (file["lightning_lora"]["adapters"][0]["base"] for file in (saved, single))
        assert base["names"] == expected["names"]
        assert torch.equal(base["hashes"], expected["hashes"])
        assert base["embeddings"] == expected["embeddings"]

    def test_resume_on_the_same_ranks_is_bit_exact(self, found: Launches) -> None:
        for rank, unbroken in zip(found(2, "resumed"), found(2, "straight"), strict=True):
            again = rank["from_fsdp"]
            assert again["losses"] == unbroken["losses"][4:8]
            torch.testing.assert_close(again["adapters"], unbroken["adapters"], **EXACT)
            assert again["step"] == 8

    @pytest.mark.parametrize("source", ["ddp", "single"])
    def test_files_of_other_strategies_resume(self, found: Launches, single: Recorded, source: str) -> None:
        for rank in found(2, "resumed"):
            again = rank[f"from_{source}"]
            torch.testing.assert_close(again["adapters"], dict(adapter_state_dict(single)), **STEP_TOLERANCE)

    @both
    def test_files_of_other_numbers_of_ranks_resume(self, found: Launches, single: Recorded, num_ranks: int) -> None:
        found(6 - num_ranks, "straight")
        for rank in found(num_ranks, "other_ranks"):
            torch.testing.assert_close(rank["adapters"], dict(adapter_state_dict(single)), **STEP_TOLERANCE)
            assert rank["step"] == 8

    def test_paths_for_fsspec_are_read_and_written(self, found: Launches) -> None:
        ranks, unbroken = found(2, "resumed"), found(2, "straight")
        for rank, straight in zip(ranks, unbroken, strict=True):
            assert rank["from_url"]["losses"] == straight["losses"][4:8]
        written = torch.load(found.directory(2) / "url.ckpt", weights_only=True)["state_dict"]
        expected = unbroken[0]["adapters"]
        torch.testing.assert_close({n.removeprefix("model."): v for n, v in written.items()}, expected, **EXACT)

    def test_the_file_resumes_under_ddp(self, found: Launches) -> None:
        for rank, straight in zip(found(2, "resumed"), found(2, "straight"), strict=True):
            torch.testing.assert_close(rank["to_ddp"]["losses"], straight["losses"][4:8], **STEP_TOLERANCE)

    @both
    def test_the_file_resumes_on_one_process(self, found: Launches, single: Recorded, num_ranks: int) -> None:
        found(num_ranks, "straight")
        path = found.directory(num_ranks) / "fsdp" / "epoch=0.ckpt"
        module = alone(max_epochs=2, ckpt_path=path)
        torch.testing.assert_close(adapter_state_dict(module), adapter_state_dict(single), **STEP_TOLERANCE)

    def test_weights_and_moments_are_bit_equal_after_loading(self, found: Launches) -> None:
        ranks = found(2, "resumed")
        saved = torch.load(found.directory(2) / "fsdp" / "epoch=1.ckpt", weights_only=True)
        weights = {name.removeprefix("model."): value for name, value in saved["state_dict"].items()}
        moments = list(saved["optimizer_states"][0]["state"].values())
        for rank in ranks:
            adapters, own = rank["loaded"]
            torch.testing.assert_close(adapters, weights, **EXACT)
            torch.testing.assert_close(own, moments, **EXACT)

    def test_the_file_loads_without_any_strategy(self, found: Launches) -> None:
        for rank in found(2, "company"):
            torch.testing.assert_close(rank["loaded"], rank["tuned"], **EXACT)


# ranks, the part of the script, and how the adapters lie
HEADED = [(2, "adapters_in_shards", "whole"), (2, "adapters_in_shards", "sharded"), (4, "quarters", "sharded")]
headed_runs = pytest.mark.parametrize(("num_ranks", "part", "kind"), HEADED)


class TestShardedAdapters:
    @headed_runs
    def test_what_trains_is_in_shards(self, found: Launches, num_ranks: int, part: str, kind: str) -> None:
        spread = found(num_ranks, part)[0][kind]["spread"]
        # 28 factors, the head and two norms of each block; the final norm stays whole
        assert spread > 28 if kind == "sharded" else spread == 0

    @headed_runs
    def test_training_clipping_and_accumulation_equal_one_process(
        self, found: Launches, num_ranks: int, part: str, kind: str
    ) -> None:
        single = one_process(**fsdp_script.HEADED)
        for rank in found(num_ranks, part):
            assert rank[kind]["steps"] == 4
            torch.testing.assert_close(rank[kind]["adapters"], dict(adapter_state_dict(single)), **STEP_TOLERANCE)

    def test_clipping_by_value_equals_one_process(self, found: Launches) -> None:
        single = one_process(gradient_clip_val=1e-3, gradient_clip_algorithm="value", limit_train_batches=1)
        clipped = found(2, "adapters_in_shards")[0]["clipped_by_value"]
        torch.testing.assert_close(clipped, dict(adapter_state_dict(single)), **STEP_TOLERANCE)

    @pytest.mark.parametrize("way", ["whole_into_True", "sharded_into_False", "sharded_into_True"])
    def test_files_cross_over(self, found: Launches, way: str) -> None:
        for rank in found(2, "adapters_in_shards"):
            torch.testing.assert_close(rank[way]["adapters"], rank["whole"]["adapters"], **STEP_TOLERANCE)
        same = found(2, "adapters_in_shards")[0]
        torch.testing.assert_close(same["sharded_into_True"]["adapters"], same["sharded"]["adapters"], **EXACT)

    @headed_runs
    def test_disabling_and_merging_are_exact(self, found: Launches, num_ranks: int, part: str, kind: str) -> None:
        with torch.no_grad():
            expected = models.llama()(models.token_ids(4, 8, seed=2)).logits
        for rank in found(num_ranks, part):
            torch.testing.assert_close(rank[kind]["disabled"], expected, rtol=1e-5, atol=1e-6)
            assert rank[kind]["again"]
            torch.testing.assert_close(rank[kind]["merged"], rank[kind]["logits"], rtol=1e-4, atol=1e-5)

    @headed_runs
    def test_the_peft_directory_holds_what_was_trained(
        self, found: Launches, num_ranks: int, part: str, kind: str
    ) -> None:
        expected = found(num_ranks, part)[0][kind]["adapters"]
        loaded = load_peft(models.llama(), found.directory(num_ranks) / f"{kind}_adapters" / "peft")
        torch.testing.assert_close(dict(adapter_state_dict(loaded)), expected, **EXACT)

    def test_the_files_of_all_are_alike(self, found: Launches) -> None:
        for num_ranks, part, _ in HEADED:
            found(num_ranks, part)
        first, *others = (
            torch.load(found.directory(num_ranks) / f"{kind}_adapters" / "epoch=1.ckpt", weights_only=True)
            for num_ranks, _, kind in HEADED
        )
        for other in others:
            assert list(first["state_dict"]) == list(other["state_dict"])
            assert [v.shape for v in first["state_dict"].values()] == [v.shape for v in other["state_dict"].values()]


class TestOptions:
    @pytest.mark.parametrize(
        "option", ["checkpointed", "compiled", "kept", "offloaded", "named", "hybrid", "manual", "own", "other base"]
    )
    def test_gradients_do_not_change(self, found: Launches, single: Recorded, option: str) -> None:
        torch.testing.assert_close(found(2, "options")[0][option], single.gradients, **GRADIENT_TOLERANCE)

    def test_gradients_over_halves_on_pairs_of_ranks_do_not_change(self, found: Launches, single: Recorded) -> None:
        torch.testing.assert_close(found(4, "quarters")[0]["hybrid"], single.gradients, **GRADIENT_TOLERANCE)

    def test_tensor_parallelism_of_the_users_is_refused_by_name(self, found: Launches) -> None:
        for rank in found(2, "options"):
            assert "'model.layers.0.mlp.up_proj.weight' is spread over ranks by tensor parallelism" in rank["columns"]

    def test_gradients_are_reduced_before_a_manual_step_reads_them(self, found: Launches, single: Recorded) -> None:
        expected = sum(value.square().sum().item() for value in single.gradients.values())
        for rank in found(2, "options"):
            assert rank["norm"] == pytest.approx([expected], rel=1e-4)

    @pytest.mark.parametrize(("precision", "base"), [("bf16-true", "bfloat16"), ("bf16-mixed", "float32")])
    def test_adapters_stay_float32(self, found: Launches, precision: str, base: str) -> None:
        single = one_process(precision=precision)
        ranks = [rank[precision] for rank in found(2, "options")]
        losses = torch.tensor([rank["losses"] for rank in ranks]).mean(0)
        # bfloat16 has 8 bits: a loss near 4.6 is rounded by up to 0.01 per operation on it
        torch.testing.assert_close(losses, torch.tensor(single.losses), rtol=5e-3, atol=5e-3)
        assert ranks[0]["dtypes"] == ["torch.float32"]
        assert ranks[0]["base"] == [f"torch.{base}"]
        assert ranks[0]["gathered_dtype"] == "torch.bfloat16"


class TestCompany:
    @both
    def test_validation_sees_the_adapters_and_the_base_alone(
        self, found: Launches, single: Recorded, num_ranks: int
    ) -> None:
        with torch.no_grad(), disabled(single):
            losses = [single.model(input_ids=b, labels=b).loss for b in fsdp_script.rank_loader(0, 1)]
        for rank in found(num_ranks, "straight"):
            torch.testing.assert_close(rank["reference"], torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)
            assert rank["val_loss"] < rank["reference"]

    @both
    def test_texts_of_unequal_lengths_are_those_of_one_process(
        self, found: Launches, single: Recorded, num_ranks: int
    ) -> None:
        for index, rank in enumerate(found(num_ranks, "straight")):
            prompt = PROMPTS[index : index + 1, : 3 + index % 2]
            text = single.model.generate(prompt, max_new_tokens=2 + index, do_sample=False)
            assert torch.equal(rank["texts"][-1], text)

    def test_no_loop_runs_in_inference_mode(self, found: Launches) -> None:
        # Lightning leaves it out under gloo by itself, and under NCCL it does not
        assert found(2, "straight")[0]["inference_modes"] == [False] * 4

    def test_counts_are_global(self, found: Launches, single: Recorded) -> None:
        total = sum(parameter.numel() for parameter in single.parameters())
        assert found(2, "straight")[1]["parameters"] == (total, ADAPTERS)

    @both
    def test_merging_and_predicting_give_the_same_logits(self, found: Launches, num_ranks: int) -> None:
        for rank in found(num_ranks, "straight"):
            torch.testing.assert_close(rank["merged"], rank["logits"], rtol=1e-4, atol=1e-5)
            assert torch.equal(rank["unmerged"], rank["logits"])
            torch.testing.assert_close(rank["predicted"], rank["logits"], **EXACT)
            torch.testing.assert_close(*rank["removed"], rtol=1e-4, atol=1e-5)

    @both
    def test_the_peft_directory_is_that_of_one_process(self, found: Launches, num_ranks: int) -> None:
        expected = found(num_ranks, "straight")[0]["adapters"]
        loaded = load_peft(models.llama(), found.directory(num_ranks) / "peft")
        torch.testing.assert_close(dict(adapter_state_dict(loaded)), expected, **EXACT)

    def test_rank_0_alone_logs(self, found: Launches) -> None:
        found(2, "company")
        logs = found.directory(2) / "logs"
        assert sorted(path.name for path in logs.iterdir()) == ["of_rank_0"]
        assert "val_loss" in (logs / "of_rank_0" / "metrics.csv").read_text()

    def test_early_stopping_stops_all_ranks(self, found: Launches) -> None:
        assert {rank["epochs"] for rank in found(2, "company")} == {2}

    def test_the_learning_rate_search_leaves_adapters_as_they_were(self, found: Launches) -> None:
        for rank in found(2, "company"):
            assert all(not value.any() for name, value in rank["after_search"].items() if name.endswith("lora_B"))
            assert rank["left_behind"] == []


class TestUnusual:
    def test_replicas_are_equal_without_seeds_and_with_the_user_s_own_backward(self, found: Launches) -> None:
        one, other = (rank["unseeded"] for rank in found(2, "unusual"))
        assert "model.model.embed_tokens.weight" in one
        torch.testing.assert_close(other, one, **EXACT)

    def test_what_trains_in_two_dtypes_can_be_in_shards(self, found: Launches) -> None:
        rank = found(2, "unusual")[0]
        # bfloat16 has 8 bits, and Adam turns the rounding of small gradients into steps of 1e-2
        torch.testing.assert_close(rank["two_dtypes_True"], rank["two_dtypes_False"], rtol=2e-2, atol=2e-2)

    @pytest.mark.parametrize("name", ["sharded", "kept"])
    def test_what_stays_gathered_follows_steps_and_turns_of_optimizers(self, found: Launches, name: str) -> None:
        for rank in found(2, "unusual"):
            expected = rank["alternating, whole"]
            torch.testing.assert_close(rank[f"alternating, {name}"], expected, **STEP_TOLERANCE)

    def test_an_optimizer_without_moments_is_saved_whole(self, found: Launches) -> None:
        for rank in found(2, "unusual"):
            assert "'fsdp_lora' with shard_adapters=False" in rank["quasi_True"]
            torch.testing.assert_close(rank["quasi_False"], rank["quasi"], **EXACT)

    def test_unfreezing_the_base_is_refused_by_name(self, found: Launches) -> None:
        for rank in found(2, "unusual"):
            assert "unfrozen after the base was sharded, and would not train" in rank["thawing"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"replicate_size": 0}, "replicate_size=0 must be a positive integer"),
        ({"min_shard_numel": -1}, "min_shard_numel=-1 must be a positive integer, or 0"),
        ({"shard_modules": "Block"}, r"must be a list: \['Block'\]"),
        ({"shard_modules": [torch.nn.Linear]}, "which is no name; write 'Linear'"),
        ({"compile": 1.5}, "name of a torch.compile backend"),
        ({"shard_module": ["Block"]}, "FSDPLoRAStrategy has no option 'shard_module'; nearest: shard_modules"),
        ({"cpu_offload": "yes"}, "must be True or False"),
    ],
)
def test_wrong_options_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    from lightning_lora import FSDPLoRAStrategy
    from lightning_lora.fabric import FSDPLoRAStrategy as Twin

    for strategy in (FSDPLoRAStrategy, Twin):
        with pytest.raises((ValueError, TypeError), match=message):
            strategy(**settings)


def test_averaging_callbacks_are_refused_by_name(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import EMAWeightAveraging

    trainer = runs.trainer(tmp_path, LoRACallback(r=4), EMAWeightAveraging(), strategy="fsdp_lora")
    with pytest.raises(ValueError, match="EMAWeightAveraging copies the whole model, which no rank holds"):
        trainer.fit(runs.LanguageModule(), runs.loader())


def test_a_model_without_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no adapters: add LoRACallback"):
        runs.trainer(tmp_path, strategy="fsdp_lora").fit(runs.LanguageModule(), runs.loader())


def test_a_typo_in_shard_modules_names_what_is_near(tmp_path: Path) -> None:
    from lightning_lora import FSDPLoRAStrategy

    trainer = runs.trainer(tmp_path, LoRACallback(r=4), strategy=FSDPLoRAStrategy(shard_modules=["LlamaDecoderLayr"]))
    with pytest.raises(ValueError, match="'LlamaDecoderLayr' names no module .*LlamaDecoderLayer"):
        trainer.fit(runs.LanguageModule(), runs.loader())


def test_a_list_of_blocks_in_shard_modules_is_told_from_its_blocks(tmp_path: Path) -> None:
    from lightning_lora import FSDPLoRAStrategy

    trainer = runs.trainer(tmp_path, LoRACallback(r=4), strategy=FSDPLoRAStrategy(shard_modules=["layers"]))
    with pytest.raises(ValueError, match=r"names 'model.layers', a ModuleList.* members: \['LlamaDecoderLayer'\]"):
        trainer.fit(runs.LanguageModule(), runs.loader())


def test_a_model_without_blocks_is_said_to_be_whole(tmp_path: Path) -> None:
    class Flat(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(8, 8), torch.nn.Linear(8, 1)

        def training_step(self, batch, batch_idx):
            return self.second(self.first(batch)).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    trainer = runs.trainer(tmp_path, LoRACallback(r=4), strategy="fsdp_lora")
    with pytest.warns(UserWarning, match="nothing of Flat is in shards"):
        trainer.fit(Flat(), torch.utils.data.DataLoader(torch.randn(8, 8), 4))


def test_a_model_in_shards_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    module = runs.LanguageModule()
    runs.trainer(tmp_path, LoRACallback(r=4), strategy="fsdp_lora").fit(module, runs.loader())
    with pytest.raises(ValueError, match="is in shards, from a run with 'fsdp_lora'"):
        runs.trainer(tmp_path, LoRACallback(r=4)).fit(module, runs.loader())
