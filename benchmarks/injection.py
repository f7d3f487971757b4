"""Time to put adapters into a model of many small linear layers."""

import warnings
from collections.abc import Callable
from typing import Any

import peft
from blocks import ALPHA, RANK, TARGETS
from timing import cpu_seconds, interleave, summary
from torch import nn

from lightning_lora import LoRAConfig, inject

SIZE = 64
NUM_FEW, NUM_MANY = 1_008, 18_432
MANY_ROUNDS = 3  # of PEFT's quarter of a minute each


def measure(rounds: int, quick: bool = False) -> list[dict[str, Any]]:
    cases = [(14, rounds, 1)] if quick else [(NUM_FEW, rounds, 2), (NUM_MANY, min(rounds, MANY_ROUNDS), 0)]
    return [
        {"linears": number, "size": SIZE, **summary(interleave(_contenders(number), number_of_rounds, warm_up=warm_up))}
        for number, number_of_rounds, warm_up in cases
    ]


def linears(number: int) -> nn.Module:
    """Return ``number`` bias-free linear layers, named as those of a decoder."""
    model = nn.Module()
    model.layers = nn.ModuleList()
    for index in range(number):
        if index % len(TARGETS) == 0:
            model.layers.append(nn.Module())
        layer = nn.Linear(SIZE, SIZE, bias=False, device="meta").to_empty(device="cpu")
        model.layers[-1].add_module(TARGETS[index % len(TARGETS)], layer)
    return model


def _contenders(number: int) -> dict[str, Callable[[], float]]:
    theirs = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS))
    ours = LoRAConfig(r=RANK, alpha=ALPHA, target_modules=TARGETS)

    def with_peft(model: nn.Module) -> object:
        return peft.get_peft_model(model, theirs)

    def with_peft_meta(model: nn.Module) -> object:
        return peft.get_peft_model(model, theirs, low_cpu_mem_usage=True)

    def with_ours(model: nn.Module) -> object:
        return inject(model, ours)

    def seconds(work: Callable[[nn.Module], object]) -> Callable[[], float]:
        def run() -> float:
            model = linears(number)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT on a model without a config
                return cpu_seconds(lambda: work(model))

        return run

    return {
        "PEFT": seconds(with_peft),
        "PEFT, low_cpu_mem_usage": seconds(with_peft_meta),  # leaves the adapters on meta, without values
        "ours": seconds(with_ours),
    }
