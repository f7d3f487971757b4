"""Optimizer state in a checkpoint: matched by name, stepped as the new run's optimizer was made to step."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import AdamW

from lightning_lora import LoRACallback, adapter_state_dict
from tests.runs import LanguageModule, loader, trainer


class Stepped(LanguageModule):
    """A run whose AdamW is made with ``options``."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def configure_optimizers(self) -> AdamW:
        return AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2, **self.options)


def fit(directory: Path, module: Stepped, ckpt_path: Path | None = None) -> Stepped:
    callbacks = LoRACallback(r=4), ModelCheckpoint(directory, save_top_k=-1, filename="{epoch}")
    run = trainer(directory, *callbacks, max_epochs=2, gradient_clip_val=0.5)
    run.fit(module, loader(), ckpt_path=ckpt_path)
    assert run.global_step == 8
    return module


@pytest.mark.parametrize("saved", [{}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("resumed", [{}, {"fused": True}], ids=str)
def test_a_run_resumes_under_another_kernel_of_adamw(
    tmp_path: Path, saved: dict[str, Any], resumed: dict[str, Any]
) -> None:
    whole = fit(tmp_path / "whole", Stepped(**resumed))
    fit(tmp_path / "saved", Stepped(**saved))
    module = fit(tmp_path / "resumed", Stepped(**resumed), ckpt_path=tmp_path / "saved" / "epoch=0.ckpt")
    # float32, another order of operations in each step
    torch.testing.assert_close(adapter_state_dict(module), adapter_state_dict(whole), rtol=1e-4, atol=1e-5)
    optimizer = module.optimizers(use_pl_optimizer=False)
    assert {entry["step"].item() for entry in optimizer.state.values()} == {8.0}


@pytest.mark.parametrize("kernel", ["fused", "foreach"])
def test_a_file_that_leaves_the_kernel_open_does_not_change_it(tmp_path: Path, kernel: str) -> None:
    fit(tmp_path / "saved", Stepped())
    file = torch.load(tmp_path / "saved" / "epoch=0.ckpt", weights_only=True)
    assert file["optimizer_states"][0]["param_groups"][0][kernel] is None
    module = fit(tmp_path / "resumed", Stepped(**{kernel: True}), ckpt_path=tmp_path / "saved" / "epoch=0.ckpt")
    optimizer = module.optimizers(use_pl_optimizer=False)
    assert optimizer.param_groups[0][kernel] is True
