"""What would copy or write one rank's parts of a model is an error that says what to write instead."""

import copy
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from lightning_lora import merge
from lightning_lora.ops.sharded import is_sharded
from tests.distributed.ranks import on_ranks
from tests.distributed.spread import adapted, kinds, launched, spread, tensors_of


def ways(model: Any, path: Path) -> dict[str, Callable[[], Any]]:
    """Return what copies a model, a layer or a parameter of it, or writes one to a file, and would keep parts."""
    holder = next(module for module in model.modules() if any(map(is_sharded, module.parameters(recurse=False))))
    part = next(parameter for parameter in holder.parameters(recurse=False) if is_sharded(parameter))
    found = {
        "torch.save(state_dict)": lambda: torch.save(model.state_dict(), path),
        "torch.save(model)": lambda: torch.save(model, path),
        "torch.save(layer)": lambda: torch.save(holder, path),
        "torch.save(parameter)": lambda: torch.save(part, io.BytesIO()),
        "pickle.dumps(model)": lambda: pickle.dumps(model),
        "deepcopy(model)": lambda: copy.deepcopy(model),
        "deepcopy(layer)": lambda: copy.deepcopy(holder),
        "deepcopy(wrapper)": lambda: copy.deepcopy(nn.Sequential(model)),
        "pickle.dumps(parameters)": lambda: pickle.dumps(list(model.parameters())),
        "AveragedModel": lambda: torch.optim.swa_utils.AveragedModel(model),
        "safetensors.save_file": lambda: safetensors.torch.save_file(tensors_of(model), path),
        "safetensors.save_model": lambda: safetensors.torch.save_model(model, str(path)),
    }
    if hasattr(model, "save_pretrained"):
        found["save_pretrained"] = lambda: model.save_pretrained(path.parent / "saved")
        found["inner save_pretrained"] = lambda: model.model.save_pretrained(path.parent / "saved")
    else:  # Megatron-core's models have extra state, which safetensors refuses before it looks at tensors
        found.pop("safetensors.save_model")
    return found


def assert_all_ways_are_refused(model: Any, directory: Path) -> None:
    for name, way in ways(model, directory / f"{os.environ['RANK']}.pt").items():
        with pytest.raises(ValueError, match="spread over ranks") as refused:
            way()
        assert "save_peft(model, directory)" in str(refused.value), name
        assert "merge(YourModule.load_from_checkpoint(path), remove=True)" in str(refused.value), name
    assert not (directory / "saved").exists()


@kinds
@on_ranks(2)
def test_what_would_hold_parts_says_what_to_write(tmp_path: Path, hf: Path, kind: str) -> None:
    model, _ = spread(kind, hf)
    assert_all_ways_are_refused(model, tmp_path)
    merge(model)
    assert_all_ways_are_refused(model, tmp_path)
    merge(model, remove=True)
    assert_all_ways_are_refused(model, tmp_path)


@on_ranks(2)
def test_megatrons_model_is_in_parts_before_it_is_placed(hf: Path) -> None:
    launched("gpt")
    model = adapted("gpt", hf)
    with pytest.raises(ValueError, match=r"save_peft\(model, directory\)"):
        copy.deepcopy(model)
