"""Optimizer states in 8 and 4 bits on 2 gloo ranks."""

from pathlib import Path

import pytest
import torch

from lightning_lora import FSDPLoRAStrategy, adapter_state_dict
from tests.checkpoint.packed_optimizers import fit, packed_dtypes
from tests.distributed.ranks import on_ranks

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytest.importorskip("torchao", reason="torchao is not installed")


@on_ranks(2)
def resume(directory: Path, name: str, strategy: str) -> None:
    whole = fit(directory, name, 20, strategy=strategy, devices=2)
    fit(directory, name, 10, strategy=strategy, devices=2)
    resumed = fit(directory, name, 20, directory / "10.ckpt", strategy=strategy, devices=2)
    assert packed_dtypes(resumed) == packed_dtypes(whole) != set()
    assert resumed.losses == whole.losses[10:]
    torch.testing.assert_close(adapter_state_dict(resumed), adapter_state_dict(whole), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["bitsandbytes AdamW8bit", "torchao AdamW8bit"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp_lora"])
def test_ten_steps_and_ten_more_are_twenty_on_two_ranks(tmp_path: Path, name: str, strategy: str) -> None:
    resume(tmp_path, name, strategy)


@on_ranks(2)
@pytest.mark.parametrize("name", ["bitsandbytes AdamW8bit", "torchao AdamW8bit"])
def test_parts_of_tensors_are_refused_before_the_first_step(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="AdamW8bit keeps its state in blocks of 8 or 4 bits, and some of what it"):
        fit(tmp_path, name, 5, strategy=FSDPLoRAStrategy(shard_adapters=True), devices=2)
