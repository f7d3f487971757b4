"""A rank above a layer's size: refused by name, or under "all-linear" the layer's size, in files too."""

import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    adapter_checkpoint,
    adapter_state_dict,
    convert,
    inject,
    load_adapter_state_dict,
    load_peft,
    merge,
    remove,
    save_peft,
)
from lightning_lora.model.state import named_lora_layers
from lightning_lora.model.summary import summary
from tests import models, runs

INITS = ["kaiming", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"]
R = 64
# the smaller side of each layer of the tiny Llama
SIZES = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "o_proj": 32, "gate_proj": 32, "up_proj": 32, "down_proj": 32}


def ranks(model: nn.Module) -> dict[str, int]:
    return {name: layer.r for name, layer in named_lora_layers(model).items()}


def own_sizes(model: nn.Module) -> dict[str, int]:
    return {name: SIZES[name.rpartition(".")[2]] for name in named_lora_layers(model)}


@pytest.mark.parametrize("init", INITS)
def test_all_linear_gives_smaller_layers_their_size(init: str) -> None:
    model = inject(models.llama(), LoRAConfig(r=R, init=init))
    assert ranks(model) == own_sizes(model)
    assert {layer.lora_scaling for layer in named_lora_layers(model).values()} == {2.0}
    ids = models.token_ids()
    # PiSSA and OLoRA subtract their start in the product
    torch.testing.assert_close(model(ids).logits, models.llama()(ids).logits, rtol=1e-4, atol=1e-5)
    remove(model)
    assert torch.equal(model(ids).logits, models.llama()(ids).logits)


@pytest.mark.parametrize("init", INITS)
def test_a_list_of_layers_with_a_smaller_one_is_refused_by_name(init: str) -> None:
    model = models.llama()
    message = "r=64 is larger than 'model.layers.0.self_attn.q_proj', a 32 -> 32 Linear: .*rank_pattern"
    with pytest.raises(ValueError, match=message):
        inject(model, LoRAConfig(r=R, init=init, target_modules=["q_proj", "up_proj"]))
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in models.llama().state_dict().items())
    inject(model, LoRAConfig(r=32, init=init, target_modules=["q_proj", "up_proj"]))


def test_a_parameter_that_is_smaller_is_refused_by_name() -> None:
    net = nn.ModuleDict({"router": nn.Module()})
    net.router.weight = nn.Parameter(torch.zeros(4, 16))
    with pytest.raises(ValueError, match=r"r=8 is larger than 'router.weight', a 16 -> 4 matrix: .*rank_pattern"):
        inject(net, LoRAConfig(r=8, target_modules=[], target_parameters=["router.weight"]))


def test_an_odd_layer_under_an_even_rank_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    with pytest.raises(ValueError, match="init='orthogonal' needs matrices of even rank, and '1' has r=1"):
        inject(net, LoRAConfig(r=4, init="orthogonal"))


def test_a_smaller_layer_keeps_the_scale_of_the_rank_that_was_asked_for() -> None:
    model = inject(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)), LoRAConfig(r=4, alpha=12))
    assert {name: (layer.r, layer.lora_scaling) for name, layer in named_lora_layers(model).items()} == {
        "0": (4, 3.0),
        "1": (1, 3.0),
    }


def test_the_smaller_layers_are_said_once_by_inject_and_by_the_first_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        model = inject(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1)), LoRAConfig(r=4))
    line = "r=4 exceeds the size of these layers, whose rank is their size: 1 (r=1)"
    assert [record.message for record in caplog.records] == [f"LoRA: {line}"]
    assert f"  {line}" in summary(model, "", model).splitlines()
    caplog.clear()
    other = inject(nn.Sequential(nn.Linear(8, 8)), LoRAConfig(r=4))
    assert not caplog.records
    assert "exceeds" not in summary(other, "", other)


def test_a_run_says_the_smaller_layers_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        runs.trainer(tmp_path, LoRACallback(r=R), max_steps=1).fit(runs.LanguageModule(), runs.loader())
    assert "\n".join(record.message for record in caplog.records).count("exceeds the size") == 1


@pytest.mark.parametrize("settings", [{}, {"alpha": 8}, {"use_rslora": True, "alpha": 8}, {"init": "pissa"}], ids=str)
def test_peft_and_we_read_a_directory_with_smaller_layers(settings: dict[str, Any], tmp_path: Path) -> None:
    model = inject(models.llama(), LoRAConfig(r=R, **settings)).eval()
    models.fill_adapters(model, std=0.02)
    ids = models.token_ids()
    expected = model(ids).logits
    torch.save(adapter_checkpoint(model), tmp_path / "file.ckpt")
    save_peft(model, tmp_path / "ours")
    convert(tmp_path / "file.ckpt", tmp_path / "converted")
    close = {"rtol": 1e-4, "atol": 1e-5}  # another order of float32 operations in the adapter's term
    for directory in ("ours", "converted"):
        theirs = peft.PeftModel.from_pretrained(models.llama(), tmp_path / directory).eval()
        torch.testing.assert_close(theirs(ids).logits, expected, **close)
    torch.testing.assert_close(load_peft(models.llama(), tmp_path / "ours")(ids).logits, expected, **close)
    again = inject(models.llama(), LoRAConfig(r=R, **settings))
    load_adapter_state_dict(again, torch.load(tmp_path / "file.ckpt", weights_only=True))
    assert torch.equal(again(ids).logits, expected)
    merge(model, remove=True)
    torch.testing.assert_close(model(ids).logits, expected, **close)


def test_a_run_with_smaller_layers_resumes_exactly(tmp_path: Path) -> None:
    def run(directory: Path, epochs: int, path: Path | None = None, **lora: Any) -> Any:
        module = runs.LanguageModule()
        file = ModelCheckpoint(directory, save_last=True, save_top_k=0)
        trainer = runs.trainer(directory, LoRACallback(**{"r": R, **lora}), file, max_epochs=epochs)
        trainer.fit(module, runs.loader(), ckpt_path=path)
        return module

    whole = run(tmp_path / "whole", 2)
    run(tmp_path / "half", 1)
    resumed = run(tmp_path / "rest", 2, tmp_path / "half" / "last.ckpt")
    assert runs.same_adapters(whole, resumed)
    loaded = runs.LanguageModule.load_from_checkpoint(tmp_path / "rest" / "last.ckpt")
    assert runs.same_adapters(whole, loaded)
    started = runs.LanguageModule()
    callback = LoRACallback(init_from=str(tmp_path / "rest" / "last.ckpt"))
    runs.trainer(tmp_path / "started", callback, max_steps=0).fit(started, runs.loader())
    assert runs.same_adapters(whole, started)
    shapes = {tuple(v.shape) for name, v in adapter_state_dict(whole).items() if name.endswith("k_proj.lora_A")}
    assert shapes == {(16, 32)}
