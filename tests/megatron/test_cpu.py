"""The stand-in for CUDA in Megatron-core: installed once, and taken out again without a trace."""

import gc
from typing import Any

import pytest
import torch

from lightning_lora.megatron import cpu
from lightning_lora.megatron.core import megatron_core


def test_uninstall_puts_megatron_core_and_torch_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # install() refuses a machine with a CUDA device
    megatron_core()
    cpu.uninstall()  # an earlier test's
    owners = cpu._patched_owners()

    def state() -> list[dict[str, Any]]:
        return [dict(vars(owner)) for owner in owners]

    before = state()
    cpu.install()
    installed = state()
    cpu.install()
    assert state() == installed
    assert torch.cuda.current_device() == torch.device("cpu")
    cpu.uninstall()
    assert state() == before
    assert installed != before


def test_patches_stay_until_the_last_of_their_users_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    megatron_core()
    cpu.uninstall()
    before = torch.cuda.current_device
    strategy, model = torch.nn.Identity(), torch.nn.Sequential(torch.nn.Linear(1, 1))
    layer = model[0]
    cpu.install_for(strategy)
    cpu.install_for(*model.modules())
    cpu.release(strategy)
    del model
    gc.collect()
    assert torch.cuda.current_device() == torch.device("cpu")
    del layer
    gc.collect()
    assert torch.cuda.current_device is before


def test_patches_that_a_script_installed_outlive_those_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    megatron_core()
    cpu.uninstall()
    cpu.install()
    run = torch.nn.Identity()
    cpu.install_for(run)
    cpu.release(run)
    assert torch.cuda.current_device() == torch.device("cpu")
    cpu.uninstall()
