"""Megatron-core's ``GPTModel`` under ``megatron_lora`` on 2 and 4 gloo ranks against Hugging Face's model on one process."""

import re
from copy import deepcopy
from typing import Any

import peft
import pytest
import torch

from lightning_lora import LoRAConfig, adapter_state_dict, inject, load_peft, save_peft
from tests import models
from tests.distributed.gpt import biased, hugging_face, mixture
from tests.distributed.gpt_script import layout_name, layouts
from tests.distributed.launch import Launches
from tests.distributed.training import Recorded, fit

STEP_TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}  # lr 1e-2 / eps 1e-4 turns a rounding of 1e-8 into 1e-6 per step
GRADIENT_TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}  # other order of sums
LOGIT_TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
EXACT = {"rtol": 0.0, "atol": 0.0}
BATCH = models.token_ids(4, 8, seed=2)


class Module(Recorded):
    def __init__(self) -> None:
        super().__init__()
        self.model = hugging_face().train()


def alone(**settings: Any) -> Module:
    module = Module()
    fit(None, module, "auto", **settings)
    return module


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(BATCH).logits


@pytest.fixture(scope="module")
def single() -> Module:
    """Two epochs of Hugging Face's model on one process."""
    return alone(max_epochs=2)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    directory = tmp_path_factory.mktemp("gpt")
    hugging_face().save_pretrained(directory / "hf")
    mixture().save_pretrained(directory / "moe")
    biased().save_pretrained(directory / "biased")
    save_peft(foreign(), directory / "hf-peft")
    return Launches("gpt_script.py", directory, first="training")


both = pytest.mark.parametrize("num_ranks", [2, 4])


def foreign() -> torch.nn.Module:
    """Hugging Face's model with adapters of unequal rank on some layers, that are not at their start."""
    config = LoRAConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], rank_pattern={"v_proj": 2})
    model = inject(hugging_face(), config)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.05)
    return model


class TestTraining:
    @both
    def test_losses_gradients_and_eight_steps_equal_hugging_faces_model_on_one_process(
        self, found: Launches, single: Module, num_ranks: int
    ) -> None:
        ranks = found(num_ranks, "training")
        for name in ranks[0]:
            losses = torch.tensor([rank[name]["losses"] for rank in ranks]).mean(0)
            torch.testing.assert_close(losses, torch.tensor(single.losses), **STEP_TOLERANCE)
            for rank in ranks:
                torch.testing.assert_close(rank[name]["gradients"], single.gradients, **GRADIENT_TOLERANCE)
                torch.testing.assert_close(rank[name]["adapters"], dict(adapter_state_dict(single)), **STEP_TOLERANCE)

    @both
    def test_every_layout_was_run(self, found: Launches, num_ranks: int) -> None:
        assert set(found(num_ranks, "training")[0]) == {layout_name(*layout) for layout in layouts(num_ranks)}

    @both
    def test_the_global_norm_is_one_processs(self, found: Launches, single: Module, num_ranks: int) -> None:
        expected = torch.stack([g.norm() for g in single.gradients.values()]).norm()
        for one in found(num_ranks, "training")[0].values():
            norm = torch.stack([g.norm() for g in one["gradients"].values()]).norm()
            torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)

    @both
    def test_whole_factors_are_bit_equal_on_all_ranks(self, found: Launches, num_ranks: int) -> None:
        first, *others = found(num_ranks, "training")
        for rank in others:
            for name, one in rank.items():
                torch.testing.assert_close(one["raw"], first[name]["raw"], **EXACT)

    @pytest.mark.parametrize("name", ["dropped False", "dropped True", "fused"])
    def test_whole_factors_are_bit_equal_with_dropout_and_fused_too(self, found: Launches, name: str) -> None:
        one, other = found(2, "variants")
        torch.testing.assert_close(other[name][1], one[name][1], **EXACT)

    def test_dropout_does_not_depend_on_sequence_parallelism(self, found: Launches) -> None:
        for rank in found(2, "variants"):
            whole, parts = (rank["layer dropout"][sp] for sp in (False, True))
            torch.testing.assert_close(parts, whole, **LOGIT_TOLERANCE)

    def test_a_dropped_run_differs_from_one_without(self, found: Launches) -> None:
        for sequence_parallel in (False, True):
            losses, _ = found(2, "variants")[0][f"dropped {sequence_parallel}"]
            assert abs(losses[1] - found(2, "training")[0]["tp2"]["losses"][1]) > 1e-4

    @both
    def test_clipping_and_accumulation_equal_one_process(self, found: Launches, num_ranks: int) -> None:
        single = alone(gradient_clip_val=0.05, accumulate_grad_batches=2)
        for adapters in found(num_ranks, "clipping"):
            torch.testing.assert_close(adapters, dict(adapter_state_dict(single)), **STEP_TOLERANCE)

    def test_targets_of_both_vocabularies_with_ranks_of_their_own_equal_one_process(self, found: Launches) -> None:
        targets = {"target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"v_proj": 2, "down_proj": 6}}
        single = alone(lora=targets)
        parts = found(2, "variants")[0]["parts"]
        torch.testing.assert_close(parts["gradients"], single.gradients, **GRADIENT_TOLERANCE)
        torch.testing.assert_close(parts["adapters"], dict(adapter_state_dict(single)), **STEP_TOLERANCE)

    @pytest.mark.parametrize("sequence_parallel", [False, True])
    def test_biases_of_adapted_layers_can_train(self, found: Launches, sequence_parallel: bool) -> None:
        single = Module()
        single.model = biased().train()
        fit(None, single, "auto", lora={"bias": "lora_only"})
        biases = found(2, "whole_modules")[0][f"biases {sequence_parallel}"]
        for index in range(2):
            q, k, v = (getattr(single.model.model.layers[index].self_attn, f"{x}_proj").bias.detach() for x in "qkv")
            expected = torch.cat([q.view(4, -1), k.view(4, -1), v.view(4, -1)], 1).flatten()  # four groups
            stacked = biases[f"decoder.layers.{index}.self_attention.linear_qkv.bias"]
            torch.testing.assert_close(stacked, expected, **STEP_TOLERANCE)

    @pytest.mark.parametrize("sequence_parallel", [False, True])
    def test_norms_and_the_output_layer_can_train_whole(self, found: Launches, sequence_parallel: bool) -> None:
        lora = {"target_modules": ["q_proj"], "modules_to_save": ["q_norm", "model.norm", "lm_head"]}
        trained = dict(alone(lora=lora).model.named_parameters())
        modules = found(2, "whole_modules")[0][str(sequence_parallel)]
        names = {"decoder.final_layernorm.weight": "model.norm.weight", "output_layer.weight": "lm_head.weight"}
        names |= {
            f"decoder.layers.{i}.self_attention.q_layernorm.weight": f"model.layers.{i}.self_attn.q_norm.weight"
            for i in (0, 1)
        }
        assert set(modules) == set(names)
        for name, value in modules.items():
            torch.testing.assert_close(value, trained[names[name]].detach(), **STEP_TOLERANCE)


class TestExperts:
    def test_adapters_on_every_expert_train_as_on_one_rank(self, found: Launches) -> None:
        for rank in found(2, "experts"):
            one, spread = rank["tp1"], rank["tp2"]
            assert sum("experts.3." in name for name in one["gradients"]) == 2 * 3 * 2  # blocks, layers, A and B
            torch.testing.assert_close(spread["gradients"], one["gradients"], **GRADIENT_TOLERANCE)
            torch.testing.assert_close(spread["adapters"], one["adapters"], **STEP_TOLERANCE)

    def test_whole_factors_are_bit_equal(self, found: Launches) -> None:
        one, other = (rank["tp2"]["raw"] for rank in found(2, "experts"))
        torch.testing.assert_close(other, one, **EXACT)

    def test_their_directory_is_read_into_hugging_faces_model(self, found: Launches) -> None:
        ranks = found(2, "experts")
        model = load_peft(mixture(), found.directory(2) / "moe-peft")
        for rank in ranks:
            torch.testing.assert_close(rank["logits"], logits(model), **LOGIT_TOLERANCE)

    def test_what_peft_would_read_as_something_else_is_not_written(self, found: Launches) -> None:
        for rank in found(2, "experts"):
            assert "has use_rslora, rank_pattern or alpha_pattern: write it with portable=True" in rank["scaled"]
            assert "adapt gate_proj, up_proj and down_proj of all experts" in rank["partial"]
        assert not (found.directory(2) / "not").exists()


class TestOutside:
    def test_a_teacher_keeps_its_parts(self, found: Launches) -> None:
        for rank in found(2, "outside"):
            torch.testing.assert_close(rank["teacher"], logits(hugging_face()), **LOGIT_TOLERANCE)

    def test_a_parallel_head_trains_in_parts_and_is_saved_whole(self, found: Launches) -> None:
        ranks = found(2, "outside")
        first = ranks[0]
        assert (first["head"] - first["first"]).abs().max() < 0.1 < first["head"].std()
        assert not torch.equal(first["head"], first["first"])
        for rank in ranks:
            torch.testing.assert_close(rank["head"], first["head"], **EXACT)
            torch.testing.assert_close(rank["saved"], first["head"], **EXACT)

    def test_split_factors_that_are_unfrozen_later_are_averaged(self, found: Launches) -> None:
        ranks = found(4, "unfreezing")
        assert all(value.any() for value in ranks[0].values())
        for rank in (2, 3):  # the same part, of another replica
            torch.testing.assert_close(ranks[rank], ranks[rank - 2], **EXACT)


class TestFabric:
    def test_losses_steps_and_norms_equal_one_process(self, found: Launches, single: Module) -> None:
        clipped = alone(gradient_clip_val=0.05)
        first = torch.stack([g.norm() for g in single.gradients.values()]).norm()
        ranks = found(2, "fabric")
        for rank in ranks:
            torch.testing.assert_close(rank["adapters"], dict(adapter_state_dict(clipped)), **STEP_TOLERANCE)
            torch.testing.assert_close(rank["norms"][0], first, rtol=1e-5, atol=0)
        losses = torch.tensor([rank["losses"] for rank in ranks]).mean(0)
        torch.testing.assert_close(losses, torch.tensor(clipped.losses), **STEP_TOLERANCE)

    def test_its_file_is_read_back(self, found: Launches) -> None:
        for rank in found(2, "fabric"):
            torch.testing.assert_close(rank["loaded"], rank["adapters"], **EXACT)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_half_precision_follows_the_losses_of_single_precision(
    found: Launches, precision: str, sequence_parallel: bool
) -> None:
    losses, dtype = found(2, "precisions")[0][f"{precision} {sequence_parallel}"]
    assert dtype == ("torch.bfloat16" if precision == "bf16-true" else "torch.float32")
    expected = found(2, "training")[0]["tp2"]["losses"][:4]
    torch.testing.assert_close(losses, expected, rtol=0.0, atol=0.01)


class TestTraffic:
    """Elements that a rank sends; batches of 2 x 8 tokens, 32 wide, r=4."""

    TOKENS, HIDDEN, RANK = 2 * 8, 32, 4

    def traffic(self, found: Launches, case: str) -> Any:
        return found(2, "traffic")[0][case]

    @pytest.mark.parametrize("kind", ["column", "row"])
    def test_a_layer_adds_nothing_without_sequence_parallelism(self, found: Launches, kind: str) -> None:
        assert self.traffic(found, f"{kind} False True") == self.traffic(found, f"{kind} False False")
        forward, backward = self.traffic(found, f"{kind} False True")
        reducing = (forward if kind == "row" else backward)["all_reduce"]
        assert reducing == [self.TOKENS * self.HIDDEN]

    def test_a_row_adds_nothing_with_it(self, found: Launches) -> None:
        assert self.traffic(found, "row True True") == self.traffic(found, "row True False")
        assert self.traffic(found, "row True True")[1]["all_gather"] == [self.TOKENS * self.HIDDEN // 2]

    def test_a_column_adds_r_numbers_per_token_with_it(self, found: Launches) -> None:
        base, adapted = (deepcopy(self.traffic(found, f"column True {adapted}")) for adapted in (False, True))
        small = self.TOKENS * self.RANK // 2
        assert sorted(adapted[0].pop("all_gather")) == sorted([*base[0].pop("all_gather"), small])
        assert sorted(adapted[1].pop("reduce_scatter")) == sorted([*base[1].pop("reduce_scatter"), small])
        assert adapted == base

    @both
    def test_whole_factors_take_one_all_reduce_per_step_and_parts_one_over_replicas(
        self, found: Launches, num_ranks: int
    ) -> None:
        for rank in found(num_ranks, "training"):
            for one in rank.values():
                traffic = one["reducing"]
                assert len(traffic["all_reduce"]) == (1 if one["replicas"] == 1 else 2)
                assert traffic["all_reduce"][0] > sum(value.numel() for value in one["raw"].values())  # and flags
                assert traffic["all_gather"] == traffic["reduce_scatter"] == traffic["broadcast"] == []

    def test_a_whole_model_adds_nothing_but_those(self, found: Launches) -> None:
        assert self.traffic(found, "model False True") == self.traffic(found, "model False False")
        base, adapted = (deepcopy(self.traffic(found, f"model True {adapted}")) for adapted in (False, True))
        ranks = [3 * self.RANK, 2 * self.RANK] * 2  # q, k, v and gate, up of two blocks
        small = [self.TOKENS * r // 2 for r in ranks]
        assert sorted(adapted[0].pop("all_gather")) == sorted([*base[0].pop("all_gather"), *small])
        assert sorted(adapted[1].pop("reduce_scatter")) == sorted([*base[1].pop("reduce_scatter"), *small])
        assert adapted == base


# the number of ranks, the part of the script, and the layout whose file was read
RESUMED = [(2, "files", "tp1"), (2, "files", "tp2"), (2, "files", "tp2-sp"), (4, "quarters", "tp2"), (4, "quarters", "tp4-sp")]  # fmt: skip


class TestFiles:
    @pytest.mark.parametrize(("num_ranks", "part", "name"), RESUMED)
    def test_a_checkpoint_of_any_layout_resumes_under_another(
        self, found: Launches, single: Module, num_ranks: int, part: str, name: str
    ) -> None:
        ranks = [rank[name] for rank in found(num_ranks, part)]
        for rank in ranks:
            torch.testing.assert_close(rank["adapters"], dict(adapter_state_dict(single)), **STEP_TOLERANCE)
        losses = torch.tensor([rank["losses"] for rank in ranks]).mean(0)
        torch.testing.assert_close(losses, torch.tensor(single.losses[4:]), **STEP_TOLERANCE)

    def test_a_checkpoint_of_parts_resumes_as_replicas(self, found: Launches, single: Module) -> None:
        for rank in found(2, "files"):
            torch.testing.assert_close(rank["to tp1"], dict(adapter_state_dict(single)), **STEP_TOLERANCE)

    @pytest.mark.parametrize(("num_ranks", "part", "name"), RESUMED)
    def test_moments_are_exact_at_the_moment_of_loading(
        self, found: Launches, num_ranks: int, part: str, name: str
    ) -> None:
        ranks = found(num_ranks, part)
        file = torch.load(found.directory(num_ranks) / name / "epoch=0.ckpt", weights_only=True)
        (names,) = file["lightning_lora"]["optimizers"][0]
        saved = file["optimizer_states"][0]["state"]
        expected = {f"{n}.{key}": v for n, one in zip(names, saved.values(), strict=True) for key, v in one.items()}
        for rank in ranks:
            torch.testing.assert_close(rank[name]["moments"], expected, **EXACT)

    def test_files_of_all_layouts_hold_the_same(self, found: Launches) -> None:
        found(2, "files")
        found(4, "training")
        first, *others = (
            torch.load(found.directory(num_ranks) / name / "epoch=0.ckpt", weights_only=True)
            for num_ranks, name in ((2, "tp1"), (2, "tp2"), (2, "tp2-sp"), (4, "tp2"), (4, "tp4-sp"))
        )
        for other in others:
            assert list(first["state_dict"]) == list(other["state_dict"])
            torch.testing.assert_close(dict(first["state_dict"]), dict(other["state_dict"]), **STEP_TOLERANCE)
            ours, theirs = (file["lightning_lora"]["adapters"][0]["base"] for file in (first, other))
            assert ours["names"] == theirs["names"]
            assert torch.equal(ours["hashes"], theirs["hashes"])

    @pytest.mark.parametrize(
        ("part", "folder", "key"), [("directories", "peft", "exported"), ("variants", "fused-peft", "fused logits")]
    )
    def test_peft_reads_the_directory_into_hugging_faces_model(
        self, found: Launches, part: str, folder: str, key: str
    ) -> None:
        ranks = found(2, part)
        theirs = peft.PeftModel.from_pretrained(hugging_face(), found.directory(2) / folder)
        ours = load_peft(hugging_face(), found.directory(2) / folder)
        for rank in ranks:
            torch.testing.assert_close(rank[key], logits(theirs), **LOGIT_TOLERANCE)
            torch.testing.assert_close(rank[key], logits(ours), **LOGIT_TOLERANCE)

    def test_a_directory_of_hugging_faces_model_is_read(self, found: Launches) -> None:
        for rank in found(2, "directories"):
            torch.testing.assert_close(rank["imported"], logits(foreign()), **LOGIT_TOLERANCE)
            torch.testing.assert_close(rank["removed"], logits(hugging_face()), **LOGIT_TOLERANCE)
        assert (logits(foreign()) - logits(hugging_face())).abs().max() > 1e-2

    def test_merging_and_disabling(self, found: Launches) -> None:
        for rank in found(2, "directories"):
            torch.testing.assert_close(rank["merged"], rank["exported"], **LOGIT_TOLERANCE)
            torch.testing.assert_close(rank["unmerged"], rank["exported"], **EXACT)
            torch.testing.assert_close(rank["disabled"], logits(hugging_face()), **LOGIT_TOLERANCE)

    def test_a_fused_pair_trains_and_resumes_on_another_number_of_ranks(self, found: Launches) -> None:
        ranks = found(2, "variants")
        losses, _, names = ranks[0]["fused"]
        assert "decoder.layers.0.self_attention.linear_qkv.lora_A" in names
        assert len(names) == 2 * 4 * 2  # two blocks, four layers, A and B
        assert abs(losses[-1] - losses[0]) > 1e-3
        again = torch.tensor([rank["fused resumed"] for rank in ranks]).mean(0)  # of two replicas
        assert len(again) == 4
        assert again[0] < losses[0]  # the same batches


class TestCompany:
    def test_tools_around_a_run_see_the_model_that_it_is(self, found: Launches) -> None:
        for rank in found(2, "company"):
            assert all(not value.any() for name, value in rank["after_search"].items() if "lora_B" in name)
            torch.testing.assert_close(*rank["predicted"], **EXACT)
            first = torch.load(found.directory(2) / "tp2" / "epoch=0.ckpt", weights_only=True)["state_dict"]
            name = "model.decoder.layers.1.mlp.linear_fc2.lora_B"
            torch.testing.assert_close(rank["started"]["model.layers.1.mlp.down_proj.lora_B"], first[name], **EXACT)
            torch.testing.assert_close(rank["base"], logits(hugging_face()), **LOGIT_TOLERANCE)
            assert rank["searched"] > 0
            assert rank["steps"] == rank["searched"] + 4 + 4  # of two epochs


class TestRefusals:
    @pytest.mark.parametrize(
        ("case", "message"),
        [
            ("built early", r"was built for tensor_parallel_size=1 .*, and runs on \d: build it in configure_model"),
            ("sequence", "the model was built without: give its config sequence_parallel=True"),
            ("dora", "for which use_dora, lora_bias, PiSSA, OLoRA and init_rng='peft' are not served"),
            ("typo", "'q_prj' matches no module of GPTModel; nearest: q_proj"),
            ("head", "'output_layer' is the output head of a Megatron-core model"),
            ("fused part", "'q_proj' is a part of 'linear_qkv', which fused_pairs=True adapts as one"),
            ("recompute", "recomputes outside of autocast, in the base's torch.float32 and not in torch.bfloat16"),
            ("bias", "bias='all' would not train the bias of 'decoder.layers.0.self_attention.linear_qkv'"),
            ("other base", "was trained on another base model.*holds other values"),
            ("rank", "has r=4 at 'decoder.layers.0.self_attention.linear_proj', the model has r=2"),
        ],
    )
    def test_what_does_not_fit_is_said(self, found: Launches, case: str, message: str) -> None:
        for rank in found(2, "refusals"):
            assert re.search(message, rank[case]), rank.get(case)
