"""``fsdp_lora`` over models that transformers and bitsandbytes quantised, on 2 gloo ranks against one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from lightning_lora import FSDPLoRAStrategy, LoRAConfig, inject
from lightning_lora.checkpoint.fingerprint import fingerprint
from lightning_lora.fabric import MegatronLoRAStrategy
from lightning_lora.model.names import clean_name
from lightning_lora.ops.sharded import is_sharded, whole
from tests import models
from tests.distributed.ranks import on_ranks
from tests.distributed.sharded import start
from tests.distributed.training import EXACT, SHARDED, Recorded, fit, from_all_ranks, rank_loader, rank_of, state

FORMS: dict[str, dict[str, Any]] = {
    "nf4-dq": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "stored as bfloat16": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.bfloat16},
    "stored as float32": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": torch.float32},
}


@pytest.fixture(scope="module")
def saved(directory: Path) -> Path:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 100}
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    models._seeded(lambda: LlamaForCausalLM(config)).save_pretrained(directory / "base")
    return directory / "base"


def packed_layers(model: nn.Module) -> dict[str, Any]:
    return {clean_name(n): m for n, m in model.named_modules() if hasattr(m, "quant_state")}


class Loaded(Recorded):
    """Trains over a model that transformers quantises as it loads it, and keeps the bytes that forward saw."""

    def __init__(self, directory: str, form: str) -> None:
        super().__init__()
        settings = BitsAndBytesConfig(load_in_4bit=True, **FORMS[form])
        self.model = LlamaForCausalLM.from_pretrained(directory, quantization_config=settings, device_map="cpu").train()
        self.seen: dict[str, Tensor] = {}
        for name, layer in packed_layers(self.model).items():
            layer.register_forward_pre_hook(lambda layer, _, name=name: self.look(name, layer))

    def look(self, name: str, layer: Any) -> None:
        self.seen[name] = in_bytes(layer.weight)


def in_bytes(weight: Any) -> Tensor:
    return whole(weight).detach().clone().contiguous().view(torch.uint8).view(-1)


def train(directory: Path, form: str, strategy: Any = "auto", precision: Any = "32-true") -> dict[str, Any]:
    module = Loaded(str(directory), form)
    settings = {"loaders": {"train_dataloaders": rank_loader(0, 1)}, "limit_train_batches": 3, "precision": precision}
    fit(None, module, strategy, **settings)
    layers = packed_layers(module.model)
    return {
        "gradients": module.gradients,
        "losses": module.losses,
        "adapters": state(module),
        "functions": module.functions,
        "seen": module.seen,
        "stored": {name: in_bytes(layer.weight) for name, layer in layers.items()},
        "sharded": [name for name, layer in layers.items() if is_sharded(layer.weight)],
        "fingerprint": fingerprint(module.model)["packed"],
    }


@pytest.fixture(scope="module")
def single(saved: Path) -> dict[str, Any]:
    return {form: train(saved, form) for form in FORMS}


@on_ranks(2)
def test_bytes_and_three_steps_are_those_of_one_process(saved: Path, single: dict[str, Any]) -> None:
    for form in FORMS:
        run = train(saved, form, FSDPLoRAStrategy(**SHARDED))
        assert len(run["sharded"]) == 14
        for what in ("stored", "seen", "losses", "gradients", "adapters"):
            torch.testing.assert_close(run[what], single[form][what], **EXACT)
        assert run["functions"] == single[form]["functions"]
        assert run["fingerprint"] == single[form]["fingerprint"]


@on_ranks(2)
def test_mixed_precision_leaves_the_bytes_alone(saved: Path, single: dict[str, Any]) -> None:
    for form in ("nf4-dq", "stored as bfloat16", "stored as float32"):
        run = train(saved, form, FSDPLoRAStrategy(**SHARDED), "bf16-mixed")
        for what in ("stored", "seen"):
            torch.testing.assert_close(run[what], single[form]["stored"], **EXACT)
        # bfloat16 has 8 bits: a loss near 4.6 is rounded by up to 0.01 per operation on it
        torch.testing.assert_close(run["losses"], single[form]["losses"], rtol=5e-3, atol=5e-3)


@on_ranks(2)
def test_ranks_that_hold_other_bytes_get_the_first_ranks_and_their_scales(saved: Path) -> None:
    rank, model = rank_of()[0], Loaded(str(saved), "nf4-dq").model
    layers = packed_layers(model)
    expected = {name: layer.quant_state.absmax.clone() for name, layer in layers.items()}
    for layer in layers.values():
        layer.weight.data.add_(rank)
        layer.quant_state.absmax.add_(rank)
    inject(model, LoRAConfig(r=2))
    start(**SHARDED).setup(model)
    stored = {name: in_bytes(layer.weight) for name, layer in layers.items()}
    torch.testing.assert_close(from_all_ranks(stored)[1], stored, **EXACT)
    for name, layer in layers.items():
        assert torch.equal(layer.quant_state.absmax, expected[name])


@pytest.mark.parametrize("bits", [4, 8])
@on_ranks(2)
def test_what_cannot_be_spread_is_refused_by_name(saved: Path, bits: int) -> None:
    settings = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = LlamaForCausalLM.from_pretrained(saved, quantization_config=settings, device_map="cpu")
    inject(model, LoRAConfig(r=2))
    if bits == 8:
        with pytest.raises(
            ValueError, match=r"'model.layers.0.self_attn.q_proj' is bitsandbytes' .*8bit.*quantize='int8'"
        ):
            start(**SHARDED).setup(model)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=MegatronLoRAStrategy(tensor_parallel_size=2))
    fabric.launch()
    with pytest.raises(ValueError, match=r"q_proj' is stored as .*, which cannot be split into parts.*quantize='nf4'"):
        fabric.setup(model)
