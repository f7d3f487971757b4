"""The same runs on an accelerator. Skipped, with the reason, where there is none."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import LoRACallback, adapter_state_dict
from tests import runs

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and this machine has none"),
]


@pytest.mark.parametrize("strategy", [pytest.param(name, marks=needs_gpu) for name in ("auto", "fsdp_lora")])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_on_a_gpu_ends_near_where_the_cpu_does(strategy: str, precision: str, tmp_path: Path) -> None:
    def fit(accelerator: str, strategy: str) -> Any:
        module = runs.LanguageModule()
        trainer = runs.trainer(
            tmp_path, LoRACallback(r=4), accelerator=accelerator, strategy=strategy, precision=precision, max_epochs=2
        )
        trainer.fit(module, runs.loader())
        return trainer, module

    trainer, on_gpu = fit("gpu", strategy)
    _, on_cpu = fit("cpu", "auto")
    # TF32 and bfloat16 round to 10 and 8 bits; the loss is near 4.6
    torch.testing.assert_close(torch.tensor(on_gpu.losses), torch.tensor(on_cpu.losses), rtol=2e-2, atol=2e-2)
    trainer.save_checkpoint(tmp_path / "gpu.ckpt")
    loaded = runs.LanguageModule.load_from_checkpoint(tmp_path / "gpu.ckpt", map_location="cpu")
    for name, value in adapter_state_dict(loaded).items():
        assert torch.equal(value, adapter_state_dict(on_gpu)[name].cpu()), name
