"""Adapted models that are spread over two gloo ranks by each strategy."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject
from lightning_lora.fabric import FSDPLoRAStrategy, MegatronLoRAStrategy
from lightning_lora.megatron import cpu
from lightning_lora.megatron.models import gpt_model
from lightning_lora.megatron.weights import load_hf_weights
from tests import models
from tests.distributed.split import four_heads

kinds = pytest.mark.parametrize("kind", ["fsdp", "tp", "gpt"])
of_hugging_face = pytest.mark.parametrize("kind", ["fsdp", "tp"])


def adapted(kind: str, source: Path | None = None) -> Any:
    if kind == "gpt":
        base = gpt_model(str(source))
        load_hf_weights(base, str(source))
    else:
        base = four_heads()
    model = inject(base, LoRAConfig(r=4))
    models.fill_adapters(model)  # of a GPTModel this rank's parts: both ranks' are alike
    return model


def launched(kind: str) -> Fabric:
    strategy: Any = FSDPLoRAStrategy(min_shard_numel=1) if kind == "fsdp" else MegatronLoRAStrategy(2)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    if kind == "gpt":
        cpu.install()  # for tests that build a model after the strategy is gone
    return fabric


def spread(kind: str, source: Path) -> tuple[Any, Any]:
    """Return an adapted model that is spread over the ranks, and its optimizer."""
    fabric = launched(kind)
    model = adapted(kind, source)
    trained = [p for p in model.parameters() if p.requires_grad]
    wrapped, optimizer = fabric.setup(model, torch.optim.AdamW(trained))
    return wrapped.module, optimizer.optimizer  # Fabric's own wrapper gathers to rank 0


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
