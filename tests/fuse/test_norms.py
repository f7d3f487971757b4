"""RMS norms of the frozen base: the same numbers as the models' own code, with less kept for backward."""

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject, named_adapter_parameters, remove
from lightning_lora.fuse import release
from lightning_lora.fuse.forms import form_of
from lightning_lora.fuse.norms import NORM_FORMS, LoRARMSNorm
from lightning_lora.ops.rms_norm import rms_norm
from tests import models

IDS = models.token_ids(2, 6)
EPS = 1e-3


def norm_classes() -> dict[str, tuple[type[nn.Module], bool | None]]:
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    plain, offset = (LlamaRMSNorm, Qwen3RMSNorm, T5LayerNorm), (GemmaRMSNorm, Gemma3RMSNorm)
    other = {nn.LayerNorm: None, HalvedNorm: None}
    return {
        c.__name__: (c, kind) for c, kind in (dict.fromkeys(plain, False) | dict.fromkeys(offset, True) | other).items()
    }


class HalvedNorm(nn.Module):
    """Looks like one, and is half of it."""

    def __init__(self, features: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(features)), eps

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * rms_norm(x, self.weight, self.eps)


@pytest.mark.parametrize("name", norm_classes())
def test_a_norm_is_known_by_its_code(name) -> None:
    cls, is_offset = norm_classes()[name]
    form = form_of(cls, NORM_FORMS)
    assert (None if form is None else form.is_offset) == is_offset
    assert form is None or getattr(cls(16, eps=EPS), form.eps) == EPS


def another_norm(how: str) -> type[nn.Module]:
    """A subclass of Gemma's norm in which one method was replaced by another code, or by the same."""
    from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

    def noting(self, x):
        self.last = output = self._norm(x.float())
        output = output * (1.0 + self.weight.float())
        return output.type_as(x)

    def same(self, hidden):
        """Return what Gemma's does."""
        normed = self._norm(hidden.float())
        normed = normed * (1.0 + self.weight.float())
        return normed.type_as(hidden)

    def other_number(self, x):
        output = self._norm(x.float())
        output = output * (1 + self.weight.float())
        return output.type_as(x)

    def other_helper(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * 2

    changes = {
        "forward": {"noting": noting, "same": same, "other number": other_number}.get(how),
        "_norm": other_helper,
    }
    return type("Another", (GemmaRMSNorm,), dict([next((k, v) for k, v in changes.items() if v is not None)]))


@pytest.mark.parametrize("how", ["same", "noting", "other number", "other helper"])
def test_a_norm_of_another_code_is_left_alone(how) -> None:
    model = nn.Sequential(another_norm(how)(8), nn.Linear(8, 8), nn.Linear(8, 8))
    norm = inject(model, LoRAConfig(r=4, target_modules=["1"]))[0]
    assert isinstance(norm, LoRARMSNorm) == (how == "same")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [n for n, (_, kind) in norm_classes().items() if kind is not None])
def test_outputs_are_the_modules_own_to_the_bit_and_gradients_those_of_float64(name, dtype) -> None:
    cls, is_offset = norm_classes()[name]
    norm = cls(64, eps=EPS).to(dtype)
    nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 64).to(dtype).requires_grad_()
    grad = torch.randn(3, 5, 64).to(dtype)
    y = rms_norm(x, norm.weight.detach(), EPS, is_offset=is_offset)
    assert torch.equal(y, norm(x))
    (got,) = torch.autograd.grad(y, x, grad)
    wide, weight = x.detach().double().requires_grad_(), norm.weight.detach().double()
    expected = wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * (weight + is_offset)
    (expected_grad,) = torch.autograd.grad(expected, wide, grad.double())
    eps = torch.finfo(dtype).eps  # what is kept is the rounded output
    torch.testing.assert_close(
        got.double(), expected_grad, rtol=8 * eps, atol=8 * eps * expected_grad.abs().max().item()
    )


@pytest.mark.parametrize("is_offset", [False, True])
def test_first_and_second_derivatives_pass_gradcheck(is_offset) -> None:
    x, weight = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), torch.randn(5, dtype=torch.float64)
    function = lambda x: rms_norm(x, weight, EPS, is_offset=is_offset)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x,))
    assert torch.autograd.gradgradcheck(function, (x,))


def adapted() -> nn.Module:
    model = models.llama()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1.0, 0.3)
    inject(model, LoRAConfig(r=4)).train()
    models.fill_adapters(model)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    model(input_ids=IDS, labels=IDS).loss.backward()
    return {name: p.grad.clone() for name, p in named_adapter_parameters(model)}


def assert_as_by_the_bases_own_norms(model: nn.Module) -> None:
    other = copy.deepcopy(model)
    norms = [module for module in other.modules() if isinstance(module, LoRARMSNorm)]
    assert len(norms) == 5
    for norm in norms:
        release(norm)
    got, expected = gradients(model), gradients(other)
    for name, value in got.items():
        assert torch.isfinite(value).all()
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)  # float32, two blocks deep


def test_adapters_get_the_same_gradients() -> None:
    assert_as_by_the_bases_own_norms(adapted())


def test_weights_with_zeros_and_weights_that_train_are_left_to_the_base() -> None:
    model = adapted()
    first, second = (block.post_attention_layernorm for block in model.model.layers)
    with torch.no_grad():
        second.weight[3] = 0.0
    first.weight.requires_grad_(True)
    assert_as_by_the_bases_own_norms(model)
    assert first.weight.grad is not None
    assert (first.lora_has_zeros, second.lora_has_zeros) == (None, True)


def test_other_weights_are_looked_at_anew_when_they_are_loaded() -> None:
    model = adapted()
    gradients(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.layers.1.post_attention_layernorm.weight"][0] = 0.0
    model.load_state_dict(state)
    assert_as_by_the_bases_own_norms(model)
    assert model.model.layers[1].post_attention_layernorm.lora_has_zeros


NORM_CHANGES = {
    "a weight is set to zero": lambda norm: nn.init.zeros_(norm.weight),
    "another weight": lambda norm: setattr(norm, "weight", nn.Parameter(torch.zeros(32), requires_grad=False)),
    "another eps": lambda norm: setattr(norm, "variance_epsilon", 1.0),
}


def test_keyword_arguments_run_the_norms_own_code() -> None:
    norm, x = adapted().model.norm, torch.randn(2, 3, 32, requires_grad=True)
    assert torch.equal(norm(hidden_states=x), norm(x))


@pytest.mark.parametrize("change", NORM_CHANGES.values(), ids=NORM_CHANGES)
def test_a_norm_that_is_changed_later_does_what_it_then_says(change) -> None:
    norm, x = adapted().model.norm, torch.randn(2, 3, 32, requires_grad=True)
    norm(x)
    other = copy.deepcopy(norm)
    release(other)
    change(norm), change(other)
    assert torch.equal(norm(x), other(x))
    found, expected = (torch.autograd.grad(one(x).sum(), x)[0] for one in (norm, other))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # float32, in another order of operations


def test_a_norm_whose_class_is_patched_later_does_what_it_then_says(monkeypatch) -> None:
    norm, x = adapted().model.norm, torch.randn(2, 3, 32, requires_grad=True)
    before, former = norm(x), norm.lora_base_class.forward
    monkeypatch.setattr(norm.lora_base_class, "forward", lambda self, x: former(self, x) * 2)
    assert torch.equal(norm(x), before * 2)


@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_t5_in_half_precision_with_its_wide_layers_computes_as_its_own_norms(feed_forward) -> None:
    # transformers keeps "wo" in float32 when it loads T5 in float16: norms see float32, and give their weight's dtype
    settings = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "vocab_size": models.VOCAB}
    config = transformers.T5Config(**settings, feed_forward_proj=feed_forward)
    model = inject(transformers.T5ForConditionalGeneration(config).to(torch.float16), LoRAConfig(r=4)).eval()
    models.fill_adapters(model)
    for name, module in model.named_modules():
        if name.endswith("wo"):
            module.float()
    other = copy.deepcopy(model)
    for module in other.modules():
        release(module)
    got, expected = (m(input_ids=IDS, decoder_input_ids=IDS).logits for m in (model, other))
    assert got.dtype == torch.float16
    assert torch.equal(got, expected)


def test_outputs_do_not_change_and_removal_gives_the_classes_back() -> None:
    model, plain = inject(models.llama(), LoRAConfig(r=4)), models.llama()
    assert torch.equal(model(IDS).logits, plain(IDS).logits)
    assert type(model.model.norm).__name__ == "LoRALlamaRMSNorm"
    remove(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert model.model.norm.__dict__.keys() == plain.model.norm.__dict__.keys()


def test_a_norm_behind_which_nothing_is_adapted_is_left_alone() -> None:
    model = inject(models.llama(), LoRAConfig(r=4, layers_to_transform=[1], target_modules=["q_proj"]))
    assert not isinstance(model.model.layers[0].input_layernorm, LoRARMSNorm)
    assert isinstance(model.model.layers[1].input_layernorm, LoRARMSNorm)
