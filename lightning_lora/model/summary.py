"""What a run says of its adapters: the first lines, hyperparameters, idle layers, and what PEFT's files leave out."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import nn
from torch.optim import Optimizer

from lightning_lora.layers import LoRALayer
from lightning_lora.layers.adalora import AdaLoRALinear
from lightning_lora.layers.plain_weight import stored_names
from lightning_lora.layers.quantized_model import num_parameters
from lightning_lora.model.base_form import quantization_of
from lightning_lora.model.hosts import named_hosts
from lightning_lora.model.matching import is_all_linear, left_out_towers
from lightning_lora.model.names import clean_name, is_inside, joined, listed, named_modules
from lightning_lora.model.spread import class_name
from lightning_lora.model.state import (
    injected_roots,
    named_adapter_parameters,
    named_lora_layers,
    named_trained_whole,
    require_injection,
)
from lightning_lora.model.trained_base import perhaps_new_heads
from lightning_lora.ops.sharded import logical


def summary(pl_module: nn.Module, path: str, root: nn.Module) -> str:
    """Return what a run's first line says: what is adapted, what trains whole, what is frozen."""
    plans, count = require_injection(root).plans, counts(pl_module, root)
    kinds = Counter(name.rpartition(".")[2] for name in named_hosts(root) or named_lora_layers(root))
    adapted = ", ".join(f"{kind} x{number}" if number > 1 else kind for kind, number in kinds.items())
    outside = listed(trained_outside(pl_module, path, root))
    lines = [
        f"LoRA on {class_name(root)}{f' at {path!r}' if path else ''}: {kinds.total()} layers adapted ({adapted})",
        _line("adapters", "adapter_parameters", count, listed([name for name in plans if name])),
        _line("trained whole", "whole_parameters", count, listed(list(named_trained_whole(root)))),
        *([_line("outside", "outside_parameters", count, outside)] if count["outside_parameters"] else []),
        _line("frozen", "frozen_parameters", count),
    ]
    if (base := quantization_of(root)) is not None:
        lines.append(f"  base in {base}")
    towers = left_out_towers(root) if any(is_all_linear(one.config.target_modules) for one in plans.values()) else {}
    if towers:
        left = ", ".join(f"{name} ({number} linear layers)" for name, number in towers.items())
        lines.append(
            f'  left out: {left}; "all-linear" means the language model. Name them in target_modules to adapt them'
        )
    for name, plan in plans.items():
        if plan.capped_ranks:
            lines.append(f"  {name and name + ': '}{plan.capped_ranks}")
    return "\n".join([*lines, *_perhaps_new(root)])


def _line(label: str, key: str, count: dict[str, int], names: str = "") -> str:
    share = 100 * count[key] / max(count["total_parameters"], 1)
    return f"  {label:<13} {count[key]:>15,}  {share:6.2f} %" + (f"  ({names})" if names else "")


def _perhaps_new(root: nn.Module) -> list[str]:
    """Return a line for each module that may be a new head and does not train whole: half of it would stay random."""
    lines = []
    for name in perhaps_new_heads(root):
        layers = [part for part in root.get_submodule(name).modules() if isinstance(part, LoRALayer)]
        adapters = {id(tensor) for layer in layers for _, tensor in layer.named_adapter_tensors()}
        base = [parameter for parameter in root.get_submodule(name).parameters() if id(parameter) not in adapters]
        if any(stored_names(part) for part in root.get_submodule(name).modules()):
            continue  # quantised weights are no new ones, and cannot train whole
        if not all(parameter.requires_grad for parameter in base):
            state = "adapted" if layers else "frozen"
            lines.append(
                f"  {name!r} ({state}) may be new: train it whole with modules_to_save=[{name!r}] if no checkpoint "
                "brought its weights"
            )
    return lines


def counts(pl_module: nn.Module, root: nn.Module) -> dict[str, int]:
    """Return the numbers of parameters: adapters, trained whole, training outside the root, frozen, all."""
    adapters = _numel(p for _, p in named_adapter_parameters(root))
    whole = _numel(named_trained_whole(root).values())
    trainable = _numel(p for p in pl_module.parameters() if p.requires_grad)
    total = num_parameters(pl_module)
    return {
        "adapter_parameters": adapters,
        "whole_parameters": whole,
        "outside_parameters": max(trainable - adapters - whole, 0),
        "frozen_parameters": total - trainable,
        "total_parameters": total,
    }


def hyperparameters(pl_module: nn.Module) -> dict[str, Any]:
    """Return what loggers are told of the adapted models: settings and sizes, the same at a resume as in the first run.

    Keys are ``"lora/r"``, or ``"lora/<name of the model>/r"`` where several models are adapted, with the name of the
    adapter before ``r`` where it has one.
    """
    roots, values = injected_roots(pl_module), {}
    for path, root in roots.items():
        prefix = f"lora/{path}/" if len(roots) > 1 else "lora/"
        for adapter, config in require_injection(root).configs.items():
            for key, value in config.to_dict().items():
                full = f"{prefix}{adapter}/{key}" if adapter else prefix + key
                values[full] = str(value) if isinstance(value, (list, dict)) else value
        count = counts(pl_module, root)
        # what else trains, and what is frozen, may change during a run
        values |= {prefix + key: count[key] for key in ("adapter_parameters", "whole_parameters", "total_parameters")}
    return values


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    """Return the number of elements of whole tensors, those of other ranks with this one's."""
    return sum(logical(parameter).numel() for parameter in parameters)


def idle_layers(root: nn.Module, optimizer: Optimizer) -> str | None:
    """Return a line that names the idle layers among those that ``optimizer`` trains, or ``None`` if there are none.

    Layers that ``layerdrop`` may skip are left out, and adapters with a name that had no rows.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    skipped = skipped_at_random(root)
    layers = named_lora_layers(root)
    had_rows = {
        _adapter_of(name) for name, layer in layers.items() for p in _given_gradients(layer) if p.grad is not None
    }
    absent = require_injection(root).named.keys() - had_rows
    idle = [
        name
        for name, layer in layers.items()
        if name not in skipped
        and _adapter_of(name) not in absent
        and any(id(p) in held for _, p in layer.named_adapter_tensors())
        and all(p.grad is None for p in _given_gradients(layer))
    ]
    if not idle:
        return None
    return (
        f"{len(idle)} adapted layers got no gradient in the first step: {listed(idle, 5)}. Their output does not reach "
        "the loss: leave them out with exclude_modules"
    )


def drops_layers(root: nn.Module) -> dict[str, float]:
    """Return the probability of each module that skips members of its module lists, by the module's name."""
    found: dict[str, float] = {}
    for name, module in root.named_modules():
        if any(isinstance(child, nn.ModuleList) for child in module.children()):
            probability = getattr(module, "layerdrop", getattr(getattr(module, "config", None), "layerdrop", 0.0))
            if isinstance(probability, (int, float)) and probability > 0:
                found[clean_name(name)] = float(probability)
    return found


def skipped_at_random(root: nn.Module) -> set[str]:
    """Return the names of the adapted layers that a forward may skip."""
    modules = named_modules(root)
    lists = [
        joined(name, local) + "."
        for name in drops_layers(root)
        for local, child in modules[name].named_children()
        if isinstance(child, nn.ModuleList)
    ]
    return {name for name in named_lora_layers(root) if name.startswith(tuple(lists))}


def outside_names(names: Iterable[str], *paths: str) -> list[str]:
    """Return the outermost modules of the tensors (clean ``names``) that lie in none of the roots ``paths``."""
    found: dict[str, None] = {}
    for name in names:
        if not any(is_inside(name, path) for path in paths):
            parts = name.split(".")
            outermost = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
            found[next(outer for outer in outermost if not any(is_inside(path, outer) for path in paths))] = None
    return list(found)


def trained_outside(module: nn.Module, path: str, root: nn.Module) -> list[str]:
    """Return what trains in ``module`` outside of its adapted model ``root``, by outermost modules and parameters."""
    inside = {id(parameter) for parameter in root.parameters()}
    named = module.named_parameters()
    return outside_names((clean_name(n) for n, p in named if p.requires_grad and id(p) not in inside), path)


def say_left_out(directory: Any, names: list[str], where: str) -> None:
    """Log on rank 0 which trained tensors a PEFT directory lacks, if any, and where they are."""
    if names:
        rank_zero_info(
            f"{directory} holds the adapter alone: no PEFT directory has a place for what trains outside the adapted "
            f"model, {listed(names)}. {where}"
        )


def _adapter_of(name: str) -> str:
    """Return the last part of a layer's name, of an adapter with a name that name."""
    return name.rpartition(".")[2]


def _given_gradients(layer: LoRALayer) -> list[nn.Parameter]:
    """Return an adapter's tensors whose gradients come from its output alone: AdaLoRA's loss term gives A and B one."""
    return [layer.lora_E] if isinstance(layer, AdaLoRALinear) else [p for _, p in layer.named_adapter_tensors()]
