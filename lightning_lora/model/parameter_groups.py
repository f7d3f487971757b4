"""Group what trains for an optimizer, so that B learns faster than A (LoRA+, Hayou et al. 2024)."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from lightning_lora.config import answering_other_names
from lightning_lora.layers import LoRALayer
from lightning_lora.layers.embedding import LoRAEmbedding
from lightning_lora.model.own_parameters import owners
from lightning_lora.model.state import injected_roots, require_injection

ByAdapter = float | Mapping[str | None, float]
KINDS = ("A", "embedding", "B", "B_no_decay")


@answering_other_names
def parameter_groups(
    model: nn.Module,
    lr: ByAdapter,
    *,
    lora_plus_ratio: ByAdapter = 16.0,
    embedding_lr: ByAdapter = 1e-6,
    weight_decay: ByAdapter = 0.0,
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

    Each named adapter has four groups of its own, such as ``law.A``, which also hold its name as ``adapter``. Every
    number may then be a mapping with a value for each adapter, by its name. What trains beside them has the key
    ``None``.

    Args:
        model: an adapted model, or a module around one: the LightningModule, in ``configure_optimizers``.
        lr: rate of A.
        lora_plus_ratio: rate of B divided by that of A. The paper recommends about 16; 1 is LoRA without LoRA+.
        embedding_lr: rate of the adapters of embeddings. The default is PEFT's.
        weight_decay: of the groups that decay. The default is PEFT's.

    Raises:
        TypeError, ValueError: a number is of the wrong type or out of range, ``model`` holds no adapters, nothing in
            it trains, or a mapping has other names than the model.

    Example::

        def configure_optimizers(self):
            return torch.optim.AdamW(parameter_groups(self, lr=1e-4), fused=True)

    Example::

        torch.optim.AdamW(parameter_groups(self, lr={"law": 1e-4, "medicine": 3e-4}, weight_decay=0.01))
    """
    if not injected_roots(model):
        raise ValueError(
            f"{type(model).__name__} holds no adapters to group: add LoRACallback to the Trainer, which adapts the "
            "model before configure_optimizers runs, or call inject(model, LoRAConfig(...)) first"
        )
    owner = owners(model)
    members: dict[str | None, dict[str, list[nn.Parameter]]] = {name: _empty() for name in owner.values()}
    for kind, parameter in _grouped(model):
        members.setdefault(owner.get(id(parameter)), _empty())[kind].append(parameter)
    if not any(any(own.values()) for own in members.values()):
        raise ValueError(
            f"nothing in {type(model).__name__} requires grad, the adapters neither: another callback, such as "
            "BaseFinetuning, may have frozen them after they were put in; list LoRACallback after it"
        )
    named = [require_injection(root).named for root in injected_roots(model).values()]
    rates = {name: one.rates for adapters in named for name, one in adapters.items()}  # those of a sweep
    numbers: dict[str, ByAdapter] = {
        "lr": lr,
        "lora_plus_ratio": lora_plus_ratio,
        "embedding_lr": embedding_lr,
        "weight_decay": weight_decay,
    }
    groups = []
    for adapter, own in members.items():
        given: dict[str, ByAdapter] = {**numbers, **(rates[adapter] if adapter is not None else {})}
        chosen = {name: _chosen(name, value, adapter, members) for name, value in given.items()}
        owned = {} if adapter is None else {"adapter": adapter}
        for kind, settings in _settings(**chosen).items():
            name = kind if adapter is None else f"{adapter}.{kind}"
            groups.append({"name": name, "params": own[kind], **settings, **owned})
    return groups


def _empty() -> dict[str, list[nn.Parameter]]:
    return {kind: [] for kind in KINDS}


def _settings(
    lr: float, lora_plus_ratio: float, embedding_lr: float, weight_decay: float
) -> dict[str, dict[str, float]]:
    """Return what an optimizer is told of each kind of group."""
    rows = (
        (lr, 1.0, weight_decay),
        (embedding_lr, embedding_lr / lr, weight_decay),
        (lr * lora_plus_ratio, lora_plus_ratio, weight_decay),
        (lr * lora_plus_ratio, lora_plus_ratio, 0.0),
    )
    keys = ("lr", "lr_ratio", "weight_decay")
    return {kind: dict(zip(keys, row, strict=True)) for kind, row in zip(KINDS, rows, strict=True)}


def _chosen(name: str, value: ByAdapter, adapter: str | None, members: Iterable[str | None]) -> float:
    """Return the number that an option has for one adapter, or for what trains beside adapters (``None``)."""
    if isinstance(value, Mapping):
        others = [key for key in (*value, *members) if key not in members or key not in value]
        if others:
            raise ValueError(
                f"{name}={dict(value)!r} must have a value for each of {list(members)}, by name, and no others; "
                f"{others[0]!r} is in one of them alone"
            )
        value = value[adapter]
    check_number(name, value, may_be_zero=name == "weight_decay")
    return value


def _grouped(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield what requires grad with the kind of its group, in the order of the model's parameters."""
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
