"""Merging, unmerging, and switching adapters off."""

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, disabled, inject, merge, merged, named_adapter_parameters, remove, unmerge
from lightning_lora.functional import merged_weight
from tests import models


def adapted(**config) -> nn.Module:
    model = inject(models.llama(dtype=config.pop("dtype", torch.float32)), LoRAConfig(**{"r": 4, **config})).eval()
    models.fill_adapters(model)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(models.token_ids()).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_unmerge_gives_the_base_back_bit_for_bit(dtype: torch.dtype) -> None:
    model = adapted(dtype=dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    merge(model)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before["model.layers.0.mlp.up_proj.weight"])
    unmerge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_merged_weight_is_float64_math_rounded_once() -> None:
    model = adapted(dtype=torch.bfloat16, alpha=3)
    layer = model.model.layers[0].self_attn.k_proj
    weight, a, b = (t.detach().double() for t in (layer.weight, layer.lora_A, layer.lora_B))
    expected = (weight + 3 / 4 * b @ a).to(torch.bfloat16)
    merge(model)
    # float32 sums differ from float64 ones by less than a rounding step of bfloat16, which can flip a tie
    assert (layer.weight != expected).float().mean() < 0.01
    torch.testing.assert_close(layer.weight, expected, rtol=2**-7, atol=0)


def test_merged_model_gives_the_adapted_models_logits() -> None:
    model = adapted()
    expected = logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)


def test_merging_twice_merges_once() -> None:
    model = adapted()
    weight = merge(model).lm_head.weight.clone()
    once = model.model.layers[0].mlp.up_proj.weight.clone()
    merge(model)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, once)
    assert torch.equal(model.lm_head.weight, weight)


def test_the_context_restores_after_an_exception() -> None:
    model = adapted()
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(RuntimeError, match="inside"), merged(model):
        raise RuntimeError("inside")
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    assert model.model.layers[0].mlp.up_proj.lora_active


def test_the_context_leaves_a_merged_model_merged() -> None:
    model = merge(adapted())
    with merged(model):
        pass
    assert model.model.layers[0].mlp.up_proj.lora_original is not None


def test_merge_and_remove_leaves_a_plain_model_with_merged_weights() -> None:
    model = adapted(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    expected = logits(model)
    merge(model, remove=True)
    assert {type(module) for module in model.modules()} == {type(module) for module in models.llama().modules()}
    assert model.state_dict().keys() == models.llama().state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)


def test_remove_on_a_merged_model_names_the_way_out() -> None:
    model = merge(adapted())
    with pytest.raises(ValueError, match=r"merge\(model, remove=True\)"):
        remove(model)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_merging_a_tied_weight_is_an_error_and_changes_nothing(target: str) -> None:
    model = inject(models.llama(tied=True), LoRAConfig(r=4, target_modules=["q_proj", target]))
    models.fill_adapters(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="tied to (model.embed_tokens|lm_head), which would change too"):
        merge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_merging_a_diverged_adapter_is_an_error() -> None:
    model = adapted()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.lora_B[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.up_proj': its adapter holds NaN"):
        merge(model)


class Doubled(nn.Linear):
    """A linear layer whose output is not its weight's product."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """A linear layer with a forward of its own that changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def test_a_subclass_is_adapted_through_its_own_forward() -> None:
    model = nn.Sequential(Doubled(8, 8))
    x = torch.randn(3, 8)
    base = model(x)
    inject(model, LoRAConfig(r=2, target_modules=["0"]))
    models.fill_adapters(model)
    layer = model[0]
    torch.testing.assert_close(model(x), base + 2 * x @ layer.lora_A.t() @ layer.lora_B.t())


def test_merging_asks_a_subclass_whether_its_weight_adds_up() -> None:
    model = inject(nn.Sequential(Doubled(8, 8)), LoRAConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="Doubled has a forward of its own"):
        merge(model)
    model = inject(nn.Sequential(Renamed(8, 8)), LoRAConfig(r=2, target_modules=["0"]))
    models.fill_adapters(model)
    x = torch.randn(3, 8)
    expected = model(x)
    torch.testing.assert_close(merge(model)(x), expected)


class TestDisabled:
    def test_gives_the_base_with_first_values_of_heads_and_biases(self) -> None:
        expected = logits(models.gpt2())
        config = LoRAConfig(r=4, target_modules=["c_attn"], bias="all", modules_to_save=["lm_head"])
        model = inject(models.gpt2(), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3)
        trained = logits(model)
        with disabled(model):
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), trained)
        assert not torch.equal(trained, expected)

    def test_leaves_graphs_alone_that_are_alive_across_it(self) -> None:
        gradients = []
        for use in (False, True):
            model = adapted(modules_to_save=["lm_head"])
            loss = model(models.token_ids()).logits.square().mean()
            if use:
                with disabled(model), torch.no_grad():
                    model(models.token_ids())
            loss.backward()
            gradients.append(model.lm_head.weight.grad)
        assert torch.equal(*gradients)

    def test_on_a_merged_model_gives_the_base_and_leaves_it_merged(self) -> None:
        model = adapted()
        expected = logits(models.llama().eval())
        merge(model)
        weight = model.model.layers[0].mlp.up_proj.weight.clone()
        with disabled(model):
            assert torch.equal(logits(model), expected)
        assert torch.equal(model.model.layers[0].mlp.up_proj.weight, weight)

    def test_restores_after_an_exception(self) -> None:
        model = adapted()
        expected = logits(model)
        with pytest.raises(RuntimeError, match="inside"), disabled(model):
            raise RuntimeError("inside")
        assert torch.equal(logits(model), expected)


def test_functions_of_an_unadapted_model_say_what_to_do() -> None:
    for function in (merge, unmerge, remove):
        with pytest.raises(ValueError, match="holds no adapters; call inject"):
            function(nn.Linear(2, 2))


def test_merged_weight_takes_a_transposed_view() -> None:
    a, b, w = torch.randn(2, 5), torch.randn(3, 2), torch.randn(5, 3)
    torch.testing.assert_close(merged_weight(w.t(), a, b, 0.5), w.t() + 0.5 * b @ a)


def test_parameters_keep_their_identity_through_merge_and_unmerge() -> None:
    model = adapted()
    before = dict(model.named_parameters())
    unmerge(merge(model))
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert len(list(named_adapter_parameters(model))) == 28
