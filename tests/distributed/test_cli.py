"""LightningCLI on two ranks under ``fsdp_lora``: an optimizer that the command line names trains the adapters."""

import sys
from pathlib import Path

import pytest
import torch

from lightning_lora import adapter_state_dict
from tests.distributed.cli_script import Eager, train
from tests.distributed.launch import launch


def test_an_optimizer_of_the_command_line_trains_as_on_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = launch("cli_script.py", 2, tmp_path)
    monkeypatch.setattr(sys, "argv", ["cli"])
    single = adapter_state_dict(train(Eager, tmp_path / "single", "--trainer.devices=1").model)
    for rank in ranks:
        for name in ("Eager", "Lazy"):
            # eight steps at lr 1e-2 and eps 1e-4 on gradients that are summed in another order
            torch.testing.assert_close(rank[name], single, rtol=1e-4, atol=1e-5)
