"""Classes that are made at run time: one for each pair of parents, and copies and pickles keep them."""

import copy
import pickle

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import nn

from lightning_lora import LoRAConfig, inject, remove
from lightning_lora.distributed.blocks import Block, wrap_blocks
from lightning_lora.layers.class_swap import lora_class
from lightning_lora.layers.linear import LoRALinear
from lightning_lora.strategies.trainer.adopted import AdoptedStrategy, adopt


def adapted() -> nn.Module:
    torch.manual_seed(0)
    return inject(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoRAConfig(r=2, target_modules=["0", "1"]))


def test_equal_layers_of_any_model_have_one_class() -> None:
    layers = [*adapted(), *adapted()]
    assert {type(layer) for layer in layers} == {lora_class(LoRALinear, nn.Linear)}
    assert all(isinstance(layer, nn.Linear) for layer in layers)
    assert type(layers[0]).__name__ == "LoRALinear"


def test_copies_and_pickles_keep_a_class_that_was_made_from_a_made_class() -> None:
    model = adapted()
    wrap_blocks([model[0]], activation_checkpointing=True, backend=None)
    assert isinstance(model[0], Block)
    assert isinstance(model[0], LoRALinear)
    x = torch.randn(3, 4, requires_grad=True)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [type(layer) for layer in twin] == [type(layer) for layer in model]
        assert torch.equal(twin(x), model(x))


def test_removed_adapters_leave_the_class_of_the_base_and_no_attribute() -> None:
    expected = nn.Linear(4, 4).__dict__.keys()
    layer = remove(adapted())[0]
    assert type(layer) is nn.Linear
    assert layer.__dict__.keys() == expected


def test_an_adopted_strategy_is_still_of_its_own_class() -> None:
    strategy = SingleDeviceStrategy(device="cpu")
    assert adopt(strategy) is strategy
    assert type(strategy) is lora_class(AdoptedStrategy, SingleDeviceStrategy)
    assert type(strategy).__name__ == "LoRASingleDeviceStrategy"
    assert isinstance(strategy, SingleDeviceStrategy)
