"""Report adapted layers that got no gradient in a run's first step, because their output does not reach the loss."""

from torch import nn
from torch.optim import Optimizer

from lightning_lora.model.layerdrop import skipped_at_random
from lightning_lora.model.names import listed
from lightning_lora.model.state import named_lora_layers


def idle_layers(root: nn.Module, optimizer: Optimizer) -> str | None:
    """Return a line that names the idle layers among those that ``optimizer`` trains, or ``None`` if there are none.

    Layers that ``layerdrop`` may skip are left out.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    skipped = skipped_at_random(root)
    idle = [
        name
        for name, layer in named_lora_layers(root).items()
        if name not in skipped
        and any(id(p) in held for _, p in layer.named_adapter_tensors())
        and all(p.grad is None for _, p in layer.named_adapter_tensors())
    ]
    if not idle:
        return None
    return (
        f"{len(idle)} adapted layers got no gradient in the first step: {listed(idle, 5)}. Their output does not reach "
        "the loss: leave them out with exclude_modules"
    )
