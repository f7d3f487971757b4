"""``gpt_model`` on 1 and 2 gloo ranks: outputs, gradients and dropout, against transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lora.megatron.models import block_spec, gpt_model
from tests import models
from tests.distributed.gpt_families import FAMILIES, build, form_groups, loaded
from tests.distributed.ranks import on_ranks
from tests.distributed.training import EXACT, from_all_ranks, rank_of

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # float32 sums in another order
BATCH = models.token_ids(2, 8)
LABELS = BATCH.roll(-1, 1)


@pytest.fixture(scope="module")
def sources(directory: Path) -> Path:
    """Return the folder in which the weights of every family have a folder."""
    for name in FAMILIES:
        build(name).save_pretrained(directory / name)
    return directory


def outputs(model: Any, **inputs: Any) -> Any:
    return model(BATCH, torch.arange(BATCH.shape[1]).expand_as(BATCH), None, **inputs)


def logits_of_transformers(name: str) -> Tensor:
    with torch.no_grad():
        return build(name)(BATCH).logits


@on_ranks(1, 2)
def test_logits_are_those_of_transformers(sources: Path) -> None:
    several = form_groups()
    for name in FAMILIES:
        expected, frequencies = logits_of_transformers(name), build(name).model.rotary_emb.inv_freq
        for parallel in {False, several}:
            model = loaded(sources / name, sequence_parallel=parallel, parallel_output=False).eval()
            with torch.no_grad():
                torch.testing.assert_close(outputs(model), expected, **TOLERANCE)
        # Megatron-core divides positions, where transformers divides frequencies
        scale = 0.25 if name == "linear rope" else 1.0
        torch.testing.assert_close(model.rotary_pos_emb.inv_freq, frequencies / scale)


@on_ranks(1, 2)
def test_dispatchers_of_experts_agree(sources: Path) -> None:
    several = form_groups()
    for dispatcher in ("allgather", "alltoall"):
        settings = {"moe_token_dispatcher_type": dispatcher, "sequence_parallel": several, "parallel_output": False}
        model = loaded(sources / "experts", **settings)  # training, which takes another way through the dispatcher
        torch.testing.assert_close(outputs(model).detach(), logits_of_transformers("experts"), **TOLERANCE)


@on_ranks(1, 2)
def test_norms_and_attention_can_be_others(sources: Path) -> None:
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    class Norm(torch.nn.RMSNorm):
        def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
            super().__init__(hidden_size, eps)

    class Attention(DotProductAttention):
        pass

    form_groups()
    plain = loaded(sources / "experts", parallel_output=False).eval()
    spec = block_spec(plain.config, {WrappedTorchNorm: Norm, DotProductAttention: Attention})
    model = loaded(sources / "experts", parallel_output=False, transformer_layer_spec=spec).eval()
    with torch.no_grad():
        assert torch.equal(outputs(model), outputs(plain))
    kinds = [type(module) for module in model.modules()]
    assert not {torch.nn.RMSNorm, DotProductAttention} & set(kinds)
    # two norms a block, those of queries and keys, and the last one; one attention a block
    assert kinds.count(Norm) == 2 * 4 + 1
    assert kinds.count(Attention) == 2


def gradients_of(model: Any, autocast: bool = False) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = outputs(model, labels=LABELS).mean()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@on_ranks(1, 2)
def test_gradients_are_those_of_transformers_and_near_them_under_autocast(sources: Path) -> None:
    form_groups()
    rank, num_ranks = rank_of()
    found = gradients_of(loaded(sources / "llama"))
    model = build("llama")
    torch.nn.functional.cross_entropy(model(BATCH).logits.flatten(0, 1), LABELS.flatten()).backward()
    layer, place = model.model.layers[1], "decoder.layers.1."
    down = layer.mlp.down_proj.weight.grad.chunk(num_ranks, 1)[rank]
    halves = [part.weight.grad.chunk(num_ranks)[rank] for part in (layer.mlp.gate_proj, layer.mlp.up_proj)]
    for name, expected in {
        "decoder.final_layernorm.weight": model.model.norm.weight.grad,
        f"{place}mlp.linear_fc2.weight": down,
        f"{place}mlp.linear_fc1.weight": torch.cat(halves),
    }.items():
        torch.testing.assert_close(found[name], expected, **TOLERANCE)

    for name, rounded in gradients_of(loaded(sources / "llama"), autocast=True).items():
        assert rounded.dtype == torch.float32
        assert (rounded - found[name]).norm() < 0.05 * found[name].norm(), name  # bfloat16 has 8 bits


DROPOUT = {"attention_dropout": 0.2, "hidden_dropout": 0.2}
RECOMPUTED: dict[str, dict[str, Any]] = {
    "full": {"recompute_granularity": "full"},
    "selective": {"recompute_granularity": "selective"},
    "mlp": {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp"]},
}


@pytest.mark.parametrize("name", ["llama", "experts"])
@on_ranks(1, 2)
def test_recomputation_draws_the_same_dropout(sources: Path, name: str) -> None:
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    several = form_groups()

    def seeded_gradients(**settings: Any) -> tuple[dict[str, Tensor], Tensor]:
        """Return the gradients, which are the same only if dropout is drawn again as it was, and what is drawn next."""
        model = loaded(sources / name, sequence_parallel=several, **settings, **DROPOUT)
        model_parallel_cuda_manual_seed(3)
        return gradients_of(model), torch.rand(2)

    expected, after = seeded_gradients()
    for settings in RECOMPUTED.values():
        recomputed, after_recomputation = seeded_gradients(**settings)
        torch.testing.assert_close(recomputed, expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(after_recomputation, after)
    weight = "decoder.layers.1.mlp.linear_fc2.weight"
    if name == "llama":  # dropout changes gradients
        assert (expected[weight] - gradients_of(loaded(sources / name))[weight]).abs().max() > 1e-4


@on_ranks(1, 2)
def test_a_fork_draws_from_its_own_stream() -> None:
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    form_groups()
    model_parallel_cuda_manual_seed(5)
    inside, outside = [], [torch.rand(1)]
    for _ in range(2):
        with get_cuda_rng_tracker().fork():
            inside.append(torch.nn.functional.dropout(torch.ones(64), 0.5))
        outside.append(torch.rand(1))
    expected = torch.rand(3, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(torch.cat(outside), expected, **EXACT)
    torch.manual_seed(5 + 2718 + rank_of()[0])
    drawn = [torch.nn.functional.dropout(torch.ones(64), 0.5) for _ in range(2)]
    torch.testing.assert_close(inside, drawn, **EXACT)
    first, *others = from_all_ranks(inside[0])
    assert not any(torch.equal(other, first) for other in others)


@on_ranks(1, 2)
def test_norms_are_marked_under_sequence_parallelism(sources: Path) -> None:
    several = form_groups()
    model = gpt_model(sources / "experts", sequence_parallel=several)
    norms = [parameter for name, parameter in model.named_parameters() if "layernorm" in name]
    assert {bool(getattr(parameter, "sequence_parallel", False)) for parameter in norms} == {several}
