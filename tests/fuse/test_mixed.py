"""What a mixture of adapters computes together, and what it keeps for backward, beside one adapter on the same rows."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, active, add_adapter, inject
from tests import models
from tests.fuse.test_counters import LLAMA_TARGETS, saved_bytes
from tests.graph import joint_functions

NUM_ADAPTERS = 8
NAMES = [f"adapter_{i}" for i in range(NUM_ADAPTERS)]
SHUFFLED = [NAMES[i % NUM_ADAPTERS] for i in (3, 0, 5, 5, 1, 2, 7, 6, 4, 3, 0, 1, 2, 4, 6, 7)]


def block_and_run():
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3RotaryEmbedding

    config = Qwen3Config(
        hidden_size=128, intermediate_size=384, num_attention_heads=4, num_key_value_heads=2, head_dim=32
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    x = torch.randn(2 * NUM_ADAPTERS, 16, 128, requires_grad=True)
    rotary = Qwen3RotaryEmbedding(config)(x, torch.arange(16)[None])
    return Qwen3DecoderLayer(config, 0), lambda block: block(x, position_embeddings=rotary)


def both(names: list[str], **fields) -> tuple[int, int]:
    """Return the bytes that a mixture keeps for backward, and those of one adapter on the same rows."""
    base, run = block_and_run()
    config = LoRAConfig(r=8, target_modules=LLAMA_TARGETS, **fields)
    single, several = inject(copy.deepcopy(base), config), copy.deepcopy(base)
    for name in NAMES:
        add_adapter(several, name, config)
    with active(several, names):
        mixed = saved_bytes(lambda: run(several), several.parameters())
    return mixed, saved_bytes(lambda: run(single), single.parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("names", [sorted(SHUFFLED), SHUFFLED], ids=["sorted", "shuffled"])
def test_a_mixture_keeps_what_one_adapter_keeps(names: list[str], dropout: float) -> None:
    mixed, single = both(names, dropout=dropout)
    assert mixed <= 1.02 * single


def test_a_mixture_is_computed_by_as_many_functions_as_one_adapter() -> None:
    base, run = block_and_run()
    config = LoRAConfig(r=8, target_modules=LLAMA_TARGETS)
    single, several = inject(copy.deepcopy(base), config), copy.deepcopy(base)
    for name in NAMES:
        add_adapter(several, name, config)
    expected = joint_functions(run(single))
    assert expected["_GatedMLPBackward"] == 1
    with active(several, SHUFFLED):
        assert joint_functions(run(several)) == expected
    with active(several, NAMES[0]):
        assert joint_functions(run(several)) == expected


@pytest.mark.parametrize("fuse", [True, False])
def test_gradients_of_gradients_are_those_of_each_alone(fuse: bool) -> None:
    base = models.llama().double()
    config = LoRAConfig(r=2, target_modules=LLAMA_TARGETS, fuse=fuse, adapter_dtype="float64")
    model = copy.deepcopy(base)
    for name in ("a", "b"):
        add_adapter(model, name, config)
    models.fill_adapters(model)
    mlp = model.model.layers[0].mlp
    x = torch.randn(3, 4, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    found = penalty(model, ["a", "b", "a"], mlp, x)
    wanted = torch.zeros_like(x)
    for name, rows in {"a": [0, 2], "b": [1]}.items():
        own = x.detach()[rows].requires_grad_()
        wanted[rows] = penalty(model, name, mlp, own)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def penalty(model: nn.Module, which, mlp: nn.Module, x: Tensor) -> Tensor:
    """Return the gradient of a gradient's squared norm."""
    with active(model, which):
        (first,) = torch.autograd.grad(mlp(x).sin().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]


@pytest.mark.parametrize("names", [sorted(SHUFFLED), SHUFFLED], ids=["sorted", "shuffled"])
def test_a_mixture_runs_under_autocast_and_in_bfloat16(names: list[str]) -> None:
    base, run = block_and_run()
    model = copy.deepcopy(base)
    for name in NAMES:
        add_adapter(model, name, LoRAConfig(r=8, target_modules=LLAMA_TARGETS))
    models.fill_adapters(model)
    with active(model, names):
        exact = run(model)
        with torch.autocast("cpu", torch.bfloat16):
            y = run(model)
    y.float().sum().backward()
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)


def test_transforms_see_a_mixture() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    for name, r in {"a": 1, "b": 2}.items():
        add_adapter(model, name, LoRAConfig(r=r, adapter_dtype="float64"))
    models.fill_adapters(model)
    x = torch.randn(3, 4, dtype=torch.float64)
    with active(model, ["a", "b", "a"]):
        jacobian = torch.func.jacrev(model)(x)
        expected = torch.autograd.functional.jacobian(model, x)
    torch.testing.assert_close(jacobian, expected)
