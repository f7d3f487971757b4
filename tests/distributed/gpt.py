"""Megatron-core models under ``megatron_lora``, with the weights of Hugging Face's and compared under its names."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor

from lightning_lora import MegatronLoRAStrategy, named_adapter_parameters
from lightning_lora.fabric import MegatronLoRAStrategy as FabricStrategy
from lightning_lora.megatron import cpu
from lightning_lora.megatron.family import Megatron
from lightning_lora.megatron.models import gpt_model
from lightning_lora.megatron.weights import load_hf_weights
from lightning_lora.ops.sharded import split_over, whole
from lightning_lora.peft.layout import laid_out
from tests import models
from tests.distributed.training import Recorded, fit, rank_loader, rank_of

sequence_parallelism = pytest.mark.parametrize("sequence_parallel", [False, True])
STEP_TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}  # lr 1e-2 / eps 1e-4 turns a rounding of 1e-8 into 1e-6 per step
GRADIENT_TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}  # other order of sums
LOGIT_TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
BATCH = models.token_ids(4, 8, seed=2)


def hugging_face() -> torch.nn.Module:
    """A Qwen3 whose key-value heads four ranks divide, four queries to each two of them."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        head_dim=8, vocab_size=models.VOCAB, tie_word_embeddings=False, max_position_embeddings=64,
    )  # fmt: skip
    return models._seeded(lambda: Qwen3ForCausalLM(config))


def biased() -> torch.nn.Module:
    """A Qwen2, whose queries, keys and values have biases."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=models.VOCAB, max_position_embeddings=64,
    )  # fmt: skip
    return models._seeded(lambda: Qwen2ForCausalLM(config))


def mixture() -> torch.nn.Module:
    """A Qwen3-MoE of four experts, two for each token."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=4,
        head_dim=8, vocab_size=models.VOCAB, max_position_embeddings=64, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, norm_topk_prob=True,
    )  # fmt: skip
    return models._seeded(lambda: Qwen3MoeForCausalLM(config))


class Alone(Recorded):
    """Hugging Face's model, which one process trains."""

    def __init__(self) -> None:
        super().__init__()
        self.model = hugging_face().train()


class Module(pl.LightningModule):
    """Builds a ``GPTModel`` with the weights of Hugging Face's, and keeps what a step was made of."""

    lr = 1e-2
    loads = True

    def __init__(self, source: Any, **overrides: Any) -> None:
        super().__init__()
        self.source, self.overrides, self.model = str(source), overrides, None
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.model is None:
            self.model = gpt_model(self.source, **self.overrides)
            if self.loads:
                load_hf_weights(self.model, self.source)
            for part in self.model.modules():
                for name, child in part.named_children():
                    if isinstance(child, torch.nn.Dropout):  # it draws numbers for p=0, too
                        setattr(part, name, torch.nn.Identity())

    def logits(self, batch: Tensor) -> Tensor:
        positions = torch.arange(batch.shape[1])[None].expand_as(batch)
        return self.model(batch, positions, None, runtime_gather_output=True)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        positions = torch.arange(batch.shape[1])[None].expand_as(batch)
        loss = self.model(batch, positions, None, labels=batch.roll(-1, 1))[:, :-1].mean()  # [batch, tokens]
        self.losses.append(loss.item())
        return loss

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.logits(batch)

    def on_train_start(self) -> None:
        torch.manual_seed(7)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not hasattr(self, "gradients") and has_names(self.model):
            self.gradients = in_hugging_face(self.model, {n: gradient(p) for n, p in self.model.named_parameters()})

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr, eps=1e-4)


def gradient(parameter: Any) -> Any:
    """Return the whole gradient of a parameter, or ``None``."""
    if parameter.grad is None:
        return None
    value = parameter.grad.detach().clone()
    if hasattr(parameter, "lora_split"):
        split_over(value, *parameter.lora_split)
    return whole(value)


def in_hugging_face(model: Any, tensors: dict[str, Any]) -> dict[str, Tensor]:
    """Return tensors of the adapters under Hugging Face's names."""
    _, sources = Megatron().adapted_view(model)
    return {name: laid_out(layout, [tensors[source]]) for name, (layout, source) in sources.items()}


def has_names(model: Any) -> bool:
    """Return whether all that trains has a name in Hugging Face's model."""
    return all(".lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)


def adapters(module: Module) -> dict[str, Tensor]:
    tensors = {name: whole(p).detach().clone() for name, p in named_adapter_parameters(module)}
    return in_hugging_face(module.model, tensors)


def run(directory: Path | None, size: int, module: Module, **settings: Any) -> tuple[Any, Module]:
    rank, num_ranks = rank_of()
    replicas = num_ranks // size
    data = rank_loader(rank // size, replicas)
    options = settings.pop("options", {})
    strategy = MegatronLoRAStrategy(tensor_parallel_size=size, **options)
    return fit(directory, module, strategy, loaders={"train_dataloaders": data}, **settings), module


def logits_of(module: Module) -> Tensor:
    module.eval()
    with torch.no_grad():
        return module.logits(BATCH).clone()


def expected_logits(model: torch.nn.Module) -> Tensor:
    """Return what one of Hugging Face's models makes of the same batch."""
    with torch.no_grad():
        return model.eval()(BATCH).logits


def launched(size: int, **options: Any) -> Fabric:
    """Launch Fabric with ``size`` tensor-parallel ranks, which makes Megatron-core's groups."""
    strategy = FabricStrategy(tensor_parallel_size=size, **options)
    fabric = Fabric(accelerator="cpu", devices=rank_of()[1], strategy=strategy)
    fabric.launch()
    cpu.install()  # for tests that run layers after the strategy is gone
    return fabric
