"""Merging over a quantised base: what is computed, what the receipt says, and what comes back."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_lora import (
    LoRAConfig,
    MergeReceipt,
    adapter_checkpoint,
    disabled,
    hot_swap,
    inject,
    load_adapter_state_dict,
    load_peft,
    merge,
    merge_receipt,
    merged,
    save_peft,
    unmerge,
)
from lightning_lora.checkpoint.fingerprint import fingerprint
from lightning_lora.layers.quantized_linear import QuantizedLinear
from lightning_lora.model.base_form import quantization_of
from lightning_lora.model.quantize import quantize
from tests import models

CONFIGS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "two layers": {"target_modules": ["q_proj", "v_proj"]},
    "bias": {"bias": "all", "lora_bias": False},
    "head": {"modules_to_save": ["lm_head"]},
}
KINDS = ["nf4", "nf4-dq", "int8"]
DOWN = "model.layers.0.mlp.down_proj"


def adapted(kind: str | None, dtype: torch.dtype = torch.float32, scale: float = 1.0, **config) -> nn.Module:
    model = models.llama(dtype=dtype)
    if kind is not None:
        quantize(model, kind)
    inject(model, LoRAConfig(**{"r": 4, **config})).eval()
    models.fill_adapters(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.mul_(scale)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(models.token_ids()).logits


def original(directory, dtype: torch.dtype = torch.float32):
    """Save the base of :func:`adapted` as it was before it was quantised."""
    path = directory / "model.safetensors"
    save_file({name: value.contiguous() for name, value in models.llama(dtype=dtype).state_dict().items()}, path)
    return path


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_is_the_trained_function_and_comes_back_bit_for_bit(kind, config):
    model = adapted(kind, **config)
    before, classes = state(model), [type(module) for module in model.modules()]
    parameters, expected = [name for name, _ in model.named_parameters()], logits(model)
    merge(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert not any(name.endswith(("quant_map", "SCB")) for name in model.state_dict())
    assert all(value.is_floating_point() for name, value in model.state_dict().items())
    unmerge(model)
    assert [type(module) for module in model.modules()] == classes
    assert [name for name, _ in model.named_parameters()] == parameters
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [{}, CONFIGS["two layers"]], ids=["all", "two layers"])
def test_a_merged_model_without_adapters_is_a_plain_one(kind, config):
    model = adapted(kind, torch.bfloat16, **config)
    dense = model.model.layers[0].self_attn.q_proj.weight.float()
    pair = model.model.layers[0].self_attn.q_proj.pairs()[""]
    update = pair.scaling * pair.B.detach() @ pair.A.detach()
    merge(model, remove=True)
    plain = models.llama(dtype=torch.bfloat16)
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]
    assert [(n, p.dtype, p.shape) for n, p in model.named_parameters()] == [
        (n, p.dtype, p.shape) for n, p in plain.named_parameters()
    ]
    assert list(model.state_dict()) == list(plain.state_dict())
    weight = model.model.layers[0].self_attn.q_proj.weight
    # the dense weight was read in bfloat16, and the sum was rounded once: at most a step apart
    torch.testing.assert_close(weight.float(), dense + update, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("config", [{}, CONFIGS["dora"], CONFIGS["two layers"]], ids=["lora", "dora", "two layers"])
@pytest.mark.parametrize("where", ["file", "directory"])
def test_merging_into_the_original_gives_the_adapter_over_it(tmp_path, config, where):
    path = original(tmp_path)
    over_float = adapted(None, **config)
    over_nf4 = adapted("nf4", **config)
    over_float.load_state_dict({n: p for n, p in over_nf4.state_dict().items() if "lora_" in n}, strict=False)
    expected = logits(over_float)
    merge(over_nf4, remove=True, base=path if where == "file" else tmp_path)
    torch.testing.assert_close(logits(over_nf4), expected, rtol=1e-4, atol=1e-5)


def test_the_receipt_is_dense_math(tmp_path):
    model, plain = adapted("nf4"), models.llama()
    layer = model.get_submodule(DOWN)
    weight, dense = plain.get_submodule(DOWN).weight.detach().double(), layer.weight.double()
    pair = layer.pairs()[""]
    update = (pair.scaling * pair.B.double() @ pair.A.double()).detach()
    merge(model, base=original(tmp_path), dtype=torch.bfloat16)
    receipt = merge_receipt(model)
    (one,) = [one for one in receipt if one.name == DOWN]
    assert one.update == pytest.approx(float(update.norm() / dense.norm()), rel=1e-4)
    assert one.base_change == pytest.approx(float((weight - dense).norm() / update.norm()), rel=1e-4)
    stored = (weight + update).float().bfloat16().double()
    assert one.rounding == pytest.approx(float((stored - weight - update).norm() / update.norm()), rel=1e-3)
    change = stored - weight.bfloat16().double()
    assert one.kept == pytest.approx(float((change * update).sum() / update.square().sum()), rel=1e-3)
    squares = sum(other.update_norm**2 for other in receipt)
    assert receipt.total.update_norm == pytest.approx(squares**0.5)
    assert len(receipt) == 14
    assert f"{DOWN}  " in str(receipt)


def test_a_float_base_in_bfloat16_loses_an_update_below_its_steps():
    model = adapted(None, torch.bfloat16, scale=1e-5)
    merge(model)
    receipt = merge_receipt(model)
    assert receipt.total.kept < 0.1
    assert receipt.total.rounding == pytest.approx(1.0, abs=0.2)
    assert receipt.total.base_change is None
    assert "less than half is kept of model.layers.0.self_attn.q_proj (" in receipt.summary()


def test_a_float32_merge_keeps_all():
    receipt = merge_receipt(merge(adapted(None)))
    assert receipt.total.rounding == 0.0
    assert receipt.total.kept == pytest.approx(1.0, rel=1e-4)  # the sum is rounded in float32


class TestOverAnotherForm:
    """The receipt says that the base is another one than the adapter was trained over, and how far it is from it."""

    def loaded(self, how: str, first: str | None, then: str | None, directory) -> nn.Module:
        trained = adapted(first)
        if how == "load_peft":
            save_peft(trained, directory)
            return load_peft(models.llama(), directory, quantize=then).eval()
        model = adapted(then, r=4)
        if how == "hot_swap":
            save_peft(trained, directory)
            hot_swap(model, directory)
        else:
            load_adapter_state_dict(model, adapter_checkpoint(trained))
        return model

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("how", ["load_peft", "hot_swap", "checkpoint"])
    def test_a_float_base_is_measured_against_its_packed_form(self, tmp_path, how, kind, caplog):
        model = self.loaded(how, kind, None, tmp_path)
        weight, dense = model.get_submodule(DOWN).weight.detach().double(), adapted(kind).get_submodule(DOWN).weight
        pair = model.get_submodule(DOWN).pairs()[""]
        update, expected = (pair.scaling * pair.B.double() @ pair.A.double()).detach(), logits(model)
        with caplog.at_level("INFO"):
            merge(model)
        assert (
            f"the base as it was loaded, not the trained one (trained over {kind}, loaded over float32)" in caplog.text
        )
        (one,) = [one for one in merge_receipt(model) if one.name == DOWN]
        assert one.base_change == pytest.approx(float((weight - dense).norm() / update.norm()), rel=1e-4)
        assert one.update == pytest.approx(float(update.norm() / dense.double().norm()), rel=1e-4)
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)  # still the function in hand

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_form_that_it_was_trained_in_gives_the_trained_function(self, tmp_path, kind):
        model = self.loaded("load_peft", kind, kind, tmp_path)
        merge(model, remove=True)
        assert merge_receipt(model).trained_over is None
        torch.testing.assert_close(logits(model), logits(adapted(kind)), rtol=1e-4, atol=1e-5)

    def test_the_original_is_the_trained_base_of_an_adapter_from_float(self, tmp_path):
        path = original(tmp_path)
        model = self.loaded("load_peft", None, "nf4", tmp_path / "adapter")
        assert merge_receipt(merge(model)).total.base_change is None  # the values of the trained base are not at hand
        assert "not the trained one (trained over float32, loaded over nf4)" in merge_receipt(model).summary()
        merge(unmerge(model), base=path)
        assert merge_receipt(model).total.base_change is None
        torch.testing.assert_close(logits(model), logits(adapted(None)), rtol=1e-4, atol=1e-5)

    def test_the_next_file_ends_it(self, tmp_path):
        model = self.loaded("checkpoint", "nf4", None, tmp_path)
        load_adapter_state_dict(model, adapter_checkpoint(adapted(None)))
        assert "into the trained base," in merge_receipt(merge(model)).summary()


def test_an_untrained_adapter_has_a_receipt():
    model = inject(models.llama(), LoRAConfig(r=4))
    total = merge_receipt(merge(model)).total
    assert (total.update, total.rounding, total.kept) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_requantising_a_small_update_is_refused_with_what_would_survive_and_changes_nothing(kind):
    model = adapted(kind, scale=1e-3)
    before = state(model)
    with pytest.raises(ValueError, match=rf"requantize={kind!r} would keep \d+\.\d % of the update"):
        merge(model, requantize=kind)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_requantising_a_large_update_stores_the_packed_sum(kind):
    model = adapted("nf4", scale=10.0)
    before, pair = state(model), model.get_submodule(DOWN).pairs()[""]
    exact = model.get_submodule(DOWN).weight + pair.scaling * pair.B.detach() @ pair.A.detach()
    merge(model, requantize=kind)
    weight = model.get_submodule(DOWN).weight
    assert (weight - exact).norm() / exact.norm() < (0.02 if kind == "int8" else 0.15)
    assert merge_receipt(model).total.form == kind
    assert merge_receipt(model).total.kept > 0.5
    unmerge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_requantising_over_the_original_keeps_a_small_update_along_it(tmp_path):
    model = adapted("nf4", scale=0.02)
    merge(model, base=original(tmp_path), requantize="nf4")
    assert merge_receipt(model).total.kept > 0.5
    assert merge_receipt(model).total.rounding > 1.0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_of_a_merged_model_unmerges_on_its_own(duplicate):
    model = adapted("nf4-dq", **CONFIGS["two layers"])
    expected = logits(model)
    twin = duplicate(merge(model))
    assert str(merge_receipt(twin)) == str(merge_receipt(model))
    assert torch.equal(logits(unmerge(twin)), expected)
    assert not torch.equal(logits(model), expected)  # still merged: another order of sums


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [{}, CONFIGS["two layers"]], ids=["all", "two layers"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_while_merged_is_that_of_the_packed_weights_too(kind, config, dtype):
    model, expected = adapted(kind, **config), adapted(kind, **config).to(dtype)
    unmerge(merge(model).to(dtype))
    assert torch.equal(logits(model), logits(expected))
    assert torch.equal(logits(merge(model)), logits(merge(expected)))


def test_a_cast_of_a_model_that_was_merged_into_another_dtype_is_undone_with_it():
    model = adapted("nf4")
    before = state(model)
    unmerge(merge(model, dtype=torch.bfloat16).half())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {p.dtype for p in merge(model).parameters()} == {torch.float32}


def test_merged_and_disabled_switch_between_the_functions():
    model = adapted("nf4")
    expected = logits(model)
    with disabled(model):
        base = logits(model)
    with merged(model):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
        with disabled(model):
            assert torch.equal(logits(model), base)
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("kind", [None, "nf4"])
@pytest.mark.parametrize("config", [{}, CONFIGS["head"], {"bias": "all"}], ids=["lora", "head", "bias"])
def test_another_dtype_is_that_of_the_whole_model_and_comes_back(kind, config):
    model = adapted(kind, **config)
    before, expected = state(model), logits(model)
    merge(model, dtype=torch.bfloat16)
    out = logits(model)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.1, atol=0.1)
    unmerge(model)
    assert torch.equal(logits(model), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    merge(model, remove=True, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_files_that_lack_a_weight_are_refused_and_nothing_changes(tmp_path):
    model = adapted("nf4")
    before = state(model)
    weights = {n: v for n, v in models.llama().state_dict().items() if n != f"{DOWN}.weight"}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"lacks {DOWN}.weight"):
        merge(model, base=tmp_path)
    save_file(weights | {f"{DOWN}.weight": torch.zeros(3, 5)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"has \[3, 5\] for '{DOWN}.weight'"):
        merge(model, base=tmp_path)
    with pytest.raises(FileNotFoundError, match="no safetensors at"):
        merge(model, base=tmp_path / "nowhere")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("remove", [False, True])
def test_another_merge_of_a_merged_model_is_refused_and_changes_nothing(tmp_path, remove):
    model = adapted("nf4")
    expected = logits(merge(model, dtype=torch.bfloat16))
    for other in ({"base": original(tmp_path)}, {"dtype": torch.float16}, {"requantize": "nf4"}):
        with pytest.raises(ValueError, match=r"merged with other settings.*call unmerge\(model\) first"):
            merge(model, remove, **other)
        assert torch.equal(logits(model), expected)
    for same in ({}, {"dtype": torch.bfloat16}):
        assert torch.equal(logits(merge(model, **same)), expected)
    assert torch.equal(logits(merge(model, remove=True)), expected)


def test_the_same_original_may_be_named_as_a_path_and_as_text(tmp_path):
    model, path = adapted("nf4"), original(tmp_path)
    expected = logits(merge(model, base=path))
    assert torch.equal(logits(merge(model, base=str(path))), expected)


def test_a_merged_model_is_known_by_the_form_that_its_base_had():
    model = inject(models.llama(), LoRAConfig(r=4), quantize="nf4")
    expected = logits(merge(model))
    inject(model, LoRAConfig(r=4), quantize="nf4")
    assert torch.equal(logits(model), expected)
    with pytest.raises(ValueError, match="quantised with quantize='nf4'"):
        inject(model, LoRAConfig(r=4), quantize="int8")


def test_a_dtype_in_words_and_a_base_that_is_not_there_are_answered_with_what_to_write():
    model = adapted("nf4")
    with pytest.raises(TypeError, match=r"dtype='bfloat16' must be a dtype of torch: write dtype=torch.bfloat16"):
        merge(model, dtype="bfloat16")
    with pytest.raises(FileNotFoundError, match="no safetensors at original: base is 'trained', or the path"):
        merge(model, base="original")
    with pytest.raises(TypeError, match=r"got OrderedDict\. .*save_pretrained\(directory\), and base=directory$"):
        merge(model, base=models.llama().state_dict())


@pytest.mark.parametrize("base", [None, 1, b"trained"])
def test_a_base_that_is_no_path_is_refused_and_nothing_changes(base):
    model = adapted("nf4")
    with pytest.raises(TypeError, match="must be 'trained', or the path of the original weights, .*; got"):
        merge(model, base=base)
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantizedLinear)


def test_words_that_mean_nothing_are_refused():
    model = adapted("nf4")
    with pytest.raises(ValueError, match="requantize must be one of 'nf4', 'nf4-dq', 'int8', got 'fp8'"):
        merge(model, requantize="fp8")
    with pytest.raises(ValueError, match="no weight of LlamaForCausalLM is quantised"):
        merge(adapted(None), requantize="nf4")
    with pytest.raises(ValueError, match="was not merged"):
        merge_receipt(model)


def test_the_first_line_of_the_receipt_is_logged_but_not_by_the_context(caplog):
    model = adapted("nf4")
    with caplog.at_level("INFO"):
        with merged(model):
            pass
        assert "merged 14 layers" not in caplog.text
        merge(model)
    assert "merged 14 layers into the trained base" in caplog.text
    assert isinstance(merge_receipt(model), MergeReceipt)


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"requantize": "int8"}], ids=["", "dtype", "int8"])
@pytest.mark.parametrize("config", [{}, CONFIGS["two layers"]], ids=["all", "two layers"])
def test_a_merged_model_has_the_fingerprint_of_its_base(options, config):
    model = adapted("nf4", scale=10.0, **config)
    before = fingerprint(model)
    plan = quantization_of(model)
    merge(model, **options)
    after = fingerprint(model)
    hashes = [dict(zip(one["names"], one["hashes"].tolist(), strict=True)) for one in (before, after)]
    assert hashes[0] == hashes[1]
    assert before["packed"] == after["packed"]
    assert getattr(quantization_of(model), "kind", None) == options.get("requantize")
    unmerge(model)
    assert quantization_of(model) is plan
    assert torch.equal(fingerprint(model)["hashes"], before["hashes"])


@pytest.mark.parametrize("kind", [*KINDS, None])
def test_the_weights_of_another_model_are_refused_before_anything_changes(tmp_path, kind):
    model = adapted(kind)
    before = state(model)
    torch.manual_seed(9)
    other = type(model)(model.config)
    save_file({name: value.contiguous() for name, value in other.state_dict().items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="holds other weights than those that the base was made from.*q_proj"):
        merge(model, base=tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_original_in_another_precision_is_the_same_base(tmp_path):
    model = adapted("nf4")
    merge(model, base=original(tmp_path, torch.bfloat16))
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.float32
