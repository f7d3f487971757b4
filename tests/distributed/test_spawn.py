"""Strategies that start their processes themselves: the adapted model comes back to the process that called fit."""

from pathlib import Path

import pytest
from torch.multiprocessing import ProcessRaisedException

from lightning_lora import LoRACallback, LoRAConfig, inject, named_adapter_parameters
from tests.runs import LanguageModule, loader, trainer


def test_a_model_that_was_adapted_before_comes_back_trained(tmp_path: Path) -> None:
    module = LanguageModule()
    inject(module.model, LoRAConfig(r=4))
    trainer(tmp_path, LoRACallback(r=4), strategy="ddp_spawn", devices=2).fit(module, loader())
    assert all(parameter.abs().sum() > 0 for _, parameter in named_adapter_parameters(module))


def test_a_bare_model_is_refused_with_the_remedy(tmp_path: Path) -> None:
    run = trainer(tmp_path, LoRACallback(r=4), strategy="ddp_fork", devices=2)  # at once, where spawned ones import all
    with pytest.raises(ProcessRaisedException, match=r"adapt it before fit with the callback's settings: inject\("):
        run.fit(LanguageModule(), loader())
