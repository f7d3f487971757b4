"""Tell which layers a model skips at random while it trains (``layerdrop``, Fan et al. 2019)."""

from torch import nn

from lightning_lora.model.names import clean_name
from lightning_lora.model.state import named_lora_layers


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
    modules = {clean_name(name): module for name, module in root.named_modules()}
    lists = [
        f"{name}.{local}." if name else f"{local}."
        for name in drops_layers(root)
        for local, child in modules[name].named_children()
        if isinstance(child, nn.ModuleList)
    ]
    return {name for name in named_lora_layers(root) if name.startswith(tuple(lists))}
