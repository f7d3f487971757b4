"""PEFT's files of AdaLoRA, in both directions, and the same adapters as plain LoRA."""

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from lightning_lora import (
    AdaLoRA,
    LoRAConfig,
    adapter_checkpoint,
    adapter_state_dict,
    check_portable,
    combine,
    convert,
    inject,
    load_peft,
    save_peft,
)
from lightning_lora.model.state import named_lora_layers, require_injection
from tests import models
from tests.model.test_adalora import Loop, adapted, batches, peft_run

CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # other order of float32 operations in the adapter's term


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=models.token_ids()).logits


def trained(**options: Any) -> nn.Module:
    """Return a model at the end of its schedule."""
    loop = Loop(adapted(**options))
    for batch in batches():
        loop.step(batch)
    return loop.model.eval()


def empty_a_layer(model: nn.Module) -> None:
    with torch.no_grad():
        next(iter(named_lora_layers(model).values())).lora_E.zero_()


def saved_by_peft(model: Any, directory: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*have invalid shape")  # of layers without ranks
        model.save_pretrained(directory)


def content(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((directory / "adapter_config.json").read_text())
    return config, safetensors.torch.load_file(directory / "adapter_model.safetensors")


@pytest.mark.parametrize("steps", [2, 24])
def test_a_directory_of_peft_is_read(tmp_path: Path, steps: int) -> None:
    _, _, theirs = peft_run({"tinit": 0 if steps == 24 else 24 - 1})
    saved_by_peft(theirs, tmp_path)
    config, tensors = content(tmp_path)
    assert config["peft_type"] == "ADALORA"
    model = load_peft(models.llama(), tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), **CLOSE)
    settings = require_injection(model).config.adalora
    assert (settings.init_r, settings.target_r, settings.total_step) == (6, 3, None)
    for layer in named_lora_layers(model).values():
        assert layer.lora_E.shape == (6, 1)


def test_peft_reads_a_directory_of_ours(tmp_path: Path) -> None:
    model = trained()
    empty_a_layer(model)
    save_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(models.llama(), tmp_path)
    assert type(theirs.base_model).__name__ == "AdaLoraModel"
    torch.testing.assert_close(logits(theirs), logits(model), **CLOSE)
    again = load_peft(models.llama(), tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_peft_goes_on_training_a_directory_of_ours(tmp_path: Path) -> None:
    save_peft(trained(), tmp_path)
    theirs = peft.PeftModel.from_pretrained(models.llama(), tmp_path, is_trainable=True)
    assert theirs.base_model.rankallocator.init_bgt == 6 * 8
    batch = models.token_ids()
    theirs(input_ids=batch, labels=batch).loss.backward()
    theirs.base_model.update_and_allocate(1)


def test_what_was_read_from_peft_is_written_for_peft(tmp_path: Path) -> None:
    _, _, theirs = peft_run({})
    saved_by_peft(theirs, tmp_path / "theirs")
    save_peft(load_peft(models.llama(), tmp_path / "theirs"), tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(models.llama(), tmp_path / "ours")
    torch.testing.assert_close(logits(again), logits(theirs), **CLOSE)


def test_a_file_with_the_name_of_the_adapter_in_it_is_read(tmp_path: Path) -> None:
    _, _, theirs = peft_run({})
    saved_by_peft(theirs, tmp_path)
    config, tensors = content(tmp_path)
    config["rank_pattern"] = {f"{name}.default": value for name, value in config["rank_pattern"].items()}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file({f"{n}.default": t for n, t in tensors.items()}, tmp_path / "adapter_model.safetensors")
    torch.testing.assert_close(logits(load_peft(models.llama(), tmp_path)), logits(theirs), **CLOSE)


@pytest.mark.parametrize("make", [models.llama, models.gpt2])
def test_as_lora_it_computes_the_same_without_the_pruned_ranks(tmp_path: Path, make: Any) -> None:
    targets = {} if make is models.llama else {"target_modules": ["c_attn", "c_proj"]}
    model = trained(make=make, **targets)
    empty_a_layer(model)
    save_peft(model, tmp_path, as_lora=True)
    config, tensors = content(tmp_path)
    assert config["peft_type"] == "LORA"
    layers = named_lora_layers(model)
    ranks = {name: int((layer.lora_E != 0).sum()) for name, layer in layers.items()}
    for name, r in ranks.items():
        key = f"base_model.model.{name}.lora_A.weight"
        assert (key in tensors) is (r > 0)
        assert r == 0 or tensors[key].shape[0] == r
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), **CLOSE)
    ours = load_peft(make(), tmp_path)
    torch.testing.assert_close(logits(ours), logits(model), **CLOSE)
    assert require_injection(ours).config.adalora is None
    assert set(named_lora_layers(ours)) == {name for name, r in ranks.items() if r > 0} != set(layers)


def test_the_weights_of_the_plain_adapter_are_the_update_to_rounding(tmp_path: Path) -> None:
    model = trained()
    save_peft(model, tmp_path, as_lora=True)
    _, tensors = content(tmp_path)
    for name, layer in named_lora_layers(model).items():
        A, B, E = (getattr(layer, f"lora_{x}").detach().double() for x in "ABE")
        expected = 12 / (6 + 1e-5) * B @ (A * E)
        factors = [tensors.get(f"base_model.model.{name}.lora_{x}.weight") for x in "BA"]
        given = factors[0].double() @ factors[1].double() if factors[0] is not None else torch.zeros_like(expected)
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-7 * float(expected.abs().max()))


def test_portable_directories_are_plain_lora_of_one_rank_that_readers_take(tmp_path: Path) -> None:
    model = trained(target_modules="all-linear")
    empty_a_layer(model)
    save_peft(model, tmp_path, portable=True)
    config, tensors = content(tmp_path)
    assert config["peft_type"] == "LORA"
    assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {config["r"]} == {config["lora_alpha"]}
    assert config["r"] == max(int((layer.lora_E != 0).sum()) for layer in named_lora_layers(model).values())
    torch.testing.assert_close(logits(load_peft(models.llama(), tmp_path)), logits(model), **CLOSE)
    assert check_portable(tmp_path, "vllm") == []
    assert check_portable(tmp_path, "sglang") == []


@pytest.mark.parametrize("options", [{}, {"as_lora": True}, {"portable": True}])
def test_a_checkpoint_converts_to_the_same_directory(tmp_path: Path, options: dict[str, bool]) -> None:
    model = trained()
    torch.save(adapter_checkpoint(model), tmp_path / "adapter.ckpt")
    save_peft(model, tmp_path / "saved", **options)
    convert(tmp_path / "adapter.ckpt", tmp_path / "converted", **options)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "converted" / name).read_bytes()


def test_heads_that_train_whole_go_with_it(tmp_path: Path) -> None:
    model = inject(
        models.bert_classifier(), LoRAConfig(adalora=AdaLoRA(init_r=4, target_r=2), target_modules=["query"])
    )
    models.fill_adapters(model)
    with torch.no_grad():
        model.classifier.weight.add_(1)
    for options in ({}, {"as_lora": True}):
        save_peft(model, tmp_path / str(options), **options)
        theirs = peft.PeftModel.from_pretrained(models.bert_classifier(), tmp_path / str(options))
        torch.testing.assert_close(logits(theirs), logits(model), **CLOSE)


def test_a_layer_smaller_than_the_rank_is_padded_for_peft(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return models._seeded(lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2)))

    model = inject(make(), LoRAConfig(adalora=AdaLoRA(init_r=4, target_r=3)))
    models.fill_adapters(model)
    save_peft(model, tmp_path)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(theirs(x), model(x), **CLOSE)
    torch.testing.assert_close(load_peft(make(), tmp_path)(x), model(x), **CLOSE)


def test_an_untrained_adapter_has_nothing_to_write_as_lora(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the ranks of all layers are zero"):
        save_peft(adapted(), tmp_path, as_lora=True)
    assert not list(tmp_path.iterdir())


def test_nan_in_a_pruned_rank_is_not_left_out_in_silence(tmp_path: Path) -> None:
    model = trained()
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    with torch.no_grad():
        layer.lora_E[0] = 0
        layer.lora_A[0, 0] = torch.nan
    assert logits(model).isnan().any()
    for options in ({"as_lora": True}, {"portable": True}):
        with pytest.raises(ValueError, match=r"lora_A.* holds NaN"):
            save_peft(model, tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_plain_adapter_is_written_as_lora_either_way(tmp_path: Path) -> None:
    model = inject(models.llama(), LoRAConfig(r=4))
    models.fill_adapters(model)
    for as_lora in (False, True):
        save_peft(model, tmp_path / str(as_lora), as_lora=as_lora)
    files = [(tmp_path / str(as_lora) / "adapter_config.json").read_bytes() for as_lora in (False, True)]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init_r": 5}, "the config says init_r=5"),
        ({"rank_pattern": None}, "the config says init_r=6"),
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "LORA", "rank_pattern": None}, "is AdaLoRA's, and the config is not"),
    ],
)
def test_damaged_directories_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    _, _, theirs = peft_run({})
    saved_by_peft(theirs, tmp_path)
    config, _ = content(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    model = models.llama()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_peft(model, tmp_path)
    assert model.state_dict().keys() == before.keys()


def test_half_a_layer_is_refused(tmp_path: Path) -> None:
    save_peft(trained(), tmp_path)
    _, tensors = content(tmp_path)
    del tensors[next(name for name in tensors if name.endswith("lora_E"))]
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="lora_E"):
        load_peft(models.llama(), tmp_path)


def test_tensors_go_from_a_directory_into_an_adapted_model_of_the_same_config(tmp_path: Path) -> None:
    model = trained()
    save_peft(model, tmp_path)
    again = load_peft(models.llama(), tmp_path)
    ours, theirs = adapter_state_dict(model), adapter_state_dict(again)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_readers_of_plain_adapters_say_how_to_write_one(tmp_path: Path) -> None:
    save_peft(trained(), tmp_path)
    with pytest.raises(ValueError, match=r"peft_type='ADALORA'.*as_lora=True"):
        combine([tmp_path, tmp_path], [1.0, 1.0], tmp_path / "sum")
    for reader in ("vllm", "sglang", "llama.cpp"):
        (problem,) = check_portable(tmp_path, reader)
        assert "ADALORA" in problem
        assert "other tensors. Write it as plain LoRA: " in problem
        assert "as_lora=True, portable=True" in problem
        save_peft(load_peft(models.llama(), tmp_path), tmp_path / reader, as_lora=True, portable=True)
        assert not any("peft_type" in other for other in check_portable(tmp_path / reader, reader))
