"""``megatron_lora`` in the Trainer on 2 and 4 gloo ranks against one process."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything

from lightning_lora import MegatronLoRAStrategy, adapter_state_dict, load_peft
from lightning_lora.megatron import core
from lightning_lora.strategies import megatron
from tests import models, runs
from tests.distributed.launch import Launches
from tests.distributed.megatron_script import MixedSteps
from tests.distributed.split import SPLIT, Module, four_heads
from tests.distributed.training import PROMPTS, fit

STEP_TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # lr 1e-2 / eps 1e-4 turns a rounding of 1e-8 into 1e-6 per step
GRADIENT_TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}  # other order of sums
EXACT = {"rtol": 0.0, "atol": 0.0}
HIDDEN = 4 * 8 * 32  # batch, tokens, hidden size: what a row-parallel layer sums
WHOLE_FACTORS = 2 * 4 * (32 * 5 + 32 * 2)  # r=4: A of q, k, v, gate, up, and B of o and down, of two blocks


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("megatron")


@pytest.fixture(scope="module")
def single(directory: Path) -> Any:
    """Two epochs on one process."""
    return alone(directory=directory / "single", max_epochs=2)


@pytest.fixture(scope="module")
def found(directory: Path, single: Any) -> Launches:
    four_heads().save_pretrained(directory / "saved")
    return Launches("megatron_script.py", directory, first="training")


def alone(module: Any = None, directory: Path | None = None, **settings: Any) -> Any:
    module = module or Module()
    fit(directory, module, "auto", **settings)
    return module


LAYOUTS = [(2, 2), (4, 2), (4, 4)]  # ranks, and how many of them share a model
layouts = pytest.mark.parametrize(("num_ranks", "size"), LAYOUTS)
both = pytest.mark.parametrize("num_ranks", [2, 4])


def trained(found: Launches, num_ranks: int, size: int) -> list[Any]:
    """Return what each rank found of training in one layout."""
    return [rank[f"tp{size}"] for rank in found(num_ranks, "training")]


@layouts
class TestTraining:
    def test_gradients_and_eight_steps_equal_one_process(
        self, found: Launches, single: Any, num_ranks: int, size: int
    ) -> None:
        for rank in trained(found, num_ranks, size):
            # a part's gradient is this rank's; the whole factors' are all there
            whole = {name.removeprefix("model."): None for name in rank["raw"]}
            expected = {n: g for n, g in single.gradients.items() if n in whole}
            gradients = {n: g for n, g in rank["gradients"].items() if n in whole}
            torch.testing.assert_close(gradients, expected, **GRADIENT_TOLERANCE)
            torch.testing.assert_close(rank["adapters"], dict(adapter_state_dict(single)), **STEP_TOLERANCE)

    def test_the_mean_loss_equals_one_process(self, found: Launches, single: Any, num_ranks: int, size: int) -> None:
        losses = torch.tensor([rank["losses"] for rank in trained(found, num_ranks, size)]).mean(0)
        torch.testing.assert_close(losses, torch.tensor(single.losses), **STEP_TOLERANCE)

    def test_layers_are_computed_together_as_in_one_process(
        self, found: Launches, single: Any, num_ranks: int, size: int
    ) -> None:
        assert single.functions["_GatedMLPBackward"] == 2
        assert all(rank["functions"] == single.functions for rank in trained(found, num_ranks, size))

    def test_whole_factors_are_bit_equal_on_all_ranks(self, found: Launches, num_ranks: int, size: int) -> None:
        first, *others = trained(found, num_ranks, size)
        for rank in others:
            torch.testing.assert_close(rank["raw"], first["raw"], **EXACT)

    def test_every_split_layer_is_split_and_its_adapter_with_it(
        self, found: Launches, num_ranks: int, size: int
    ) -> None:
        # weights of 14 layers, one factor of each, the output head and the input embedding
        assert len(trained(found, num_ranks, size)[0]["split"]) == 14 + 14 + 2

    def test_texts_are_those_of_one_process(self, found: Launches, single: Any, num_ranks: int, size: int) -> None:
        text = single.model.eval().generate(PROMPTS[:1], max_new_tokens=4, do_sample=False)
        assert all(torch.equal(rank["texts"], text) for rank in trained(found, num_ranks, size))


class TestSteps:
    def test_dropout_is_that_of_one_process_and_whole_factors_stay_bit_equal(
        self, found: Launches, single: Any
    ) -> None:
        seed_everything(7, verbose=False)
        dropped = alone(lora={"dropout": 0.3})
        ranks = found(2, "dropout")  # which share the model: the batch and so its mask are one process's
        for losses, raw in ranks:
            torch.testing.assert_close(losses, dropped.losses, **STEP_TOLERANCE)
            torch.testing.assert_close(raw, ranks[0][1], **EXACT)
        assert abs(dropped.losses[1] - single.losses[1]) > 1e-3

    @both
    def test_clipping_and_accumulation_equal_one_process(self, found: Launches, num_ranks: int) -> None:
        clipped = alone(gradient_clip_val=0.05, accumulate_grad_batches=2)
        for rank in found(num_ranks, "steps"):
            torch.testing.assert_close(rank["clipped"], dict(adapter_state_dict(clipped)), **STEP_TOLERANCE)

    @both
    def test_two_backwards_before_a_manual_step_count_once_each(
        self, found: Launches, single: Any, num_ranks: int
    ) -> None:
        manual = found(num_ranks, "steps")[0]["manual"]
        for name in trained(found, num_ranks, 2)[0]["raw"]:
            name = name.removeprefix("model.")
            torch.testing.assert_close(manual[name], single.gradients[name], **GRADIENT_TOLERANCE)

    @both
    @pytest.mark.parametrize("order", ["raw first", "raw last"])
    def test_a_backward_past_the_strategy_counts_once_too(self, found: Launches, num_ranks: int, order: str) -> None:
        expected = dict(adapter_state_dict(alone(MixedSteps("raw first"))))
        torch.testing.assert_close(found(num_ranks, "steps")[0][order], expected, **STEP_TOLERANCE)


@layouts
class TestTraffic:
    def test_a_forward_has_the_bases_own_collectives_and_no_more(
        self, found: Launches, num_ranks: int, size: int
    ) -> None:
        traffic = trained(found, num_ranks, size)[0]["traffic"]
        # the embedding, two row-parallel layers in each of two blocks, and the output head's parts put together
        assert traffic["all_reduce"] == [HIDDEN * size // num_ranks] * 5
        assert traffic["reduce_scatter"] == []
        assert len(traffic["all_gather"]) <= 1

    def test_a_save_gathers_no_base(self, found: Launches, num_ranks: int, size: int) -> None:
        rank = trained(found, num_ranks, size)[0]
        adapters = sum(value.numel() for value in rank["adapters"].values())
        assert sum(rank["saving"]["all_gather"]) <= 3 * adapters  # the split factors, and Adam's two moments


# the number of ranks, the part of the script, and where the file was written
RESUMED = [(2, "files", "tp2"), (2, "files", "fsdp"), (2, "files", "ddp"), (2, "files", "single"), (4, "replicas", "tp4"), (4, "replicas", "single")]  # fmt: skip
resumptions = pytest.mark.parametrize(("num_ranks", "part", "source"), RESUMED)


class TestFiles:
    @layouts
    def test_the_file_is_that_of_one_process(
        self, found: Launches, single: Any, directory: Path, num_ranks: int, size: int
    ) -> None:
        found(num_ranks, "training")
        folders = (found.directory(num_ranks) / f"tp{size}", directory / "single")
        one, other = (torch.load(folder / "epoch=1.ckpt", weights_only=True) for folder in folders)
        assert list(one["state_dict"]) == list(other["state_dict"])
        torch.testing.assert_close(dict(one["state_dict"]), dict(other["state_dict"]), **STEP_TOLERANCE)
        ours, theirs = (file["lightning_lora"]["adapters"][0]["base"] for file in (one, other))
        assert torch.equal(ours["hashes"], theirs["hashes"])
        assert ours["names"] == theirs["names"]
        for own, expected in zip(
            one["optimizer_states"][0]["state"].values(), other["optimizer_states"][0]["state"].values(), strict=True
        ):
            torch.testing.assert_close(own, expected, **STEP_TOLERANCE)

    @resumptions
    def test_files_of_any_strategy_resume(
        self, found: Launches, single: Any, num_ranks: int, part: str, source: str
    ) -> None:
        for index, rank in enumerate(found(num_ranks, part)):
            resumed = rank[f"from {source}"]
            torch.testing.assert_close(resumed["adapters"], dict(adapter_state_dict(single)), **STEP_TOLERANCE)
            if source == "tp2":
                assert resumed["losses"] == trained(found, num_ranks, 2)[index]["losses"][4:]

    def test_the_file_resumes_under_fsdp_and_on_one_process(self, found: Launches, single: Any) -> None:
        expected = dict(adapter_state_dict(single))
        torch.testing.assert_close(found(2, "files")[0]["to fsdp"]["adapters"], expected, **STEP_TOLERANCE)
        resumed = alone(max_epochs=2, ckpt_path=found.directory(2) / "tp2" / "epoch=0.ckpt")
        torch.testing.assert_close(dict(adapter_state_dict(resumed)), expected, **STEP_TOLERANCE)

    @resumptions
    def test_moments_are_exact_at_the_moment_of_loading(
        self, found: Launches, num_ranks: int, part: str, source: str
    ) -> None:
        ranks = found(num_ranks, part)
        saved = torch.load(found.directory(num_ranks) / source / "epoch=0.ckpt", weights_only=True)
        moments = list(saved["optimizer_states"][0]["state"].values())
        for index, rank in enumerate(ranks):
            place, resumed = index % 2, rank[f"from {source}"]  # of two ranks that share a model
            for name, own, whole in zip(resumed["order"], resumed["moments"], moments, strict=True):
                for key, value in own.items():
                    expected = whole[key]
                    if value.shape != expected.shape:
                        dim = next(d for d in range(2) if value.shape[d] != expected.shape[d])
                        expected = expected.chunk(2, dim)[place]
                    assert torch.equal(value, expected), (name, key)

    @layouts
    def test_the_peft_directory_is_that_of_one_process(self, found: Launches, num_ranks: int, size: int) -> None:
        ranks = trained(found, num_ranks, size)
        loaded = load_peft(four_heads(), found.directory(num_ranks) / f"peft{size}")
        torch.testing.assert_close(dict(adapter_state_dict(loaded)), ranks[0]["adapters"], **EXACT)
        logits, inside, again = ranks[0]["merging"]
        with torch.no_grad():
            expected = loaded.eval()(models.token_ids(4, 8, seed=2)).logits
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(inside, logits, rtol=1e-4, atol=1e-5)
        assert torch.equal(again, logits)


class TestModels:
    @pytest.mark.parametrize("name", SPLIT)
    def test_two_steps_equal_one_process(self, found: Launches, name: str) -> None:
        single = alone(Module(name), limit_train_batches=2)
        ranks = [rank[name] for rank in found(2, "families")]
        losses = torch.tensor([rank["losses"] for rank in ranks]).mean(0)
        torch.testing.assert_close(losses, torch.tensor(single.losses), **STEP_TOLERANCE)
        torch.testing.assert_close(ranks[0]["adapters"], dict(adapter_state_dict(single)), **STEP_TOLERANCE)

    def test_a_plan_of_the_users_is_followed(self, found: Launches) -> None:
        single = alone(Module("bert"), limit_train_batches=2)
        planned = found(2, "families")[0]["planned"]
        torch.testing.assert_close(planned["adapters"], dict(adapter_state_dict(single)), **STEP_TOLERANCE)
        # two blocks: of the first layer weight, bias and B, of the second weight and A
        assert len(planned["split"]) == 2 * 5
        assert all("intermediate.dense" in name or "output.dense" in name for name in planned["split"])

    def test_a_base_on_meta_is_read_in_slices(self, found: Launches) -> None:
        expected = trained(found, 2, 2)[0]["gradients"]
        torch.testing.assert_close(found(2, "families")[0]["meta"], expected, **GRADIENT_TOLERANCE)


class TestCompany:
    def test_tools_around_a_run_see_the_model_that_it_is(self, found: Launches) -> None:
        with torch.no_grad():
            base = four_heads()(models.token_ids(4, 8, seed=2)).logits
        for rank in found(2, "company"):
            assert all(not value.any() for name, value in rank["after_search"].items() if name.endswith("lora_B"))
            torch.testing.assert_close(rank["disabled"], base, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(*rank["predicted"], **EXACT)
            torch.testing.assert_close(*rank["removed"], rtol=1e-4, atol=1e-5)
            assert rank["steps"] == 3 + 4 + 4  # of the search, and of two epochs


class TestRefusals:
    @pytest.mark.parametrize(
        ("case", "message"),
        [
            ("word", "the plan's word 'columnwise' .* is not served; served are 'colwise'"),
            ("name", "the plan's 'layers.*.self_attn.query' names no module"),
            ("dora", "use_dora, lora_bias, PiSSA and OLoRA are not served"),
            ("no plan", "GPT2LMHeadModel has no tensor-parallel plan"),
            ("trained", "'model.layers.0.mlp.down_proj' trains its own 'weight'"),
            ("tied", "the tied embedding or output head is adapted"),
            ("sequence", "sequence_parallel=True is served for Megatron-core's models, not for LlamaForCausalLM"),
            ("size", "LlamaForCausalLM is split over 2 ranks, from another run, and this one has 1 that share a model"),
            ("removed", "was split over ranks by a former run under 'megatron_lora'"),
            ("batches", "ranks that share a model were given different batches"),
        ],
    )
    def test_what_cannot_be_split_is_said(self, found: Launches, case: str, message: str) -> None:
        for rank in found(2, "refusals"):
            assert re.search(message, rank[case]), rank.get(case)

    def test_heads_that_ranks_do_not_divide_are_said_with_the_numbers(self, found: Launches) -> None:
        expected = "num_key_value_heads=2 of Qwen3ForCausalLM is not divisible by tensor_parallel_size=4; sizes that divide it: 1, 2"
        assert found(4, "heads") == [expected] * 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2 is not served"),
        ({"context_parallel_size": 2}, "context_parallel_size=2 is not served"),
        ({"expert_parallel_size": 4}, "expert_parallel_size=4 is not served"),
        ({"tensor_parallel_size": 0}, "must be 'auto' or a positive integer"),
        ({"tensor_paralel_size": 2}, "has no option 'tensor_paralel_size'; nearest: tensor_parallel_size"),
    ],
)
def test_options_that_are_not_served_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        MegatronLoRAStrategy(**settings)


def test_a_missing_or_other_megatron_core_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "SERVED", ((0, 99), (1, 0)))
    with pytest.raises(ImportError, match=r'found 0\..*pip install "megatron-core>=0.99,<1.0"'):
        MegatronLoRAStrategy()
    for name in [name for name in sys.modules if name == "megatron" or name.startswith("megatron.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    with pytest.raises(ImportError, match="'megatron_lora' needs megatron-core: pip install"):
        MegatronLoRAStrategy()


def test_megatron_core_does_not_widen_what_a_checkpoint_may_hold(found: Launches) -> None:
    assert found(2, "safety") == [(True, False)] * 2


def test_auto_takes_the_smallest_number_of_ranks_that_divides_heads_and_ranks() -> None:
    cpu, module = torch.device("cpu"), Module()
    assert [megatron.choose_size("auto", ranks, module, cpu) for ranks in (1, 2, 4, 8)] == [1, 2, 2, 2]
    with pytest.raises(ValueError, match="divides both the 3 ranks and the model's 4 and 4 heads"):
        megatron.choose_size("auto", 3, module, cpu)
    with pytest.raises(ValueError, match="tensor_parallel_size=3 does not divide the 4 ranks"):
        megatron.choose_size(3, 4, module, cpu)


def test_auto_takes_more_ranks_where_half_a_device_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Module()  # as it is when the ranks are laid out: nothing is frozen yet
    base_bytes = sum(parameter.nbytes for parameter in module.parameters())

    def chosen(device_bytes: float) -> int:
        properties = type("Properties", (), {"total_memory": device_bytes})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        return megatron.choose_size("auto", 8, module, torch.device("cuda"))

    assert chosen(base_bytes) == 2
    assert chosen(base_bytes * 0.99) == 4
    assert chosen(1) == 4  # four heads: no number of ranks is enough


def test_a_megatron_core_without_a_local_product_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.tensor_parallel.layers import RowParallelLinear

    monkeypatch.delattr(RowParallelLinear, "_forward_impl")
    with pytest.raises(ImportError, match=r"RowParallelLinear of this megatron-core has no method _forward_impl"):
        MegatronLoRAStrategy()


def test_one_process_is_a_run_like_any_other(tmp_path: Path) -> None:
    from lightning_lora import LoRACallback

    module, expected = runs.LanguageModule(), runs.LanguageModule()
    split = runs.trainer(tmp_path, LoRACallback(r=4), strategy="megatron_lora", use_distributed_sampler=False)
    split.fit(module, runs.loader())
    runs.trainer(tmp_path, LoRACallback(r=4)).fit(expected, runs.loader())
    torch.testing.assert_close(module.losses, expected.losses, **STEP_TOLERANCE)
