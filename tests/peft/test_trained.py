"""Against PEFT: heads that train whole, tied tensors, copies, and modules that PEFT cannot wrap."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    LoRAConfig,
    adapter_checkpoint,
    convert,
    inject,
    load_peft,
    save_peft,
)
from lightning_lora.model.state import named_trained_whole
from tests import models
from tests.peft.test_directory import CLOSE, give_values, saved_by_peft


def llama_tied() -> nn.Module:
    return models.llama(tied=True).eval()


def untied() -> nn.Module:
    model = llama_tied()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"trainable_token_indices": {"lm_head": [1, 2]}},
    ],
    ids=str,
)
def test_a_copy_of_a_tied_tensor_that_peft_trained_is_never_put_into_both(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    wrapped = saved_by_peft(llama_tied, tmp_path, target_modules=["q_proj"], **settings)
    model, before = llama_tied(), llama_tied().state_dict()
    with pytest.raises(ValueError, match="PEFT trained a copy. Untie"):
        load_peft(model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ids = models.token_ids()
    torch.testing.assert_close(load_peft(untied(), tmp_path)(ids).logits, wrapped(ids).logits, **CLOSE)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens"], "rank_pattern": {"embed_tokens": 2}, "alpha_pattern": {"embed_tokens": 5}},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    ],
    ids=str,
)
def test_ensure_weight_tying_means_the_same_here(settings: dict[str, Any], tmp_path: Path) -> None:
    wrapped = saved_by_peft(llama_tied, tmp_path, ensure_weight_tying=True, task_type="CAUSAL_LM", **settings)
    ids = models.token_ids()
    torch.testing.assert_close(load_peft(llama_tied(), tmp_path)(ids).logits, wrapped(ids).logits, **CLOSE)


def test_indices_of_blocks_that_the_model_lacks_are_ignored_as_by_peft(tmp_path: Path) -> None:
    wrapped = saved_by_peft(models.llama, tmp_path, target_modules=["q_proj"], layers_to_transform=[0, 9])
    ids = models.token_ids()
    torch.testing.assert_close(load_peft(models.llama(), tmp_path)(ids).logits, wrapped(ids).logits, **CLOSE)


class Scored(nn.Module):
    """Two heads of which one's name ends the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.score, self.prescore, self.body = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.score(self.prescore(self.body(x)))


def scored() -> nn.Module:
    torch.manual_seed(0)
    return Scored()


def test_a_head_whose_name_ends_anothers_is_read_alone(tmp_path: Path) -> None:
    model = inject(scored(), LoRAConfig(r=2, target_modules=["body"], modules_to_save=["score"]))
    assert set(named_trained_whole(model)) == {"score.weight", "score.bias"}
    give_values(model)
    save_peft(model, tmp_path)
    again = load_peft(scored(), tmp_path)
    assert set(named_trained_whole(again)) == {"score.weight", "score.bias"}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    theirs = peft.PeftModel.from_pretrained(scored(), tmp_path)
    torch.testing.assert_close(theirs(x), model(x), **CLOSE)
    torch.save(adapter_checkpoint(model), tmp_path / "file.ckpt")
    with pytest.raises(
        ValueError, match=r"PEFT expects 'prescore.weight' in the file.*call save_peft\(model, directory\)"
    ):
        convert(tmp_path / "file.ckpt", tmp_path / "converted")


class Heads(nn.Module):
    """A body with heads in containers, which PEFT cannot wrap."""

    def __init__(self, container: str) -> None:
        super().__init__()
        a, b = nn.Linear(8, 2), nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
        self.body = nn.Linear(8, 8)
        nested = nn.ModuleList([nn.ModuleDict({"inner": b})])
        self.heads: Any = nn.ModuleDict({"a": a, "b": nested}) if container == "dict" else nn.ModuleList([a, nested])

    def forward(self, x: Tensor) -> Tensor:
        first, nested = self.heads.values() if isinstance(self.heads, nn.ModuleDict) else self.heads
        x = self.body(x)
        return first(x) + nested[0]["inner"](x)


def heads(container: str) -> nn.Module:
    torch.manual_seed(0)
    return Heads(container)


@pytest.mark.parametrize("container", ["dict", "list"])
def test_peft_reads_heads_that_lie_in_containers(container: str, tmp_path: Path) -> None:
    model = inject(heads(container), LoRAConfig(r=2, target_modules=["body"], modules_to_save=["heads"]))
    give_values(model)
    save_peft(model, tmp_path)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    theirs = peft.PeftModel.from_pretrained(heads(container), tmp_path)
    torch.testing.assert_close(theirs(x), model(x), **CLOSE)
    ours = load_peft(heads(container), tmp_path)
    assert torch.equal(ours(x), model(x))
    assert set(named_trained_whole(ours)) == set(named_trained_whole(model))
    adapter_checkpoint(ours)  # and it is described for PEFT again


@pytest.mark.parametrize("container", ["dict", "list"])
def test_heads_in_containers_that_peft_trained_are_read(container: str, tmp_path: Path) -> None:
    names = {"dict": ["heads.a", "b.0.inner"], "list": ["heads.0", "inner"]}[container]
    config = peft.LoraConfig(r=2, target_modules=["body"], modules_to_save=names)
    wrapped = peft.get_peft_model(heads(container), config)
    give_values(wrapped)
    wrapped.save_pretrained(tmp_path)
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    ours = load_peft(heads(container), tmp_path)
    torch.testing.assert_close(ours(x), wrapped(x), **CLOSE)
    save_peft(ours, tmp_path / "again")
    again = peft.PeftModel.from_pretrained(heads(container), tmp_path / "again")
    torch.testing.assert_close(again(x), wrapped(x), **CLOSE)


def test_a_head_whose_name_hides_adapters_from_peft_is_refused(tmp_path: Path) -> None:
    model = inject(scored(), LoRAConfig(r=2, target_modules=["body", "prescore"], modules_to_save=["score"]))
    with pytest.raises(
        ValueError, match=r"'prescore' is adapted and lies in a module whose name ends like that of one"
    ):
        save_peft(model, tmp_path)
    net = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))), nn.Linear(8, 2))
    inject(net, LoRAConfig(r=2, target_modules=["0.1.0"], modules_to_save=["1"]))
    with pytest.raises(ValueError, match=r"'0.1.0' is adapted and lies in a module whose name ends like that of one"):
        save_peft(net, tmp_path)


def test_parameters_in_a_container_are_refused_for_peft(tmp_path: Path) -> None:
    net = nn.ModuleDict({"body": nn.Linear(4, 4), "scales": nn.ParameterList([nn.Parameter(torch.ones(4))])})
    inject(net, LoRAConfig(r=2, target_modules=["body"], modules_to_save=["scales"]))
    with pytest.raises(ValueError, match="'scales' trains whole, and PEFT trains only modules that have a forward"):
        save_peft(net, tmp_path)
