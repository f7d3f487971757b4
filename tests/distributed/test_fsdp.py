"""``fsdp_lora`` in the Trainer on 2 and 4 gloo ranks against one process and against DDP."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch

from lightning_lora import LoRACallback, adapter_state_dict, disabled, load_peft
from tests import models, runs
from tests.distributed import fsdp_script
from tests.distributed.ddp_script import Recorded, train
from tests.distributed.fsdp_script import PROMPTS
from tests.distributed.launch import launch

# lr 1e-2 / eps 1e-4 turns a rounding of 1e-8 in a gradient into 1e-6 per step, and there are eight
STEP_TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
GRADIENT_TOLERANCE = {"rtol": 1e-4, "atol": 1e-7}  # other order of sums
EXACT = {"rtol": 0.0, "atol": 0.0}
ADAPTERS = 4096  # elements, of 28 tensors: r=4 on the 14 linear layers of the tiny Llama
TOGETHER = {"_LoRALinearsBackward": 6, "_GatedMLPBackward": 2, "_RMSNormBackward": 4}
EMBEDDING, BLOCK = 3200, 9280  # elements


@pytest.fixture(scope="module", params=[2, 4])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp(f"fsdp{request.param}")
    _, single = train(directory / "single", "auto", 0, 1, max_epochs=2)
    launch("fsdp_script.py", 6 - request.param, directory, "half")
    ranks = launch("fsdp_script.py", request.param, directory)
    return {"directory": directory, "single": single, "ranks": ranks, "num_ranks": request.param}


def one_process(tmp_path: Path, module: Any = None, **settings: Any) -> Any:
    module = module or Recorded()
    fsdp_script.fit(tmp_path, module, "auto", **settings)
    return module


class TestTraining:
    def test_every_gradient_equals_one_process(self, run: dict[str, Any]) -> None:
        expected = run["single"].gradients
        torch.testing.assert_close(run["ranks"][0]["straight"]["gradients"], expected, **GRADIENT_TOLERANCE)

    def test_eight_optimizer_steps_equal_one_process(self, run: dict[str, Any]) -> None:
        expected = adapter_state_dict(run["single"])
        torch.testing.assert_close(run["ranks"][0]["straight"]["adapters"], expected, **STEP_TOLERANCE)

    def test_the_mean_loss_of_every_step_equals_one_process(self, run: dict[str, Any]) -> None:
        losses = torch.tensor([rank["straight"]["losses"] for rank in run["ranks"]]).mean(0)
        torch.testing.assert_close(losses[:8], torch.tensor(run["single"].losses), **STEP_TOLERANCE)

    def test_layers_are_computed_together_as_in_one_process(self, run: dict[str, Any]) -> None:
        # two blocks: q, k, v together, and o; the MLP; two norms; then the last norm. Behind a frozen embedding there is
        # no gradient to gather: q, k and v of the first block stay apart, and its first norm as it is
        assert run["single"].functions == TOGETHER
        assert all(rank["straight"]["functions"] == TOGETHER for rank in run["ranks"])

    def test_replicas_are_bit_equal(self, run: dict[str, Any]) -> None:
        for rank in run["ranks"][1:]:
            torch.testing.assert_close(rank["straight"]["adapters"], run["ranks"][0]["straight"]["adapters"], **EXACT)

    def test_the_base_is_in_shards_and_the_adapters_are_not(self, run: dict[str, Any]) -> None:
        names = run["ranks"][0]["straight"]["sharded"]
        assert len(names) == 20  # 9 per block, embedding, head; the final norm is too small
        assert not any(".lora_" in name for name in names)

    def test_a_second_fit_goes_on(self, run: dict[str, Any], tmp_path: Path) -> None:
        single = one_process(tmp_path, max_epochs=3)
        losses = torch.tensor([rank["straight"]["third_epoch"] for rank in run["ranks"]]).mean(0)
        # Adam's moments start anew in a second fit, and so they do in one process
        again = one_process(tmp_path / "again", max_epochs=2)
        again.trainer.fit_loop.max_epochs = 3
        again.trainer.fit(again, fsdp_script.rank_loader(0, 1))
        torch.testing.assert_close(losses, torch.tensor(again.losses[8:]), **STEP_TOLERANCE)
        assert len(single.losses) == 12


class TestTraffic:
    def test_a_step_gathers_the_base_and_reduces_the_adapters_once(self, run: dict[str, Any]) -> None:
        n = run["num_ranks"]
        unit = {"embedding": -(-100 // n) * 32, "block": BLOCK // n, "head": -(-100 // n) * 32}
        # forward: embedding, two blocks, head; backward: the first block again
        gathers = [unit["embedding"], unit["block"], unit["block"], unit["head"], unit["block"]]
        for rank in run["ranks"]:
            steps = rank["straight"]["traffic"][1:8]
            # validation leaves the last block and the head gathered: the first step of an epoch saves those two
            for step in steps[:3] + steps[4:]:
                assert step == {
                    "all_gather": gathers,
                    "reduce_scatter": [],
                    "all_reduce": [ADAPTERS + 28],
                    "broadcast": [],
                }
            assert rank["straight"]["traffic"][0]["all_gather"] == [*gathers[:2], gathers[4]]

    def test_accumulation_reduces_once_per_step(self, run: dict[str, Any], tmp_path: Path) -> None:
        traffic = run["ranks"][0]["options"]["accumulated_traffic"]
        assert [step["all_reduce"] for step in traffic] == [[], [ADAPTERS + 28]] * 2
        single = one_process(tmp_path, accumulate_grad_batches=2, gradient_clip_val=0.05)
        expected = dict(adapter_state_dict(single))
        torch.testing.assert_close(run["ranks"][0]["options"]["accumulated"], expected, **STEP_TOLERANCE)

    def test_a_save_gathers_nothing(self, run: dict[str, Any]) -> None:
        for rank in run["ranks"]:
            assert not any(rank["straight"]["saving"].values())

    def test_replicated_heads_are_broadcast_from_rank_0(self, run: dict[str, Any]) -> None:
        heads = [rank["options"]["headed"] for rank in run["ranks"]]
        for head in heads[1:]:
            trained = {name: value for name, value in head.items() if "running" not in name}
            torch.testing.assert_close(trained, {name: heads[0][name] for name in trained}, **EXACT)
        assert len(run["ranks"][0]["options"]["saved_head"]) == 7


class TestCheckpoints:
    def test_one_file_holds_the_adapters_alone(self, run: dict[str, Any]) -> None:
        files = sorted(path.name for path in (run["directory"] / "fsdp").iterdir())
        assert files == ["epoch=0.ckpt", "epoch=1.ckpt", "epoch=2.ckpt"]
        saved = torch.load(run["directory"] / "fsdp" / "epoch=1.ckpt", weights_only=True)
        theirs = {name.removeprefix("model."): value for name, value in saved["state_dict"].items()}
        torch.testing.assert_close(theirs, run["ranks"][0]["straight"]["adapters"], **EXACT)
        assert all(type(value) is torch.Tensor for value in theirs.values())
        single = torch.load(run["directory"] / "single" / "epoch=1.ckpt", weights_only=True)
        assert saved.keys() == single.keys()
        base, expected = (file["lightning_lora"]["adapters"][0]["base"] for file in (saved, single))
        assert base["names"] == expected["names"]
        assert torch.equal(base["hashes"], expected["hashes"])
        assert base["embeddings"] == expected["embeddings"]

    def test_resume_on_the_same_ranks_is_bit_exact(self, run: dict[str, Any]) -> None:
        for rank in run["ranks"]:
            again, unbroken = rank["resumed"]["from_fsdp"], rank["straight"]
            assert again["losses"] == unbroken["losses"][4:8]
            torch.testing.assert_close(again["adapters"], unbroken["adapters"], **EXACT)
            assert again["step"] == 8

    @pytest.mark.parametrize("source", ["ddp", "single", "other"])
    def test_files_of_other_strategies_and_numbers_of_ranks_resume(self, run: dict[str, Any], source: str) -> None:
        for rank in run["ranks"]:
            again = rank["resumed"][f"from_{source}"]
            torch.testing.assert_close(again["adapters"], dict(adapter_state_dict(run["single"])), **STEP_TOLERANCE)

    def test_paths_for_fsspec_are_read_and_written(self, run: dict[str, Any]) -> None:
        for rank in run["ranks"]:
            assert rank["resumed"]["from_url"]["losses"] == rank["straight"]["losses"][4:8]
        written = torch.load(run["directory"] / "url.ckpt", weights_only=True)["state_dict"]
        expected = run["ranks"][0]["straight"]["adapters"]
        torch.testing.assert_close({n.removeprefix("model."): v for n, v in written.items()}, expected, **EXACT)

    def test_the_file_resumes_under_ddp(self, run: dict[str, Any]) -> None:
        for rank in run["ranks"]:
            losses = rank["resumed"]["to_ddp"]["losses"]
            torch.testing.assert_close(losses, rank["straight"]["losses"][4:8], **STEP_TOLERANCE)

    def test_the_file_resumes_on_one_process(self, run: dict[str, Any], tmp_path: Path) -> None:
        _, module = train(tmp_path, "auto", 0, 1, max_epochs=2, ckpt_path=run["directory"] / "fsdp" / "epoch=0.ckpt")
        expected = adapter_state_dict(run["single"])
        torch.testing.assert_close(adapter_state_dict(module), expected, **STEP_TOLERANCE)

    def test_weights_and_moments_are_bit_equal_after_loading(self, run: dict[str, Any]) -> None:
        saved = torch.load(run["directory"] / "fsdp" / "epoch=1.ckpt", weights_only=True)
        weights = {name.removeprefix("model."): value for name, value in saved["state_dict"].items()}
        moments = list(saved["optimizer_states"][0]["state"].values())
        for rank in run["ranks"]:
            adapters, own = rank["resumed"]["loaded"]
            torch.testing.assert_close(adapters, weights, **EXACT)
            torch.testing.assert_close(own, moments, **EXACT)

    def test_the_file_loads_without_any_strategy(self, run: dict[str, Any]) -> None:
        for rank in run["ranks"]:
            torch.testing.assert_close(rank["company"]["loaded"], rank["company"]["tuned"], **EXACT)


class TestShardedAdapters:
    def test_what_trains_is_in_shards(self, run: dict[str, Any]) -> None:
        found = run["ranks"][0]["adapters_in_shards"]
        # 28 factors, the head and two norms of each block; the final norm stays whole
        assert found["spread_sharded"] > 28
        assert found["spread_whole"] == 0

    def test_training_clipping_and_accumulation_equal_one_process(self, run: dict[str, Any], tmp_path: Path) -> None:
        settings = {"gradient_clip_val": 0.05, "max_epochs": 2, "accumulate_grad_batches": 2}
        single = one_process(tmp_path, lora={"modules_to_save": ["lm_head", "norm"]}, **settings)
        for rank in run["ranks"]:
            for kind in ("whole", "sharded"):
                found = rank["adapters_in_shards"][kind]
                assert found["steps"] == 4
                torch.testing.assert_close(found["adapters"], dict(adapter_state_dict(single)), **STEP_TOLERANCE)

    def test_clipping_by_value_equals_one_process(self, run: dict[str, Any], tmp_path: Path) -> None:
        single = one_process(tmp_path, gradient_clip_val=1e-3, gradient_clip_algorithm="value", limit_train_batches=1)
        found = run["ranks"][0]["adapters_in_shards"]["clipped_by_value"]
        torch.testing.assert_close(found, dict(adapter_state_dict(single)), **STEP_TOLERANCE)

    @pytest.mark.parametrize("way", ["whole_into_True", "sharded_into_False", "sharded_into_True"])
    def test_files_cross_over(self, run: dict[str, Any], way: str) -> None:
        for rank in run["ranks"]:
            found = rank["adapters_in_shards"]
            torch.testing.assert_close(found[way]["adapters"], found["whole"]["adapters"], **STEP_TOLERANCE)
        same = run["ranks"][0]["adapters_in_shards"]
        torch.testing.assert_close(same["sharded_into_True"]["adapters"], same["sharded"]["adapters"], **EXACT)

    @pytest.mark.parametrize("kind", ["whole", "sharded"])
    def test_disabling_and_merging_are_exact(self, run: dict[str, Any], kind: str) -> None:
        base = models.llama()
        with torch.no_grad():
            expected = base(models.token_ids(4, 8, seed=2)).logits
        for rank in run["ranks"]:
            found = rank["adapters_in_shards"][kind]
            torch.testing.assert_close(found["disabled"], expected, rtol=1e-5, atol=1e-6)
            assert found["again"]
            torch.testing.assert_close(found["merged"], found["logits"], rtol=1e-4, atol=1e-5)

    def test_the_files_of_both_are_alike(self, run: dict[str, Any]) -> None:
        one, other = (
            torch.load(run["directory"] / f"{kind}_adapters" / "epoch=1.ckpt", weights_only=True)
            for kind in ("whole", "sharded")
        )
        assert list(one["state_dict"]) == list(other["state_dict"])
        assert [v.shape for v in one["state_dict"].values()] == [v.shape for v in other["state_dict"].values()]
        for kind in ("whole", "sharded"):
            loaded = load_peft(models.llama(), run["directory"] / f"peft_{kind}")
            expected = run["ranks"][0]["adapters_in_shards"][kind]["adapters"]
            torch.testing.assert_close(dict(adapter_state_dict(loaded)), expected, **EXACT)


class TestOptions:
    @pytest.mark.parametrize(
        "option", ["checkpointed", "compiled", "kept", "offloaded", "named", "hybrid", "manual", "own", "other base"]
    )
    def test_gradients_do_not_change(self, run: dict[str, Any], option: str) -> None:
        found = run["ranks"][0]["options"][option]
        torch.testing.assert_close(found, run["single"].gradients, **GRADIENT_TOLERANCE)

    def test_tensor_parallelism_of_the_users_is_refused_by_name(self, run: dict[str, Any]) -> None:
        for rank in run["ranks"]:
            message = rank["options"]["columns"]
            assert "'model.layers.0.mlp.up_proj.weight' is spread over ranks by tensor parallelism" in message

    def test_gradients_are_reduced_before_a_manual_step_reads_them(self, run: dict[str, Any]) -> None:
        expected = sum(value.square().sum().item() for value in run["single"].gradients.values())
        for rank in run["ranks"]:
            assert rank["options"]["norm"] == pytest.approx([expected], rel=1e-4)

    @pytest.mark.parametrize(("precision", "base"), [("bf16-true", "bfloat16"), ("bf16-mixed", "float32")])
    def test_adapters_stay_float32(self, run: dict[str, Any], precision: str, base: str, tmp_path: Path) -> None:
        single = one_process(tmp_path, precision=precision)
        losses = torch.tensor([rank["options"][precision]["losses"] for rank in run["ranks"]]).mean(0)
        # bfloat16 has 8 bits: a loss near 4.6 is rounded by up to 0.01 per operation on it
        torch.testing.assert_close(losses, torch.tensor(single.losses), rtol=5e-3, atol=5e-3)
        found = run["ranks"][0]["options"][precision]
        assert found["dtypes"] == ["torch.float32"]
        assert found["base"] == [f"torch.{base}"]
        assert found["gathered_dtype"] == "torch.bfloat16"


class TestCompany:
    def test_validation_sees_the_adapters_and_the_base_alone(self, run: dict[str, Any]) -> None:
        with torch.no_grad(), disabled(run["single"]):
            losses = [run["single"].model(input_ids=b, labels=b).loss for b in fsdp_script.rank_loader(0, 1)]
        for rank in run["ranks"]:
            torch.testing.assert_close(rank["straight"]["reference"], torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)
            assert rank["straight"]["val_loss"] < rank["straight"]["reference"]

    def test_texts_of_unequal_lengths_are_those_of_one_process(self, run: dict[str, Any]) -> None:
        model = run["single"].model
        for index, rank in enumerate(run["ranks"]):
            text = model.generate(
                PROMPTS[index : index + 1, : 3 + index % 2], max_new_tokens=2 + index, do_sample=False
            )
            assert torch.equal(rank["straight"]["texts"][-1], text)

    def test_no_loop_runs_in_inference_mode(self, run: dict[str, Any]) -> None:
        # Lightning leaves it out under gloo by itself, and under NCCL it does not
        assert run["ranks"][0]["straight"]["inference_modes"] == [False] * 4

    def test_counts_are_global(self, run: dict[str, Any]) -> None:
        total = sum(parameter.numel() for parameter in run["single"].parameters())
        assert run["ranks"][1]["straight"]["parameters"] == (total, ADAPTERS)

    def test_merging_and_predicting_give_the_same_logits(self, run: dict[str, Any]) -> None:
        for rank in run["ranks"]:
            found = rank["straight"]
            torch.testing.assert_close(found["merged"], found["logits"], rtol=1e-4, atol=1e-5)
            assert torch.equal(found["unmerged"], found["logits"])
            torch.testing.assert_close(found["predicted"], found["logits"], **EXACT)
            torch.testing.assert_close(*found["removed"], rtol=1e-4, atol=1e-5)

    def test_the_peft_directory_is_that_of_one_process(self, run: dict[str, Any]) -> None:
        loaded = load_peft(models.llama(), run["directory"] / "peft")
        expected = run["ranks"][0]["straight"]["adapters"]
        torch.testing.assert_close(dict(adapter_state_dict(loaded)), expected, **EXACT)

    def test_rank_0_alone_logs(self, run: dict[str, Any]) -> None:
        logs = sorted(path.name for path in (run["directory"] / "logs").iterdir())
        assert logs == ["of_rank_0"]
        metrics = (run["directory"] / "logs" / "of_rank_0" / "metrics.csv").read_text()
        assert "val_loss" in metrics

    def test_early_stopping_stops_all_ranks(self, run: dict[str, Any]) -> None:
        assert {rank["company"]["epochs"] for rank in run["ranks"]} == {2}

    def test_the_learning_rate_search_leaves_adapters_as_they_were(self, run: dict[str, Any]) -> None:
        for rank in run["ranks"]:
            before = rank["company"]["after_search"]
            assert all(not value.any() for name, value in before.items() if name.endswith("lora_B"))
            assert rank["company"]["left_behind"] == []


class TestUnusual:
    def test_replicas_are_equal_without_seeds_and_with_the_user_s_own_backward(self, run: dict[str, Any]) -> None:
        first = run["ranks"][0]["unusual"]["unseeded"]
        assert "model.model.embed_tokens.weight" in first
        for rank in run["ranks"][1:]:
            torch.testing.assert_close(rank["unusual"]["unseeded"], first, **EXACT)

    def test_what_trains_in_two_dtypes_can_be_in_shards(self, run: dict[str, Any]) -> None:
        found = run["ranks"][0]["unusual"]
        # bfloat16 has 8 bits, and Adam turns the rounding of small gradients into steps of 1e-2
        torch.testing.assert_close(found["two_dtypes_True"], found["two_dtypes_False"], rtol=2e-2, atol=2e-2)

    def test_what_stays_gathered_follows_steps_and_turns_of_optimizers(self, run: dict[str, Any]) -> None:
        for rank in run["ranks"]:
            found = rank["unusual"]
            for name in ("sharded", "kept"):
                expected = found["alternating, whole"]
                torch.testing.assert_close(found[f"alternating, {name}"], expected, **STEP_TOLERANCE)

    def test_an_optimizer_without_moments_is_saved_whole(self, run: dict[str, Any]) -> None:
        for rank in run["ranks"]:
            found = rank["unusual"]
            assert "'fsdp_lora' with shard_adapters=False" in found["quasi_True"]
            torch.testing.assert_close(found["quasi_False"], found["quasi"], **EXACT)

    def test_unfreezing_the_base_is_refused_by_name(self, run: dict[str, Any]) -> None:
        for rank in run["ranks"]:
            assert "unfrozen after the base was sharded, and would not train" in rank["unusual"]["thawing"]


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
