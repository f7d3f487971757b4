"""Megatron-core's ``GPTModel`` under ``megatron_lora`` on 2 and 4 gloo ranks against Hugging Face's model on one process."""

import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from lightning_lora import LoRAConfig, adapter_state_dict, inject, load_peft, save_peft
from tests import models
from tests.distributed.ddp_script import Recorded
from tests.distributed.fsdp_script import fit
from tests.distributed.gpt_script import biased, hugging_face, layout_name, layouts, mixture
from tests.distributed.launch import launch

STEP_TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}  # lr 1e-2 / eps 1e-4 turns a rounding of 1e-8 into 1e-6 per step
GRADIENT_TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}  # other order of sums
LOGIT_TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
EXACT = {"rtol": 0.0, "atol": 0.0}
BATCH = models.token_ids(4, 8, seed=2)


class Module(Recorded):
    def __init__(self) -> None:
        super().__init__()
        self.model = hugging_face().train()


def alone(directory: Path, **settings: Any) -> Module:
    module = Module()
    fit(directory, module, "auto", **settings)
    return module


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(BATCH).logits


@pytest.fixture(scope="module", params=[2, 4])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp(f"gpt{request.param}")
    hugging_face().save_pretrained(directory / "hf")
    mixture().save_pretrained(directory / "moe")
    biased().save_pretrained(directory / "biased")
    save_peft(foreign(), directory / "hf-peft")
    single = alone(directory / "single", max_epochs=2)
    ranks = launch("gpt_script.py", request.param, directory)
    return {"directory": directory, "single": single, "ranks": ranks, "num_ranks": request.param}


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
    def test_losses_gradients_and_eight_steps_equal_hugging_faces_model_on_one_process(
        self, run: dict[str, Any]
    ) -> None:
        for name in run["ranks"][0]["training"]:
            ranks = [rank["training"][name] for rank in run["ranks"]]
            losses = torch.tensor([rank["losses"] for rank in ranks]).mean(0)
            torch.testing.assert_close(losses, torch.tensor(run["single"].losses), **STEP_TOLERANCE)
            for rank in ranks:
                torch.testing.assert_close(rank["gradients"], run["single"].gradients, **GRADIENT_TOLERANCE)
                torch.testing.assert_close(rank["adapters"], dict(adapter_state_dict(run["single"])), **STEP_TOLERANCE)

    def test_every_layout_was_run(self, run: dict[str, Any]) -> None:
        assert set(run["ranks"][0]["training"]) == {layout_name(*layout) for layout in layouts(run["num_ranks"])}

    def test_the_global_norm_is_one_processs(self, run: dict[str, Any]) -> None:
        expected = torch.stack([g.norm() for g in run["single"].gradients.values()]).norm()
        for found in run["ranks"][0]["training"].values():
            norm = torch.stack([g.norm() for g in found["gradients"].values()]).norm()
            torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)

    def test_whole_factors_are_bit_equal_on_all_ranks_with_dropout_too(self, run: dict[str, Any]) -> None:
        for rank in run["ranks"][1:]:
            for name, found in rank["training"].items():
                torch.testing.assert_close(found["raw"], run["ranks"][0]["training"][name]["raw"], **EXACT)
            for name in ("dropped False", "dropped True", "fused"):
                torch.testing.assert_close(rank["variants"][name][1], run["ranks"][0]["variants"][name][1], **EXACT)

    def test_dropout_does_not_depend_on_sequence_parallelism(self, run: dict[str, Any]) -> None:
        for rank in run["ranks"]:
            whole, parts = (rank["variants"]["layer dropout"][sp] for sp in (False, True))
            torch.testing.assert_close(parts, whole, **LOGIT_TOLERANCE)

    def test_a_dropped_run_differs_from_one_without(self, run: dict[str, Any]) -> None:
        for sequence_parallel in (False, True):
            losses, _ = run["ranks"][0]["variants"][f"dropped {sequence_parallel}"]
            assert abs(losses[1] - run["ranks"][0]["training"][f"tp{run['num_ranks']}"]["losses"][1]) > 1e-4

    def test_clipping_and_accumulation_equal_one_process(self, run: dict[str, Any], tmp_path: Path) -> None:
        single = alone(tmp_path, gradient_clip_val=0.05, accumulate_grad_batches=2)
        for size in {2, run["num_ranks"]}:
            for rank in run["ranks"]:
                found = rank["variants"][f"clipped tp{size}"]
                torch.testing.assert_close(found, dict(adapter_state_dict(single)), **STEP_TOLERANCE)

    def test_targets_of_both_vocabularies_with_ranks_of_their_own_equal_one_process(
        self, run: dict[str, Any], tmp_path: Path
    ) -> None:
        targets = {"target_modules": ["q_proj", "v_proj", "down_proj"], "rank_pattern": {"v_proj": 2, "down_proj": 6}}
        single = alone(tmp_path, lora=targets)
        found = run["ranks"][0]["variants"]["parts"]
        torch.testing.assert_close(found["gradients"], single.gradients, **GRADIENT_TOLERANCE)
        torch.testing.assert_close(found["adapters"], dict(adapter_state_dict(single)), **STEP_TOLERANCE)

    @pytest.mark.parametrize("sequence_parallel", [False, True])
    def test_biases_of_adapted_layers_can_train(
        self, run: dict[str, Any], sequence_parallel: bool, tmp_path: Path
    ) -> None:
        single = Module()
        single.model = biased().train()
        fit(tmp_path, single, "auto", lora={"bias": "lora_only"})
        found = run["ranks"][0]["whole_modules"][f"biases {sequence_parallel}"]
        for index in range(2):
            q, k, v = (getattr(single.model.model.layers[index].self_attn, f"{x}_proj").bias.detach() for x in "qkv")
            expected = torch.cat([q.view(4, -1), k.view(4, -1), v.view(4, -1)], 1).flatten()  # four groups
            stacked = found[f"decoder.layers.{index}.self_attention.linear_qkv.bias"]
            torch.testing.assert_close(stacked, expected, **STEP_TOLERANCE)

    @pytest.mark.parametrize("sequence_parallel", [False, True])
    def test_norms_and_the_output_layer_can_train_whole(
        self, run: dict[str, Any], sequence_parallel: bool, tmp_path: Path
    ) -> None:
        lora = {"target_modules": ["q_proj"], "modules_to_save": ["q_norm", "model.norm", "lm_head"]}
        single = alone(tmp_path, lora=lora)
        trained = dict(single.model.named_parameters())
        found = run["ranks"][0]["whole_modules"][str(sequence_parallel)]
        names = {"decoder.final_layernorm.weight": "model.norm.weight", "output_layer.weight": "lm_head.weight"}
        names |= {
            f"decoder.layers.{i}.self_attention.q_layernorm.weight": f"model.layers.{i}.self_attn.q_norm.weight"
            for i in (0, 1)
        }
        assert set(found) == set(names)
        for name, value in found.items():
            torch.testing.assert_close(value, trained[names[name]].detach(), **STEP_TOLERANCE)


class TestExperts:
    def test_adapters_on_every_expert_train_as_on_one_rank(self, run: dict[str, Any]) -> None:
        for rank in run["ranks"]:
            one, spread = (rank["experts"][f"tp{size}"] for size in (1, run["num_ranks"]))
            assert sum("experts.3." in name for name in one["gradients"]) == 2 * 3 * 2  # blocks, layers, A and B
            torch.testing.assert_close(spread["gradients"], one["gradients"], **GRADIENT_TOLERANCE)
            torch.testing.assert_close(spread["adapters"], one["adapters"], **STEP_TOLERANCE)

    def test_whole_factors_are_bit_equal(self, run: dict[str, Any]) -> None:
        first, *others = (rank["experts"][f"tp{run['num_ranks']}"]["raw"] for rank in run["ranks"])
        for other in others:
            torch.testing.assert_close(other, first, **EXACT)

    def test_their_directory_is_read_into_hugging_faces_model(self, run: dict[str, Any]) -> None:
        model = load_peft(mixture(), run["directory"] / "moe-peft")
        for rank in run["ranks"]:
            torch.testing.assert_close(rank["experts"]["logits"], logits(model), **LOGIT_TOLERANCE)

    def test_what_peft_would_read_as_something_else_is_not_written(self, run: dict[str, Any]) -> None:
        for rank in run["ranks"]:
            assert (
                "has use_rslora, rank_pattern or alpha_pattern: write it with portable=True"
                in rank["experts"]["scaled"]
            )
            assert "adapt gate_proj, up_proj and down_proj of all experts" in rank["experts"]["partial"]
            assert not (run["directory"] / "not").exists()


class TestOutside:
    def test_a_teacher_keeps_its_parts(self, run: dict[str, Any]) -> None:
        for rank in run["ranks"]:
            torch.testing.assert_close(rank["outside"]["teacher"], logits(hugging_face()), **LOGIT_TOLERANCE)

    def test_a_parallel_head_trains_in_parts_and_is_saved_whole(self, run: dict[str, Any]) -> None:
        first, *others = (rank["outside"] for rank in run["ranks"])
        assert (first["head"] - first["first"]).abs().max() < 0.1 < first["head"].std()
        assert not torch.equal(first["head"], first["first"])
        for found in (first, *others):
            torch.testing.assert_close(found["head"], first["head"], **EXACT)
            torch.testing.assert_close(found["saved"], first["head"], **EXACT)

    def test_split_factors_that_are_unfrozen_later_are_averaged(self, run: dict[str, Any]) -> None:
        found = [rank["unfreezing"] for rank in run["ranks"]]
        assert all(value.any() for value in found[0].values())
        for rank in range(2, run["num_ranks"]):  # the same part, of another replica
            torch.testing.assert_close(found[rank], found[rank - 2], **EXACT)


class TestFabric:
    def test_losses_steps_and_norms_equal_one_process(self, run: dict[str, Any], tmp_path: Path) -> None:
        single = alone(tmp_path, gradient_clip_val=0.05)
        first = torch.stack([g.norm() for g in run["single"].gradients.values()]).norm()
        for rank in run["ranks"]:
            torch.testing.assert_close(rank["fabric"]["adapters"], dict(adapter_state_dict(single)), **STEP_TOLERANCE)
            torch.testing.assert_close(rank["fabric"]["norms"][0], first, rtol=1e-5, atol=0)
        losses = torch.tensor([rank["fabric"]["losses"] for rank in run["ranks"]]).mean(0)
        torch.testing.assert_close(losses, torch.tensor(single.losses), **STEP_TOLERANCE)

    def test_its_file_is_read_back(self, run: dict[str, Any]) -> None:
        for rank in run["ranks"]:
            torch.testing.assert_close(rank["fabric"]["loaded"], rank["fabric"]["adapters"], **EXACT)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_half_precision_follows_the_losses_of_single_precision(
    run: dict[str, Any], precision: str, sequence_parallel: bool
) -> None:
    losses, dtype = run["ranks"][0]["precisions"][f"{precision} {sequence_parallel}"]
    assert dtype == ("torch.bfloat16" if precision == "bf16-true" else "torch.float32")
    expected = run["ranks"][0]["training"][f"tp{run['num_ranks']}"]["losses"][:4]
    torch.testing.assert_close(losses, expected, rtol=0.0, atol=0.01)


class TestTraffic:
    """Elements that a rank sends; batches of 2 x 8 tokens, 32 wide, r=4."""

    TOKENS, HIDDEN, RANK = 2 * 8, 32, 4

    def traffic(self, run: dict[str, Any], case: str) -> Any:
        return run["ranks"][0]["traffic"][case]

    @pytest.mark.parametrize("kind", ["column", "row"])
    def test_a_layer_adds_nothing_without_sequence_parallelism(self, run: dict[str, Any], kind: str) -> None:
        assert self.traffic(run, f"{kind} False True") == self.traffic(run, f"{kind} False False")
        forward, backward = self.traffic(run, f"{kind} False True")
        reducing = (forward if kind == "row" else backward)["all_reduce"]
        assert reducing == [self.TOKENS * self.HIDDEN]

    def test_a_row_adds_nothing_with_it(self, run: dict[str, Any]) -> None:
        assert self.traffic(run, "row True True") == self.traffic(run, "row True False")
        assert self.traffic(run, "row True True")[1]["all_gather"] == [self.TOKENS * self.HIDDEN // run["num_ranks"]]

    def test_a_column_adds_r_numbers_per_token_with_it(self, run: dict[str, Any]) -> None:
        base, adapted = (self.traffic(run, f"column True {adapted}") for adapted in (False, True))
        small = self.TOKENS * self.RANK // run["num_ranks"]
        assert sorted(adapted[0].pop("all_gather")) == sorted([*base[0].pop("all_gather"), small])
        assert sorted(adapted[1].pop("reduce_scatter")) == sorted([*base[1].pop("reduce_scatter"), small])
        assert adapted == base

    def test_whole_factors_take_one_all_reduce_per_step_and_parts_one_over_replicas(self, run: dict[str, Any]) -> None:
        for rank in run["ranks"]:
            for found in rank["training"].values():
                traffic = found["reducing"]
                assert len(traffic["all_reduce"]) == (1 if found["replicas"] == 1 else 2)
                assert traffic["all_reduce"][0] > sum(value.numel() for value in found["raw"].values())  # and flags
                assert traffic["all_gather"] == traffic["reduce_scatter"] == traffic["broadcast"] == []

    def test_a_whole_model_adds_nothing_but_those(self, run: dict[str, Any]) -> None:
        assert self.traffic(run, "model False True") == self.traffic(run, "model False False")
        base, adapted = (self.traffic(run, f"model True {adapted}") for adapted in (False, True))
        ranks = [3 * self.RANK, 2 * self.RANK] * 2  # q, k, v and gate, up of two blocks
        small = [self.TOKENS * r // run["num_ranks"] for r in ranks]
        assert sorted(adapted[0].pop("all_gather")) == sorted([*base[0].pop("all_gather"), *small])
        assert sorted(adapted[1].pop("reduce_scatter")) == sorted([*base[1].pop("reduce_scatter"), *small])
        assert adapted == base


class TestFiles:
    def test_a_checkpoint_of_any_layout_resumes_under_another(self, run: dict[str, Any]) -> None:
        for rank in run["ranks"]:
            for name, found in rank["files"].items():
                if name.startswith("from "):
                    expected = dict(adapter_state_dict(run["single"]))
                    torch.testing.assert_close(found["adapters"], expected, **STEP_TOLERANCE)
                    torch.testing.assert_close(found["losses"], run["single"].losses[4:], **STEP_TOLERANCE)
            torch.testing.assert_close(
                rank["files"]["to tp1"], dict(adapter_state_dict(run["single"])), **STEP_TOLERANCE
            )

    def test_moments_are_exact_at_the_moment_of_loading(self, run: dict[str, Any]) -> None:
        written = [name.removeprefix("moments ") for name in run["ranks"][0]["files"] if name.startswith("moments ")]
        assert len(written) == 3
        for name in written:
            file = torch.load(run["directory"] / name / "epoch=0.ckpt", weights_only=True)
            (names,) = file["lightning_lora"]["optimizers"][0]
            saved = file["optimizer_states"][0]["state"]
            expected = {f"{n}.{key}": v for n, one in zip(names, saved.values(), strict=True) for key, v in one.items()}
            for rank in run["ranks"]:
                torch.testing.assert_close(rank["files"][f"moments {name}"], expected, **EXACT)

    def test_files_of_all_layouts_hold_the_same(self, run: dict[str, Any]) -> None:
        first, *others = (
            torch.load(run["directory"] / name / "epoch=0.ckpt", weights_only=True)
            for name in ("tp1", "tp2", f"tp{run['num_ranks']}-sp")
        )
        for other in others:
            assert list(first["state_dict"]) == list(other["state_dict"])
            torch.testing.assert_close(dict(first["state_dict"]), dict(other["state_dict"]), **STEP_TOLERANCE)
            ours, theirs = (file["lightning_lora"]["adapters"][0]["base"] for file in (first, other))
            assert ours["names"] == theirs["names"]
            assert torch.equal(ours["hashes"], theirs["hashes"])

    def test_peft_reads_the_directory_into_hugging_faces_model(self, run: dict[str, Any]) -> None:
        for folder, found in (("peft", "exported"), ("fused-peft", "fused logits")):
            section = "files" if found == "exported" else "variants"
            theirs = peft.PeftModel.from_pretrained(hugging_face(), run["directory"] / folder)
            for rank in run["ranks"]:
                torch.testing.assert_close(rank[section][found], logits(theirs), **LOGIT_TOLERANCE)
            ours = load_peft(hugging_face(), run["directory"] / folder)
            torch.testing.assert_close(rank[section][found], logits(ours), **LOGIT_TOLERANCE)

    def test_a_directory_of_hugging_faces_model_is_read(self, run: dict[str, Any]) -> None:
        for rank in run["ranks"]:
            torch.testing.assert_close(rank["files"]["imported"], logits(foreign()), **LOGIT_TOLERANCE)
            torch.testing.assert_close(rank["files"]["removed"], logits(hugging_face()), **LOGIT_TOLERANCE)
        assert (logits(foreign()) - logits(hugging_face())).abs().max() > 1e-2

    def test_merging_and_disabling(self, run: dict[str, Any]) -> None:
        for rank in run["ranks"]:
            found = rank["files"]
            torch.testing.assert_close(found["merged"], found["exported"], **LOGIT_TOLERANCE)
            torch.testing.assert_close(found["unmerged"], found["exported"], **EXACT)
            torch.testing.assert_close(found["disabled"], logits(hugging_face()), **LOGIT_TOLERANCE)

    def test_a_fused_pair_trains_and_resumes_on_another_number_of_ranks(self, run: dict[str, Any]) -> None:
        losses, _, names = run["ranks"][0]["variants"]["fused"]
        assert "decoder.layers.0.self_attention.linear_qkv.lora_A" in names
        assert len(names) == 2 * 4 * 2  # two blocks, four layers, A and B
        assert abs(losses[-1] - losses[0]) > 1e-3
        again = torch.tensor([rank["variants"]["fused resumed"] for rank in run["ranks"]]).mean(0)
        assert len(again) == 4
        if run["num_ranks"] == 2:  # the same batches
            assert again[0] < losses[0]


class TestCompany:
    def test_tools_around_a_run_see_the_model_that_it_is(self, run: dict[str, Any]) -> None:
        for rank in run["ranks"]:
            found = rank["company"]
            assert all(not value.any() for name, value in found["after_search"].items() if "lora_B" in name)
            torch.testing.assert_close(*found["predicted"], **EXACT)
            first = torch.load(run["directory"] / "tp2" / "epoch=0.ckpt", weights_only=True)["state_dict"]
            name = "model.decoder.layers.1.mlp.linear_fc2.lora_B"
            torch.testing.assert_close(found["started"]["model.layers.1.mlp.down_proj.lora_B"], first[name], **EXACT)
            torch.testing.assert_close(found["base"], logits(hugging_face()), **LOGIT_TOLERANCE)
            assert found["searched"] > 0
            assert found["steps"] == found["searched"] + 4 + 4  # of two epochs


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
    def test_what_does_not_fit_is_said(self, run: dict[str, Any], case: str, message: str) -> None:
        for rank in run["ranks"]:
            assert re.search(message, rank["refusals"][case]), rank["refusals"].get(case)
