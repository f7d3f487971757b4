"""Choose what trains of the base itself: whole modules, biases, and single rows of embeddings."""

from collections.abc import Collection, Iterable, Mapping

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.model.names import clean_name, nearest_names
from lightning_lora.ops.quantized import check_plain


def select_token_rows(model: nn.Module, config: LoRAConfig) -> dict[str, tuple[nn.Module, list[nn.Module], list[int]]]:
    """Return the tables with rows that train: ``{name: (embedding or output head, modules tied to it, token ids)}``.

    Raises:
        ValueError: no table is meant, one is meant twice, or a module of another kind is tied to it.
    """
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}
    modules = _named_modules(model)
    if not isinstance(wanted, Mapping):
        wanted = {_input_embedding(model, modules): wanted}
    selected: dict[str, tuple[nn.Module, list[nn.Module], list[int]]] = {}
    for entry, token_ids in wanted.items():
        names = [n for n, m in modules.items() if (n == entry or n.endswith(f".{entry}")) and _is_table(m)]
        if len(names) != 1:
            raise ValueError(
                f"trainable_token_indices: {entry!r} names {len(names)} embeddings or output heads of "
                f"{type(model).__name__}, expected one{nearest_names([entry], modules)}"
            )
        weight = modules[names[0]]._parameters.get("weight")
        check_plain(f"trainable_token_indices: the weight of {names[0]!r}", weight)
        tied = {n: m for n, m in modules.items() if m._parameters.get("weight") is weight}
        if not all(_is_table(module) for module in tied.values()):
            raise ValueError(
                f"trainable_token_indices: the weight of {names[0]!r} is tied to more than embeddings and linear heads"
            )
        first, *_ = tied  # a checkpoint has the rows under this name
        _, _, rows = selected.setdefault(first, (tied.pop(first), list(tied.values()), list(token_ids)))
        if rows != list(token_ids):
            raise ValueError(
                f"trainable_token_indices lists other rows for {entry!r} than for {first!r}, which is the same tensor"
            )
    return selected


def _is_table(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or type(module) is nn.Linear


def _input_embedding(model: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    get_input_embeddings = getattr(model, "get_input_embeddings", None)
    embedding = get_input_embeddings() if callable(get_input_embeddings) else None
    for name, module in modules.items():
        if module is embedding:
            return name
    return "embed_tokens"


def select_trained_whole(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the full names of the modules that ``modules_to_save`` means.

    These are the module of that very name, or else all whose names end in the entry.
    """
    modules = _named_modules(model)
    found: set[str] = set()
    for entry in names:
        hits = {entry} if entry in modules else {name for name in modules if name.endswith(entry)}
        if not hits:
            nearest = nearest_names([entry], modules)
            raise ValueError(f"modules_to_save entry {entry!r} matches no module of {type(model).__name__}{nearest}")
        found |= hits
    ordered = [name for name in modules if name in found]
    for name in ordered:
        for local, parameter in modules[name].named_parameters():
            check_plain(f"modules_to_save: {name}.{local}", parameter)
    return [name for name in ordered if not any(name.startswith(f"{other}.") for other in ordered)]


def base_that_trains(
    model: nn.Module, trained_whole: Collection[str], adapted: Iterable[nn.Module], bias: str
) -> dict[str, int]:
    """Return the base parameters that train by design, by clean name with their sizes; tied ones by their first.

    Args:
        trained_whole: names of modules, and of parameters that modules hold themselves, that train whole.
        adapted: layers whose biases train with ``bias="lora_only"``.
    """
    modules = _named_modules(model)
    wanted = {id(p) for name in trained_whole if name in modules for p in modules[name].parameters()}
    if bias == "lora_only":
        wanted |= {id(own) for layer in adapted if (own := layer._parameters.get("bias")) is not None}
    found = {}
    for full_name, parameter in model.named_parameters():
        name = clean_name(full_name)
        is_bias = bias == "all" and name.rpartition(".")[2] == "bias"
        if id(parameter) in wanted or name in trained_whole or is_bias:
            found[name] = parameter.numel()
    return found


def _named_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {clean_name(name): module for name, module in model.named_modules() if clean_name(name)}
