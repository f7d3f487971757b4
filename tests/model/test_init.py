"""An initialisation of a user's own is a function and its registration."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, inject
from lightning_lora.config import INITS
from lightning_lora.model import init
from tests import models


@pytest.fixture
def constant() -> Iterator[str]:
    @init.register_init("constant_N")
    def constant(layer, pair, word, generator):
        return torch.full(pair.A.shape, float(word.rpartition("_")[2])), None

    yield "constant_N"
    del INITS["constant_N"], init._FUNCTIONS["constant_N"]


def test_an_initialisation_is_added_by_registration(constant: str) -> None:
    model: nn.Module = inject(models.llama(), LoRAConfig(r=2, init="constant_3"))
    factors = dict(model.named_parameters())
    assert all((factors[name] == 3).all() for name in factors if name.endswith("lora_A"))
    assert not any(factors[name].any() for name in factors if name.endswith("lora_B"))
    with pytest.raises(ValueError, match=r"init='constant' must be one of 'kaiming', .* or 'constant_N'"):
        LoRAConfig(init="constant")


def test_an_initialisation_that_is_not_registered_is_refused() -> None:
    with pytest.raises(ValueError, match="init='constant_3' must be one of .* or 'olora'"):
        LoRAConfig(init="constant_3")
