"""Bases that are built without values and streamed from safetensors, each rank its own slices."""

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
from lightning_lora.ops.sharded import is_sharded
from tests import models, zoo
from tests.distributed.hand_written import GPT, Computed
from tests.distributed.ranks import on_ranks
from tests.distributed.sharded import EVERYTHING, fill, start
from tests.distributed.training import EXACT, GRADIENT_TOLERANCE, Recorded, alone, fit, from_all_ranks


def bert() -> nn.Module:
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=100
    )
    return models._seeded(lambda: BertModel(config))


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
