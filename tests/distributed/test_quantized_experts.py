"""Packed experts on ranks, in shards, copies and beside split layers, against one process: steps, bytes, streamed bases."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_lora import FSDPLoRAStrategy, MegatronLoRAStrategy, inject, named_adapter_parameters
from lightning_lora.checkpoint.fingerprint import fingerprint
from lightning_lora.model.quantize import quantize
from lightning_lora.ops.sharded import is_sharded, local_part, part_of
from tests import models
from tests.distributed.quantized import KINDS, Quantized, packed_bytes, quantized_layers, train, train_epochs
from tests.distributed.ranks import on_ranks
from tests.distributed.sharded import EVERYTHING, start
from tests.distributed.split import GRADIENT_TOLERANCE
from tests.distributed.training import EXACT, SHARDED, STEP_TOLERANCE, Recorded, from_all_ranks
from tests.fuse.test_experts import build
from tests.fuse.test_quantized_experts import CONFIGS, config

FAMILIES = ("qwen3_moe", "gpt_oss")


class QuantizedMixture(Quantized):
    """Trains adapters of packed experts."""

    def __init__(self, kind: str, family: str = "qwen3_moe", exclude: list[str] | None = None) -> None:
        self.family = family
        super().__init__(kind, exclude)

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


OPTIONS: list[dict[str, Any]] = [
    {},
    {"replicate_size": 2},
    {"cpu_offload": True},
    {"replicate_size": 2, "cpu_offload": True, "activation_checkpointing": True},
]


@on_ranks(2, 4)
def test_three_steps_in_shards_are_those_of_one_process(single: list[dict[str, Any]]) -> None:
    for options in OPTIONS:
        for (kind, family, how), expected in zip(RUNS, single, strict=True):
            found = run(kind, family, FSDPLoRAStrategy(**SHARDED, **options), how)
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


def cut_between_blocks(kind: str, family: str, how: str, strategy: Any = "auto") -> tuple[Any, dict[str, Any]]:
    """Train a model of which two ranks can cut every layer that is packed and not of experts."""
    module = QuantizedMixture(kind, family, ["o_proj"])
    return module, train(module, strategy, lora=CONFIGS[how])


SPLIT_RUNS = [("nf4", "qwen3_moe", "adapted"), ("nf4-dq", "mixtral", "adapted"), ("int8", "qwen3_moe", "not adapted")]


@pytest.fixture(scope="module")
def single_split() -> list[dict[str, Any]]:
    return [cut_between_blocks(*one)[1] for one in SPLIT_RUNS]


@on_ranks(2)
def test_experts_stay_whole_and_packed_beside_layers_that_are_split(single_split: list[dict[str, Any]]) -> None:
    for one, expected in zip(SPLIT_RUNS, single_split, strict=True):
        module, found = cut_between_blocks(*one, MegatronLoRAStrategy(tensor_parallel_size=2))
        for name, layer in quantized_layers(module).items():
            assert any(map(is_sharded, layer.parameters(recurse=False))) == ("experts" not in name)
        parameters = dict(named_adapter_parameters(module))
        for name, gradient in expected["gradients"].items():
            own = local_part(part_of(gradient, parameters[name]))
            torch.testing.assert_close(local_part(found["gradients"][name]), own, **GRADIENT_TOLERANCE)
        torch.testing.assert_close(found["stored"], expected["stored"], **EXACT)
        for what in ("losses", "adapters"):
            torch.testing.assert_close(found[what], expected[what], **STEP_TOLERANCE)
        torch.testing.assert_close(*from_all_ranks(found["adapters"]), **EXACT)


LORA = CONFIGS["adapted"]


@on_ranks()
def in_shards(directory: Path, ckpt_path: Path | None, epochs: int, num_ranks: int) -> dict[str, Any]:
    strategy = FSDPLoRAStrategy(**SHARDED)
    return train_epochs(directory, QuantizedMixture("nf4"), strategy, ckpt_path, epochs, lora=LORA)


def test_one_file_goes_from_four_ranks_in_nf4_to_one_in_bf16_to_two_in_nf4(tmp_path: Path) -> None:
    first, *others = in_shards(tmp_path / "first", None, 1, num_ranks=4)
    for other in others:
        torch.testing.assert_close(other["after"], first["after"], **EXACT)
    module = Recorded()
    module.model = build("qwen3_moe").train().bfloat16()
    path = tmp_path / "first" / "epoch=0.ckpt"
    second = train_epochs(tmp_path / "second", module, "auto", path, 2, lora=LORA)
    torch.testing.assert_close(second["before"], first["after"], **EXACT)
    path = tmp_path / "second" / "epoch=1.ckpt"
    alone = train_epochs(tmp_path / "alone", QuantizedMixture("nf4"), "auto", path, 3, lora=LORA)
    for third in in_shards(tmp_path / "third", path, 3, num_ranks=2):
        torch.testing.assert_close(third["before"], second["after"], **EXACT)
        torch.testing.assert_close(third["losses"], alone["losses"], **STEP_TOLERANCE)
        torch.testing.assert_close(third["after"][0], alone["after"][0], **STEP_TOLERANCE)
    files = [torch.load(tmp_path / name / "epoch=2.ckpt", weights_only=True) for name in ("third", "alone")]
    assert files[0]["state_dict"].keys() == files[1]["state_dict"].keys()


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
