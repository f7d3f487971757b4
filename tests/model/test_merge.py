"""Merging, unmerging, and switching adapters off."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lora import (
    LoRAConfig,
    adapter_checkpoint,
    adapter_state_dict,
    disabled,
    inject,
    merge,
    merged,
    named_adapter_parameters,
    remove,
    save_peft,
    unmerge,
)
from lightning_lora.ops.weights import merged_weight
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


def test_weights_that_somebody_put_in_one_buffer_are_not_tied() -> None:
    model = inject(models.gpt2(), LoRAConfig(r=4, bias="all", lora_bias=True))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    buffer = torch.cat([parameter.detach().reshape(-1) for parameter in trained])
    pieces = buffer.split([parameter.numel() for parameter in trained])
    for parameter, piece in zip(trained, pieces, strict=True):
        parameter.data = piece.view_as(parameter)
    models.fill_adapters(model)
    attention = model.transformer.h[0].attn
    biases = attention.c_attn.bias, attention.c_proj.bias
    assert len({bias.untyped_storage().data_ptr() for bias in biases}) == 1
    expected = logits(model)
    torch.testing.assert_close(logits(merge(model)), expected, rtol=1e-4, atol=1e-5)  # float32, merged or not


def test_overlapping_weights_are_tied() -> None:
    model = inject(models.llama(), LoRAConfig(r=4, target_modules=["k_proj"]))
    attention, rows = model.model.layers[0].self_attn, torch.randn(24, 32)
    attention.k_proj.weight.data, attention.v_proj.weight.data = rows[:16], rows[8:]
    with pytest.raises(ValueError, match=r"tied to model\.layers\.0\.self_attn\.v_proj, which would change too"):
        merge(model)


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


# blocks within blocks, several models, copies


def test_a_merge_that_fails_at_the_last_layer_has_changed_nothing() -> None:
    model = adapted()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.lora_A[0, 0] = float("inf")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj"):
        merge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.model.layers[0].mlp.up_proj.lora_active


def test_a_merge_that_fails_in_the_second_of_two_models_has_changed_neither() -> None:
    both = nn.ModuleList([adapted(), adapted()])
    with torch.no_grad():
        both[1].model.layers[1].mlp.down_proj.lora_A[0, 0] = float("nan")
    expected = logits(both[0])
    with pytest.raises(ValueError, match="holds NaN"):
        merge(both)
    assert torch.equal(logits(both[0]), expected)
    assert both[0].model.layers[0].mlp.up_proj.lora_original is None


def test_the_context_around_two_models_leaves_each_as_it_was() -> None:
    both = nn.ModuleList([merge(adapted()), adapted()])
    with merged(both):
        assert both[1].model.layers[0].mlp.up_proj.lora_original is not None
    assert both[0].model.layers[0].mlp.up_proj.lora_original is not None
    assert both[1].model.layers[0].mlp.up_proj.lora_original is None


def test_merged_inside_merged_and_disabled_inside_disabled_end_where_they_began() -> None:
    model, base = adapted(), logits(models.llama().eval())
    expected = logits(model)
    with merged(model):
        inside = logits(model)
        with merged(model):
            pass
        assert torch.equal(logits(model), inside)
    with disabled(model):
        with disabled(model):
            pass
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), expected)


def test_disabled_inside_merged_gives_the_base_and_then_the_merged_again() -> None:
    model, base = adapted(), logits(models.llama().eval())
    expected = logits(model)
    with merged(model):
        inside = logits(model)
        with disabled(model):
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), inside)
    assert torch.equal(logits(model), expected)


def test_merging_what_is_disabled_is_an_error() -> None:
    model = adapted()
    expected = logits(model)
    with disabled(model):
        with pytest.raises(ValueError, match="disabled"):
            merge(model)
        with pytest.raises(ValueError, match="disabled"), merged(model):
            pass
        assert torch.equal(logits(model), logits(models.llama().eval()))
    assert torch.equal(logits(model), expected)


def test_unmerge_inside_disabled_does_not_wake_the_adapters() -> None:
    model = adapted()
    expected, base = logits(model), logits(models.llama().eval())
    with disabled(model):
        unmerge(model)
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), expected)


def test_an_exception_deep_inside_leaves_everything_as_it_was() -> None:
    model = adapted(modules_to_save=["lm_head"])
    expected, parameters = logits(model), dict(model.named_parameters())
    with pytest.raises(KeyError), merged(model), disabled(model):
        raise KeyError
    assert torch.equal(logits(model), expected)
    assert all(p is parameters[name] for name, p in model.named_parameters())


@pytest.mark.parametrize("targets", [["c_attn", "c_fc", "c_proj"], ["wpe"], "all-linear"])
def test_conv1d_and_embeddings_merge_and_come_back(targets) -> None:
    model = inject(models.gpt2(), LoRAConfig(r=4, target_modules=targets, modules_to_save=[]))
    models.fill_adapters(model)
    expected, state = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
    merge(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    unmerge(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_copy_of_a_merged_model_unmerges_on_its_own() -> None:
    model = adapted()
    expected = logits(model)
    twin = copy.deepcopy(merge(model))
    assert torch.equal(logits(unmerge(twin)), expected)
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, twin.model.layers[0].mlp.up_proj.weight)


def test_a_weight_normed_layer_cannot_be_merged_and_says_why() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    models.fill_adapters(inject(model, LoRAConfig(r=2)))
    with pytest.raises(ValueError, match="is not a stored parameter of it: it is computed"):
        merge(model)


def test_merge_on_the_meta_device_says_to_load_the_base_first() -> None:
    with torch.device("meta"):
        model = inject(nn.Sequential(nn.Linear(8, 8)), LoRAConfig(r=2))
    with pytest.raises(ValueError, match="meta device; load the base first"):
        merge(model)


class Written(nn.Linear):
    """The product, written out."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class RenamedTwice(Renamed):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden)


class RenamedDoubled(Doubled):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden)


def falcon() -> type[nn.Linear]:
    from transformers.models.falcon.modeling_falcon import FalconLinear

    return FalconLinear


@pytest.mark.parametrize("cls", [Renamed, RenamedTwice, Written, falcon], ids=lambda cls: cls.__name__)
def test_a_forward_that_is_the_product_by_its_code_is_merged(cls) -> None:
    cls = cls() if cls is falcon else cls
    model, x = inject(nn.Sequential(cls(8, 8)), LoRAConfig(r=2, target_modules=["0"])), torch.randn(3, 8)
    models.fill_adapters(model)
    expected = model(x)
    with merged(model):
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)  # float32, another order of additions


def test_a_forward_of_another_code_is_not_merged_and_not_run() -> None:
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return F.linear(x, self.weight, self.bias)

    for cls in (Counting, RenamedDoubled):
        model = inject(nn.Sequential(cls(8, 8)), LoRAConfig(r=2, target_modules=["0"]))
        with pytest.raises(ValueError, match="has a forward of its own, which is not known to be x W"):
            merge(model)
        assert model[0].__dict__.get("calls") is None


def test_saving_and_removing_inside_disabled_are_errors_for_the_trained_values_are_away(tmp_path) -> None:
    model = adapted(modules_to_save=["lm_head"])
    expected = logits(model)
    with disabled(model):
        for function in (adapter_state_dict, adapter_checkpoint, lambda m: save_peft(m, tmp_path), remove):
            with pytest.raises(ValueError, match=r"leave the block of disabled\(model\) first"):
                function(model)
    assert torch.equal(logits(model), expected)


def test_loading_a_base_into_merged_weights_is_an_error_for_unmerge_would_undo_it() -> None:
    model = merge(adapted())
    with pytest.raises(ValueError, match=r"call unmerge\(model\) before loading"):
        model.load_state_dict(models.llama().state_dict())
    unmerge(model).load_state_dict(models.llama().state_dict())
