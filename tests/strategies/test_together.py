"""Adapters that train together end where each would end in a run of its own: one process."""

import dataclasses
from typing import Any

import pytest
import torch

from tests import models
from tests.together import STEPS_OF, Together, alone, batches, configs, fit, outcome


def build(dtype: torch.dtype) -> Any:
    return models.llama(dtype=dtype).train()


# other order of sums in products over more rows
TOLERANCES = {torch.float64: {"rtol": 1e-10, "atol": 1e-10}, torch.float32: {"rtol": 1e-6, "atol": 1e-6}}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_ten_steps_together_equal_runs_apart(dtype: torch.dtype, dropout: float) -> None:
    named = configs(adapter_dtype=str(dtype).removeprefix("torch."), dropout=dropout)
    module = Together(build(dtype))
    fit(module, named, batches())
    found, expected = outcome(module), alone(lambda: build(dtype), named)
    torch.testing.assert_close(found, expected, **TOLERANCES[dtype])
    steps = {name: int(found[name]["model.layers.0.mlp.up_proj.lora_A"][1]["step"]) for name in named}
    assert steps == STEPS_OF == {"law": 9, "medicine": 8, "code": 4}


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_an_exact_run_equals_runs_apart_bit_for_bit(dtype: torch.dtype) -> None:
    named = configs(adapter_dtype=str(dtype).removeprefix("torch."), dropout=0.3)
    module = Together(build(dtype), exact=True)
    fit(module, named, batches())
    unfused = {name: dataclasses.replace(config, fuse=False) for name, config in named.items()}
    torch.testing.assert_close(outcome(module), alone(lambda: build(dtype), unfused), rtol=0, atol=0)


def test_dropout_beside_a_magnitude_is_that_of_a_run_apart() -> None:
    named = configs(adapter_dtype="float64", dropout=0.3)
    named["code"] = dataclasses.replace(named["code"], use_dora=True, target_modules=["q_proj", "v_proj", "up_proj"])
    module = Together(build(torch.float64))
    fit(module, named, batches())
    found = outcome(module)
    torch.testing.assert_close(found, alone(lambda: build(torch.float64), named), **TOLERANCES[torch.float64])
