"""What a PEFT directory of an adapted model holds, in plain values: config, tensors by key, metadata."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lightning_lora.checkpoint.file import PARTS
from lightning_lora.checkpoint.fingerprint import renamed
from lightning_lora.layers import LoRALayer
from lightning_lora.layers.convolution import LoRAConv
from lightning_lora.layers.embedding import LoRAEmbedding
from lightning_lora.layers.parameters import LoRAParameters
from lightning_lora.layers.residual import ResidualLinear
from lightning_lora.layers.token_rows import TokenRows
from lightning_lora.model.families import family_of
from lightning_lora.model.names import clean_name, is_inside
from lightning_lora.model.state import named_lora_layers, named_pairs, named_trained_whole, require_injection
from lightning_lora.peft.keys import PREFIX
from lightning_lora.peft.layout import Entry
from lightning_lora.peft.written import modules_trained_whole, peft_config


def describe_for_peft(root: nn.Module, base: Mapping[str, Any]) -> dict[str, Any]:
    """Return all that a PEFT directory needs beside the tensors, in plain values: config, entries, metadata.

    Args:
        base: the fingerprint of the frozen base.

    Raises:
        ValueError: PEFT would compute something else from the file.
    """
    family = family_of(root)
    if family is not None and family.skeleton(root) is not None:
        view, sources = family.adapted_view(root)
        description = describe_for_peft(view, renamed(base, family.peft_name))
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
        "config": peft_config(root),
        "entries": [(e.key, e.layout, list(e.names)) for e in _entries(root)],
        "metadata": {"base": {**base, "hashes": base["hashes"].tolist()}},
    }


def _check_trained_whole(root: nn.Module) -> None:
    """Raise ``ValueError`` for parameters that train whole and lie in no module that PEFT could wrap."""
    modules = modules_trained_whole(root)
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


def _from(name: str, sources: Mapping[str, tuple[str, str]]) -> tuple[str, list[str]]:
    layout, source = sources[name]
    return layout, [source]


def _entries(root: nn.Module) -> list[Entry]:
    entries: list[Entry] = []
    layers = named_lora_layers(root)
    for name, layer in layers.items():
        entries.extend(_layer_entries(name, layer, layers))
    whole = {id(parameter): name for name, parameter in named_trained_whole(root).items()}
    modules = modules_trained_whole(root)
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
    entries = [
        Entry(f"{PREFIX}{name_there}.{key}", "plain", [f"{name}.{local}"])
        for local, key in more.items()
        if local in layer.adapter_names
    ]
    for x in "AB":
        layout = f"residual_{x}" if start else "plain"
        if x == "B" and name_there != name:  # PEFT adds this update twice: see layout.times_added
            layout = f"half_{layout}"
        names = [f"{name}.lora_{x}", f"{name}.lora_{x}0"] if start else [f"{name}.lora_{x}"]
        entries.append(Entry(f"{PREFIX}{name_there}.lora_{kind}{x}{suffix}", layout, names))
    return entries


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


def _for_checkpoint(root: nn.Module, base: dict[str, Any]) -> dict[str, Any]:
    """Return what :func:`~lightning_lora.peft.convert` needs of a checkpoint, or why it cannot be done."""
    try:
        return describe_for_peft(root, base)
    except ValueError as error:
        return {"refused": str(error)}


PARTS["peft"] = _for_checkpoint
