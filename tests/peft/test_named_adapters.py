"""Directories of several named adapters: written as PEFT reads them, read, handed on, and swapped."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    LoRAConfig,
    active,
    adapter_checkpoint,
    adapter_state_dict,
    adapter_tensors,
    adapters,
    add_adapter,
    convert,
    hot_swap,
    inject,
    load_adapter_state_dict,
    load_peft,
    merge,
    named_adapter_parameters,
    quantize,
    save_peft,
    unmerge,
)
from lightning_lora.peft.card import forms_of
from tests import models

CONFIGS = {
    "law": LoRAConfig(r=4, alpha=16, use_rslora=True),
    "medicine": LoRAConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=True),
    "code": LoRAConfig(
        r=3, target_modules=["up_proj", "down_proj"], rank_pattern={"layers.0.mlp.up_proj": 5}, init="olora"
    ),
}
ROWS = ["law", "medicine", None, "code", "law"]


def model_with(configs: dict[str, LoRAConfig] = CONFIGS, seed: int = 0) -> nn.Module:
    model = models.llama()
    for name, config in configs.items():
        add_adapter(model, name, config)
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in named_adapter_parameters(model):  # near their start, as magnitudes have to be
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def logits(model: nn.Module, which: object, ids: Tensor) -> Tensor:
    with torch.no_grad(), active(model, which):  # type: ignore[arg-type]
        return model(ids).logits


def alone(model: nn.Module, name: str) -> nn.Module:
    """Return a model with one adapter without a name, which holds the values of one that has one."""
    single = inject(models.llama(), CONFIGS[name])
    own = adapter_state_dict(model)
    load_adapter_state_dict(
        single, {k.replace(f".lora.{name}", ""): v for k, v in own.items() if f".lora.{name}." in k}
    )
    return single


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


@pytest.mark.parametrize("name", list(CONFIGS))
def test_each_folder_is_what_one_adapter_alone_writes(name: str, tmp_path: Path) -> None:
    model = model_with()
    save_peft(model, tmp_path / "all")
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == sorted(CONFIGS)
    save_peft(model, tmp_path / "one", adapter=name)
    torch.save(adapter_checkpoint(model), tmp_path / "file.pt")
    convert(tmp_path / "file.pt", tmp_path / "converted")
    save_peft(alone(model, name), tmp_path / "alone")
    for directory in ("all/" + name, "one", "converted/" + name):
        assert same_files(tmp_path / directory, tmp_path / "alone")
    for portable in (False,) if CONFIGS[name].use_dora else (True, False):
        config, tensors = adapter_tensors(model, name, portable)
        expected, others = adapter_tensors(alone(model, name), portable=portable)
        assert config == expected
        there = dict(others)
        assert all(torch.equal(value, there.pop(key)) for key, value in tensors)
        assert not there


def test_peft_reads_all_and_mixes_them_in_a_batch(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    configs = {**CONFIGS, "medicine": LoRAConfig(r=2, target_modules=["q_proj", "v_proj"])}  # it mixes no DoRA
    model, ids = model_with(configs).eval(), models.token_ids(len(ROWS), 9)
    save_peft(model, tmp_path)
    first, *others = configs
    theirs = peft.PeftModel.from_pretrained(models.llama(), tmp_path / first, adapter_name=first)
    for name in others:
        theirs.load_adapter(tmp_path / name, adapter_name=name)
    theirs.eval()
    with torch.no_grad():
        mixed = theirs(ids, adapter_names=[name or "__base__" for name in ROWS]).logits
    torch.testing.assert_close(logits(model, ROWS, ids), mixed, rtol=1e-4, atol=1e-5)
    for name in configs:
        theirs.set_adapter(name)
        with torch.no_grad():
            torch.testing.assert_close(logits(model, name, ids), theirs(ids).logits, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    read = load_peft(models.llama(), tmp_path / "theirs").eval()
    torch.testing.assert_close(logits(read, ROWS, ids), mixed, rtol=1e-4, atol=1e-5)


def test_a_directory_of_folders_gives_all(tmp_path: Path) -> None:
    model, ids = model_with().eval(), models.token_ids(len(ROWS), 9)
    save_peft(model, tmp_path)
    read = load_peft(models.llama(), tmp_path).eval()
    assert sorted(adapters(read)) == sorted(CONFIGS)
    torch.testing.assert_close(logits(read, ROWS, ids), logits(model, ROWS, ids), rtol=1e-5, atol=1e-6)


def test_one_is_added_under_a_name_of_its_own(tmp_path: Path) -> None:
    model, ids = model_with().eval(), models.token_ids(2, 9)
    save_peft(model, tmp_path)
    save_peft(alone(model, "law"), tmp_path / "flat")
    read = load_peft(models.llama(), tmp_path / "flat", adapter="jus").eval()
    assert load_peft(read, tmp_path, adapter="medicine") is read
    assert list(adapters(read)) == ["jus", "medicine"]
    expected = logits(model, ["law", "medicine"], ids)
    torch.testing.assert_close(logits(read, ["jus", "medicine"], ids), expected, rtol=1e-5, atol=1e-6)
    quantized = models.llama()
    quantize(quantized, "nf4")
    over = load_peft(copy.deepcopy(quantized), tmp_path, check_base=False)
    other = load_peft(models.llama(), tmp_path, quantize="nf4", check_base=False)
    assert torch.equal(logits(over.eval(), ROWS[:2], ids), logits(other.eval(), ROWS[:2], ids))


def test_names_that_are_taken_or_lacking_are_refused_and_nothing_changes(tmp_path: Path) -> None:
    model = model_with()
    save_peft(model, tmp_path)
    save_peft(model, tmp_path / "flat", adapter="law")
    before = {name: value.clone() for name, value in adapter_state_dict(model).items()}
    with pytest.raises(ValueError, match=r"there is an adapter 'code'.*hot_swap"):
        load_peft(model, tmp_path)
    with pytest.raises(ValueError, match="give the one in .*flat a name"):
        load_peft(model, tmp_path / "flat")
    with pytest.raises(ValueError, match="has an adapter without a name"):
        load_peft(inject(models.llama()), tmp_path / "flat", adapter="law")
    with pytest.raises(FileNotFoundError, match="is not an adapter directory"):
        load_peft(models.llama(), tmp_path, adapter="unknown")
    assert all(torch.equal(value, before[name]) for name, value in adapter_state_dict(model).items())


def test_the_model_is_given_back_where_one_of_several_does_not_fit(tmp_path: Path) -> None:
    save_peft(model_with(), tmp_path)
    other = models.llama()
    other.get_parameter("model.layers.0.mlp.down_proj.weight").data.mul_(2)
    first = load_peft(models.llama(), tmp_path, adapter="law")
    for model in (other, first):
        keys = set(model.state_dict())
        (tmp_path / "medicine" / "adapter_model.safetensors").write_bytes(b"damaged")
        with pytest.raises(ValueError, match="another base model|there is an adapter 'law'|is damaged"):
            load_peft(model, tmp_path)
        assert set(model.state_dict()) == keys
    save_peft(model_with(), tmp_path)
    with pytest.raises(ValueError, match="another base model"):
        load_peft(other, tmp_path)
    assert all(parameter.requires_grad for parameter in other.parameters())
    assert not any(".lora." in name for name, _ in other.named_parameters())


def test_one_of_several_has_to_be_named() -> None:
    model = model_with()
    for act in (lambda: adapter_tensors(model), lambda: hot_swap(model, "directory")):
        with pytest.raises(ValueError, match="has several adapters: give adapter= one of 'law', 'medicine', 'code'"):
            act()
    with pytest.raises(ValueError, match="adapter='art' is not known: LlamaForCausalLM has 'law', 'medicine', 'code'"):
        adapter_tensors(model, "art")
    with pytest.raises(ValueError, match="adapter='law' is not known: the adapter of LlamaForCausalLM has no name"):
        save_peft(inject(models.llama()), "directory", adapter="law")
    only = model_with({"law": CONFIGS["law"]})
    assert adapter_tensors(only)[0] == adapter_tensors(only, "law")[0]


def test_a_hot_swap_changes_one_and_leaves_the_others(tmp_path: Path) -> None:
    model, other = model_with(), model_with(seed=1)
    before = {name: value.clone() for name, value in adapter_state_dict(model).items()}
    save_peft(other, tmp_path)
    hot_swap(model, tmp_path / "medicine", adapter="medicine")
    theirs = adapter_state_dict(other)
    for name, value in adapter_state_dict(model).items():
        assert torch.equal(value, theirs[name] if ".lora.medicine." in name else before[name])
    with pytest.raises(ValueError, match="differ in what is adapted"):
        hot_swap(model, tmp_path / "medicine", adapter="law")


def test_nothing_is_written_where_one_of_them_holds_nan(tmp_path: Path) -> None:
    model = model_with()
    named = dict(named_adapter_parameters(model))
    named["model.layers.1.mlp.up_proj.lora.code.lora_B"].data.fill_(torch.nan)
    with pytest.raises(ValueError, match="holds NaN"):
        save_peft(model, tmp_path / "all")
    assert not (tmp_path / "all").exists()
    save_peft(model, tmp_path / "law", adapter="law")
    assert (tmp_path / "law" / "adapter_config.json").exists()


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_adapters_over_a_packed_base_are_no_part_of_it(tmp_path: Path, kind: Any) -> None:
    model = models.llama()
    quantize(model, kind)
    num_weights = forms_of(inject(copy.deepcopy(model), LoRAConfig()))
    add_adapter(model, "law", LoRAConfig(r=4))
    add_adapter(model, "medicine", LoRAConfig(r=3, use_dora=True))
    assert forms_of(model) == num_weights
    save_peft(model, tmp_path)
    loaded = load_peft(models.llama(), tmp_path)
    assert list(adapters(loaded)) == ["law", "medicine"]
    model.load_state_dict(model.state_dict())
    merge(model, adapter="medicine")
    unmerge(model)
    load_peft(models.llama(), tmp_path, quantize=kind)
