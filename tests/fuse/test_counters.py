"""What a step costs, counted: kernels and the bytes kept for backward, beside PEFT. The figures repeat on any machine."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora import LoRAConfig, inject

TOKENS, RANK = 256, 4
# neither reads nor writes elements
NO_KERNEL = ("empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view")


class Kernels(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.total += not (func.is_view or func._schema.name.removeprefix("aten::") in NO_KERNEL)
        return func(*args, **(kwargs or {}))


def kernels(function, inputs: list[Tensor]) -> int:
    """Operators that touch elements, in forward and backward; one backward before, so that all is made."""
    with Kernels() as count:
        y = function()
        torch.autograd.grad(y, inputs, torch.ones_like(y))
    return count.total


def saved_bytes(function, parameters) -> int:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        output = function()
    known = {p.untyped_storage().data_ptr() for p in parameters}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    del output
    return sum(size for address, size in storages.items() if address not in known)


def with_peft(module: nn.Module, dropout: float, targets) -> nn.Module:
    import peft

    config = peft.LoraConfig(r=RANK, lora_dropout=dropout, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a bare block has no config
        return peft.get_peft_model(module, config).base_model.model.train()


def with_ours(module: nn.Module, dropout: float, targets) -> nn.Module:
    return inject(module, LoRAConfig(r=RANK, dropout=dropout, target_modules=targets)).train()


LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def llama_block():
    """A block in the proportions of Llama-3.2-1B: keys a quarter of the hidden size, the MLP four times."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=128, intermediate_size=512, num_attention_heads=8, num_key_value_heads=2)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    x = torch.randn(1, TOKENS, 128, requires_grad=True)
    rotary = LlamaRotaryEmbedding(config)(x, torch.arange(TOKENS)[None])
    return LlamaDecoderLayer(config, 0), lambda block: block(x, position_embeddings=rotary)


@pytest.mark.parametrize(("dropout", "limit"), [(0.0, 0.60), (0.05, 0.40)])
def test_a_llama_block_keeps_at_most_a_share_of_what_peft_keeps(dropout, limit) -> None:
    base, run = llama_block()
    kept = {}
    for name, build in {"PEFT": with_peft, "ours": with_ours}.items():
        block = build(copy.deepcopy(base), dropout, LLAMA_TARGETS)
        kept[name] = saved_bytes(lambda block=block: run(block), block.parameters())
    assert kept["ours"] <= limit * kept["PEFT"]


class LlamaLinears(nn.Module):
    """The linear layers and the activation of a Llama block, each used as there, without norms and attention."""

    def __init__(self, hidden: int = 16, keys: int = 8, intermediate: int = 32, device: str = "cpu") -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaMLP

        super().__init__()
        with torch.device(device):
            self.q_proj = nn.Linear(hidden, hidden, bias=False)
            self.k_proj, self.v_proj = nn.Linear(hidden, keys, bias=False), nn.Linear(hidden, keys, bias=False)
            self.o_proj = nn.Linear(hidden, hidden, bias=False)
            self.mlp = LlamaMLP(LlamaConfig(hidden_size=hidden, intermediate_size=intermediate, num_attention_heads=4))

    def forward(self, x: Tensor, attended: Tensor, between: Tensor) -> tuple[Tensor, ...]:
        return self.q_proj(x), self.k_proj(x), self.v_proj(x), self.o_proj(attended), self.mlp(between)


def llama_linears(build, device: str, dropout: float = 0.0) -> int:
    module = build(LlamaLinears(device=device), dropout, LLAMA_TARGETS)
    for layer in module.modules():  # adapters are real even where the base is on meta
        layer._parameters.update(
            {n: nn.Parameter(p.to(device), p.requires_grad) for n, p in layer._parameters.items() if p is not None}
        )
    inputs = [torch.zeros(1, 8, 16, device=device, requires_grad=True) for _ in range(3)]
    trained = [p for p in module.parameters() if p.requires_grad]
    with Kernels() as count:
        outputs = module(*inputs)
        torch.autograd.grad(outputs, [*inputs, *trained], [torch.ones_like(y) for y in outputs])
    return count.total - len(outputs)  # the ones


def test_the_linears_of_a_llama_block_run_at_most_60_kernels() -> None:
    # on meta, the layouts of a GPU; on CPU gradients of B come transposed, which costs nothing here
    ours = {device: llama_linears(with_ours, device) for device in ("cpu", "meta")}
    assert max(ours.values()) <= 60
    assert llama_linears(with_peft, "cpu") >= 90


class Unknown(LlamaLinears):
    """The same layers, called in a way that shows nothing in common."""

    def forward(self, x: Tensor, attended: Tensor, between: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (getattr(self, f"{name}_proj")(x) for name in "qkv")
        mlp = self.mlp
        h = mlp.down_proj(nn.functional.silu(mlp.gate_proj(between)) * mlp.up_proj(between))
        return q, k, v, self.o_proj(attended), h


def gpt2_linears():
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    block = GPT2Block(GPT2Config(n_embd=32, n_head=4, attn_pdrop=0.0, resid_pdrop=0.0, attn_implementation="sdpa"), 0)
    return block, ["c_attn", "c_proj", "c_fc"]


def bert_layer():
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertLayer

    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "attn_implementation": "sdpa"}
    config = BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertLayer(config), ["query", "key", "value", "dense"]


@pytest.mark.parametrize("make", [gpt2_linears, bert_layer])
def test_whole_blocks_of_other_families_run_at_most_75_kernels(make) -> None:
    block, targets = make()
    with_ours(block, 0.0, targets)
    x = torch.randn(1, 8, 32, requires_grad=True)
    trained = [p for p in block.parameters() if p.requires_grad]

    def run() -> Tensor:
        y = block(x)
        return y if isinstance(y, Tensor) else y[0]

    assert kernels(run, [x, *trained]) - 1 <= 75


def test_layers_that_are_computed_one_by_one_run_at_most_75_kernels() -> None:
    module = with_ours(Unknown(), 0.0, LLAMA_TARGETS)
    inputs = [torch.zeros(1, 8, 16, requires_grad=True) for _ in range(3)]
    trained = [p for p in module.parameters() if p.requires_grad]
    with Kernels() as count:
        outputs = module(*inputs)
        torch.autograd.grad(outputs, [*inputs, *trained], [torch.ones_like(y) for y in outputs])
    assert count.total - len(outputs) <= 75
