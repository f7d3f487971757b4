"""Describe in plain values what a PEFT directory of an adapted model holds: config, tensors by key, metadata."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

from torch import nn

from lightning_lora.checkpoint.file import PARTS
from lightning_lora.checkpoint.fingerprint import renamed
from lightning_lora.layers import LoRALayer
from lightning_lora.layers.adalora import AdaLoRALinear
from lightning_lora.layers.convolution import LoRAConv
from lightning_lora.layers.embedding import LoRAEmbedding
from lightning_lora.layers.parameters import LoRAParameters
from lightning_lora.layers.residual import ResidualLinear
from lightning_lora.layers.token_rows import TokenRows
from lightning_lora.model.families import family_of
from lightning_lora.model.names import clean_name, is_inside
from lightning_lora.model.state import named_lora_layers, named_pairs, named_trained_whole, require_injection
from lightning_lora.peft.card import forms_of
from lightning_lora.peft.layout import PREFIX, is_projection
from lightning_lora.peft.written import modules_trained_whole, peft_config

Entry: TypeAlias = tuple[str, str, list[str]]  # a key, and the layout and the names of the tensors that it is made from


def describe_for_peft(root: nn.Module, base: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return all that a PEFT directory needs beside the tensors, in plain values: config, entries, metadata.

    Args:
        base: the fingerprint of the frozen base; ``None`` leaves it out of the metadata.

    Raises:
        ValueError: PEFT would compute something else from the file.
    """
    family = family_of(root)
    if family is not None and family.skeleton(root) is not None:
        view, sources = family.adapted_view(root)
        description = describe_for_peft(view, base and renamed(base, family.peft_name))
        description["only_portable"] = _check_experts(root, view)
        by_key = {key: sources[name] for key, _, (name,) in description["entries"]}
        description["entries"] = [(key, layout, [source]) for key, (layout, source) in by_key.items()]
        description["config"]["task_type"] = "CAUSAL_LM"
        return description
    for name, layer in named_lora_layers(root).items():
        if isinstance(layer, LoRAConv) and (layer.padding_mode != "zeros" or set(layer.dilation) != {1}):
            raise ValueError(
                f"PEFT convolves with lora_A of {name!r} without the base's dilation={tuple(layer.dilation)} and "
                f"padding_mode={layer.padding_mode!r}, and would compute something else from the file. Keep the "
                "adapter in checkpoints, or merge(model, remove=True) and save the merged model"
            )
    modules = modules_trained_whole(root)
    # PEFT also wants tensors of the modules that did not train and whose names end like that of one that did
    names = (clean_name(name) for name, _ in root.named_modules(remove_duplicate=False))
    beside = [n for n in names if n.endswith(tuple(modules)) and not _lies_in(n, modules)] if modules else []
    _check_trained_whole(root, modules, beside)
    return {
        "config": peft_config(root, modules),
        "entries": _entries(root, modules, beside),
        "metadata": {
            **({} if base is None else {"base": {**base, "hashes": base["hashes"].tolist()}}),
            **({"trained_over": forms} if (forms := forms_of(root)) else {}),
        },
    }


def _check_trained_whole(root: nn.Module, modules: list[str], beside: list[str]) -> None:
    """Raise ``ValueError`` for parameters that train whole and lie in no module that PEFT could wrap."""
    owners = {clean_name(name): module for name, module in root.named_modules(remove_duplicate=False)}
    for name in modules:
        if name not in owners or isinstance(owners[name], (nn.ParameterList, nn.ParameterDict)):
            raise ValueError(
                f"{name!r} trains whole, and PEFT trains only modules that have a forward: keep the adapter in "
                "checkpoints, or leave it frozen with modules_to_save=[...] that does not name it"
            )
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
    experts = {name for name, m in view.named_modules() if isinstance(m, nn.Linear) and ".experts." in name}
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


def _entries(root: nn.Module, modules: list[str], beside: list[str]) -> list[Entry]:
    layers = named_lora_layers(root)
    r = require_injection(root).config.r
    entries = [entry for name, layer in layers.items() for entry in _layer_entries(name, layer, layers, r)]
    whole = {id(parameter): name for name, parameter in named_trained_whole(root).items()}
    stored = {clean_name(name) for name in root.state_dict(keep_vars=True)}  # some buffers are not
    for name, tensor in [*root.named_parameters(remove_duplicate=False), *root.named_buffers(remove_duplicate=False)]:
        clean = clean_name(name)
        owner, key = clean.rpartition(".")[0], PREFIX + clean
        if clean not in stored:
            continue
        if _lies_in(owner, modules):
            entries.append((key, "plain", [whole.get(id(tensor), clean)]))
        elif id(tensor) in whole:
            key = f"{PREFIX}{_name_there(owner, layers)}.base_layer.bias" if owner in layers else key
            entries.append((key, "plain", [whole[id(tensor)]]))  # the one name that a checkpoint has it under
        elif _lies_in(owner, beside):
            entries.append((key, "plain", [clean]))
    return entries


def _lies_in(owner: str, modules: Iterable[str]) -> bool:
    return any(is_inside(owner, module) for module in modules)


def _layer_entries(name: str, layer: LoRALayer, layers: Mapping[str, LoRALayer], r: int) -> list[Entry]:
    if isinstance(layer, TokenRows):
        key = f"{PREFIX}{name}.token_adapter.trainable_tokens_delta"
        return [] if layer.lora_is_twin else [(key, "plain", [f"{name}.lora_rows"])]
    if isinstance(layer, LoRAParameters):
        return _parameter_entries(name, layer)
    if isinstance(layer, AdaLoRALinear):
        return _adalora_entries(name, layer, r)
    name_there = _name_there(name, layers)
    kind, suffix = ("embedding_", "") if isinstance(layer, LoRAEmbedding) else ("", ".weight")
    more = {"lora_magnitude": "lora_magnitude_vector", "lora_bias": "lora_B.bias"}
    entries = [
        (f"{PREFIX}{name_there}.{key}", "plain", [f"{name}.{local}"])
        for local, key in more.items()
        if local in layer.adapter_names
    ]
    for x in "AB":
        layout, names = "plain", [f"{name}.lora_{x}"]
        if isinstance(layer, ResidualLinear):
            layout, names = f"residual_{x}", [*names, f"{name}.lora_{x}0"]
        if x == "B" and name_there != name:  # PEFT adds this update twice: see layout.times_added
            layout = f"half_{layout}"
        entries.append((f"{PREFIX}{name_there}.lora_{kind}{x}{suffix}", layout, names))
    return entries


def _adalora_entries(name: str, layer: AdaLoRALinear, init_r: int) -> list[Entry]:
    """Return the entries of one layer; PEFT's have one rank, whatever their size."""
    dims = {"A": 0, "B": 1, "E": 0}
    layouts = {x: "plain" if layer.r == init_r else f"padded_{dim}_{init_r}" for x, dim in dims.items()}
    return [(f"{PREFIX}{name}.lora_{x}", layout, [f"{name}.lora_{x}"]) for x, layout in layouts.items()]


def _name_there(name: str, layers: Mapping[str, LoRALayer]) -> str:
    """Return PEFT's name of an adapted layer: an attention's output projection lies in the attention's wrapper."""
    parent, _, child = name.rpartition(".")
    return f"{parent}.base_layer.{child}" if is_projection(name, layers) else name


def _parameter_entries(name: str, layer: LoRAParameters) -> list[Entry]:
    """Return the entries of PEFT's nested wrappers: the module's first parameter is the innermost."""
    entries: list[Entry] = []
    for outer, part in enumerate(layer.lora_parts, start=1):
        for x in "AB":
            layout = f"experts_{x}" if getattr(layer, f"lora_{x}_{part}").ndim == 3 else "plain"
            key = f"{PREFIX}{name}{'.base_layer' * (len(layer.lora_parts) - outer)}.lora_{x}.weight"
            entries.append((key, layout, [f"{name}.lora_{x}_{part}"]))
    return entries


def _for_checkpoint(root: nn.Module, base: dict[str, Any]) -> dict[str, Any]:
    """Return what :func:`~lightning_lora.peft.save.convert` needs of a checkpoint, or why it cannot be done."""
    try:
        return describe_for_peft(root, base)
    except ValueError as error:
        return {"refused": str(error)}


PARTS["peft"] = _for_checkpoint
