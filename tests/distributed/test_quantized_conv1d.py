"""GPT-2 over packed ``Conv1D``s on ranks, in shards and filled from disk, against one process."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_lora import FSDPLoRAStrategy, LoRAConfig, MegatronLoRAStrategy, inject
from lightning_lora.checkpoint.fingerprint import fingerprint
from lightning_lora.distributed import packed_target
from lightning_lora.model.quantize import quantize
from tests import models
from tests.distributed.quantized import KINDS, Quantized, packed_bytes, train, train_epochs
from tests.distributed.ranks import on_ranks
from tests.distributed.sharded import EVERYTHING, start
from tests.distributed.training import EXACT, SHARDED, STEP_TOLERANCE, error_of


class QuantizedGPT2(Quantized):
    def build(self) -> nn.Module:
        model = models.gpt2().train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return model


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    return {kind: train(QuantizedGPT2(kind)) for kind in KINDS}


@on_ranks(2)
def test_three_steps_in_shards_are_those_of_one_process(single: dict[str, Any]) -> None:
    for kind in KINDS:
        found = train(QuantizedGPT2(kind), FSDPLoRAStrategy(**SHARDED))
        for what in ("stored", "seen"):
            torch.testing.assert_close(found[what], single[kind][what], **EXACT)
        for what in ("losses", "gradients", "adapters"):
            torch.testing.assert_close(found[what], single[kind][what], **STEP_TOLERANCE)


@on_ranks(2)
def in_shards(directory: Path, ckpt_path: Path | None, epochs: int) -> dict[str, Any]:
    return train_epochs(directory, QuantizedGPT2("nf4-dq"), FSDPLoRAStrategy(**SHARDED), ckpt_path, epochs)


def test_a_file_goes_from_shards_in_nf4_to_one_process_in_int8_and_back(tmp_path: Path) -> None:
    first, _ = in_shards(tmp_path / "first", None, 1)
    path = tmp_path / "first" / "epoch=0.ckpt"
    second = train_epochs(tmp_path / "second", QuantizedGPT2("int8"), "auto", path, 2)
    torch.testing.assert_close(second["before"], first["after"], **EXACT)
    for third in in_shards(tmp_path / "third", tmp_path / "second" / "epoch=1.ckpt", 3):
        torch.testing.assert_close(third["before"], second["after"], **EXACT)


@pytest.fixture(scope="module")
def saved(directory: Path) -> Path:
    """Return the folder with the base as it is, and packed in each kind."""
    models.gpt2().save_pretrained(directory / "base")
    for kind in KINDS:
        quantize(model := models.gpt2(), kind)
        model.save_pretrained(directory / kind)
    return directory


@on_ranks(2)
def test_bases_on_disk_become_the_bytes_of_one_process(saved: Path) -> None:
    known = fingerprint(inject(models.gpt2(), LoRAConfig(r=2)))
    for kind in KINDS:
        quantize(expected := models.gpt2(), kind)
        for source in ("base", kind):
            model = models.on_meta(AutoModelForCausalLM, saved / "base")
            inject(model, LoRAConfig(r=2), quantize=kind)
            with mock.patch.object(packed_target, "_CHUNK", 1000):  # parts of rows
                start(**EVERYTHING, base_weights=str(saved / source)).setup(model)
            torch.testing.assert_close(packed_bytes(model), packed_bytes(expected), **EXACT)
            if source == "base":
                found = fingerprint(model)
                hashes = [dict(zip(one["names"], one["hashes"].tolist(), strict=True)) for one in (found, known)]
                assert hashes[0] == hashes[1]


@on_ranks(2)
def test_a_plan_that_splits_it_is_refused_by_name() -> None:
    strategy = MegatronLoRAStrategy(tensor_parallel_size=2, plan={"h.*.mlp.c_fc": "colwise"})
    message = error_of(train, QuantizedGPT2("nf4"), strategy)
    assert "the plan names 'transformer.h.0.mlp.c_fc'" in message
    assert "split are linear layers" in message
