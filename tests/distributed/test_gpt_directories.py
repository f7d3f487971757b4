"""PEFT directories of a ``GPTModel`` on two gloo ranks, out and in, and adapters on experts, against Hugging Face's model."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from lightning_lora import LoRAConfig, active, disabled, inject, load_peft, merge, merged, remove, save_peft, unmerge
from lightning_lora.megatron.models import gpt_model
from lightning_lora.megatron.weights import load_hf_weights
from lightning_lora.ops.sharded import is_sharded
from tests.distributed.gpt import (
    GRADIENT_TOLERANCE,
    LOGIT_TOLERANCE,
    STEP_TOLERANCE,
    Module,
    adapters,
    expected_logits,
    hugging_face,
    logits_of,
    mixture,
    run,
)
from tests.distributed.ranks import on_ranks
from tests.distributed.split import whole_factors
from tests.distributed.training import EXACT, from_all_ranks
from tests.models import fill_adapters


@pytest.mark.parametrize("fused_pairs", [False, True])
@on_ranks(2)
def test_peft_reads_the_directory_into_hugging_faces_model(tmp_path: Path, hf: Path, fused_pairs: bool) -> None:
    module = Module(hf)
    run(None, 2, module, lora={"fused_pairs": fused_pairs})
    save_peft(module.model, tmp_path)
    logits = logits_of(module)
    theirs = peft.PeftModel.from_pretrained(hugging_face(), tmp_path)
    torch.testing.assert_close(logits, expected_logits(theirs), **LOGIT_TOLERANCE)
    torch.testing.assert_close(logits, expected_logits(load_peft(hugging_face(), tmp_path)), **LOGIT_TOLERANCE)


@on_ranks(2)
def test_merging_and_disabling(hf: Path) -> None:
    module = Module(hf)
    run(None, 2, module)
    logits = logits_of(module)
    with torch.no_grad(), merged(module):
        torch.testing.assert_close(logits_of(module), logits, **LOGIT_TOLERANCE)
    with disabled(module):
        torch.testing.assert_close(logits_of(module), expected_logits(hugging_face()), **LOGIT_TOLERANCE)
    merge(module)
    unmerge(module)
    torch.testing.assert_close(logits_of(module), logits, **EXACT)


@pytest.fixture(scope="module")
def foreign(directory: Path) -> Path:
    """Return the directory of adapters of unequal rank on some layers, that are not at their start."""
    config = LoRAConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], rank_pattern={"v_proj": 2})
    model = inject(hugging_face(), config)
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.05)
    save_peft(model, directory / "foreign")
    return directory / "foreign"


@on_ranks(2)
def test_a_directory_of_hugging_faces_model_is_read(hf: Path, foreign: Path) -> None:
    module = Module(hf)
    run(None, 2, module)
    module.model = gpt_model(str(hf))
    load_hf_weights(module.model, hf)
    load_peft(module.model, foreign)
    theirs, base = expected_logits(load_peft(hugging_face(), foreign)), expected_logits(hugging_face())
    assert (theirs - base).abs().max() > 1e-2
    torch.testing.assert_close(logits_of(module), theirs, **LOGIT_TOLERANCE)
    remove(module.model)
    torch.testing.assert_close(logits_of(module), base, **LOGIT_TOLERANCE)


@pytest.fixture(scope="module")
def source_of_mixture(directory: Path) -> Path:
    mixture().save_pretrained(directory / "moe")
    return directory / "moe"


@on_ranks(2)
def test_adapters_on_every_expert_train_as_on_one_rank_and_are_read_into_hugging_faces_model(
    tmp_path: Path, source_of_mixture: Path
) -> None:
    def trained(size: int) -> Module:
        module = Module(source_of_mixture, sequence_parallel=size > 1)
        run(None, size, module)
        return module

    one, spread = trained(1), trained(2)
    assert sum("experts.3." in name for name in one.gradients) == 2 * 3 * 2  # blocks, layers, A and B
    torch.testing.assert_close(spread.gradients, one.gradients, **GRADIENT_TOLERANCE)
    torch.testing.assert_close(adapters(spread), adapters(one), **STEP_TOLERANCE)
    factors = whole_factors(spread)
    torch.testing.assert_close(from_all_ranks(factors)[0], factors, **EXACT)
    save_peft(spread.model, tmp_path)
    expected = expected_logits(load_peft(mixture(), tmp_path))
    torch.testing.assert_close(logits_of(spread), expected, **LOGIT_TOLERANCE)


NOT_WRITTEN: list[tuple[dict[str, Any], str]] = [
    ({"use_rslora": True}, "has use_rslora, rank_pattern or alpha_pattern: write it with portable=True"),
    ({"target_modules": ["gate_proj"]}, "adapt gate_proj, up_proj and down_proj of all experts"),
]


@pytest.mark.parametrize(("settings", "message"), NOT_WRITTEN)
@on_ranks(2)
def test_what_peft_would_read_as_something_else_is_not_written(
    tmp_path: Path, source_of_mixture: Path, settings: dict[str, Any], message: str
) -> None:
    run(None, 2, Module(source_of_mixture, sequence_parallel=True), max_epochs=0)  # lays the ranks out
    model = gpt_model(source_of_mixture, sequence_parallel=True)
    load_hf_weights(model, source_of_mixture)
    inject(model, LoRAConfig(r=4, **settings))
    torch.manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_A" in name and not is_sharded(parameter):
            torch.nn.init.normal_(parameter)
    with pytest.raises(ValueError, match=message):
        save_peft(model, tmp_path / "not")
    assert not (tmp_path / "not").exists()


@on_ranks(2)
def test_adapters_with_names_go_out_and_in_by_folders(tmp_path: Path, hf: Path) -> None:
    configs = {"law": LoRAConfig(r=4), "medicine": LoRAConfig(r=2, target_modules=["q_proj", "v_proj"])}
    module, other = Module(hf), Module(hf)
    with_names = {"adapters": configs}
    run(None, 2, module, lora=with_names, max_steps=0)
    fill_adapters(module.model)
    save_peft(module.model, tmp_path)
    run(None, 2, other, lora=with_names, max_steps=0)
    other.model = load_peft(remove(other.model), tmp_path)
    for name in configs:
        with active(module.model, name), active(other.model, name):
            logits = logits_of(module)
            torch.testing.assert_close(logits_of(other), logits, **EXACT)
        theirs = load_peft(hugging_face(), tmp_path / name)
        torch.testing.assert_close(logits, expected_logits(theirs), **LOGIT_TOLERANCE)
