"""``fsdp_lora`` over a base in 4 and 8 bits, on 2 and 4 gloo ranks against one process: steps, bytes, options, files."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import FSDPLoRAStrategy, LoRAConfig, inject
from lightning_lora.model.quantize import quantize
from lightning_lora.ops.sharded import is_sharded, local_part
from tests import models
from tests.distributed.counting import counted_collectives
from tests.distributed.quantized import KINDS, Quantized, packed_bytes, quantized_layers, train, train_epochs
from tests.distributed.ranks import on_ranks
from tests.distributed.sharded import start
from tests.distributed.training import EXACT, SHARDED, Recorded, fit

RUNS = {**{kind: (kind, "32-true") for kind in KINDS}, "bf16": ("nf4-dq", "bf16-true"), "mixed": ("nf4", "bf16-mixed")}


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    """Three steps of each kind on one process."""
    return {name: train(Quantized(kind), precision=precision) for name, (kind, precision) in RUNS.items()}


@pytest.fixture(scope="module", params=[2, 4])
def num_ranks(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
@on_ranks()
def ranks(num_ranks: int) -> dict[str, Any]:
    runs = {}
    for name, (kind, precision) in RUNS.items():
        module = Quantized(kind)
        runs[name] = train(module, FSDPLoRAStrategy(**SHARDED), precision=precision)
        layers = quantized_layers(module.model).values()
        runs[name]["split"] = [(one.weight_codes, one.weight_scales) for one in layers]
        runs[name]["split"] = [tuple(local_part(part).shape[0] for part in parts) for parts in runs[name]["split"]]
        runs[name]["sharded"] = [n for n, p in module.named_parameters() if is_sharded(p)]
    return runs


@pytest.mark.parametrize("name", [name for name in RUNS if name != "mixed"])
def test_losses_gradients_and_three_steps_are_bit_equal_to_one_process(ranks: Any, single: Any, name: str) -> None:
    for rank in ranks:
        for what in ("losses", "gradients", "adapters"):
            torch.testing.assert_close(rank[name][what], single[name][what], **EXACT)


def test_mixed_precision_leaves_the_packed_bytes_alone(ranks: Any, single: Any) -> None:
    for rank in ranks:
        # embeddings and norms are gathered in bfloat16, which has 8 bits; one process keeps them in float32
        torch.testing.assert_close(rank["mixed"]["losses"], single["mixed"]["losses"], rtol=5e-3, atol=5e-3)
        torch.testing.assert_close(rank["mixed"]["adapters"], ranks[0]["mixed"]["adapters"], **EXACT)


@pytest.mark.parametrize("name", RUNS)
def test_packed_bytes_are_those_of_one_process_in_storage_and_inside_forward(
    ranks: Any, single: Any, name: str
) -> None:
    for rank in ranks:
        for what in ("stored", "seen"):
            torch.testing.assert_close(rank[name][what], single[name]["stored"], **EXACT)


@pytest.mark.parametrize("name", KINDS)
def test_codes_and_scales_are_split_between_the_same_blocks(ranks: Any, single: Any, num_ranks: int, name: str) -> None:
    assert len([one for one in ranks[0][name]["sharded"] if one.endswith(("_codes", "_scales"))]) == 2 * 14
    for rank in ranks:
        assert all(codes == scales for codes, scales in rank[name]["split"])
    whole = [len(part) for key, part in single[name]["stored"].items() if key.endswith("codes")]
    assert [sum(rank[name]["split"][i][0] for rank in ranks) for i in range(14)] == whole


OPTIONS: dict[str, dict[str, Any]] = {
    "checkpointed": {"activation_checkpointing": True},
    "kept": {"reshard_after_forward": False},
    "offloaded": {"cpu_offload": True},
    "hybrid": {"replicate_size": 2},
    "hybrid, offloaded, checkpointed": {"replicate_size": 2, "cpu_offload": True, "activation_checkpointing": True},
}


@on_ranks(4)
def test_options_change_nothing(single: Any) -> None:
    for options in OPTIONS.values():
        run = train(Quantized("nf4-dq"), FSDPLoRAStrategy(**SHARDED, **options))
        for what in ("losses", "gradients", "adapters", "stored"):
            torch.testing.assert_close(run[what], single["nf4-dq"][what], **EXACT)


class Counted(Recorded):
    """Notes what is gathered in each step."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.model = self.model.bfloat16()
        self.gathered_bytes: list[int] = []
        if kind is not None:
            quantize(self.model, kind)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._counting = counted_collectives()
        self.traffic = self._counting.__enter__()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._counting.__exit__(None, None, None)
        size = self.traffic.gathered_dtype.itemsize
        self.gathered_bytes.append(size * sum(self.traffic["all_gather"]))


@on_ranks(2)
def test_a_step_gathers_packed_bytes() -> None:
    gathered = {}
    for kind in (None, "nf4", "nf4-dq"):
        module = Counted(kind)
        fit(None, module, "fsdp_lora", limit_train_batches=3)
        assert len(set(module.gathered_bytes)) == 1
        gathered[kind] = module.gathered_bytes[0]
    # 4.5 and 4.13 bits of 16, and two norms of each block
    assert gathered["nf4"] / gathered[None] < 0.29
    assert gathered["nf4-dq"] / gathered[None] < 0.28


@on_ranks(2)
def test_ranks_that_drew_other_values_get_the_first_ranks_bytes() -> None:
    fabric = start(**SHARDED)
    model = models.llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter, generator=None) * fabric.global_rank)
    quantize(model, "nf4-dq")
    expected = models.llama()
    quantize(expected, "nf4-dq")
    inject(model, LoRAConfig(r=2))
    fabric.setup(model)
    torch.testing.assert_close(packed_bytes(model), packed_bytes(expected), **EXACT)


@pytest.mark.parametrize("kind", KINDS)
@on_ranks(2)
def test_a_state_dict_of_shards_is_whole_and_loads_again(kind: str) -> None:
    model, other = models.llama(), models.llama()
    quantize(model, kind)
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(2)
    quantize(other, kind)
    expected, state = packed_bytes(model), other.state_dict()
    inject(model, LoRAConfig(r=2))
    start(**SHARDED).setup(model)
    kept = {name: value.detach().clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, strict=False)  # whole, in bitsandbytes' keys
    torch.testing.assert_close(packed_bytes(model), packed_bytes(other), **EXACT)
    model.load_state_dict(kept)
    torch.testing.assert_close(packed_bytes(model), expected, **EXACT)


@on_ranks(4)
def in_shards(directory: Path, ckpt_path: Path | None, epochs: int) -> dict[str, Any]:
    return train_epochs(directory, Quantized("nf4-dq"), FSDPLoRAStrategy(**SHARDED), ckpt_path, epochs)


def test_one_adapter_file_goes_from_nf4_in_shards_to_bf16_on_one_process_and_back(tmp_path: Path) -> None:
    first, *others = in_shards(tmp_path / "first", None, 1)
    for other in others:
        torch.testing.assert_close(other["after"], first["after"], **EXACT)
    module = Recorded()
    module.model = module.model.bfloat16()
    path = tmp_path / "first" / "epoch=0.ckpt"
    second = train_epochs(tmp_path / "second", module, "auto", path, 2)
    torch.testing.assert_close(second["before"], first["after"], **EXACT)
    for third in in_shards(tmp_path / "third", tmp_path / "second" / "epoch=1.ckpt", 3):
        torch.testing.assert_close(third["before"], second["after"], **EXACT)
    # and NF4 on one process writes the file that four ranks write
    train_epochs(tmp_path / "alone", Quantized("nf4-dq"), "auto", None, 1)
    files = [torch.load(tmp_path / name / "epoch=0.ckpt", weights_only=True) for name in ("first", "alone")]
    torch.testing.assert_close(files[0]["state_dict"], files[1]["state_dict"], **EXACT)
