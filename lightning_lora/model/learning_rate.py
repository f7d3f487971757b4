"""Compare an optimizer's rates with those that LoRA is trained with, and with the ratio of LoRA+."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CyclicLR

from lightning_lora.layers.embedding import LoRAEmbedding
from lightning_lora.model.state import named_lora_layers

LOWEST, HIGHEST = 2e-4, 1e-3  # of the published rates, see rate_line
_GIVEN_BY_FUNCTION = 0.1  # a rate from here on, under a schedule, is a factor of the schedule's own function


def rate_line(root: nn.Module, optimizers: Sequence[Optimizer], schedulers: Sequence[Any]) -> str | None:
    """Return the line that says that the rate of A and B is ten times off or more; ``None`` if it is not.

    The rule: a line for a rate from ``10 * 1e-3``, or above 0 and up to ``2e-4 / 10``, of torch's Adam or AdamW.
    Between 2e-4 and 1e-3 are the rates published for supervised fine-tuning of language models: 3e-4 to 1e-3 by the
    sweep over some 30 models behind ``get_lr`` of the Tinker cookbook (one is at 1e-4), 2e-4 in TRL's guide to "LoRA
    Without Regret" (Schulman et al. 2025). That paper finds ten times the rate of full fine-tuning for every rank, so a
    rate taken over from full fine-tuning is ten times too low. DPO and RL are trained at 1e-5 to 5e-5 (Tinker, TRL),
    and the line says so.

    The rate is the highest one that is known before the first step: the group's present rate, the one that its schedule
    starts from or peaks at, whichever is highest. So a warm-up from 0 counts with its peak. A rate of 0.1 or more under
    a schedule is a factor of the schedule's function (``LambdaLR`` over ``lr=1``): the present rate counts. A group of
    :func:`~lightning_lora.parameter_groups` counts with the rate of A. Where groups have several rates, all must be off
    on the same side.
    """
    factors = _factors(root)
    rates = [
        _rate(optimizer, index, schedulers)
        for optimizer in optimizers
        if isinstance(optimizer, (Adam, AdamW))
        for index, group in enumerate(optimizer.param_groups)
        if any(id(parameter) in factors for parameter in group["params"])
    ]
    if rates and min(rates) >= 10 * HIGHEST:
        rate, side = min(rates), "above"
    elif rates and 0 < max(rates) <= LOWEST / 10:
        rate, side = max(rates), "below"
    else:
        return None
    return (
        f"learning rate {rate:g} is ten times or more {side} the {LOWEST:g} to {HIGHEST:g} that LoRA takes in "
        "supervised fine-tuning with Adam (ten times the rate of full fine-tuning); DPO and RL take 1e-05 to 5e-05"
    )


def check_ratio_is_kept(optimizers: Sequence[Optimizer], schedulers: Sequence[Any]) -> None:
    """Raise ``ValueError`` where a schedule gives groups of :func:`~lightning_lora.parameter_groups` one rate."""
    for optimizer in optimizers:
        of_plus = {
            group["name"]: (_peak(optimizer, index, schedulers), group["lr_ratio"])
            for index, group in enumerate(optimizer.param_groups)
            if "lr_ratio" in group
        }
        for name, (rate_A, ratio_A) in of_plus.items():
            if not name.endswith("A"):
                continue
            rate_B, ratio_B = of_plus.get(f"{name[:-1]}B", (0.0, 1.0))
            if rate_A != rate_B or ratio_A == ratio_B:
                continue
            raise ValueError(
                f"the schedule gives A and B of LoRA+ the same rate, {rate_A:g}, in place of a ratio of {ratio_B:g}: "
                "give it one value for each group, such as OneCycleLR(optimizer, "
                'max_lr=[group["lr"] for group in optimizer.param_groups], ...)'
            )


def _factors(root: nn.Module) -> set[int]:
    """Return the identities of A and B of all layers but embeddings, which have rates of their own."""
    layers = [layer for layer in named_lora_layers(root).values() if not isinstance(layer, LoRAEmbedding)]
    return {id(factor) for layer in layers for pair in layer.pairs().values() for factor in (pair.A, pair.B)}


def _rate(optimizer: Optimizer, index: int, schedulers: Iterable[Any]) -> float:
    """Return the highest rate of a group that is known before the first step, of LoRA+'s groups that of A."""
    group = optimizer.param_groups[index]
    ratio = float(group.get("lr_ratio", 1.0))
    rate = _peak(optimizer, index, schedulers) / ratio
    return float(group["lr"]) / ratio if "initial_lr" in group and rate >= _GIVEN_BY_FUNCTION else rate


def _peak(optimizer: Optimizer, index: int, schedulers: Iterable[Any]) -> float:
    """Return the highest of a group's present rate and those that its schedule starts from or peaks at."""
    group = optimizer.param_groups[index]
    cyclic = [one.max_lrs[index] for one in schedulers if isinstance(one, CyclicLR) and one.optimizer is optimizer]
    own = [group[key] for key in ("lr", "initial_lr", "max_lr") if key in group]
    return max(map(float, (*cyclic, *own)))
