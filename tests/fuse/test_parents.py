"""Layers whose parent reads their weight instead of calling them: torch's own attention and encoder layers."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject, merge, merged, named_adapter_parameters, remove, unmerge
from lightning_lora.model.state import named_lora_layers
from tests import models

# float32 through two blocks, outputs of about 1
CLOSE = {"rtol": 1e-5, "atol": 2e-6}
IDS = models.token_ids(3, 6)
PADDING = torch.arange(6)[None] >= torch.tensor([6, 4, 2])[:, None]


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerDecoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.decoder = nn.TransformerDecoder(layer, 2)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.decoder(x, x.flip(1), tgt_key_padding_mask=padding)


class Attention(nn.Module):
    """Attention on its own, with widths of its own for keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.MultiheadAttention(32, 4, batch_first=True)
        self.cross = nn.MultiheadAttention(32, 4, kdim=16, vdim=8, batch_first=True)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        x = self.own(x, x, x, key_padding_mask=padding, need_weights=False)[0]
        return self.cross(x, x[..., :16], x[..., :8], key_padding_mask=padding)[0]


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.encoder(x, src_key_padding_mask=padding)


def build(cls) -> nn.Module:
    torch.manual_seed(0)
    return cls()


def adapted(cls, **config) -> nn.Module:
    model = inject(build(cls), LoRAConfig(**{"r": 4, **config}))
    models.fill_adapters(model)
    return model


def merged_by_hand(model: nn.Module, cls) -> nn.Module:
    """A plain model whose weights are the sums, taken in float64."""
    plain, layers = build(cls), named_lora_layers(model)
    with torch.no_grad():
        for name, layer in layers.items():
            weight = plain.get_submodule(name).weight
            weight.copy_(weight.double() + layer.lora_scaling * layer.lora_B.double() @ layer.lora_A.double())
    return plain


def inputs() -> Tensor:
    return torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(4))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")  # the base's
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("cls", [Encoder, Decoder, Attention])
def test_output_equals_weights_that_were_merged_by_hand(cls, padding, training, grad) -> None:
    model = adapted(cls).train(training)
    plain = merged_by_hand(model, cls).train(training)
    with torch.set_grad_enabled(grad):
        got, expected = model(inputs(), padding), plain(inputs(), padding)
    real = (
        torch.ones(3, 6, dtype=torch.bool) if padding is None else ~padding
    )  # what stands in padded places is undefined
    torch.testing.assert_close(got[real], expected[real], **CLOSE)


def test_the_hand_written_classifier_is_right_in_both_modes() -> None:
    model = adapted(models.Encoder)
    plain = merged_by_hand(model, models.Encoder)
    for training in (True, False):
        with torch.no_grad():
            torch.testing.assert_close(model.train(training)(IDS), plain.train(training)(IDS), **CLOSE)


def test_every_layer_of_an_encoder_is_adapted_attention_output_too() -> None:
    kinds = {name.partition(".layers.0.")[2] for name in named_lora_layers(adapted(Encoder)) if ".layers.0." in name}
    assert kinds == {"self_attn.out_proj", "linear1", "linear2"}


@pytest.mark.parametrize("cls", [Encoder, Decoder, Attention])
def test_every_adapter_gets_the_gradient_of_the_merged_weight(cls) -> None:
    model = adapted(cls).train()
    plain = merged_by_hand(model, cls).train()
    for one in (model, plain):
        y = one(inputs())
        (y * torch.arange(y.numel()).cos().view(y.shape)).sum().backward()
    for name, layer in named_lora_layers(model).items():
        whole = plain.get_submodule(name).weight.grad.double()
        grad_A, grad_B = (
            layer.lora_scaling * g for g in (layer.lora_B.double().T @ whole, whole @ layer.lora_A.double().T)
        )
        for got, expected in ((layer.lora_A.grad, grad_A), (layer.lora_B.grad, grad_B)):
            atol = 1e-5 * expected.abs().max().item()  # float32 sums over 18 positions
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=atol)


def test_the_weight_of_an_attention_output_reads_as_the_effective_one_and_is_stored_as_the_base() -> None:
    model = adapted(Attention)
    layer, base = model.own.out_proj, build(Attention).own.out_proj
    assert torch.equal(layer.state_dict()["weight"], base.weight)
    assert torch.equal(layer.base_weight, base.weight)
    assert not torch.equal(layer.weight, base.weight)


@pytest.mark.parametrize("cls", [Encoder, Decoder, Attention])
def test_merge_and_unmerge_restore_bits_and_outputs(cls) -> None:
    model = adapted(cls).eval()
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = model(inputs())
        with merged(model):
            torch.testing.assert_close(model(inputs()), expected, **CLOSE)
        assert torch.equal(model(inputs()), expected)
        unmerge(merge(model))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("cls", [Encoder, Decoder, Attention])
def test_merge_with_remove_leaves_torchs_own_classes_and_fused_path(cls) -> None:
    model, reference = adapted(cls), build(cls)
    plain = merged_by_hand(model, cls).eval()
    merge(model, remove=True).eval()
    assert [type(m) for m in model.modules()] == [type(m) for m in reference.modules()]
    for module, other in zip(model.modules(), reference.modules(), strict=True):
        for attribute in ("activation_relu_or_gelu", "use_nested_tensor"):
            assert getattr(module, attribute, None) == getattr(other, attribute, None)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs()), plain(inputs()), **CLOSE)


def test_after_remove_the_fused_path_is_taken_again() -> None:
    model = adapted(Encoder).eval()
    layer = model.encoder.layers[0]
    assert layer.activation_relu_or_gelu == 0
    remove(model)
    assert layer.activation_relu_or_gelu == 1
    assert model.encoder.use_nested_tensor


def test_a_model_that_adapts_no_encoder_layer_keeps_the_fused_path() -> None:
    torch.manual_seed(0)
    model = inject(nn.Sequential(Encoder(), nn.Linear(32, 3)), LoRAConfig(r=3, target_modules="1"))
    assert model[0].encoder.layers[0].activation_relu_or_gelu == 1


def test_dropout_reaches_the_called_layers_and_spares_the_read_one() -> None:
    model = adapted(Encoder, dropout=0.5, target_modules=["out_proj"]).train()
    torch.testing.assert_close(model(inputs()), model(inputs()), rtol=0, atol=0)
    model = adapted(Encoder, dropout=0.5, target_modules=["linear1"]).train()
    assert not torch.equal(model(inputs()), model(inputs()))


def test_a_half_precision_encoder_runs_with_float32_adapters() -> None:
    model = adapted(Encoder).bfloat16().eval()
    assert {p.dtype for _, p in named_adapter_parameters(model)} == {torch.float32}
    with torch.no_grad():
        plain = merged_by_hand(model, Encoder).eval()
        got = model(inputs().bfloat16())
        # bf16 has 8 bits, and the outputs of a layer norm are about 1
        torch.testing.assert_close(got.float(), plain(inputs()), rtol=0.05, atol=0.1)


def test_gradients_flow_under_autocast() -> None:
    model = adapted(Encoder).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(inputs()).float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for _, p in named_adapter_parameters(model))
