"""Hugging Face's models that ``megatron_lora`` splits over ranks: what they are built from, and how they train."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from torch import Tensor

from lightning_lora import MegatronLoRAStrategy
from lightning_lora.ops.sharded import is_sharded
from tests import models, zoo
from tests.distributed.counting import counted_collectives
from tests.distributed.training import PROMPTS, Recorded, fit, optimizer_state, rank_loader, rank_of, state

GRADIENT_TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}  # other order of sums
LAYOUTS = [(2, 2), (4, 2), (4, 4)]  # ranks, and how many of them share a model
layouts = pytest.mark.parametrize(("num_ranks", "size"), LAYOUTS)


def four_heads(tied: bool = False) -> torch.nn.Module:
    """A Llama whose heads four ranks divide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=models.VOCAB, tie_word_embeddings=tied,
    )  # fmt: skip
    return models._seeded(lambda: LlamaForCausalLM(config))


def bert() -> torch.nn.Module:
    """An encoder without a plan in transformers, and without dropout."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=models.VOCAB,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return models._seeded(lambda: BertModel(config, add_pooling_layer=False))


def small(name: str, **settings: Any) -> torch.nn.Module:
    """A model that the zoo has none of, by the name of its family in transformers."""
    import transformers

    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": models.VOCAB, "pad_token_id": 0,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**(sizes | settings))
    return models._seeded(lambda: getattr(transformers, f"{name}ForCausalLM")(config))


BUILDS: dict[str, Any] = {
    "llama": four_heads,
    "tied llama": lambda: four_heads(tied=True),
    "qwen3": models.qwen3,
    "gemma2": zoo.named("gemma2").build,
    "phi3": zoo.named("phi3").build,
    "bert": bert,
    **{name: zoo.named(name).build for name in ("mistral", "qwen2", "gemma3", "mixtral", "qwen3_moe", "deepseek_v3")},
    "glm4": lambda: small("Glm4", head_dim=8),
    "phi": lambda: small("Phi", num_key_value_heads=4),
    "gpt2": models.gpt2,
}
SPLIT = tuple(name for name in BUILDS if name != "gpt2")


class Module(Recorded):
    """Notes what moves between ranks in each step, and generates and validates on the way."""

    def __init__(self, model: str = "llama") -> None:
        super().__init__()
        self.model = BUILDS[model]().train()
        self.texts: list[Tensor] = []
        self.traffic: list[dict[str, list[int]]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        with counted_collectives() as traffic:
            output = self.model(input_ids=batch)
        self.traffic.append(dict(traffic))
        logits = output.logits if hasattr(output, "logits") else output.last_hidden_state
        if logits.shape[-1] == models.VOCAB:
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        else:
            loss = logits.square().mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        if hasattr(self.model, "generate"):
            self.texts.append(self.model.generate(PROMPTS[:1], max_new_tokens=4, do_sample=False))


class AtMidway(pl.Callback):
    """Keeps the optimizer's moments as they are when the last epoch begins."""

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        self.moments = optimizer_state(pl_module)


class AfterTheSearch(LearningRateFinder):
    """Keeps the adapters as the search left them."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_fit_start(trainer, pl_module)
        self.adapters = state(pl_module)


def run(directory: Path | None, size: Any, module: Any = None, **settings: Any) -> Any:
    """Train with ``size`` tensor-parallel ranks; what is left of the ranks is data-parallel."""
    rank, num_ranks = rank_of()
    replicas = num_ranks // (num_ranks if size == "auto" else size)
    data = rank_loader(rank // (num_ranks // replicas), replicas)
    module = module or Module()
    options = settings.pop("options", {})
    loaders = {"train_dataloaders": data} | ({"val_dataloaders": data} if settings.pop("validates", True) else {})
    strategy = MegatronLoRAStrategy(tensor_parallel_size=size, **options)
    trainer = fit(directory, module, strategy, loaders=loaders, **settings)
    return trainer, module


def whole_factors(module: Any) -> dict[str, Tensor]:
    """Return the factors that every rank holds whole."""
    named = module.named_parameters()
    return {n: p.detach().clone() for n, p in named if p.requires_grad and not is_sharded(p)}
