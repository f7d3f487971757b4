"""``save_peft``: an adapted model as a PEFT directory."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.checkpoint.all_ranks import meet
from lightning_lora.checkpoint.fingerprint import known_fingerprint, renamed
from lightning_lora.checkpoint.storage import local_directory, location
from lightning_lora.layers import LoRALayer
from lightning_lora.layers.convolution import LoRAConv
from lightning_lora.layers.embedding import LoRAEmbedding
from lightning_lora.layers.linear import LoRAConv1D, LoRALinear
from lightning_lora.layers.parameters import LoRAParameters
from lightning_lora.layers.residual import ResidualLinear
from lightning_lora.layers.token_rows import TokenRows
from lightning_lora.megatron.names import hugging_face_name, megatron_parts
from lightning_lora.megatron.view import adapted_view
from lightning_lora.model.finite import OnNonfinite
from lightning_lora.model.left_out import say_left_out, trained_outside
from lightning_lora.model.names import clean_name, is_inside
from lightning_lora.model.root import is_megatron, name_or_path
from lightning_lora.model.state import (
    check_not_disabled,
    injected_roots,
    named_lora_layers,
    named_pairs,
    named_token_rows,
    named_trained_whole,
    require_injection,
    require_root,
)
from lightning_lora.ops.sharded import is_sharded, whole
from lightning_lora.peft.directory import PREFIX, Entry, laid_out, write_directory
from lightning_lora.peft.portable import make_portable

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


def save_peft(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    portable: bool = False,
    tokenizer: Any = None,
    on_nonfinite: OnNonfinite = "error",
) -> None:
    """Write the adapter as a directory that PEFT reads. Never writes base weights, never asks the network.

    Rank and alpha that differ from most layers' are written as anchored patterns of full names, so that no order of
    patterns can change their meaning. A tied tensor that trains is written under each of its modules. PiSSA and OLoRA
    adapters are written as their difference from the original base, at twice the rank. Heads and biases are written in
    the dtype that they train in, and PEFT rounds them to its model's.

    Of a module around the adapted model, what else trains is left out, and named in one line.

    Where adapters are whole on every rank (DDP, ``fsdp_lora``), any rank may call it, alone or with others, and writes.
    Where they are spread over ranks (``megatron_lora``, ``shard_adapters=True``), all must call it: rank 0 writes, and
    all return when the files are there. The fingerprint of a base in shards is that from when it was sharded.

    Args:
        directory: a local one or a URL that fsspec knows, such as ``"s3://bucket/adapter"``.
        portable: for readers that know one rank and one scale, such as vLLM, SGLang and llama.cpp: pad every layer with
            zeros to the largest rank, fold its scale in, and write ``r = lora_alpha``.
        tokenizer: saved beside the adapter with its ``save_pretrained``; ``None`` takes ``model.tokenizer`` if there is
            one.
        on_nonfinite: what to do about an adapter that holds NaN or infinity.

    Raises:
        ValueError: the adapter has what the format, or with ``portable`` those readers, cannot express, or holds NaN or
            infinity; or only some of the ranks called it that all must. Nothing is written then.
    """
    root = require_root(model)
    check_not_disabled(root)
    description = describe_for_peft(root, known_fingerprint(root))
    tensors = _needed(root, description)
    spread = any(map(is_sharded, tensors.values()))
    if spread:
        meet("save_peft")
    named = {name: whole(tensor).detach() for name, tensor in tensors.items()}
    failure: Exception | None = None
    if not spread or torch.distributed.get_rank() == 0:
        try:
            write_described(description, named, directory, portable=portable, on_nonfinite=on_nonfinite)
            write_tokenizer(getattr(model, "tokenizer", None) if tokenizer is None else tokenizer, directory)
        except Exception as error:
            if not spread:
                raise
            failure = error
    if spread:
        fail_together(failure)
    ((path, _),) = injected_roots(model).items()
    say_left_out(directory, trained_outside(model, path, root), "Save the state_dict() of those beside it")


def write_tokenizer(tokenizer: Any, directory: str | os.PathLike[str]) -> None:
    """Save a tokenizer beside an adapter, if it is one."""
    if callable(save := getattr(tokenizer, "save_pretrained", None)):
        with local_directory(location(directory)) as folder:
            save(folder)


def _needed(root: nn.Module, description: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors to write by name; of spread ones, this rank's part."""
    needed = {name for _, _, names in description["entries"] for name in names}
    tensors = {clean_name(name): tensor for name, tensor in root.state_dict(keep_vars=True).items()}
    return {name: tensor for name, tensor in tensors.items() if name in needed}


def fail_together(failure: Exception | None) -> None:
    """Raise on every rank what rank 0 raised: the others would wait for it. Called on all ranks."""
    outcome: list[Any] = [None if failure is None else (isinstance(failure, ValueError), str(failure))]
    torch.distributed.broadcast_object_list(outcome, 0)
    if failure is not None:
        raise failure
    if outcome[0] is not None:
        is_value_error, message = outcome[0]
        raise (ValueError if is_value_error else RuntimeError)(message)


def describe_for_peft(root: nn.Module, base: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that a PEFT directory needs beside the tensors, in plain values: config, entries, metadata.

    Args:
        base: the fingerprint of the frozen base.

    Raises:
        ValueError: PEFT would compute something else from the file.
    """
    if is_megatron(root):
        view, sources = adapted_view(root)
        description = describe_for_peft(view, renamed(base, hugging_face_name))
        description["only_portable"] = _check_experts(root, view)
        description["entries"] = [(key, *_from(names[0], sources)) for key, _, names in description["entries"]]
        description["config"]["task_type"] = "CAUSAL_LM"
        return description
    for name, layer in named_lora_layers(root).items():
        if isinstance(layer, LoRAConv) and (layer.padding_mode != "zeros" or set(layer.dilation) != {1}):
            raise ValueError(
                f"PEFT convolves with lora_A of {name!r} without the base's dilation={tuple(layer.dilation)} and "
                f"padding_mode={layer.padding_mode!r}, and would compute something else from the file. Keep the "
                "adapter in checkpoints, or merge(model, remove=True) and save the merged model"
            )
    _check_trained_whole(root)
    return {
        "config": _peft_config(root),
        "entries": [(e.key, e.layout, list(e.names)) for e in _entries(root)],
        "metadata": {"base": {**base, "hashes": base["hashes"].tolist()}},
    }


def _check_trained_whole(root: nn.Module) -> None:
    """Raise ``ValueError`` for parameters that train whole and lie in no module that PEFT could wrap."""
    modules = _modules_trained_whole(root)
    owners = {clean_name(name): module for name, module in root.named_modules(remove_duplicate=False)}
    for name in modules:
        if name not in owners or isinstance(owners[name], (nn.ParameterList, nn.ParameterDict)):
            raise ValueError(
                f"{name!r} trains whole, and PEFT trains only modules that have a forward: keep the adapter in "
                "checkpoints, or leave it frozen with modules_to_save=[...] that does not name it"
            )
    beside = _hit_by_endings(root, modules)
    hidden = [name for name in named_lora_layers(root) if _lies_in(name, beside)]
    if hidden:
        raise ValueError(
            f"{hidden[0]!r} is adapted and lies in a module whose name ends like that of one that trains whole "
            f"({', '.join(modules)}). PEFT would train both whole and adapt nothing in them: keep the adapter in "
            "checkpoints, or give the head another name"
        )


def _check_experts(root: nn.Module, view: nn.Module) -> str | None:
    """Return why PEFT would read the experts' adapters as something else unless they are written portably, if so.

    transformers keeps all experts of a block in one tensor for gate and up and one for down, and PEFT reads one rank
    and one scale for each.

    Raises:
        ValueError: only some of the experts, or of their layers, are adapted.
    """
    experts = {part.name for found in megatron_parts(root).values() for part in found if ".experts." in part.name}
    pairs = {name: pair for name, pair in named_pairs(view).items() if name in experts}
    if not pairs:
        return None
    blocks = {name.partition(".experts.")[0] for name in pairs}
    lacking = [name for name in experts if name.partition(".experts.")[0] in blocks and name not in pairs]
    if lacking:
        raise ValueError(
            f"{min(lacking)!r} is not adapted and other layers of those experts are, which no PEFT directory can say: "
            "adapt gate_proj, up_proj and down_proj of all experts, or keep the adapter in checkpoints"
        )
    injection = require_injection(root)
    if injection.config.use_rslora or len({(pair.r, pair.scaling) for pair in named_pairs(view).values()}) > 1:
        return "use_rslora, rank_pattern or alpha_pattern"
    return None


def _from(name: str, sources: Mapping[str, tuple[str, str]]) -> tuple[str, list[str]]:
    layout, source = sources[name]
    return layout, [source]


def write_described(
    description: Mapping[str, Any],
    named: Mapping[str, Tensor],
    directory: str | os.PathLike[str],
    *,
    portable: bool,
    on_nonfinite: OnNonfinite,
) -> None:
    """Write a directory from what :func:`describe_for_peft` returned and the model's tensors by name.

    Raises:
        ValueError: PEFT would read the adapters of experts as something else; ``portable=True`` is then the way.
    """
    if description.get("only_portable") and not portable:
        raise ValueError(
            "PEFT reads adapters of experts with one rank and one scale, and this one has "
            f"{description['only_portable']}: write it with portable=True"
        )
    lacking = [name for _, _, names in description["entries"] for name in names if name not in named]
    if lacking:
        raise ValueError(
            f"PEFT expects {lacking[0]!r} in the file, since its module's name ends like that of one that trains "
            "whole, and the checkpoint holds no frozen tensors: load it into the model and call save_peft(model, "
            "directory)"
        )
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for key, layout, names in description["entries"]:
        value = laid_out(layout, [named[name].detach() for name in names])
        shared = value.data_ptr() in seen  # a tied tensor under its second name: safetensors wants memory of its own
        tensors[key] = value.clone() if shared else value
        seen.add(value.data_ptr())
    config = description["config"]
    if portable:
        config, tensors = make_portable(config, tensors, _parameters_by_layer(description["entries"]))
    write_directory(directory, config, tensors, description["metadata"], on_nonfinite=on_nonfinite)


def _parameters_by_layer(entries: Iterable[tuple[str, str, Sequence[str]]]) -> dict[str, str]:
    """Return the names of adapted parameters by the layers' names in the file, which does not tell them."""
    suffix = ".lora_A.weight"
    names = {key.removesuffix(suffix): names[0] for key, _, names in entries if key.endswith(suffix)}
    return {
        layer: name.replace(".lora_A_", ".")
        for layer, name in names.items()
        if ".lora_A_" in name and f"{layer}.".startswith(f"{PREFIX}{name.partition('.lora_A_')[0]}.")
    }


def _entries(root: nn.Module) -> list[Entry]:
    entries: list[Entry] = []
    layers = named_lora_layers(root)
    for name, layer in layers.items():
        entries.extend(_layer_entries(name, layer, layers))
    whole = {id(parameter): name for name, parameter in named_trained_whole(root).items()}
    modules = _modules_trained_whole(root)
    beside = _hit_by_endings(root, modules)
    stored = {clean_name(name) for name in root.state_dict(keep_vars=True)}  # some buffers are not
    for name, tensor in [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]:
        clean = clean_name(name)
        owner = clean.rpartition(".")[0]
        if clean not in stored:
            continue
        if _lies_in(owner, modules):
            entries.append(Entry(PREFIX + clean, "plain", [whole.get(id(tensor), clean)]))
        elif id(tensor) in whole:
            key = f"{PREFIX}{_name_there(owner, layers)}.base_layer.bias" if owner in layers else PREFIX + clean
            entries.append(Entry(key, "plain", [whole[id(tensor)]]))  # the one name that a checkpoint has it under
        elif _lies_in(owner, beside):
            entries.append(Entry(PREFIX + clean, "plain", [clean]))
    return entries


def _lies_in(owner: str, modules: Iterable[str]) -> bool:
    return any(is_inside(owner, module) for module in modules)


def _hit_by_endings(root: nn.Module, modules: Sequence[str]) -> list[str]:
    """Return untrained modules whose names end like that of a trained one: PEFT wants tensors for them too."""
    names = (clean_name(name) for name, _ in root.named_modules(remove_duplicate=False))
    return [name for name in names if name.endswith(tuple(modules)) and not _lies_in(name, modules)] if modules else []


def _layer_entries(name: str, layer: LoRALayer, layers: Mapping[str, LoRALayer]) -> list[Entry]:
    if isinstance(layer, TokenRows):
        key = f"{PREFIX}{name}.token_adapter.trainable_tokens_delta"
        return [] if layer.lora_is_twin else [Entry(key, "plain", [f"{name}.lora_rows"])]
    if isinstance(layer, LoRAParameters):
        return _parameter_entries(name, layer)
    name_there = _name_there(name, layers)
    kind, suffix = ("embedding_", "") if isinstance(layer, LoRAEmbedding) else ("", ".weight")
    start = isinstance(layer, ResidualLinear)
    more = {"lora_magnitude": "lora_magnitude_vector", "lora_bias": "lora_B.bias"}
    return [
        Entry(f"{PREFIX}{name_there}.{key}", "plain", [f"{name}.{local}"])
        for local, key in more.items()
        if local in layer.adapter_names
    ] + [
        Entry(
            f"{PREFIX}{name_there}.lora_{kind}{x}{suffix}",
            f"residual_{x}" if start else "plain",
            [f"{name}.lora_{x}", f"{name}.lora_{x}0"] if start else [f"{name}.lora_{x}"],
        )
        for x in "AB"
    ]


def _name_there(name: str, layers: Mapping[str, LoRALayer]) -> str:
    """Return PEFT's name of an adapted layer: an attention's output projection lies in the attention's wrapper."""
    parent, _, child = name.rpartition(".")
    return f"{parent}.base_layer.{child}" if isinstance(layers.get(parent), nn.MultiheadAttention) else name


def _parameter_entries(name: str, layer: LoRAParameters) -> list[Entry]:
    """Return the entries of PEFT's nested wrappers: the module's first parameter is the innermost."""
    entries = []
    parts = list(layer.lora_parts)
    for index, part in enumerate(parts):
        inner = ".base_layer" * (len(parts) - 1 - index)
        for x in "AB":
            stacked = getattr(layer, f"lora_{x}_{part}").ndim == 3
            key = f"{PREFIX}{name}{inner}.lora_{x}.weight"
            entries.append(Entry(key, f"experts_{x}" if stacked else "plain", [f"{name}.lora_{x}_{part}"]))
    return entries


def _modules_trained_whole(root: nn.Module) -> list[str]:
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


def _peft_config(root: nn.Module) -> dict[str, Any]:
    injection = require_injection(root)
    config, layers = injection.config, named_lora_layers(root)
    doubled = {name for name, layer in layers.items() if isinstance(layer, ResidualLinear)}
    pairs = {  # an attention's output projection goes with the attention
        name: pair
        for name, pair in named_pairs(root).items()
        if not isinstance(layers.get(name.rpartition(".")[0]), nn.MultiheadAttention)
    }
    ranks = {name: pair.r * (2 if name in doubled else 1) for name, pair in pairs.items()}
    factor = {name: r**0.5 if config.use_rslora else r for name, r in ranks.items()}
    alphas = {name: _as_integer(pair.scaling * factor[name]) for name, pair in pairs.items()}
    r = Counter(ranks.values()).most_common(1)[0][0] if ranks else config.r
    alpha = Counter(alphas.values()).most_common(1)[0][0] if alphas else _as_integer(config.alpha or 2 * config.r)
    trained_whole = _modules_trained_whole(root)
    modules, parameters = _targets(root, layers)
    rows = named_token_rows(root)
    return {
        "peft_type": "LORA",
        "task_type": _task_type(root, trained_whole),
        "base_model_name_or_path": name_or_path(root),
        "revision": getattr(getattr(root, "config", None), "_commit_hash", None),
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if parameters else config.dropout,  # PEFT takes none with target_parameters
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        **({"lora_bias": True} if config.lora_bias else {}),  # a field that older PEFTs do not know
        "bias": config.bias,
        "target_modules": _target_modules(root, modules, trained_whole),
        "target_parameters": parameters or None,
        "trainable_token_indices": rows or None,
        "exclude_modules": None,
        "modules_to_save": trained_whole or None,
        "rank_pattern": {f"^{re.escape(name)}": value for name, value in ranks.items() if value != r},
        "alpha_pattern": {f"^{re.escape(name)}": value for name, value in alphas.items() if value != alpha},
        "fan_in_fan_out": any(isinstance(layer, LoRAConv1D) for layer in layers.values()),
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _targets(root: nn.Module, layers: Mapping[str, LoRALayer]) -> tuple[list[str], list[str]]:
    """Return the names of adapted modules and of adapted parameters, as PEFT has to be told them."""
    fused = any(
        parameter is not None and parameter.ndim == 3 and local == "gate_up_proj"
        for module in root.modules()
        for local, parameter in module._parameters.items()
    )
    modules: list[str] = []
    parameters: list[str] = []
    for name, layer in layers.items():
        if isinstance(layer, TokenRows) or isinstance(layers.get(name.rpartition(".")[0]), nn.MultiheadAttention):
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
