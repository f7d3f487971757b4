"""The ``adapter_config.json`` that makes PEFT adapt the layers of an adapted model, and no others."""

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import nn

from lightning_lora.compat.transformers import revision
from lightning_lora.config import LoRAConfig
from lightning_lora.layers import LoRALayer
from lightning_lora.layers.linear import LoRAConv1D, LoRALinear
from lightning_lora.layers.parameters import LoRAParameters, own_parameters
from lightning_lora.layers.residual import ResidualLinear
from lightning_lora.layers.token_rows import TokenRows
from lightning_lora.model.families import name_or_path
from lightning_lora.model.names import clean_name
from lightning_lora.model.state import (
    Injection,
    named_lora_layers,
    named_pairs,
    named_token_rows,
    require_injection,
)
from lightning_lora.peft.config import anchored, divisor
from lightning_lora.peft.layout import is_projection

_TASK_TYPES = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
# linear layers of these names PEFT takes for the parts of fused experts, in a model that has such
_EXPERT_PARTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


def peft_config(root: nn.Module, trained_whole: list[str]) -> dict[str, Any]:
    """Return the content of ``adapter_config.json`` for an adapted model with these :func:`modules_trained_whole`."""
    injection = require_injection(root)
    config, layers = injection.config, named_lora_layers(root)
    # an attention's output projection goes with the attention
    pairs = {name: pair for name, pair in named_pairs(root).items() if not is_projection(name, layers)}
    ranks = {n: pair.r * (2 if isinstance(layers.get(n), ResidualLinear) else 1) for n, pair in pairs.items()}
    rslora = {"use_rslora": config.use_rslora}
    alphas = {name: _as_integer(pair.scaling * divisor(rslora, ranks[name])) for name, pair in pairs.items()}
    r, rank_pattern = anchored(ranks, config.r)
    alpha, alpha_pattern = anchored(alphas, _as_integer(config.alpha or 2 * config.r))
    modules, parameters = _targets(root, layers)
    written = {
        "peft_type": "LORA",
        "task_type": _task_type(root, trained_whole),
        "base_model_name_or_path": name_or_path(root),
        "revision": revision(getattr(root, "config", None)),
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if parameters else config.dropout,  # PEFT takes none with target_parameters
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        **({"lora_bias": True} if config.lora_bias else {}),  # older PEFTs do not know the field
        "bias": config.bias,
        "target_modules": _target_modules(root, modules, trained_whole),
        "target_parameters": parameters or None,
        "trainable_token_indices": named_token_rows(root) or None,
        "exclude_modules": None,
        "modules_to_save": trained_whole or None,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "fan_in_fan_out": any(isinstance(layer, LoRAConv1D) for layer in layers.values()),
        "init_lora_weights": True,
        **dict.fromkeys(("layers_to_transform", "layers_pattern")),
    }
    return written if config.adalora is None else {**written, **_adalora_fields(injection)}


def _adalora_fields(injection: Injection) -> dict[str, Any]:
    """Return the fields that differ for AdaLoRA, which has one scale, and its ranks in the tensors."""
    config = injection.config
    assert config.adalora is not None
    # PEFT wants a number of steps, and reads it where it goes on training
    steps = injection.total_step or config.adalora.tinit + config.adalora.tfinal + 1
    return {
        "peft_type": "ADALORA",
        **asdict(config.adalora),
        "total_step": config.adalora.total_step or steps,
        "r": LoRAConfig.r,  # PEFT warns of any other
        "lora_alpha": _as_integer(config.alpha or 2 * config.r),
        "rank_pattern": None,
        "alpha_pattern": {},
    }


def _targets(root: nn.Module, layers: Mapping[str, LoRALayer]) -> tuple[list[str], list[str]]:
    """Return the names of adapted modules and of adapted parameters, as PEFT has to be told them."""
    fused = any(
        len(parameter.shape) == 3 and local == "gate_up_proj"
        for module in root.modules()
        for local, parameter in own_parameters(module).items()
    )
    modules: list[str] = []
    parameters: list[str] = []
    for name, layer in layers.items():
        if isinstance(layer, TokenRows) or is_projection(name, layers):
            continue
        if isinstance(layer, LoRAParameters):
            parameters.extend(f"{name}.{part}" for part in layer.lora_parts)
        elif fused and isinstance(layer, LoRALinear) and name.rpartition(".")[2] in _EXPERT_PARTS:
            parameters.append(f"{name}.weight")
        else:
            modules.append(name)
    return modules, parameters


def _task_type(root: nn.Module, trained_whole: list[str]) -> str | None:
    """Return PEFT's task, which decides the arguments that PEFT's model passes on: only for models that take them.

    PEFT trains the heads of some tasks whole, whatever ``modules_to_save`` says: not if they did not train here.
    """
    if getattr(root, "main_input_name", None) != "input_ids":
        return None
    task = next((task for ending, task in _TASK_TYPES.items() if type(root).__name__.endswith(ending)), None)
    heads = [clean_name(n) for n, _ in root.named_modules() if n.endswith(_HEADS.get(task or "", ()))]
    if not all(any(head == module or head.startswith(f"{module}.") for module in trained_whole) for head in heads):
        return None
    is_encoder_decoder = getattr(getattr(root, "config", None), "is_encoder_decoder", False)
    return None if task == "SEQ_2_SEQ_LM" and not is_encoder_decoder else task


def _target_modules(root: nn.Module, adapted: list[str], trained_whole: list[str]) -> list[str] | str:
    """Return the shortest of suffixes, full names or one expression that PEFT resolves to exactly these layers."""
    names = [clean_name(name) for name, _ in root.named_modules() if clean_name(name)]
    free = [name for name in names if not any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in trained_whole)]

    def hit(targets: list[str]) -> set[str]:
        return {name for name in free if name in targets or any(name.endswith(f".{target}") for target in targets)}

    suffixes = sorted({name.rpartition(".")[2] for name in adapted})
    for targets in (suffixes, adapted):
        if hit(targets) == set(adapted):
            return targets
    return "|".join(re.escape(name) for name in adapted)


def _as_integer(value: float) -> int | float:
    nearest = round(value)
    return nearest if abs(value - nearest) < 1e-9 * max(1, nearest) else value


def modules_trained_whole(root: nn.Module) -> list[str]:
    """Return the modules that train whole, with those that hold a tied twin of one of their tensors.

    PEFT wraps no containers without a forward: of these come their members.
    """
    injection = require_injection(root)
    modules = list(injection.trained_whole)
    inside = {
        id(p)
        for name, p in root.named_parameters(remove_duplicate=False)
        if any(clean_name(name).startswith(f"{module}.") for module in modules)
    }
    for name, parameter in root.named_parameters(remove_duplicate=False):
        owner = clean_name(name).rpartition(".")[0]
        if id(parameter) in inside and not any(owner == m or owner.startswith(f"{m}.") for m in modules):
            modules.append(owner)
    owners = {clean_name(name): module for name, module in root.named_modules(remove_duplicate=False)}
    return [member for name in modules for member in _with_forward(name, owners.get(name))]


def _with_forward(name: str, module: nn.Module | None) -> list[str]:
    if not isinstance(module, (nn.ModuleDict, nn.ModuleList)):
        return [name]
    return [one for local, child in module.named_children() for one in _with_forward(f"{name}.{local}", child)]
