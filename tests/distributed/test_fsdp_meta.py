"""Bases that are built without values and streamed from safetensors, each rank its own slices."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from lightning_lora import LoRAConfig, inject
from lightning_lora.distributed.base_weights import materialize, open_slices
from tests import models, zoo
from tests.distributed.fsdp_meta_script import Computed
from tests.distributed.fsdp_models_script import GPT
from tests.distributed.launch import Launches, launch
from tests.distributed.training import Recorded, fit

# 12 blocks of 12 MB
LARGE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "vocab_size": 8192}
EMBEDDING_BYTES = 4 * 512 * 8192


def large() -> nn.Module:
    return models._seeded(lambda: LlamaForCausalLM(LlamaConfig(num_attention_heads=8, **LARGE)))


def bert() -> nn.Module:
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
    )
    return models._seeded(lambda: BertModel(config))


def family(name: str) -> Callable[[], nn.Module]:
    return next(f.build for f in zoo.FAMILIES if f.name == name)


SAVED: dict[str, Callable[[], nn.Module]] = {
    "llama": models.llama,
    "tied": lambda: models.llama(tied=True),
    "gemma3": family("gemma3"),
    "experts": family("mixtral"),
    "body": bert,
    "large": large,
    "lacking": models.llama,
    "of another shape": models.llama,
    "truncated": models.llama,
    "without a shard": models.llama,
}


def damage(directory: Path) -> None:
    lacking = directory / "lacking" / "model.safetensors"
    tensors = safetensors.torch.load_file(lacking)
    safetensors.torch.save_file({n: v for n, v in tensors.items() if "layers.1.mlp.up_proj" not in n}, lacking)
    tensors["lm_head.weight"] = torch.ones(7, 32)
    safetensors.torch.save_file(tensors, directory / "of another shape" / "model.safetensors")
    whole = (directory / "truncated" / "model.safetensors").read_bytes()
    (directory / "truncated" / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    index = json.loads((directory / "without a shard" / "model.safetensors.index.json").read_text())
    (directory / "without a shard" / sorted(set(index["weight_map"].values()))[1]).unlink()
    (directory / "empty").mkdir()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("meta")
    for name, build in SAVED.items():
        in_shards = name in ("llama", "without a shard")
        size = "50KB" if in_shards else "30MB" if name == "large" else "5GB"
        build().save_pretrained(directory / name, max_shard_size=size)
    assert (directory / "llama" / "model.safetensors.index.json").is_file()
    for name, build in (("gpt", GPT), ("buffer", Computed)):
        (directory / name).mkdir()
        safetensors.torch.save_file(models._seeded(build).state_dict(), directory / name / "weights.safetensors")
    damage(directory)
    return directory


@pytest.fixture(scope="module")
def found(directory: Path) -> Launches:
    return Launches("fsdp_meta_script.py", directory)


both = pytest.mark.parametrize("num_ranks", [2, 4])


@both
@pytest.mark.parametrize("name", ["llama", "tied", "gemma3", "experts", "gpt", "buffer", "offloaded"])
def test_the_base_is_bit_for_bit_what_was_saved(found: Launches, directory: Path, num_ranks: int, name: str) -> None:
    build = {"gpt": lambda: models._seeded(GPT), "buffer": Computed, "offloaded": models.llama}.get(name) or SAVED[name]
    expected = build()
    if name == "buffer":
        expected.load_state_dict(safetensors.torch.load_file(directory / name / "weights.safetensors"))
    for rank in found(num_ranks, "cases"):
        assert rank[name]["spread"]
        torch.testing.assert_close(rank[name]["state"], dict(expected.state_dict()), rtol=0, atol=0)
        torch.testing.assert_close(rank[name]["buffers"], dict(expected.named_buffers()), rtol=0, atol=0)


def test_experts_were_saved_one_by_one_and_are_read_into_fused_tensors(found: Launches, directory: Path) -> None:
    keys = safetensors.torch.load_file(directory / "experts" / "model.safetensors").keys()
    names = found(2, "cases")[0]["experts"]["state"].keys()
    assert any("experts.0." in key for key in keys)
    assert not any("experts.0." in name for name in names)


@both
def test_the_checkpoint_of_a_body_fills_a_model_with_a_new_head(found: Launches, num_ranks: int) -> None:
    expected = {f"bert.{name}": value for name, value in bert().state_dict().items()}
    heads = []
    for rank in found(num_ranks, "cases"):
        state = rank["body"]["state"]
        torch.testing.assert_close({n: v for n, v in state.items() if n in expected}, expected, rtol=0, atol=0)
        heads.append({n: v for n, v in state.items() if n not in expected})
        assert heads[-1].keys() == {"classifier.weight", "classifier.bias"}
        assert heads[-1]["classifier.weight"].std() > 0
        torch.testing.assert_close(heads[-1], heads[0], rtol=0, atol=0)


@pytest.mark.parametrize("early", [True, False])
def test_the_first_gradients_equal_one_process(found: Launches, early: bool) -> None:
    module = Recorded()
    fit(None, module, "auto", limit_train_batches=1)
    torch.testing.assert_close(found(2, "gradients")[0][early], module.gradients, rtol=1e-4, atol=1e-7)


def test_no_rank_ever_holds_the_whole_base(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # glibc gives what is freed back at once, so that memory in use is what is measured
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    (tmp_path / "large").symlink_to(directory / "large")
    for memory in launch("fsdp_meta_script.py", 2, tmp_path, "memory", fresh=True):
        assert memory["whole"] > 150e6
        assert memory["held"] < memory["whole"] / 2 * 1.05
        # its own share, the largest unit gathered (what arrives, and the tensors made of it), and 8 MB for the rest
        assert memory["peak"] < memory["held"] + 2 * EMBEDDING_BYTES + 8e6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lacking", "lacks 1 tensors of LlamaForCausalLM: model.layers.1.mlp.up_proj.weight"),
        ("of another shape", r"has \(7, 32\) for 'lm_head.weight', the model has \(100, 32\)"),
        ("truncated", "cannot be read as safetensors"),
        ("without a shard", "names 'model-00002-of.*', which is not there"),
        ("empty", "no safetensors at"),
        ("nowhere", "nothing says where its weights are: give the strategy base_weights="),
        ("no code", "'scale' is a buffer that no checkpoint holds"),
    ],
)
def test_what_cannot_be_filled_is_one_clear_error(found: Launches, name: str, message: str) -> None:
    for rank in found(2, "refusals"):
        assert re.search(message, rank[name]), rank.get(name)


@pytest.mark.parametrize(
    ("prefix", "inner", "message"),
    [
        ("", False, r"without 'model\.': adapt that module alone, by LoRACallback\(module='model'\)"),
        ("model.", True, r"behind 'model\.': save the weights under the model's own names"),
    ],
)
def test_names_that_differ_by_a_prefix_are_told(tmp_path: Path, prefix: str, inner: bool, message: str) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = GPT()

    saved = tmp_path / "base.safetensors"
    safetensors.torch.save_file({f"{prefix}{name}": value for name, value in GPT().state_dict().items()}, saved)
    with torch.device("meta"):
        outer = Outer()
    model = inject(outer.model if inner else outer, LoRAConfig(r=2))
    with pytest.raises(ValueError, match=message):
        materialize(model, str(saved), torch.device("cpu"))


def test_two_files_with_the_same_tensor_are_refused(tmp_path: Path) -> None:
    for name in ("first", "second"):
        safetensors.torch.save_file({"weight": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="several files in .* hold 'weight'"), open_slices(str(tmp_path)):
        pass
