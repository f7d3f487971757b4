"""``LoRAConfig(fuse=False)``: a setting of how a run computes, which changes no file of adapters."""

from pathlib import Path

import pytest
import torch

from lightning_lora import (
    LoRAConfig,
    adapter_checkpoint,
    adapter_state_dict,
    inject,
    load_adapter_state_dict,
    load_peft,
    save_peft,
)
from tests import models


def adapted(*, fuse: bool) -> torch.nn.Module:
    model = inject(models.llama(), LoRAConfig(r=4, fuse=fuse))
    models.fill_adapters(model)
    return model


def test_it_is_true_or_false() -> None:
    with pytest.raises(TypeError, match="fuse='no' must be True or False"):
        LoRAConfig(fuse="no")


def test_the_config_holds_it_and_is_read_where_it_does_not() -> None:
    assert LoRAConfig.from_dict(LoRAConfig(fuse=False).to_dict()) == LoRAConfig(fuse=False)
    older = {name: value for name, value in LoRAConfig(fuse=False).to_dict().items() if name != "fuse"}
    assert LoRAConfig.from_dict(older).fuse
    assert "fuse" not in LoRAConfig(fuse=False).to_peft()


def test_a_peft_directory_is_the_same_with_and_without(tmp_path: Path) -> None:
    for fuse in (True, False):
        save_peft(adapted(fuse=fuse), tmp_path / str(fuse))
    written = [{path.name: path.read_bytes() for path in (tmp_path / str(fuse)).iterdir()} for fuse in (True, False)]
    assert written[0] == written[1]
    load_peft(models.llama(), tmp_path / "False")


@pytest.mark.parametrize("fuse", [True, False])
def test_a_checkpoint_loads_into_a_model_with_the_other_setting(fuse: bool, tmp_path: Path) -> None:
    torch.save(adapter_checkpoint(adapted(fuse=fuse)), tmp_path / "adapter.ckpt")
    model = inject(models.llama(), LoRAConfig(r=4, fuse=not fuse))
    load_adapter_state_dict(model, torch.load(tmp_path / "adapter.ckpt", weights_only=True))
    expected = adapter_state_dict(adapted(fuse=fuse))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter_state_dict(model).items())
