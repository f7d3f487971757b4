"""``save_pretrained`` of adapted models: it reads back as what it computed, or says what to write instead."""

import copy
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from lightning_lora import LoRAConfig, disabled, inject, merge, merged, remove
from tests import models

EXACT = {"rtol": 0.0, "atol": 0.0}


def adapted(build: Any = models.llama, **settings: Any) -> Any:
    model = inject(build().eval(), LoRAConfig(r=4, **settings))
    models.fill_adapters(model)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(models.token_ids()).logits


def read_back(model: Any, directory: Path) -> Tensor:
    return logits(type(model).from_pretrained(directory).eval())


def names_in(directory: Path) -> set[str]:
    return set(safetensors.torch.load_file(directory / "model.safetensors"))


class TestActiveAdapters:
    def test_are_refused_with_what_to_write(self, tmp_path: Path):
        with pytest.raises(ValueError, match="the base alone would be read back") as raised:
            adapted().save_pretrained(tmp_path / "saved")
        for remedy in ("save_peft(model, directory)", "with merged(model):", "merge(model, remove=True)"):
            assert remedy in str(raised.value)
        assert not (tmp_path / "saved").exists()

    def test_are_refused_inside_the_adapted_model_and_around_it(self, tmp_path: Path):
        whole = models.llama()
        inject(whole.model.layers, LoRAConfig(r=4))  # a root that is no transformers model
        for model in (whole, whole.model, adapted().model):
            with pytest.raises(ValueError, match="save_peft"):
                model.save_pretrained(tmp_path)

    def test_are_refused_in_a_given_state(self, tmp_path: Path):
        model = adapted()
        with pytest.raises(ValueError, match="save_peft"):
            model.save_pretrained(tmp_path, True, model.state_dict())

    def test_are_refused_for_the_hub(self, tmp_path: Path):
        with pytest.raises(ValueError, match="save_peft"):
            adapted().save_pretrained(tmp_path, push_to_hub=True, is_main_process=False)

    def test_are_refused_by_the_hubs_mixin(self, tmp_path: Path):
        class Net(nn.Module, PyTorchModelHubMixin):
            def __init__(self) -> None:
                super().__init__()
                self.linear = nn.Linear(8, 8)

        model = inject(Net(), LoRAConfig(r=2))
        with pytest.raises(ValueError, match="save_peft"):
            model.save_pretrained(tmp_path)
        remove(model).save_pretrained(tmp_path)
        torch.testing.assert_close(Net.from_pretrained(tmp_path).linear.weight, model.linear.weight, **EXACT)

    def test_are_refused_by_diffusers_models(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        class ModelMixin(nn.Module):  # takes no state_dict=, as diffusers' does not
            def save_pretrained(self, save_directory: Path, is_main_process: bool = True) -> None:
                torch.save(self.state_dict(), save_directory / "model.pt")

        module: Any = types.ModuleType("diffusers.models.modeling_utils")
        module.ModelMixin = ModelMixin
        monkeypatch.setitem(sys.modules, module.__name__, module)
        net = ModelMixin()
        net.linear = nn.Linear(8, 8)
        inject(net, LoRAConfig(r=2))
        with pytest.raises(ValueError, match="save_peft"):
            net.save_pretrained(tmp_path)
        with merged(net):
            net.save_pretrained(tmp_path)
            expected = net.linear.weight.clone()
        torch.testing.assert_close(torch.load(tmp_path / "model.pt")["linear.weight"], expected, **EXACT)

    def test_do_not_keep_others_from_being_saved(self, tmp_path: Path):
        adapted()
        plain = models.llama().eval()
        plain.save_pretrained(tmp_path)
        torch.testing.assert_close(read_back(plain, tmp_path), logits(plain), **EXACT)


class TestWhatIsWritten:
    @pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"init": "pissa"}, {"trainable_token_indices": [3]}])
    def test_merged_inside_a_block_reads_back_as_the_adapted_model(self, settings: dict[str, Any], tmp_path: Path):
        model = adapted(**settings)
        with merged(model):
            expected = logits(model)
            model.save_pretrained(tmp_path)
        torch.testing.assert_close(read_back(model, tmp_path), expected, **EXACT)
        torch.testing.assert_close(expected, logits(model), rtol=1e-4, atol=1e-5)  # the sum is taken once, in float32
        assert names_in(tmp_path) == names_in_plain(tmp_path)

    def test_merged_for_good_reads_back_as_the_adapted_model(self, tmp_path: Path):
        model = merge(adapted(), remove=True)
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(read_back(model, tmp_path), logits(model), **EXACT)

    def test_trained_heads_are_the_trained_ones(self, tmp_path: Path):
        model = adapted(models.bert_classifier)
        with torch.no_grad():
            model.classifier.weight.add_(1.0)
        with merged(model):
            model.save_pretrained(tmp_path)
            expected = logits(model)
        torch.testing.assert_close(read_back(model, tmp_path), expected, **EXACT)

    @pytest.mark.parametrize("build", [models.llama, models.bert_classifier])
    def test_disabled_reads_back_as_the_base(self, build: Any, tmp_path: Path):
        base, model = build().eval(), adapted(build)
        with disabled(model):
            model.save_pretrained(tmp_path)
        torch.testing.assert_close(read_back(model, tmp_path), logits(base), **EXACT)

    def test_removed_reads_back_as_the_base(self, tmp_path: Path):
        model = remove(adapted())
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(read_back(model, tmp_path), logits(models.llama().eval()), **EXACT)

    def test_a_given_state_without_adapters_is_written_as_given(self, tmp_path: Path):
        base = models.llama().eval()
        adapted().save_pretrained(tmp_path, state_dict=base.state_dict())
        torch.testing.assert_close(read_back(base, tmp_path), logits(base), **EXACT)

    def test_merged_with_a_given_state_leaves_out_the_adapters(self, tmp_path: Path):
        model = adapted()
        with merged(model):
            model.save_pretrained(tmp_path, is_main_process=True, state_dict=model.state_dict())
            expected = logits(model)
        torch.testing.assert_close(read_back(model, tmp_path), expected, **EXACT)
        assert names_in(tmp_path) == names_in_plain(tmp_path)


def names_in_plain(directory: Path) -> set[str]:
    models.llama().save_pretrained(directory / "plain")
    return names_in(directory / "plain")


class TestOtherCopies:
    """On one device every other way of copying an adapted model holds all of it."""

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copy_computes_the_same(self, copied: Any):
        model = adapted()
        torch.testing.assert_close(logits(copied(model)), logits(model), **EXACT)

    def test_safetensors_of_the_whole_model_is_read_into_an_adapted_one_and_refused_by_a_bare_one(self, tmp_path: Path):
        model, fresh = adapted(), inject(models.llama().eval(), LoRAConfig(r=4))
        safetensors.torch.save_model(model, str(tmp_path / "model.safetensors"))
        safetensors.torch.load_model(fresh, str(tmp_path / "model.safetensors"))
        torch.testing.assert_close(logits(fresh), logits(model), **EXACT)
        with pytest.raises(RuntimeError, match="lora_A"):
            safetensors.torch.load_model(models.llama(), str(tmp_path / "model.safetensors"))
