"""Tiny random models from configs, the same on every call: nothing is downloaded."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

VOCAB = 100


def llama(
    *, tied: bool = False, dropout: float = 0.0, dtype: torch.dtype = torch.float32, layers: int = 2
) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        tie_word_embeddings=tied,
        attention_dropout=dropout,
    )
    return _seeded(lambda: LlamaForCausalLM(config)).to(dtype)


def qwen3() -> nn.Module:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCAB,
    )
    return _seeded(lambda: Qwen3ForCausalLM(config))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=64)
    return _seeded(lambda: GPT2LMHeadModel(config)).eval()


def bert_classifier() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCAB, num_labels=3
    )
    return _seeded(lambda: BertForSequenceClassification(config)).eval()


class Encoder(nn.Module):
    """A hand-written classifier on torch's own encoder layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, 3)

    def forward(self, ids: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(self.embed(ids), src_key_padding_mask=padding).mean(1))


def encoder() -> nn.Module:
    return _seeded(Encoder)


def on_meta(kind: Any, directory: Path, **settings: Any) -> nn.Module:
    """Return a transformers model without values, from the config in a directory, which it names as its weights'."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory, **settings)
    config._name_or_path = str(directory)
    with torch.device("meta"):
        model = kind.from_config(config)
    model.config._name_or_path = str(directory)
    return model


def token_ids(rows: int = 2, columns: int = 7, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (rows, columns), generator=torch.Generator().manual_seed(seed))


def fill_adapters(model: nn.Module, std: float = 0.1, seed: int = 0) -> None:
    """Give every adapter random values, as training would."""
    from lightning_lora import named_adapter_parameters

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in named_adapter_parameters(model):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def checkpoint_activations(model: Any, settings: dict[str, Any] | None = None) -> None:
    """Recompute activations in backward, by the method of transformers 5.23, or by the older one of another name."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable(settings)


def _seeded(build):  # type: ignore[no-untyped-def]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()
