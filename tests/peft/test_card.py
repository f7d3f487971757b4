"""The model card of a portable adapter, and that its readers need no more than before."""

import json
import warnings

import peft
import pytest
import torch
from huggingface_hub import ModelCard

from lightning_lora import LoRAConfig, adapter_checkpoint, check_portable, convert, inject, load_peft, save_peft
from lightning_lora.model.quantize import quantize
from tests import models


@pytest.fixture(params=["nf4", None])
def kind(request):
    return request.param


def adapted(directory, kind):
    """Return a model that says where it came from, quantised and adapted."""
    models.llama().save_pretrained(directory)
    model = type(models.llama()).from_pretrained(directory, dtype=torch.float32)
    if kind is not None:
        quantize(model, kind)
    inject(model, LoRAConfig(r=4))
    models.fill_adapters(model)
    return model


@pytest.mark.parametrize("converted", [False, True])
def test_a_card_says_the_base_and_its_form(tmp_path, kind, converted):
    model = adapted(tmp_path / "base", kind)
    if converted:
        torch.save(adapter_checkpoint(model), tmp_path / "adapter.ckpt")
        convert(tmp_path / "adapter.ckpt", tmp_path / "portable", portable=True)
    else:
        save_peft(model, tmp_path / "portable", portable=True)
    card = ModelCard.load(tmp_path / "portable" / "README.md")
    assert card.data.base_model == str(tmp_path / "base")
    assert card.data.library_name == "peft"
    assert ("14 weights in `nf4`" in card.text) == (kind is not None)


def test_peft_reads_the_directory_without_a_warning_and_knows_all_of_its_fields(tmp_path, kind):
    model = adapted(tmp_path / "base", kind)
    save_peft(model, tmp_path / "portable", portable=True)
    fields = json.loads((tmp_path / "portable" / "adapter_config.json").read_text())
    assert fields.keys() <= vars(peft.LoraConfig()).keys() | {"lora_bias"}
    base = type(models.llama()).from_pretrained(tmp_path / "base", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a FutureWarning of transformers' is not about the file
        theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "portable"))
    again = type(models.llama()).from_pretrained(tmp_path / "base", dtype=torch.float32)
    ours = load_peft(again, tmp_path / "portable")
    ids = models.token_ids()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-6)
    for reader in ("vllm", "sglang", "llama.cpp"):
        assert check_portable(tmp_path / "portable", reader) == []


def test_a_card_of_the_users_stays_and_a_plain_directory_has_none(tmp_path, kind):
    model = adapted(tmp_path / "base", kind)
    (tmp_path / "portable").mkdir()
    (tmp_path / "portable" / "README.md").write_text("mine")
    save_peft(model, tmp_path / "portable", portable=True)
    assert (tmp_path / "portable" / "README.md").read_text() == "mine"
    save_peft(model, tmp_path / "plain")
    assert not (tmp_path / "plain" / "README.md").exists()
