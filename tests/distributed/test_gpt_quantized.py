"""``GPTModel``s over a base in 4 bits, on 1, 2 and 4 gloo ranks, against Hugging Face's model on one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, disabled, inject, load_hf_weights, load_peft, merge, save_peft, unmerge
from lightning_lora.layers.quantized import QuantizedModule
from lightning_lora.model.quantize import quantize
from lightning_lora.ops.sharded import local_part, whole
from tests import models
from tests.distributed.gpt import (
    GRADIENT_TOLERANCE,
    LOGIT_TOLERANCE,
    STEP_TOLERANCE,
    Module,
    adapters,
    expected_logits,
    launched,
    logits_of,
    run,
)
from tests.distributed.quantized import AtStart, Quantized, quantized_layers, train
from tests.distributed.ranks import on_ranks
from tests.distributed.training import EXACT, error_of, from_all_ranks

NF4 = {"lora": {"quantize": "nf4"}}
STEPS = {"limit_train_batches": 3}


def hugging_face(head_dim: int = 32) -> nn.Module:
    """A Qwen3 of which four ranks hold rows of whole blocks of 64 values."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        head_dim=head_dim, vocab_size=models.VOCAB, tie_word_embeddings=False, max_position_embeddings=64,
    )  # fmt: skip
    return models._seeded(lambda: Qwen3ForCausalLM(config))


class Alone(Quantized):
    def build(self) -> nn.Module:
        return hugging_face().train()


@pytest.fixture(scope="module")
def source(directory: Path) -> Path:
    hugging_face().save_pretrained(directory / "source")
    hugging_face(head_dim=8).save_pretrained(directory / "narrow")
    return directory / "source"


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    module = Alone("nf4")
    found = train(module)
    return {**found, "codes": {name: layer.stored("weight").tensors for name, layer in packed(module).items()}}


def packed(module: Any) -> dict[str, Any]:
    return quantized_layers(module.model)


LAYOUTS = [(1, 1, {}), (2, 2, {}), (2, 2, {"sequence_parallel": True}), (4, 4, {}), (4, 2, {})]


@pytest.mark.parametrize(("num_ranks", "size", "overrides"), LAYOUTS)
@on_ranks()
def test_bytes_and_three_steps_are_those_of_one_process(
    source: Path, single: dict[str, Any], num_ranks: int, size: int, overrides: dict[str, Any]
) -> None:
    module = Module(source, recompute_granularity="full" if size == 4 else None, **overrides)
    run(None, size, module, **NF4, **STEPS)
    losses = torch.tensor(from_all_ranks(module.losses)).mean(0)
    torch.testing.assert_close(losses, torch.tensor(single["losses"]), **STEP_TOLERANCE)
    torch.testing.assert_close(module.gradients, single["gradients"], **GRADIENT_TOLERANCE)
    torch.testing.assert_close(adapters(module), single["adapters"], **STEP_TOLERANCE)
    layers = packed(module)
    assert len(layers) == 2 * 4
    for block in range(2):
        ours, theirs = f"decoder.layers.{block}.", f"model.layers.{block}."
        for name, parts in {
            "self_attention.linear_proj": ["self_attn.o_proj"],
            "mlp.linear_fc1": ["mlp.gate_proj", "mlp.up_proj"],
            "mlp.linear_fc2": ["mlp.down_proj"],
        }.items():
            for part in ("codes", "scales"):
                expected = torch.cat([single["codes"][theirs + one][part] for one in parts])
                found = getattr(layers[ours + name], f"weight_{part}")
                torch.testing.assert_close(whole(found).detach(), expected, **EXACT)
                assert local_part(found).shape[0] * size == expected.shape[0]


@on_ranks(2)
def test_disabled_is_the_quantised_base_and_peft_directories_are_hugging_faces(source: Path, tmp_path: Path) -> None:
    module = Module(source)
    run(None, 2, module, **NF4, **STEPS)
    found = logits_of(module)
    with disabled(module.model):
        base = logits_of(module)
    save_peft(module.model, tmp_path)
    alone = hugging_face()
    quantize(alone, "nf4")
    torch.testing.assert_close(base, expected_logits(alone), **LOGIT_TOLERANCE)
    torch.testing.assert_close(found, expected_logits(load_peft(alone, tmp_path)), **LOGIT_TOLERANCE)
    assert (found - base).abs().max() > 1e-3


@on_ranks(2)
def test_a_state_dict_of_parts_loads_again(source: Path) -> None:
    module = Module(source)
    run(None, 2, module, **NF4, **STEPS)
    expected = logits_of(module)
    kept = {name: value.clone() for name, value in module.model.state_dict().items() if isinstance(value, Tensor)}
    for layer in packed(module).values():
        layer.weight_codes.zero_()
    assert not torch.equal(logits_of(module), expected)
    module.model.load_state_dict(kept, strict=False)
    assert torch.equal(logits_of(module), expected)


@on_ranks(1)
def test_merging_on_one_rank_gives_the_trained_function(source: Path) -> None:
    module = Module(source)
    run(None, 1, module, **NF4, **STEPS)
    expected = logits_of(module)
    merge(module.model)
    assert not packed(module)
    torch.testing.assert_close(logits_of(module), expected, **LOGIT_TOLERANCE)
    unmerge(module.model)
    assert torch.equal(logits_of(module), expected)


@on_ranks(1)
def test_backward_keeps_nothing_dense(source: Path) -> None:
    module = Module(source)
    run(None, 1, module, **NF4, limit_train_batches=1)
    shapes = {tuple(layer.stored("weight").shape) for layer in packed(module).values()}
    saved: list[Tensor] = []
    for active in (True, False):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            for layer in packed(module).values():
                layer.lora_active = active
                layer(torch.randn(3, 2, layer.input_size, requires_grad=True))
    assert saved
    assert not shapes & {tuple(tensor.shape) for tensor in saved}


@on_ranks()
def train_and_save(directory: Path, source: Path, num_ranks: int, kind: str | None, ckpt_path: Path | None) -> Any:
    at_start = AtStart()
    module = Module(source)
    lora = {} if kind is None else {"quantize": kind}
    epochs = 1 if ckpt_path is None else 2
    run(directory, num_ranks, module, lora=lora, max_epochs=epochs, ckpt_path=ckpt_path, callbacks=(at_start,))
    return at_start.step, at_start.adapters, adapters(module), module.losses


def test_a_file_goes_from_two_ranks_in_4_bits_to_one_in_32(source: Path, tmp_path: Path) -> None:
    first, _ = train_and_save(tmp_path / "first", source, num_ranks=2, kind="nf4", ckpt_path=None)
    path = tmp_path / "first" / "epoch=0.ckpt"
    written = torch.load(path, weights_only=True)["state_dict"]
    for kind in (None, "nf4"):
        ((step, before, _, losses),) = train_and_save(
            tmp_path / str(kind), source, num_ranks=1, kind=kind, ckpt_path=path
        )
        assert step == 4
        torch.testing.assert_close({f"model.{name}": value for name, value in before.items()}, written, **EXACT)
        assert max(losses) < first[3][0]


def mixture() -> nn.Module:
    """A Qwen3-MoE of which two ranks hold rows of whole blocks."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=models.VOCAB, max_position_embeddings=64, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=128, norm_topk_prob=True,
    )  # fmt: skip
    return models._seeded(lambda: Qwen3MoeForCausalLM(config))


@pytest.fixture(scope="module")
def experts(directory: Path) -> Path:
    mixture().save_pretrained(directory / "experts")
    return directory / "experts"


@on_ranks(2)
def test_experts_in_fabric_compute_what_hugging_faces_packed_experts_do(experts: Path) -> None:
    fabric, module = launched(2), Module(experts)
    module.configure_model()
    model = inject(module.model, LoRAConfig(r=2), quantize="nf4")
    assert len(packed(module)) == 2 * (2 + 4 * 2)  # q, k and v, their output; gate and up, and down, of each expert
    fabric.setup(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
    alone = mixture()
    quantize(alone, "nf4")
    torch.testing.assert_close(logits_of(module), expected_logits(alone), **LOGIT_TOLERANCE)


class OtherBase(Module):
    def configure_model(self) -> None:
        super().configure_model()
        with torch.no_grad():
            self.model.decoder.layers[1].mlp.linear_fc2.weight.mul_(2)


@on_ranks(2)
def resume_over_another_base(source: Path, path: Path) -> list[str]:
    epochs = {"max_epochs": 2, "ckpt_path": path}
    return [error_of(run, None, 2, OtherBase(source), lora=lora, **epochs) for lora in ({}, NF4["lora"])]


def test_another_base_is_refused_by_the_tensor_in_which_it_differs(source: Path, tmp_path: Path) -> None:
    train_and_save(tmp_path, source, num_ranks=1, kind="nf4", ckpt_path=None)
    for messages in resume_over_another_base(source, tmp_path / "epoch=0.ckpt"):
        for message in messages:
            assert "the base tensor 'decoder.layers.1.mlp.linear_fc2.weight' holds other values" in message


@on_ranks(2)
def test_what_is_not_served_is_refused_by_name_before_anything_changes(source: Path) -> None:
    for kind in ("nf4-dq", "int8"):
        message = error_of(run, None, 2, Module(source), lora={"quantize": kind}, **STEPS)
        assert f"quantize={kind!r} is not served for Megatron-core's GPTModel" in message
    module = Module(source.parent / "narrow")
    message = error_of(run, None, 2, module, **NF4, **STEPS)
    assert "'decoder.layers.0.self_attention.linear_proj' would be quantised in blocks of 64 values" in message
    assert "a rank has rows of 32" in message
    assert not any(isinstance(part, QuantizedModule) for part in module.modules())
    left_out = {"lora": {"quantize": "nf4", "quantize_exclude": ["linear_proj"]}}
    run(None, 2, module, **left_out, **STEPS)
    assert len(packed(module)) == 2 * 3
    too_late = "is quantised, and the weights come too late"
    assert too_late in error_of(load_hf_weights, module.model, source.parent / "narrow")
    assert too_late in error_of(run, None, 2, Module(source), options={"base_weights": str(source)}, **NF4, **STEPS)
