"""One rank that copies and writes a spread model in every way that a user might, and notes what each one gave."""

import copy
import io
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from lightning_lora import LoRAConfig, inject, merge
from lightning_lora.fabric import FSDPLoRAStrategy, MegatronLoRAStrategy
from lightning_lora.megatron.models import gpt_model, load_hf_weights
from lightning_lora.ops.sharded import is_sharded, whole
from tests import models
from tests.distributed.gpt import hugging_face
from tests.distributed.launch import report
from tests.distributed.split import four_heads

FACTOR = 3.0  # what the adapters of a reloaded model were multiplied by in between


def built(kind: str, directory: Path) -> nn.Module:
    if kind != "gpt":
        return four_heads()
    model = gpt_model(str(directory))
    load_hf_weights(model, str(directory))
    return model


def ways(model: Any, path: Path) -> dict[str, Callable[[], Any]]:
    """Return what copies a model, a layer or a parameter of it, or writes one to a file, and would keep parts."""
    holder = next(module for module in model.modules() if any(map(is_sharded, module._parameters.values())))
    part = next(parameter for parameter in holder._parameters.values() if is_sharded(parameter))
    found = {
        "torch.save(state_dict)": lambda: torch.save(model.state_dict(), path),
        "torch.save(model)": lambda: torch.save(model, path),
        "torch.save(layer)": lambda: torch.save(holder, path),
        "torch.save(parameter)": lambda: torch.save(part, io.BytesIO()),
        "pickle.dumps(model)": lambda: pickle.dumps(model),
        "deepcopy(model)": lambda: copy.deepcopy(model),
        "deepcopy(layer)": lambda: copy.deepcopy(holder),
        "deepcopy(wrapper)": lambda: copy.deepcopy(nn.Sequential(model)),
        "pickle.dumps(parameters)": lambda: pickle.dumps(list(model.parameters())),
        "AveragedModel": lambda: torch.optim.swa_utils.AveragedModel(model),
        "safetensors.save_file": lambda: safetensors.torch.save_file(tensors_of(model), path),
        "safetensors.save_model": lambda: safetensors.torch.save_model(model, str(path)),
    }
    if hasattr(model, "save_pretrained"):
        found["save_pretrained"] = lambda: model.save_pretrained(path.parent / "saved")
        found["inner save_pretrained"] = lambda: model.model.save_pretrained(path.parent / "saved")
    else:  # Megatron-core's models have extra state, which safetensors refuses before it looks at tensors
        found.pop("safetensors.save_model")
    return found


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def refusal(way: Callable[[], Any]) -> str:
    try:
        way()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole state in the way that torch has for models in shards."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: value.clone() for name, value in state.items() if isinstance(value, Tensor)}  # some are the live ones


def shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in tensors_of(model).items()}


def tried(kind: str, directory: Path, rank: int) -> dict[str, Any]:
    strategy: Any = FSDPLoRAStrategy(min_shard_numel=1) if kind == "fsdp" else MegatronLoRAStrategy(2)
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    model = inject(built(kind, directory / "hugging face"), LoRAConfig(r=4))
    models.fill_adapters(model)  # of a GPTModel this rank's parts: both ranks' are alike
    unplaced = refusal(lambda: copy.deepcopy(model)) if kind == "gpt" else None  # it is built in parts
    wrapped, optimizer = fabric.setup(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
    model = wrapped.module
    path = directory / f"{kind}{rank}.pt"
    found: dict[str, Any] = {
        "unplaced": unplaced,
        "refusals": {name: refusal(way) for name, way in ways(model, path).items()},
        "shapes": shapes(model),
        "whole": gathered(model),
    }
    kept = copy.deepcopy(model.state_dict())
    scale_trained(model, FACTOR)
    found["scaled"] = gathered(model)
    model.load_state_dict(kept)
    found["put back"] = gathered(model)
    state = {name: torch.full(shape, 0.5) for name, shape in found["shapes"].items()}
    model.load_state_dict(state, strict=False)  # Megatron-core's extra state aside
    found["from whole tensors"] = gathered(model)
    found |= optimizer_states(optimizer.optimizer, path)  # Fabric's own wrapper gathers to rank 0
    model.load_state_dict(kept)
    merge(model)
    found["merged refusals"] = {name: refusal(way) for name, way in ways(model, path).items()}
    merge(model, remove=True)
    found["plain refusals"] = {name: refusal(way) for name, way in ways(model, path).items()}
    found["plain"] = gathered(model)
    if kind != "gpt":
        target = directory / f"given {kind}"
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if rank == 0:
            model.save_pretrained(target, state_dict=state)
    fabric.barrier()
    return found


def optimizer_states(optimizer: Any, path: Path) -> dict[str, Any]:
    """Step on gradients of one, and put the moments back after another step."""
    step(optimizer, 1.0)
    found = {
        "moments": moments(optimizer),
        "torch.save(moments)": refusal(lambda: torch.save(optimizer.state_dict(), path)),
    }
    kept = copy.deepcopy(optimizer.state_dict())
    step(optimizer, 3.0)
    found["later moments"] = moments(optimizer)
    optimizer.load_state_dict(kept)
    found["moments put back"] = moments(optimizer)
    state = {index: {**entry, "exp_avg": found["moments"][index] * 2} for index, entry in kept["state"].items()}
    optimizer.load_state_dict({**kept, "state": state})
    found["moments from whole tensors"] = moments(optimizer)
    return found


def step(optimizer: Any, gradient: float) -> None:
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()


def moments(optimizer: Any) -> dict[int, Tensor]:
    state = optimizer.state_dict()["state"]
    return {index: whole(entry["exp_avg"]).clone() for index, entry in state.items()}


def alone(directory: Path) -> dict[str, Any]:
    """One rank under ``megatron_lora``, which holds the whole of every part."""
    fabric = Fabric(accelerator="cpu", devices=1, strategy=MegatronLoRAStrategy())
    fabric.launch()
    model = inject(four_heads(), LoRAConfig(r=4))
    models.fill_adapters(model)
    model = fabric.setup_module(model).module
    torch.save(model.state_dict(), directory / "alone.pt")
    return {"state": torch.load(directory / "alone.pt")}


@torch.no_grad()
def scale_trained(model: nn.Module, factor: float) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.mul_(factor)


if __name__ == "__main__":
    directory, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    if os.environ["WORLD_SIZE"] == "1":
        report(directory, alone(directory))
    else:
        if rank == 0:
            hugging_face().save_pretrained(directory / "hugging face")
        report(directory, {kind: tried(kind, directory, rank) for kind in ("fsdp", "tp", "gpt")})
