"""Packed experts on ranks, in shards, copies and beside split layers, against one process: steps, bytes, streamed bases."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_lora import FSDPLoRAStrategy, MegatronLoRAStrategy, inject
from lightning_lora.checkpoint.fingerprint import fingerprint
from lightning_lora.model.quantize import quantize
from tests import models
from tests.distributed.quantized import KINDS, Quantized, packed_bytes, train
from tests.distributed.ranks import on_ranks
from tests.distributed.sharded import EVERYTHING, start
from tests.distributed.training import EXACT, SHARDED, STEP_TOLERANCE
from tests.fuse.test_experts import build
from tests.fuse.test_quantized_experts import CONFIGS, config

FAMILIES = ("qwen3_moe", "gpt_oss")


class QuantizedMixture(Quantized):
    """Trains adapters of packed experts."""

    def __init__(self, kind: str, family: str = "qwen3_moe") -> None:
        self.family = family
        super().__init__(kind)

    def build(self) -> nn.Module:
        return build(self.family).train()


def run(kind: str, family: str, strategy: Any = "auto", how: str = "adapted", **settings: Any) -> dict[str, Any]:
    return train(QuantizedMixture(kind, family), strategy, lora=CONFIGS[how], **settings)


RUNS = [("nf4", "qwen3_moe", "adapted"), ("nf4-dq", "gpt_oss", "adapted"), ("int8", "qwen3_moe", "not adapted")]


@pytest.fixture(scope="module")
def single() -> list[dict[str, Any]]:
    return [run(kind, family, how=how) for kind, family, how in RUNS]


def assert_same(found: dict[str, Any], expected: dict[str, Any], *packed: str) -> None:
    """Compare bytes bit for bit, and numbers but for the order of sums, which depends on the number of threads."""
    for what in ("losses", "gradients", "adapters"):
        torch.testing.assert_close(found[what], expected[what], **STEP_TOLERANCE)
    for what in packed:
        torch.testing.assert_close(found[what], expected[what], **EXACT)


@on_ranks(2)
def test_three_steps_in_shards_are_those_of_one_process(single: list[dict[str, Any]]) -> None:
    for (kind, family, how), expected in zip(RUNS, single, strict=True):
        found = run(kind, family, FSDPLoRAStrategy(**SHARDED), how)
        assert_same(found, expected, "stored", "seen")


@on_ranks(2)
def test_mixed_precision_leaves_the_packed_bytes_alone(single: list[dict[str, Any]]) -> None:
    kind, family, how = RUNS[0]
    found = run(kind, family, FSDPLoRAStrategy(**SHARDED), how, precision="bf16-mixed")
    for what in ("stored", "seen"):
        torch.testing.assert_close(found[what], single[0]["stored"], **EXACT)
    torch.testing.assert_close(found["losses"], single[0]["losses"], rtol=5e-3, atol=5e-3)  # bfloat16 has 8 bits


@on_ranks(2)
def test_three_steps_of_replicas_are_those_of_one_process(single: list[dict[str, Any]]) -> None:
    kind, family, how = RUNS[0]
    found = run(kind, family, "ddp", how)
    assert_same(found, single[0], "stored")


@on_ranks(2)
def test_experts_stay_whole_and_packed_beside_layers_that_are_split(single: list[dict[str, Any]]) -> None:
    kind, family, how = RUNS[2]
    found = run(kind, family, MegatronLoRAStrategy(tensor_parallel_size=2), how)
    for key, expected in single[2]["stored"].items():
        if "experts" in key:
            torch.testing.assert_close(found["stored"][key], expected, **EXACT)
    torch.testing.assert_close(found["losses"], single[2]["losses"], **STEP_TOLERANCE)


@pytest.fixture(scope="module")
def saved(directory: Path) -> Path:
    """Return the folder with a base as transformers writes it, one tensor for each expert, and packed in each kind."""
    for family in FAMILIES:
        build(family).save_pretrained(directory / family)
        for kind in KINDS:
            quantize(model := build(family), kind)
            state = {name: value.clone() for name, value in model.state_dict().items()}
            safetensors.torch.save_file(state, directory / f"{family}-{kind}.safetensors")
    return directory


@on_ranks(2)
def test_bases_on_disk_become_the_bytes_of_one_process(saved: Path) -> None:
    for family in FAMILIES:
        for kind in KINDS:
            quantize(expected := build(family), kind)
            known = fingerprint(inject(build(family), config()))
            for source in (family, f"{family}-{kind}.safetensors"):
                model = models.on_meta(AutoModelForCausalLM, saved / family)
                inject(model, config(), quantize=kind)
                start(**EVERYTHING, base_weights=str(saved / source)).setup(model)
                torch.testing.assert_close(packed_bytes(model), packed_bytes(expected), **EXACT)
                if source == family:
                    found = fingerprint(model)
                    assert dict(zip(found["names"], found["hashes"].tolist(), strict=True)) == dict(
                        zip(known["names"], known["hashes"].tolist(), strict=True)
                    )
