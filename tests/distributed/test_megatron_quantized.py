"""``megatron_lora`` over a quantised base, on 2 and 4 gloo ranks against one process: bytes, steps, files, refusals."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from lightning_lora import LoRAConfig, MegatronLoRAStrategy, inject, named_adapter_parameters
from lightning_lora.checkpoint.fingerprint import fingerprint
from lightning_lora.fabric import MegatronLoRAStrategy as FabricStrategy
from lightning_lora.model.quantize import quantize
from lightning_lora.ops.sharded import is_sharded, local_part, part_of
from tests import models
from tests.distributed.quantized import KINDS, AtStart, Quantized, packed_bytes, quantized_layers, train
from tests.distributed.ranks import on_ranks
from tests.distributed.split import GRADIENT_TOLERANCE
from tests.distributed.training import EXACT, STEP_TOLERANCE, Recorded, fit, from_all_ranks, rank_loader, rank_of, state


def wide_llama() -> nn.Module:
    """A Llama that four ranks cut between blocks of 64 values, by rows and by columns."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 100}
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=4, **sizes)
    return models._seeded(lambda: AutoModelForCausalLM.from_config(config))


def quantized(kind: Any) -> nn.Module:
    model = wide_llama()
    quantize(model, kind)
    return model


class Wide(Quantized):
    def build(self) -> nn.Module:
        return wide_llama()


def dense(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.weight for name, layer in quantized_layers(model).items()}


def of_rank(weight: Tensor, layer: Any) -> Tensor:
    rank, num_ranks = rank_of()
    return weight.chunk(num_ranks, layer.tp_dim)[rank]


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    return {kind: train(Wide(kind)) for kind in KINDS}


@on_ranks(2, 4)
def test_bytes_and_three_steps_equal_one_process(single: dict[str, Any]) -> None:
    for kind in KINDS:
        module = Wide(kind)
        run = train(module, MegatronLoRAStrategy(tensor_parallel_size=rank_of()[1]))
        expected = dense(quantized(kind))
        for name, layer in quantized_layers(module.model).items():
            assert torch.equal(layer.weight, of_rank(expected[name], layer))
        torch.testing.assert_close(run["stored"], single[kind]["stored"], **EXACT)
        # a row-parallel product is a sum over ranks, whose order is another
        parameters = dict(named_adapter_parameters(module))
        for name, gradient in run["gradients"].items():
            own = local_part(part_of(single[kind]["gradients"][name], parameters[name]))
            torch.testing.assert_close(local_part(gradient), own, **GRADIENT_TOLERANCE)
        torch.testing.assert_close(run["losses"], single[kind]["losses"], **STEP_TOLERANCE)
        torch.testing.assert_close(run["adapters"], single[kind]["adapters"], **STEP_TOLERANCE)
        replicas = from_all_ranks({n: p.detach() for n, p in module.named_parameters() if not is_sharded(p)})
        torch.testing.assert_close(replicas, [replicas[0]] * len(replicas), **EXACT)
        # an eighth of float32's bytes, and a scale for each block
        held = sum(local_part(p).nbytes for n, p in module.named_parameters() if n.endswith(("_codes", "_scales")))
        assert held * rank_of()[1] < 0.28 * 4 * sum(weight.numel() for weight in expected.values())


@pytest.fixture(scope="module")
def saved(directory: Path) -> Path:
    """Return the folder with the base in float32, and packed in each kind."""
    wide_llama().save_pretrained(directory / "base")
    for kind in KINDS:
        (directory / kind).mkdir()
        safetensors.torch.save_file(dict(quantized(kind).state_dict()), directory / kind / "weights.safetensors")
    return directory


def place(model: nn.Module, **options: Any) -> nn.Module:
    size = rank_of()[1]
    fabric = Fabric(accelerator="cpu", devices=size, strategy=FabricStrategy(tensor_parallel_size=size, **options))
    fabric.launch()
    fabric.setup(inject(model, LoRAConfig(r=2)))
    return model


@on_ranks(2, 4)
def test_a_base_on_disk_becomes_the_bytes_that_one_process_makes_of_it(saved: Path) -> None:
    for kind in KINDS:
        alone = inject(quantized(kind), LoRAConfig(r=2))
        expected, values = packed_bytes(alone), dense(alone)
        for source in ("base", kind):
            model = models.on_meta(AutoModelForCausalLM, saved / "base")
            quantize(model, kind)
            place(model, base_weights=str(saved / source))
            torch.testing.assert_close(packed_bytes(model), expected, **EXACT)
            for name, layer in quantized_layers(model).items():
                assert torch.equal(layer.weight, of_rank(values[name], layer))
            found, known = fingerprint(model), fingerprint(alone)
            assert found["packed"] == known["packed"]
            hashes = [dict(zip(one["names"], one["hashes"].tolist(), strict=True)) for one in (found, known)]
            assert hashes[0].items() <= hashes[1].items()
            assert len(hashes[0]) == len(hashes[1]) - (0 if source == "base" else 14)


@on_ranks(2)
def test_a_state_dict_of_parts_is_whole_and_loads_again() -> None:
    for kind in KINDS:
        alone, other = quantized(kind), wide_llama()
        with torch.no_grad():
            other.model.layers[0].mlp.down_proj.weight.mul_(2)
        quantize(other, kind)
        model = place(quantized(kind))
        kept = {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.load_state_dict(other.state_dict(), strict=False)  # whole, in bitsandbytes' keys
        torch.testing.assert_close(packed_bytes(model), packed_bytes(other), **EXACT)
        model.load_state_dict(kept)
        torch.testing.assert_close(packed_bytes(model), packed_bytes(alone), **EXACT)


@on_ranks(2)
def write_file(directory: Path) -> dict[str, Tensor]:
    module = Wide("nf4-dq")
    strategy = MegatronLoRAStrategy(tensor_parallel_size=2)
    fit(directory, module, strategy, loaders={"train_dataloaders": rank_loader(0, 1)}, limit_train_batches=1)
    return state(module)


class Float(Recorded):
    def __init__(self) -> None:
        super().__init__()
        self.model = wide_llama().bfloat16()


def test_a_file_of_parts_resumes_over_bf16_on_one_process(tmp_path: Path) -> None:
    written, at_start = write_file(tmp_path)[0], AtStart()
    settings = {"max_epochs": 2, "limit_train_batches": 1, "callbacks": (at_start,)}
    fit(tmp_path / "alone", Float(), "auto", ckpt_path=tmp_path / "epoch=0.ckpt", **settings)
    torch.testing.assert_close(at_start.adapters, written, **EXACT)


@on_ranks(2)
def test_a_cut_through_blocks_is_refused_before_anything_changes() -> None:
    for kind, message in (
        ("nf4", r"'model.layers.0.self_attn.o_proj' is quantised in blocks of 64 .* each rank has 16 columns"),
        ("int8", ""),
    ):
        model = models.llama()
        quantize(model, kind)
        before = packed_bytes(model)
        if message:
            with pytest.raises(ValueError, match=message) as raised:
                place(model)
            assert "quantize_exclude='model.layers.0.self_attn.o_proj'" in str(raised.value)
            torch.testing.assert_close(packed_bytes(model), before, **EXACT)
            assert not any(map(is_sharded, model.parameters()))
        else:
            place(model)
