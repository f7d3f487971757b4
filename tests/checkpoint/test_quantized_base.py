"""An adapter knows its base in any form: the fingerprint of a quantised base is that of the weights it was made from."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    adapter_checkpoint,
    inject,
    load_adapter_state_dict,
    load_peft,
    quantize,
    save_peft,
)
from lightning_lora.checkpoint.fingerprint import fingerprint
from tests import models

CONFIG = LoRAConfig(r=4)
KINDS = ["nf4", "nf4-dq", "int8"]


def base(*, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = models.llama()
    if seed:
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / 8
    return model.to(dtype)


def codes_only(kind: str = "nf4", **settings: Any) -> nn.Module:
    """Return a base that was read from packed weights: nobody has seen what they were made from."""
    source, model = base(**settings), base(seed=9)
    quantize(source, kind)
    quantize(model, kind)
    model.load_state_dict(source.state_dict())
    return model


def adapted(model: nn.Module, quantize: Any = None) -> nn.Module:
    inject(model, CONFIG, quantize=quantize)
    models.fill_adapters(model)
    return model


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "trained over" in record.getMessage()]


@pytest.fixture(autouse=True)
def _logged(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_hashes_are_those_of_the_weights_that_were_quantised(kind: str, dtype: torch.dtype) -> None:
    model, packed = adapted(base()), adapted(base(dtype=dtype), kind)
    prints = [fingerprint(one) for one in (model, packed)]
    expected, found = (dict(zip(one["names"], one["hashes"].tolist(), strict=True)) for one in prints)
    assert found == expected
    assert len(found) == len(models.llama().state_dict())


@pytest.mark.parametrize(
    ("first", "then", "line"),
    [
        ("nf4", None, "trained over nf4, loaded over bfloat16"),
        (None, "nf4-dq", "trained over bfloat16, loaded over nf4-dq"),
        ("int8", "nf4", "trained over int8, loaded over nf4"),
        ("nf4", "nf4", None),
        (None, None, None),
    ],
)
def test_an_adapter_fits_the_base_in_any_form_and_a_line_says_what_changed(first, then, line, caplog) -> None:
    saved = adapter_checkpoint(adapted(base(dtype=torch.bfloat16), first))
    model = adapted(base(dtype=torch.bfloat16), then)
    caplog.clear()
    load_adapter_state_dict(model, saved)
    assert lines(caplog) == ([] if line is None else [f"the checkpoint: {line}"])


def test_a_peft_directory_says_so_too(tmp_path: Path, caplog) -> None:
    save_peft(adapted(base(), "nf4"), tmp_path)
    load_peft(base(), tmp_path)
    assert lines(caplog) == [f"{tmp_path}: trained over nf4, loaded over float32"]
    load_peft(base(), tmp_path, quantize="nf4")
    assert len(lines(caplog)) == 1


def test_other_weights_left_out_are_another_form(caplog) -> None:
    saved = adapter_checkpoint(adapted(base(), "nf4"))
    model = base()
    inject(model, CONFIG, quantize="nf4", quantize_exclude=["q_proj"])
    load_adapter_state_dict(model, saved)
    assert lines(caplog) == ["the checkpoint: trained over nf4 (14 weights), loaded over nf4 (12 weights)"]


@pytest.mark.parametrize("first", [None, "nf4", "int8"])
@pytest.mark.parametrize("then", [None, "nf4"])
def test_another_base_is_refused_and_most_of_it_said_to_differ(first, then) -> None:
    saved = adapter_checkpoint(adapted(base(), first))
    with pytest.raises(ValueError, match=r"holds other values, and so do \d+ of the \d+ others") as raised:
        load_adapter_state_dict(adapted(base(seed=1), then), saved)
    assert "last row" not in str(raised.value)


def test_one_other_weight_is_named() -> None:
    saved = adapter_checkpoint(adapted(base(), "nf4"))
    other = base()
    other.model.layers[1].mlp.up_proj.weight.data.mul_(2)
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.up_proj.weight' holds other values\. "):
        load_adapter_state_dict(adapted(other, "nf4"), saved)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["written into", "emptied"])
def test_a_base_whose_codes_were_overwritten_in_place_is_another_one(kind, how) -> None:
    saved = adapter_checkpoint(adapted(base(), kind))
    model = adapted(base(), kind)
    layer = model.model.layers[0].mlp.up_proj
    if how == "emptied":
        layer.to_empty(device="cpu")
    layer.weight_codes.data.zero_()  # what to_empty leaves is whatever was there
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.up_proj.weight' holds other values\. "):
        load_adapter_state_dict(model, saved)


class TestWhereTheWeightsWereNeverSeen:
    """Bases that are read from packed weights are known by their codes."""

    def test_the_codes_tell_bases_apart(self) -> None:
        saved = adapter_checkpoint(adapted(codes_only()))
        load_adapter_state_dict(adapted(codes_only()), saved)
        with pytest.raises(ValueError, match="holds other values"):
            load_adapter_state_dict(adapted(codes_only(seed=3)), saved)

    def test_a_base_whose_weights_were_seen_has_the_same_codes(self) -> None:
        for one, other in ((codes_only(), base()), (base(), codes_only())):
            kinds = [None if one_of.model.layers[0].mlp.up_proj._parameters.get("weight") is None else "nf4"
                     for one_of in (one, other)]  # fmt: skip
            load_adapter_state_dict(adapted(other, kinds[1]), adapter_checkpoint(adapted(one, kinds[0])))
        with pytest.raises(ValueError, match="holds other values"):
            load_adapter_state_dict(adapted(base(seed=3), "nf4"), adapter_checkpoint(adapted(codes_only())))

    def test_a_load_of_the_same_codes_keeps_what_was_seen(self) -> None:
        model = adapted(base(), "nf4")
        model.load_state_dict(model.state_dict())
        load_adapter_state_dict(adapted(base()), adapter_checkpoint(model))

    def test_a_load_of_the_same_codes_with_other_scales_forgets_it(self) -> None:
        model, twice = base(), base()
        for parameter in twice.parameters():
            parameter.data.mul_(2)
        for one in (model, twice):
            quantize(one, "nf4")
        model.load_state_dict(twice.state_dict())
        base_of = adapter_checkpoint(adapted(model))["lightning_lora"]["adapters"][0]["base"]
        assert not any("_proj" in name for name in base_of["names"])
        assert sum("_proj" in name for name in base_of["packed"]) == 14

    def test_double_quantisation_has_the_codes_of_plain(self) -> None:
        load_adapter_state_dict(adapted(codes_only("nf4-dq")), adapter_checkpoint(adapted(codes_only("nf4"))))

    @pytest.mark.parametrize("double", [False, True])
    def test_layers_of_bitsandbytes_have_the_codes_of_ours(self, double: bool) -> None:
        bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")

        def theirs(seed: int) -> nn.Module:
            torch.manual_seed(seed)
            layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compress_statistics=double)
            return inject(nn.Sequential(layer.to("cpu")), CONFIG)

        torch.manual_seed(0)
        ours = nn.Sequential(nn.Linear(64, 64, bias=False))
        saved = adapter_checkpoint(inject(ours, CONFIG, quantize="nf4"))
        load_adapter_state_dict(theirs(0), saved)
        with pytest.raises(ValueError, match="'0.weight' holds other values"):
            load_adapter_state_dict(theirs(1), saved)
