"""Merging one of several named adapters."""

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, active, disabled, merge, merge_receipt, merged, quantize, remove, unmerge
from tests import models
from tests.model.small import assert_same_state
from tests.model.test_adapters import with_adapters, within

IDS = models.token_ids()
CONFIGS = {"law": LoRAConfig(r=4), "medicine": LoRAConfig(r=2, target_modules=["q_proj", "v_proj"])}


def nf4() -> nn.Module:
    model = models.llama()
    quantize(model, "nf4")
    return model


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("build", [models.llama, nf4])
def test_a_merged_adapter_acts_alone_and_unmerge_gives_all_back(build, name: str) -> None:
    model = with_adapters(build(), CONFIGS)
    before = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    with active(model, name):
        expected = model(IDS).logits
    merge(model, adapter=name)
    within(1e-5)(model(IDS).logits, expected)
    assert all(".lora." not in one.name for one in merge_receipt(model))
    with pytest.raises(ValueError, match="is merged"), active(model, "law"):
        pass
    other = next(other for other in CONFIGS if other != name)
    with pytest.raises(ValueError, match="merged with other settings"):
        merge(model, adapter=other)
    with disabled(model):
        assert not torch.allclose(model(IDS).logits, expected, atol=1e-3)
    within(1e-5)(model(IDS).logits, expected)
    unmerge(model)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    with active(model, name):
        assert torch.equal(model(IDS).logits, expected)
    with pytest.raises(ValueError, match="none was chosen"):
        model(IDS)


def test_a_model_with_one_adapter_merged_for_good_is_plain() -> None:
    base = models.llama()
    model = with_adapters(base, CONFIGS)
    with active(model, "law"):
        expected = model(IDS).logits
    merge(model, remove=True, adapter="law")
    within(1e-5)(model(IDS).logits, expected)
    assert list(model.state_dict()) == list(base.state_dict())
    assert {name: type(one) for name, one in model.named_modules()} == {n: type(m) for n, m in base.named_modules()}


def test_merging_says_which_adapters_there_are() -> None:
    model = with_adapters(models.llama(), CONFIGS)
    with pytest.raises(ValueError, match="2 adapters: give adapter=, one of law, medicine"):
        merge(model)
    with pytest.raises(ValueError, match="no adapter 'x': LlamaForCausalLM has 'law', 'medicine'"):
        merge(model, adapter="x")
    with active(model, "law"), pytest.raises(ValueError, match="inside active"):
        merge(model, adapter="law")
    with merged(model, adapter="law"), pytest.raises(ValueError, match="merged"):
        remove(model, adapter="medicine")
    remove(model, adapter="medicine")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with merged(model):
        pass
    assert_same_state(model, before)
