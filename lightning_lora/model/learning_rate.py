"""Compare an optimizer's rates with those that LoRA is trained with, and with the ratio of LoRA+."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CyclicLR

from lightning_lora.layers.embedding import LoRAEmbedding
from lightning_lora.model.state import named_lora_layers

LOWEST, HIGHEST = 2e-4, 5e-4  # of the published rates, see rate_line
_GIVEN_BY_FUNCTION = 0.1  # a rate from here on, under a schedule, is a factor of the schedule's own function


def rate_line(root: nn.Module, optimizers: Sequence[Optimizer], schedulers: Iterable[Any]) -> str | None:
    """Return the line that says that the rate of A and B is more than ten times off; ``None`` if it is not.

    The rule: a line for a rate above ``10 * 5e-4``, or above 0 and below ``2e-4 / 10``, of torch's Adam or AdamW.
    Between 2e-4 and 5e-4 are the rates published for supervised fine-tuning of language models: 2.9e-4 for
    Llama-3.1-8B and 4.7e-4 for Qwen3-8B by ``get_lr`` of the Tinker cookbook, about 5e-4 for other models (same
    source), 2e-4 in TRL's guide to "LoRA Without Regret" (Schulman et al. 2025). That paper finds ten times the rate of
    full fine-tuning for every rank, so a rate taken over from full fine-tuning is ten times too low. DPO and RL are
    trained at about 1e-5 (Tinker, TRL), and the line says so.

    The rate is the highest one that is known before the first step: the group's present rate, the one that its schedule
    starts from or peaks at, whichever is highest. So a warm-up from 0 counts with its peak. A rate of 0.1 or more under
    a schedule is a factor of the schedule's function (``LambdaLR`` over ``lr=1``): the present rate counts. A group of
    :func:`~lightning_lora.parameter_groups` counts with the rate of A. Where groups have several rates, all must be off
    on the same side.
    """
    factors = _factors(root)
    schedulers = list(schedulers)
    rates = [
        _known_rate(optimizer, index, schedulers) / group.get("lr_ratio", 1.0)
        for optimizer in optimizers
        if isinstance(optimizer, (Adam, AdamW))
        for index, group in enumerate(optimizer.param_groups)
        if any(id(parameter) in factors for parameter in group["params"])
    ]
    if not rates or not (min(rates) > 10 * HIGHEST or 0 < max(rates) < LOWEST / 10):
        return None
    rate, side = (min(rates), "above") if min(rates) > HIGHEST else (max(rates), "below")
    return (
        f"learning rate {rate:g} is more than ten times {side} the {LOWEST:g} to {HIGHEST:g} that LoRA is trained with "
        "in supervised fine-tuning by Adam (ten times the rate of full fine-tuning; DPO and RL take about 1e-05)"
    )


def check_ratio_is_kept(optimizers: Sequence[Optimizer]) -> None:
    """Raise ``ValueError`` where a schedule gives groups of :func:`~lightning_lora.parameter_groups` one rate."""
    for optimizer in optimizers:
        groups = {group["name"]: group for group in optimizer.param_groups if "lr_ratio" in group}
        if "A" not in groups or "B" not in groups or groups["A"]["lr_ratio"] == groups["B"]["lr_ratio"]:
            continue
        rates = [_highest(groups[name]) for name in "AB"]
        if rates[0] == rates[1]:
            raise ValueError(
                f"the schedule gives A and B of LoRA+ the same rate, {rates[0]:g}, in place of a ratio of "
                f"{groups['B']['lr_ratio']:g}: give it one value for each group, such as OneCycleLR(optimizer, "
                'max_lr=[group["lr"] for group in optimizer.param_groups], ...)'
            )


def _factors(root: nn.Module) -> set[int]:
    """Return the identities of A and B of all layers but embeddings, which have rates of their own."""
    layers = [layer for layer in named_lora_layers(root).values() if not isinstance(layer, LoRAEmbedding)]
    return {id(factor) for layer in layers for pair in layer.pairs().values() for factor in (pair.A, pair.B)}


def _known_rate(optimizer: Optimizer, index: int, schedulers: Iterable[Any]) -> float:
    """Return the highest rate of a group that is known before the first step."""
    group = optimizer.param_groups[index]
    peaks = [one.max_lrs[index] for one in schedulers if isinstance(one, CyclicLR) and one.optimizer is optimizer]
    rate = max(_highest(group), *map(float, peaks), 0.0)
    return float(group["lr"]) if "initial_lr" in group and rate >= _GIVEN_BY_FUNCTION else rate


def _highest(group: dict[str, Any]) -> float:
    """Return the highest of a group's own rates: the present one, and where its schedule starts or peaks."""
    return max(float(group[key]) for key in ("lr", "initial_lr", "max_lr") if key in group)
