"""The stand-in for CUDA in Megatron-core: installed once, and taken out again without a trace."""

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
