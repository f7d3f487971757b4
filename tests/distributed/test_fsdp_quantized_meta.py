"""Quantised bases that are built without values and streamed from safetensors, each rank its own blocks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lightning_lora import FSDPLoRAStrategy, LoRAConfig, inject
from lightning_lora.checkpoint.fingerprint import fingerprint
from lightning_lora.distributed import sharding
from lightning_lora.distributed.base_weights import materialize
from lightning_lora.model.quantize import quantize
from lightning_lora.ops.sharded import is_sharded, local_part, whole
from tests import models
from tests.distributed.quantized import KINDS, Quantized, packed_bytes, quantized_layers, train
from tests.distributed.ranks import on_ranks
from tests.distributed.sharded import EVERYTHING, start
from tests.distributed.training import EXACT, rank_of
from tests.live_bytes import watched


def odd_llama(**sizes: Any) -> nn.Module:
    """A Llama in bfloat16 whose blocks of 64 values begin and end in the middle of rows."""
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 100} | sizes
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes)
    return models._seeded(lambda: AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))


def quantized(kind: Any) -> nn.Module:
    model = odd_llama()
    quantize(model, kind)
    return model


@pytest.fixture(scope="module")
def saved(directory: Path) -> Path:
    """Return the folder with the base in bfloat16, in several files, and packed in each kind."""
    odd_llama().save_pretrained(directory / "base", max_shard_size="50KB")
    for kind in KINDS:
        (directory / kind).mkdir()
        state = {name: value.clone() for name, value in quantized(kind).state_dict().items()}
        safetensors.torch.save_file(state, directory / kind / "weights.safetensors")
    return directory


def empty(saved: Path, kind: Any) -> nn.Module:
    """Return a model on the meta device, quantised and adapted."""
    model = models.on_meta(AutoModelForCausalLM, saved / "base", dtype=torch.bfloat16)
    quantize(model, kind)
    return inject(model, LoRAConfig(r=2))


def filled(model: nn.Module) -> dict[str, Tensor]:
    """Return the base, whole: packed parts and the rest. Called on all ranks."""
    rest = {name: whole(p).detach() for name, p in model.named_parameters() if ".lora_" not in name}
    return packed_bytes(model) | {name: value for name, value in rest.items() if not name.endswith(("codes", "scales"))}


WAYS: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in KINDS),
    ("nf4-dq", {"replicate_size": 2, "cpu_offload": True}),
]


@on_ranks(2, 4)
def test_values_on_disk_become_the_bytes_that_one_process_makes_of_them(saved: Path) -> None:
    for kind, options in WAYS:
        model = empty(saved, kind)
        start(**EVERYTHING, **options, base_weights=str(saved / "base")).setup(model)
        torch.testing.assert_close(filled(model), filled(quantized(kind)), **EXACT)


@on_ranks(2)
def test_packed_bytes_on_disk_are_read_as_they_are(saved: Path) -> None:
    for kind in KINDS:
        model = empty(saved, kind)
        start(**EVERYTHING, base_weights=str(saved / kind)).setup(model)
        torch.testing.assert_close(filled(model), filled(quantized(kind)), **EXACT)


@pytest.fixture(scope="module")
def from_transformers(directory: Path) -> tuple[Path, dict[str, Tensor]]:
    """Return a checkpoint that transformers and bitsandbytes wrote, and the values that bitsandbytes reads there."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    odd_llama(hidden_size=64, intermediate_size=128).save_pretrained(directory / "even")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = LlamaForCausalLM.from_pretrained(directory / "even", quantization_config=settings, device_map="cpu")
    model.save_pretrained(directory / "4 bits")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)}
    values = {
        name: bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
        for name, layer in layers.items()
    }
    return directory, values


@on_ranks(2)
def stream_from_transformers(directory: Path) -> dict[str, Tensor]:
    model = models.on_meta(AutoModelForCausalLM, directory / "even", dtype=torch.bfloat16)
    quantize(model, "nf4-dq")
    inject(model, LoRAConfig(r=2))
    start(**EVERYTHING, base_weights=str(directory / "4 bits")).setup(model)
    parts = packed_bytes(model)
    return {
        name: type(layer.stored("weight"))(
            {part: parts[f"{name}.{part}"] for part in layer.stored("weight").tensors}, layer.quantized["weight"].shape,
            torch.bfloat16,
        ).dense(torch.bfloat16).float()
        for name, layer in quantized_layers(model).items()
    }  # fmt: skip


def test_a_checkpoint_of_transformers_and_bitsandbytes_is_read(from_transformers: Any) -> None:
    directory, expected = from_transformers
    for found in stream_from_transformers(directory):
        torch.testing.assert_close(found, expected, **EXACT)


def another_shape(state: dict[str, Tensor]) -> None:
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(64, 32)


def lacking(state: dict[str, Tensor]) -> None:
    del state["model.layers.1.mlp.up_proj.weight"]


def with_nan(state: dict[str, Tensor]) -> None:
    state["model.layers.1.mlp.up_proj.weight"][-1, -1] = torch.nan  # a value of the last rank


def of_integers(state: dict[str, Tensor]) -> None:
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(80, 48, dtype=torch.int32)


def truncated(state: dict[str, Tensor]) -> None:
    state["model.layers.1.mlp.up_proj.weight"] = state["model.layers.1.mlp.up_proj.weight"][:-32]


def without_scales(state: dict[str, Tensor]) -> None:
    del state["model.layers.1.mlp.up_proj.weight.absmax"]


def of_another_block_size(state: dict[str, Tensor]) -> None:
    name = "model.layers.1.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    facts = json.loads(bytes(state[name].tolist())) | {"blocksize": 128}
    state[name] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)


UP = "'model.layers.1.mlp.up_proj.weight'"
DAMAGES: list[tuple[str, Callable[[Any], None], str]] = [
    ("base", another_shape, rf"has \(64, 32\) for {UP}, the model has \(80, 48\)"),
    ("base", lacking, r"lacks 1 tensors of LlamaForCausalLM: model\.layers\.1\.mlp\.up_proj\.weight"),
    ("base", with_nan, r"NaN or infinity in model\.layers\.1\.mlp\.up_proj\.weight, which cannot be quantised"),
    ("base", of_integers, f"{UP} cannot be loaded into a quantised layer: the file is torch.int32"),
    ("nf4-dq", truncated, f"{UP} cannot be loaded .* it has 1888 bytes of codes, expected 1920"),
    ("nf4-dq", without_scales, f"{UP} cannot be loaded .* its parts have the shapes"),
    ("nf4-dq", of_another_block_size, f"{UP} cannot be loaded .* its state says .*'blocksize': 128"),
    ("nf4", lambda state: None, "cannot be loaded .* the file is 'nf4', the model is 'nf4-dq'"),
]


@on_ranks(2)
def test_scales_without_a_value_are_one_clear_error_on_all_ranks(saved: Path, tmp_path: Path) -> None:
    """Packed on disk, a base that held NaN has it in the scales; rank 0 does not read the last one of a weight."""
    rank, _ = rank_of()
    for kind, entry in {"nf4": "weight.absmax", "nf4-dq": "weight.nested_absmax", "int8": "SCB"}.items():
        state = safetensors.torch.load_file(saved / kind / "weights.safetensors")
        state[f"model.layers.1.mlp.up_proj.{entry}"][-1] = torch.nan
        path = tmp_path / f"{kind}-{rank}.safetensors"
        safetensors.torch.save_file(state, path)
        with pytest.raises(ValueError, match=r"base_weights has NaN or infinity in model\.layers\.1\.mlp\.up_proj"):
            start(**EVERYTHING, base_weights=str(path)).setup(empty(saved, kind))


@on_ranks(2)
def test_files_that_do_not_fit_are_one_clear_error_on_all_ranks(saved: Path, tmp_path: Path) -> None:
    rank, _ = rank_of()
    for index, (name, damage, message) in enumerate(DAMAGES):
        state: dict[str, Tensor] = {}
        for file in sorted((saved / name).glob("*.safetensors")):
            state |= safetensors.torch.load_file(file)
        damage(state)
        path = tmp_path / f"{index}-{rank}.safetensors"
        safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, path)
        with pytest.raises(ValueError, match=message):
            start(**EVERYTHING, base_weights=str(path)).setup(empty(saved, "nf4-dq"))


@on_ranks(2)
def test_packed_bytes_do_not_fill_a_layer_that_is_not_quantised(saved: Path) -> None:
    for kind in KINDS:
        model = inject(models.on_meta(AutoModelForCausalLM, saved / "base", dtype=torch.bfloat16), LoRAConfig(r=2))
        with pytest.raises(ValueError, match=r"in 4 or 8 bits .*: quantise the model in the form of the file"):
            start(**EVERYTHING, base_weights=str(saved / kind)).setup(model)


class OnMeta(Quantized):
    """Builds its model on the meta device."""

    def build(self) -> nn.Module:
        return models.on_meta(AutoModelForCausalLM, Path(self.directory), dtype=torch.bfloat16)

    def __init__(self, kind: str, directory: str) -> None:
        self.directory = directory
        super().__init__(kind)


class Odd(Quantized):
    def build(self) -> nn.Module:
        return odd_llama()


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    return train(Odd("nf4-dq"))


@on_ranks(2)
def test_three_steps_over_a_streamed_base_are_those_of_one_process(saved: Path, single: dict[str, Any]) -> None:
    run = train(OnMeta("nf4-dq", str(saved / "base")), FSDPLoRAStrategy(**EVERYTHING))
    for what in ("losses", "gradients", "adapters", "stored", "seen"):
        torch.testing.assert_close(run[what], single[what], **EXACT)


@on_ranks(2)
def test_a_streamed_base_is_known_by_the_values_on_disk(saved: Path) -> None:
    for kind in KINDS:
        expected = fingerprint(inject(odd_llama(), LoRAConfig(r=2)))
        whole_base = fingerprint(inject(quantized(kind), LoRAConfig(r=2)))
        model = empty(saved, kind)
        start(**EVERYTHING, base_weights=str(saved / "base")).setup(model)
        found = fingerprint(model)
        assert dict(zip(found["names"], found["hashes"].tolist(), strict=True)) == dict(
            zip(expected["names"], expected["hashes"].tolist(), strict=True)
        )
        assert found["packed"] == whole_base["packed"]


LARGE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 2048}


@pytest.fixture
def large(tmp_path: Path) -> Path:
    odd_llama(**LARGE).save_pretrained(tmp_path, max_shard_size="10MB")
    return tmp_path


def own_bytes(model: nn.Module) -> int:
    return sum(local_part(tensor).nbytes for tensor in [*model.parameters(), *model.buffers()])


def unit_bytes(model: nn.Module) -> int:
    """Return the bytes of the largest unit, gathered."""
    units = [*model.model.layers, model.model.embed_tokens, model.lm_head]
    return max(sum(p.nbytes for p in unit.parameters() if is_sharded(p)) for unit in units)


@on_ranks(2)
def test_no_rank_holds_more_than_its_share_and_the_largest_unit_while_it_streams(large: Path) -> None:
    mapped = {file.stat().st_size for file in large.glob("*.safetensors")}
    model = models.on_meta(AutoModelForCausalLM, large, dtype=torch.bfloat16)
    quantize(model, "nf4-dq")
    inject(model, LoRAConfig(r=2))
    peaks = []

    def measured(*args: Any) -> None:
        with watched(ignored_bytes=mapped) as found:
            materialize(*args)
        peaks.append(found.peak)

    with mock.patch.object(sharding, "materialize", measured):
        start(base_weights=str(large)).setup(model)
    assert peaks[0] / (own_bytes(model) + unit_bytes(model)) <= 1.05
    assert own_bytes(model) < 0.6 * sum(p.nbytes for p in model.parameters())
