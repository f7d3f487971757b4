"""Group what trains for an optimizer, so that B learns faster than A (LoRA+, Hayou et al. 2024)."""

import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from lightning_lora.config import answering_other_names
from lightning_lora.layers import LoRALayer
from lightning_lora.layers.embedding import LoRAEmbedding
from lightning_lora.model.state import injected_roots


@answering_other_names
def parameter_groups(
    model: nn.Module,
    lr: float,
    *,
    lora_plus_ratio: float = 16.0,
    embedding_lr: float = 1e-6,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Return the groups of LoRA+ over all of ``model`` that requires grad, for the constructor of an optimizer.

    The groups are those of PEFT's ``create_loraplus_optimizer``, in its order:

    - ``A``, at ``lr``: A, single rows of embeddings, and every tensor that is in no other group.
    - ``embedding``, at ``embedding_lr``: A and B of embeddings.
    - ``B``, at ``lr * lora_plus_ratio``: B, and vectors, such as magnitudes of DoRA and scales of RMS norms.
    - ``B_no_decay``, at the same rate and without weight decay: biases, and the vectors of ``nn.LayerNorm``.

    A group without parameters is kept, so that schedules with a value for each group, and checkpoints, do not depend on
    what the model has.

    What trains beside the adapters (heads, an unfrozen part of the base) is grouped by the same rule. Each group also
    holds ``lr_ratio``, its rate divided by ``lr``. A schedule that multiplies rates keeps the ratios. One that sets
    them needs a value per group: ``OneCycleLR(optimizer, max_lr=[group["lr"] for group in groups], ...)``.

    Args:
        model: an adapted model, or a module around one: the LightningModule, in ``configure_optimizers``.
        lr: rate of A.
        lora_plus_ratio: rate of B divided by that of A. The paper recommends about 16; 1 is LoRA without LoRA+.
        embedding_lr: rate of the adapters of embeddings. The default is PEFT's.
        weight_decay: of the groups that decay. The default is PEFT's.

    Raises:
        TypeError, ValueError: a number is of the wrong type or out of range, ``model`` holds no adapters, or nothing in
            it trains.

    Example::

        def configure_optimizers(self):
            return torch.optim.AdamW(parameter_groups(self, lr=1e-4), fused=True)
    """
    for name, value in {"lr": lr, "lora_plus_ratio": lora_plus_ratio, "embedding_lr": embedding_lr}.items():
        check_number(name, value)
    check_number("weight_decay", weight_decay, may_be_zero=True)
    if not injected_roots(model):
        raise ValueError(
            f"{type(model).__name__} holds no adapters to group: add LoRACallback to the Trainer, which adapts the "
            "model before configure_optimizers runs, or call inject(model, LoRAConfig(...)) first"
        )
    settings = {  # rate, the same divided by lr, and weight decay
        "A": (lr, 1.0, weight_decay),
        "embedding": (embedding_lr, embedding_lr / lr, weight_decay),
        "B": (lr * lora_plus_ratio, lora_plus_ratio, weight_decay),
        "B_no_decay": (lr * lora_plus_ratio, lora_plus_ratio, 0.0),
    }
    members: dict[str, list[nn.Parameter]] = {name: [] for name in settings}
    for group, parameter in _grouped(model):
        members[group].append(parameter)
    if not any(members.values()):
        raise ValueError(
            f"nothing in {type(model).__name__} requires grad, the adapters neither: another callback, such as "
            "BaseFinetuning, may have frozen them after they were put in; list LoRACallback after it"
        )
    return [
        {"name": name, "params": members[name], "lr": rate, "lr_ratio": ratio, "weight_decay": decay}
        for name, (rate, ratio, decay) in settings.items()
    ]


def _grouped(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield what requires grad with the name of its group, in the order of the model's parameters."""
    modules = list(model.modules())
    faster = {id(pair.B) for layer in modules if isinstance(layer, LoRALayer) for pair in layer.pairs().values()}
    seen: set[int] = set()
    for module in modules:
        for name, parameter in module._parameters.items():  # as stored: reading an attribute may give a cast copy
            if parameter is None or not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if isinstance(module, LoRAEmbedding) and name != "lora_magnitude":
                yield "embedding", parameter
            elif id(parameter) in faster or parameter.ndim == 1:
                decays = "bias" not in name and not isinstance(module, nn.LayerNorm)
                yield "B" if decays else "B_no_decay", parameter
            else:
                yield "A", parameter


def check_number(name: str, value: Any, *, may_be_zero: bool = False) -> None:
    """Raise ``TypeError`` or ``ValueError`` for what is no finite number above 0."""
    expected = f"a finite number {'from' if may_be_zero else 'above'} 0"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} must be {expected}; got {type(value).__name__}")
    if not math.isfinite(value) or value < 0 or (value == 0 and not may_be_zero):
        raise ValueError(f"{name}={value!r} must be {expected}")
