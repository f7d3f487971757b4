"""Layers under several names, tied weights, and copies of adapted models."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    adapter_state_dict,
    inject,
    load_adapter_state_dict,
    named_adapter_parameters,
    remove,
)
from lightning_lora.model.state import named_lora_layers
from tests import models
from tests.model.small import (
    IDS,
    Mlp,
    assert_removes_to,
    assert_same_state,
    config_for,
    mlp,
    portrait,
    run,
    shared,
    train,
)
from tests.real_models import rxnmapper


def test_tied_weights_stay_tied_and_get_one_adapter_each() -> None:
    model = models.llama(tied=True)
    inject(model, LoRAConfig(r=4, target_modules=["embed_tokens", "lm_head"]))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(named_lora_layers(model)) == 2
    remove(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_layer_under_two_names_gets_one_adapter_that_serves_both() -> None:
    model = inject(shared(), LoRAConfig(r=4))
    models.fill_adapters(model)
    x, merged = torch.linspace(-1, 1, 40).view(5, 8), shared()
    with torch.no_grad():
        merged.first.weight += 2.0 * model.first.lora_B @ model.first.lora_A
        merged.last.weight += 2.0 * model.last.lora_B @ model.last.lora_A
    assert list(named_lora_layers(model)) == ["first", "last"]
    torch.testing.assert_close(model(x), merged(x))


def test_a_base_checkpoint_of_a_shared_layer_loads_after_injection() -> None:
    model = inject(shared(), LoRAConfig(r=4))
    state = {name: tensor + 1 for name, tensor in shared().state_dict().items()}
    model.load_state_dict(state)
    assert torch.equal(model.first.weight, state["second.weight"])


def test_adapters_of_a_shared_layer_load_by_their_first_name() -> None:
    model, other = inject(shared(), LoRAConfig(r=4)), inject(shared(), LoRAConfig(r=4))
    models.fill_adapters(model)
    load_adapter_state_dict(other, adapter_state_dict(model))
    assert torch.equal(run(other), run(model))
    third = inject(shared(), LoRAConfig(r=4))
    third.load_state_dict(adapter_state_dict(model))
    assert torch.equal(run(third), run(model))


def peft_twin(base: nn.Module, ours: nn.Module, targets: list[str]) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    twin = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets))
    tensors = dict(named_adapter_parameters(ours))
    with torch.no_grad():
        for name, parameter in twin.base_model.model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(tensors[name.replace(".default.weight", "")])
    return twin


def test_the_real_albert_with_one_weight_for_twelve_layers_equals_peft() -> None:
    targets = ["query", "value", "ffn", "dense"]
    model = inject(rxnmapper(), LoRAConfig(r=4, target_modules=targets)).eval()
    models.fill_adapters(model, std=0.02)
    twin = peft_twin(rxnmapper(), model, targets).eval()
    logits, expected = model(IDS).logits, twin(IDS).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)  # 12 layers of float32, logits of about 10
    logits.square().mean().backward()
    expected.square().mean().backward()
    grads = {
        n.replace(".default.weight", ""): p.grad for n, p in twin.base_model.model.named_parameters() if ".lora_" in n
    }
    for name, parameter in named_adapter_parameters(model):
        torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-3, atol=1e-4 * grads[name].abs().max().item())


def test_the_real_albert_comes_back_from_all_linear_and_embedding_adapters() -> None:
    model = rxnmapper()
    before, state = portrait(model), copy.deepcopy(model.state_dict())
    inject(model, LoRAConfig(r=4))
    assert len(named_lora_layers(model)) == 8  # mapping in, q, k, v, dense, two of the ffn, the head's dense
    train(model, 1)
    remove(model)
    assert portrait(model) == before
    assert_same_state(model, state)


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def test_the_adapters_dropout_has_a_mode_of_its_own() -> None:
    plain = Mlp().eval()
    before = portrait(plain)
    model = inject(plain, LoRAConfig(r=2, dropout=0.5))
    layers = named_lora_layers(model).values()
    assert not any(layer.drops for layer in layers)  # as its layer was
    for layer in layers:
        layer.start_dropout()
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twins = named_lora_layers(copied).values()
        assert all(layer.drops and not layer.training for layer in twins)
        assert not any(layer.drops for layer in named_lora_layers(copied.eval()).values())
        assert all(layer.drops for layer in named_lora_layers(copied.train()).values())
    assert portrait(remove(model.eval())) == before


@pytest.mark.parametrize("copy_of", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("build", [models.llama, models.bert_classifier, models.encoder, mlp, shared])
def test_a_copy_is_whole_and_its_own(copy_of, build) -> None:
    model = inject(build(), config_for(build)).eval()
    models.fill_adapters(model)
    twin = copy_of(model)
    assert torch.equal(run(twin), run(model))
    assert portrait(twin) == portrait(model)
    own = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in own for p in twin.parameters())
    assert_removes_to(twin, build())


def test_loading_into_a_copy_leaves_the_first_model_alone() -> None:
    model = inject(models.bert_classifier(), LoRAConfig(r=4))
    twin = copy.deepcopy(model)
    twin.load_state_dict(
        {
            name: tensor + 1
            for name, tensor in models.bert_classifier().state_dict().items()
            if tensor.is_floating_point()
        },
        strict=False,
    )
    remove(model)
    assert_same_state(model, models.bert_classifier().state_dict())
