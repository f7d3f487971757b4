"""``hot_swap`` against ``load_peft`` into a fresh model, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_lora import LoRAConfig, adapter_state_dict, disabled, hot_swap, inject, load_peft, merge, save_peft
from lightning_lora.model.state import named_lora_layers
from tests import models
from tests.peft.test_adapter_tensors import FACTORS, MORE, adapted
from tests.peft.test_directory import give_values, saved_by_peft

SWAPPED = [case for case in FACTORS | MORE if case != "pissa"]


def moved(model: nn.Module) -> nn.Module:
    """Give every tensor that trains, and AdaLoRA's ranks, other values."""
    give_values(model, seed=9)
    return model


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out = model.eval()(input_ids=models.token_ids())
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize("case", SWAPPED)
def test_it_computes_what_a_fresh_model_with_the_directory_does(case: str, tmp_path: Path) -> None:
    save_peft(adapted(case), tmp_path)
    model = moved(adapted(case))
    identities = {name: id(parameter) for name, parameter in model.named_parameters()}
    before, expected = output(model), output(load_peft((FACTORS | MORE)[case][0](), tmp_path))
    assert not torch.equal(before, expected)
    hot_swap(model, tmp_path)
    assert torch.equal(output(model), expected)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == identities


@pytest.mark.parametrize(
    "settings",
    [{"target_modules": "all-linear"}, {"target_modules": ["embed_tokens", "q_proj"]}],
    ids=["linear", "embedding"],
)
def test_a_directory_of_peft(settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = saved_by_peft(models.llama, tmp_path, **settings)
    model = moved(inject(models.llama(), LoRAConfig(r=4, alpha=6, **settings)))
    hot_swap(model, tmp_path)
    torch.testing.assert_close(output(model), theirs(models.token_ids()).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_model_is_not_compiled_again(tmp_path: Path) -> None:
    save_peft(adapted("llama"), tmp_path)
    model = moved(adapted("llama"))
    expected = output(load_peft(models.llama(), tmp_path))
    graphs = CompileCounterWithBackend("eager")
    torch.compiler.reset()
    compiled = torch.compile(model, backend=graphs)
    with torch.no_grad():
        before = compiled(models.token_ids(), use_cache=False).logits
        count = graphs.frame_count
        hot_swap(compiled, tmp_path)
        after = compiled(models.token_ids(), use_cache=False).logits
    assert count == graphs.frame_count > 0
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6)


def test_an_optimizer_keeps_its_moments(tmp_path: Path) -> None:
    save_peft(adapted("llama"), tmp_path)
    model = moved(adapted("llama"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    model(input_ids=models.token_ids(), labels=models.token_ids()).loss.backward()
    optimizer.step()
    before = [state["exp_avg"].clone() for state in optimizer.state.values()]
    hot_swap(model, tmp_path)
    assert all(torch.equal(s["exp_avg"], m) for s, m in zip(optimizer.state.values(), before, strict=True))
    assert all(parameter in optimizer.state for parameter in model.parameters() if parameter.requires_grad)


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"r": 8}, r"has \(8, 32\) for .*lora_A.weight', the model has \(4, 32\). hot_swap copies values alone"),
    "targets": ({"target_modules": ["q_proj"]}, r"nothing only in the directory, 'model.layers.0.mlp.down_proj'"),
    "scale": ({"alpha": 16}, r"scales 'model.layers.0.self_attn.q_proj' by 4, the model by 2"),
    "dora": ({"use_dora": True}, "differ in what is adapted or trains whole"),
    "head": ({"modules_to_save": ["lm_head"]}, "'lm_head.weight' only in the directory, nothing only in the model"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_adapter_is_refused_before_anything_is_copied(other: str, tmp_path: Path) -> None:
    settings, message = OTHERS[other]
    source = inject(models.llama(), LoRAConfig(**{"r": 4, "alpha": settings.get("r", 4) * 2, **settings}))
    save_peft(source, tmp_path)
    model = adapted("llama")
    before = {name: value.clone() for name, value in adapter_state_dict(model).items()}
    with pytest.raises(ValueError, match=message):
        hot_swap(model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in adapter_state_dict(model).items())


def test_other_rows_of_an_embedding_are_refused(tmp_path: Path) -> None:
    save_peft(inject(models.llama(), LoRAConfig(r=4, trainable_token_indices={"embed_tokens": [2, 5]})), tmp_path)
    with pytest.raises(ValueError, match="train other rows of 'model.embed_tokens'"):
        hot_swap(adapted("rows"), tmp_path)


def test_a_portable_directory_of_another_scale_is_refused(tmp_path: Path) -> None:
    save_peft(adapted("llama"), tmp_path, portable=True)
    with pytest.raises(ValueError, match="without portable=True"):
        hot_swap(adapted("llama"), tmp_path)


def test_pissa_takes_its_own_run_and_no_other(tmp_path: Path) -> None:
    own, other = tmp_path / "own", tmp_path / "other"
    save_peft(adapted("pissa"), own)
    model = moved(adapted("pissa"))
    expected = output(adapted("pissa"))
    hot_swap(model, own)
    assert torch.equal(output(model), expected)
    stranger = adapted("pissa")
    layer = next(iter(named_lora_layers(stranger).values()))
    nn.init.normal_(layer.lora_A0)
    save_peft(stranger, other)
    with pytest.raises(ValueError, match="has values of .* that the model cannot take: another start of PiSSA"):
        hot_swap(model, other)
    assert torch.equal(output(model), expected)


def test_another_base_is_refused_unless_accepted(tmp_path: Path) -> None:
    base = models.llama()
    nn.init.normal_(base.model.layers[1].mlp.up_proj.weight)
    save_peft(inject(base, LoRAConfig(r=4)), tmp_path)
    model = adapted("llama")
    with pytest.raises(ValueError, match=r"another base model: the base tensor 'model.layers.1.mlp.up_proj.weight'"):
        hot_swap(model, tmp_path)
    hot_swap(model, tmp_path, check_base=False)
    assert not any(value.any() for name, value in adapter_state_dict(model).items() if name.endswith("lora_B"))


def test_a_base_in_another_form_takes_the_directory(tmp_path: Path) -> None:
    save_peft(adapted("nf4"), tmp_path)
    model = moved(adapted("llama"))
    hot_swap(model, tmp_path)
    assert torch.equal(output(model), output(adapted("llama")))


def test_an_unknown_name_a_merged_and_a_disabled_adapter_and_nan_are_refused(tmp_path: Path) -> None:
    model = adapted("llama")
    save_peft(model, tmp_path)
    with pytest.raises(ValueError, match="adapter='law' is not known"):
        hot_swap(model, tmp_path, "law")
    with disabled(model), pytest.raises(ValueError, match="are disabled"):
        hot_swap(model, tmp_path)
    merge(model)
    with pytest.raises(ValueError, match="are merged"):
        hot_swap(model, tmp_path)
    nn.init.constant_(model.model.layers[0].self_attn.q_proj.lora_B, float("nan"))
    with pytest.warns(UserWarning, match="holds NaN"):
        save_peft(model, tmp_path, on_nonfinite="warn")
    with pytest.raises(ValueError, match="holds NaN"):
        hot_swap(adapted("llama"), tmp_path)
