"""Bytes of a checkpoint of a SmolLM2-135M-shaped model: full fine-tuning, PEFT, ours; without and with Adam."""

import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning
import peft
import torch
from blocks import ALPHA, RANK, TARGETS
from torch import nn
from transformers import LlamaForCausalLM
from whole_step import model_config

from lightning_lora import LoRAConfig, adapter_checkpoint, inject, named_adapter_parameters, save_peft


class ByteCount:
    """A file that only counts."""

    def __init__(self) -> None:
        self.total = 0

    def write(self, data: Any) -> int:
        size = memoryview(data).nbytes
        self.total += size
        return size

    def flush(self) -> None:
        pass


def measure(rounds: int, quick: bool = False) -> dict[str, Any]:
    """Return sizes in bytes. "Lightning" files hold what ``Trainer.save_checkpoint`` writes, less loop counters."""
    config = model_config(quick)
    base = LlamaForCausalLM(config)
    sizes = {"Lightning, full fine-tuning": torch_bytes(lightning_state(base))}
    sizes["Lightning, full fine-tuning, with optimizer"] = torch_bytes(
        lightning_state(base) | optimizer_states(base.parameters())
    )
    sizes.update(_peft_sizes(LlamaForCausalLM(config)))
    sizes.update(_our_sizes(inject(base, LoRAConfig(r=RANK, alpha=ALPHA, target_modules=TARGETS))))
    return {"model": f"{'tiny' if quick else 'SmolLM2-135M'} shape, float32", "rank": RANK, "bytes": sizes}


def lightning_state(model: nn.Module) -> dict[str, Any]:
    return {"pytorch-lightning_version": lightning.__version__, "state_dict": model.state_dict(prefix="model.")}


def optimizer_states(parameters: Iterable[nn.Parameter]) -> dict[str, Any]:
    """Return the states of an AdamW that has made one step."""
    optimizer = torch.optim.AdamW(p for p in parameters if p.requires_grad)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return {"optimizer_states": [optimizer.state_dict()]}


def torch_bytes(checkpoint: dict[str, Any]) -> int:
    file = ByteCount()
    torch.save(checkpoint, file)
    return file.total


def _peft_sizes(base: nn.Module) -> dict[str, int]:
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as directory:
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(
            base, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM")
        )
        in_lightning = torch_bytes(lightning_state(model) | optimizer_states(model.parameters()))
        model.save_pretrained(directory)
        return {
            "Lightning, PEFT inside, with optimizer": in_lightning,
            "PEFT directory, by PEFT": (Path(directory) / "adapter_model.safetensors").stat().st_size,
        }


def _our_sizes(model: nn.Module) -> dict[str, int]:
    checkpoint = adapter_checkpoint(model)
    adapters = [parameter for _, parameter in named_adapter_parameters(model)]
    with tempfile.TemporaryDirectory() as directory:
        save_peft(model, directory)
        peft_file = (Path(directory) / "adapter_model.safetensors").stat().st_size
    return {
        "ours": torch_bytes(checkpoint),
        "ours, with optimizer": torch_bytes(checkpoint | optimizer_states(adapters)),
        "PEFT directory, by ours": peft_file,
        "adapter tensors alone": sum(p.numel() * p.element_size() for p in adapters),
    }
