"""``adapter_tensors`` against the files of ``save_peft``, and against PEFT, which takes what it hands on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from lightning_lora import AdaLoRA, LoRAConfig, adapter_tensors, check_portable, disabled, inject, quantize, save_peft
from lightning_lora.model.state import named_lora_layers
from tests import models, zoo
from tests.live_bytes import watched
from tests.peft.test_directory import CLOSE, give_values
from tests.peft.test_portable import EXPERTS, PATTERNS, Convolutions, seeded


class Attention(nn.Module):
    """An ``nn.MultiheadAttention``, of whose output projection a file holds half of B."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(models.VOCAB, 8)
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        return self.mha(x, x, x, need_weights=False)[0]


def in_4_bits() -> nn.Module:
    model = models.llama()
    quantize(model, "nf4")
    return model


FACTORS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "llama": (models.llama, {}),
    "tied": (lambda: models.llama(tied=True), {"target_modules": ["embed_tokens", "q_proj"]}),
    "patterns": (models.llama, {"use_rslora": True, **PATTERNS}),
    "gpt2": (models.gpt2, {"target_modules": ["c_attn", "c_proj"], "rank_pattern": {"c_attn": 3}}),
    "convolutions": (lambda: seeded(Convolutions), {"target_modules": ["conv", "line", "head", "embed"]}),
    "experts": (zoo.named("mixtral").build, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "pissa": (models.llama, {"init": "pissa", "target_modules": ["q_proj", "down_proj"]}),
    "attention": (lambda: seeded(Attention), {"target_modules": ["mha"]}),
    "nf4": (in_4_bits, {}),
    "adalora": (models.llama, {"adalora": AdaLoRA(target_r=3, init_r=5, total_step=100)}),
}
MORE: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "dora": (models.llama, {"use_dora": True}),
    "bias": (models.gpt2, {"target_modules": ["c_attn"], "bias": "all", "lora_bias": True}),
    "head": (lambda: models.llama(tied=True), {"modules_to_save": ["lm_head"]}),
    "rows": (models.llama, {"trainable_token_indices": {"embed_tokens": [1, 5]}}),
}


def adapted(case: str) -> nn.Module:
    build, settings = (FACTORS | MORE)[case]
    r = {} if case == "adalora" else {"r": 4}
    model = inject(build(), LoRAConfig(**r, **settings)).eval()
    give_values(model)
    if case == "adalora":
        for number, layer in enumerate(named_lora_layers(model).values()):
            with torch.no_grad():
                layer.lora_E[: number % 6] = 0  # of every sixth layer no rank is left
    return model


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((directory / "adapter_config.json").read_text())
    return config, safetensors.torch.load_file(directory / "adapter_model.safetensors")


@pytest.mark.parametrize(("case", "portable"), [*((c, True) for c in FACTORS), *((c, False) for c in FACTORS | MORE)])
def test_it_hands_on_exactly_what_save_peft_writes(case: str, portable: bool, tmp_path: Path) -> None:
    model = adapted(case)
    save_peft(model, tmp_path, portable=portable)
    expected_config, expected = read(tmp_path)
    config, tensors = adapter_tensors(model, portable=portable)
    got = dict(tensors)
    assert json.loads(json.dumps(config)) == expected_config
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert value.dtype == expected[name].dtype
        assert torch.equal(value, expected[name]), name


def test_peft_takes_config_and_tensors() -> None:
    model, ids = adapted("patterns"), models.token_ids()
    config, tensors = adapter_tensors(model)
    theirs = peft.get_peft_model(models.llama(), peft.LoraConfig(**config)).eval()
    result = peft.set_peft_model_state_dict(theirs, dict(tensors))
    assert not result.unexpected_keys
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids).logits, **CLOSE)


@pytest.mark.parametrize("reader", ["vllm", "sglang"])
def test_servers_accept_config_and_tensors(reader: str, tmp_path: Path) -> None:
    config, tensors = adapter_tensors(adapted("patterns"))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(dict(tensors), tmp_path / "adapter_model.safetensors")
    assert check_portable(tmp_path, reader) == []


@pytest.mark.parametrize("case", FACTORS)
def test_tensors_are_copies(case: str) -> None:
    model = adapted(case)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _, value in adapter_tensors(model, portable=case != "experts")[1]:
        assert value.is_contiguous()
        value.fill_(7)
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("portable", [False, True])
def test_no_more_than_one_layer_exists_at_once(portable: bool) -> None:
    model = adapted("patterns")
    sizes: dict[str, int] = {}
    _, tensors = adapter_tensors(model, portable=portable)
    with watched() as live:
        for name, value in tensors:
            layer = name.partition(".lora_")[0]
            sizes[layer] = sizes.get(layer, 0) + value.nbytes
            del value
    # A and B, B before its scale is in it, and the copy that is handed on
    assert live.peak <= 3 * max(sizes.values()) < sum(sizes.values()) / 2


def test_a_tensor_has_the_values_of_its_turn() -> None:
    model = inject(models.llama(), LoRAConfig(r=4, target_modules=["q_proj"]))
    _, tensors = adapter_tensors(model)
    layer = model.model.layers[0].self_attn.q_proj
    nn.init.constant_(layer.lora_A, 3)
    assert torch.equal(dict(tensors)["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"], layer.lora_A)


def test_what_cannot_be_handed_on_is_refused_before_the_first_tensor() -> None:
    with pytest.raises(ValueError, match="use_dora=True: a portable adapter holds the factors of LoRA alone"):
        adapter_tensors(adapted("dora"))
    model = adapted("llama")
    with pytest.raises(ValueError, match="adapter='law' is not known: the adapter of LlamaForCausalLM has no name"):
        adapter_tensors(model, "law")
    with disabled(model), pytest.raises(ValueError, match="are disabled"):
        adapter_tensors(model)
    with pytest.raises(ValueError, match="holds no adapters"):
        adapter_tensors(models.llama())


def test_nan_is_an_error_at_its_turn_or_a_warning() -> None:
    model = adapted("llama")
    nn.init.constant_(model.model.layers[0].self_attn.q_proj.lora_B, float("nan"))
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.lora_B.weight' holds NaN"):
        list(adapter_tensors(model)[1])
    with pytest.warns(UserWarning, match="holds NaN"):
        list(adapter_tensors(model, on_nonfinite="warn")[1])
