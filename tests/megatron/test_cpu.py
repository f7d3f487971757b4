"""The stand-in for CUDA in Megatron-core: installed once, and taken out again without a trace."""

from typing import Any

import pytest
import torch

from lightning_lora.megatron import cpu
from lightning_lora.megatron.core import megatron_core


@pytest.mark.skipif(torch.cuda.is_available(), reason="install() refuses a machine with a CUDA device")
def test_uninstall_puts_megatron_core_and_torch_back() -> None:
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
