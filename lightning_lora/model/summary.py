"""Describe the adapters in the first lines of a run, and for loggers."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from lightning_lora.layers import LoRALayer
from lightning_lora.model.gathered import class_name
from lightning_lora.model.heads import perhaps_new_heads
from lightning_lora.model.left_out import trained_outside
from lightning_lora.model.matching import is_all_linear
from lightning_lora.model.names import listed
from lightning_lora.model.state import (
    injected_roots,
    named_adapter_parameters,
    named_lora_layers,
    named_trained_whole,
    require_injection,
)
from lightning_lora.model.towers import left_out_towers
from lightning_lora.ops.sharded import logical


def summary(pl_module: nn.Module, path: str, root: nn.Module) -> str:
    """Return what a run's first line says: what is adapted, what trains whole, what is frozen."""
    plan, count = require_injection(root).plan, counts(pl_module, root)
    kinds = Counter(name.rpartition(".")[2] for name in named_lora_layers(root))
    adapted = ", ".join(f"{kind} x{number}" if number > 1 else kind for kind, number in kinds.items())
    named = {
        "whole": listed(list(named_trained_whole(root))),
        "outside": listed(trained_outside(pl_module, path, root)),
    }
    lines = [
        f"LoRA on {class_name(root)}{f' at {path!r}' if path else ''}: {kinds.total()} layers adapted ({adapted})",
        _line("adapters", "adapter_parameters", count),
        _line("trained whole", "whole_parameters", count, named["whole"]),
        *([_line("outside", "outside_parameters", count, named["outside"])] if count["outside_parameters"] else []),
        _line("frozen", "frozen_parameters", count),
    ]
    towers = left_out_towers(root) if is_all_linear(plan.config.target_modules) else {}
    if towers:
        left = ", ".join(f"{name} ({number} linear layers)" for name, number in towers.items())
        lines.append(
            f'  left out: {left}; "all-linear" means the language model. Name them in target_modules to adapt them'
        )
    if plan.capped_ranks:
        lines.append(f"  {plan.capped_ranks}")
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
    total = _numel(pl_module.parameters())
    return {
        "adapter_parameters": adapters,
        "whole_parameters": whole,
        "outside_parameters": max(trainable - adapters - whole, 0),
        "frozen_parameters": total - trainable,
        "total_parameters": total,
    }


def hyperparameters(pl_module: nn.Module) -> dict[str, Any]:
    """Return what loggers are told of the adapted models: settings and sizes, the same at a resume as in the first run.

    Keys are ``"lora/r"``, or ``"lora/<name of the model>/r"`` where several models are adapted.
    """
    roots, values = injected_roots(pl_module), {}
    for path, root in roots.items():
        prefix = f"lora/{path}/" if len(roots) > 1 else "lora/"
        for key, value in require_injection(root).config.to_dict().items():
            values[prefix + key] = str(value) if isinstance(value, (list, dict)) else value
        count = counts(pl_module, root)
        # what else trains, and what is frozen, may change during a run
        values |= {prefix + key: count[key] for key in ("adapter_parameters", "whole_parameters", "total_parameters")}
    return values


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    """Return the number of elements of whole tensors, those of other ranks with this one's."""
    return sum(logical(parameter).numel() for parameter in parameters)
