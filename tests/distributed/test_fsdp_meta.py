"""Bases that are built without values and streamed from safetensors, each rank its own slices."""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from lightning_lora import FSDPLoRAStrategy, LoRAConfig, inject
from lightning_lora.distributed.base_weights import materialize, open_slices
from lightning_lora.model.spread import gathered
from lightning_lora.ops.sharded import is_sharded
from tests import models, zoo
from tests.distributed.hand_written import GPT
from tests.distributed.ranks import on_ranks
from tests.distributed.sharded import EVERYTHING, start
from tests.distributed.training import EXACT, GRADIENT_TOLERANCE, Recorded, alone, fit, from_all_ranks


def bert() -> nn.Module:
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
    )
    return models._seeded(lambda: BertModel(config))


class Positions(nn.Module):
    """A buffer that no checkpoint holds, and, in a subclass, the code to compute it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.register_buffer("scale", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x * self.scale


class Computed(Positions):
    def reset_parameters(self) -> None:
        self.scale.copy_(torch.arange(4.0))


PRETRAINED: dict[str, Callable[[], Any]] = {
    "llama": models.llama,
    "tied": lambda: models.llama(tied=True),
    "gemma3": zoo.named("gemma3").build,
    "experts": zoo.named("mixtral").build,
    "bert": bert,
}
HAND_WRITTEN: dict[str, Callable[[], nn.Module]] = {"gpt": lambda: models._seeded(GPT), "buffer": Computed}


@pytest.fixture(scope="module")
def saved(directory: Path) -> Path:
    """Return the folder in which every model has a folder of its own."""
    for name, build in PRETRAINED.items():
        build().save_pretrained(directory / name, max_shard_size="50KB" if name == "llama" else "5GB")
    assert (directory / "llama" / "model.safetensors.index.json").is_file()
    for name, make in HAND_WRITTEN.items():
        (directory / name).mkdir()
        safetensors.torch.save_file(make().state_dict(), directory / name / "weights.safetensors")
    return directory


def empty(saved: Path, name: str, kind: Any = AutoModelForCausalLM, **settings: Any) -> nn.Module:
    """Return a model on the meta device."""
    if name not in HAND_WRITTEN:
        return models.on_meta(kind, saved / name, **settings)
    with torch.device("meta"):
        return HAND_WRITTEN[name]()


def fill(model: nn.Module, **options: Any) -> dict[str, Tensor]:
    """Shard an adapted model whose base is on meta; return its base, whole."""
    inject(model, LoRAConfig(r=2))
    start(**options).setup(model)
    assert any(is_sharded(parameter) for parameter in model.parameters())
    with gathered(model):
        state = {name: value.detach().clone() for name, value in model.state_dict(keep_vars=True).items()}
    return {name: value for name, value in state.items() if ".lora_" not in name}


@pytest.mark.parametrize("name", ["llama", "tied", "gemma3", "experts", "gpt", "buffer"])
@on_ranks(2, 4)
def test_the_base_is_bit_for_bit_what_was_saved(saved: Path, name: str) -> None:
    options = {"base_weights": str(saved / name)} if name in HAND_WRITTEN else {}
    model, expected = empty(saved, name), (PRETRAINED | HAND_WRITTEN)[name]()
    if name == "buffer":
        expected.load_state_dict(safetensors.torch.load_file(saved / name / "weights.safetensors"))
    torch.testing.assert_close(fill(model, **options, **EVERYTHING), dict(expected.state_dict()), **EXACT)
    torch.testing.assert_close(dict(model.named_buffers()), dict(expected.named_buffers()), **EXACT)


@on_ranks(2, 4)
def test_an_offloaded_base_is_bit_for_bit_what_was_saved(saved: Path) -> None:
    model, expected = empty(saved, "llama"), models.llama()
    filled = fill(model, cpu_offload=True, **EVERYTHING)
    torch.testing.assert_close(filled, dict(expected.state_dict()), **EXACT)
    torch.testing.assert_close(dict(model.named_buffers()), dict(expected.named_buffers()), **EXACT)


def test_experts_were_saved_one_by_one_and_are_read_into_fused_tensors(saved: Path) -> None:
    keys = safetensors.torch.load_file(saved / "experts" / "model.safetensors").keys()
    assert any("experts.0." in key for key in keys)
    assert not any("experts.0." in name for name in empty(saved, "experts").state_dict())


@on_ranks(2, 4)
def test_the_checkpoint_of_a_body_fills_a_model_with_a_new_head(saved: Path) -> None:
    filled = fill(empty(saved, "bert", AutoModelForSequenceClassification, num_labels=3), **EVERYTHING)
    expected = {f"bert.{name}": value for name, value in bert().state_dict().items()}
    head = {name: value for name, value in filled.items() if name not in expected}
    torch.testing.assert_close({name: filled[name] for name in expected}, expected, **EXACT)
    assert head.keys() == {"classifier.weight", "classifier.bias"}
    assert head["classifier.weight"].std() > 0
    torch.testing.assert_close(head, from_all_ranks(head)[0], **EXACT)


class OnMeta(Recorded):
    """Builds a model without values from the config in a directory."""

    def __init__(self, directory: str, early: bool) -> None:
        super().__init__()
        self.directory = directory
        self.model: Any = None
        if early:
            self.configure_model()

    def configure_model(self) -> None:
        if self.model is None:
            self.model = models.on_meta(AutoModelForCausalLM, Path(self.directory))


@pytest.fixture(scope="module")
def first_gradients() -> dict[str, Tensor]:
    return alone(limit_train_batches=1).gradients


@pytest.mark.parametrize("early", [True, False])
@on_ranks(2)
def test_the_first_gradients_equal_one_process(saved: Path, first_gradients: dict[str, Tensor], early: bool) -> None:
    module = OnMeta(str(saved / "llama"), early)
    fit(None, module, FSDPLoRAStrategy(**EVERYTHING), limit_train_batches=1)
    torch.testing.assert_close(module.gradients, first_gradients, **GRADIENT_TOLERANCE)


class Memory:
    """The most anonymous memory that this process held inside the block, in bytes, above what it began with."""

    def __enter__(self) -> "Memory":
        self._start = self._peak = self._now()
        self._done = False
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done = True
        self._thread.join()
        self.peak_bytes = self._peak - self._start

    def _watch(self) -> None:
        while not self._done:
            self._peak = max(self._peak, self._now())
            time.sleep(0.001)

    @staticmethod
    def _now() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("RssAnon:")[2].split()[0])


# 12 blocks of 12 MB
LARGE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12, "vocab_size": 8192}
EMBEDDING_BYTES = 4 * 512 * 8192


@pytest.fixture
def large(tmp_path: Path) -> Path:
    config = LlamaConfig(num_attention_heads=8, **LARGE)
    models._seeded(lambda: LlamaForCausalLM(config)).save_pretrained(tmp_path, max_shard_size="30MB")
    return tmp_path


# glibc gives what is freed back at once, so that memory in use is what is measured
@on_ranks(2, fresh=True, environment={"MALLOC_MMAP_THRESHOLD_": "65536"})
def test_no_rank_ever_holds_the_whole_base(large: Path) -> None:
    model = models.on_meta(AutoModelForCausalLM, large)
    inject(model, LoRAConfig(r=2))
    fabric = start()
    with Memory() as memory:
        fabric.setup(model)
    whole_bytes = sum(p.nbytes for p in model.parameters())
    held_bytes = sum(p.to_local().nbytes if is_sharded(p) else p.nbytes for p in model.parameters())
    assert whole_bytes > 150e6
    assert held_bytes < whole_bytes / 2 * 1.05
    # its own share, the largest unit gathered (what arrives, and the tensors made of it), and 8 MB for the rest
    assert memory.peak_bytes < held_bytes + 2 * EMBEDDING_BYTES + 8e6


def lacking(weights: Path) -> None:
    tensors = safetensors.torch.load_file(weights / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if "layers.1.mlp.up_proj" not in name}
    safetensors.torch.save_file(kept, weights / "model.safetensors")


def of_another_shape(weights: Path) -> None:
    tensors = safetensors.torch.load_file(weights / "model.safetensors")
    tensors["lm_head.weight"] = torch.ones(7, 32)
    safetensors.torch.save_file(tensors, weights / "model.safetensors")


def truncated(weights: Path) -> None:
    whole = (weights / "model.safetensors").read_bytes()
    (weights / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def without_a_shard(weights: Path) -> None:
    index = json.loads((weights / "model.safetensors.index.json").read_text())
    (weights / sorted(set(index["weight_map"].values()))[1]).unlink()


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (lacking, r"lacks 1 tensors of LlamaForCausalLM: model\.layers\.1\.mlp\.up_proj\.weight"),
    (of_another_shape, r"has \(7, 32\) for 'lm_head.weight', the model has \(100, 32\)"),
    (truncated, "cannot be read as safetensors"),
    (without_a_shard, "names 'model-00002-of.*', which is not there"),
]


@pytest.fixture
def damaged(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    damage, message = request.param
    models.llama().save_pretrained(tmp_path, max_shard_size="50KB" if damage is without_a_shard else "5GB")
    damage(tmp_path)
    return tmp_path, message


@pytest.mark.parametrize("damaged", DAMAGES, indirect=True, ids=[damage.__name__ for damage, _ in DAMAGES])
@on_ranks(2)
def test_weights_that_cannot_fill_the_model_are_one_clear_error(damaged: tuple[Path, str]) -> None:
    weights, message = damaged
    model = models.on_meta(AutoModelForCausalLM, weights)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        fill(model, base_weights=str(weights))


@on_ranks(2)
def test_weights_that_nobody_names_or_computes_are_one_clear_error(saved: Path, tmp_path: Path) -> None:
    def empty_of(build: Callable[[], nn.Module]) -> nn.Module:
        with torch.device("meta"):
            return build()

    with pytest.raises((ValueError, FileNotFoundError), match="no safetensors at"):
        fill(empty_of(GPT), base_weights=str(tmp_path))
    with pytest.raises(ValueError, match="nothing says where its weights are: give the strategy base_weights="):
        fill(empty_of(GPT))
    with pytest.raises(ValueError, match="'scale' is a buffer that no checkpoint holds"):
        fill(empty_of(Positions), base_weights=str(saved / "buffer"))


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
