"""Damaged PEFT directories and those of another kind."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    inject,
    load_peft,
    save_peft,
)
from lightning_lora.layers import LoRALayer
from tests import models
from tests.peft.test_directory import saved_by_peft


class TestDamagedDirectories:
    """One clear error each; the model is untouched and nothing is executed."""

    @staticmethod
    def refuse(
        directory: Path, match: str, error: type[Exception] = ValueError, model: nn.Module | None = None
    ) -> None:
        model = model or models.llama()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(error, match=match):
            load_peft(model, directory)
        assert not any(isinstance(module, LoRALayer) for module in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        save_peft(inject(models.llama(), LoRAConfig(r=4)), tmp_path)
        return tmp_path

    @staticmethod
    def edit_config(directory: Path, **changes: Any) -> None:
        path = directory / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    @staticmethod
    def edit_tensors(directory: Path, change: Callable[[dict[str, Any]], None]) -> None:
        path = directory / "adapter_model.safetensors"
        tensors = safetensors.torch.load_file(path)
        change(tensors)
        safetensors.torch.save_file(tensors, path)

    def test_no_config(self, directory: Path) -> None:
        (directory / "adapter_config.json").unlink()
        self.refuse(directory, r"has no adapter_config.json \(adapter_model.safetensors\)", FileNotFoundError)

    def test_no_directory(self, tmp_path: Path) -> None:
        self.refuse(tmp_path / "nowhere", "no such directory", FileNotFoundError)

    def test_no_tensors(self, directory: Path) -> None:
        (directory / "adapter_model.safetensors").unlink()
        self.refuse(directory, "neither adapter_model.safetensors nor adapter_model.bin", FileNotFoundError)

    @pytest.mark.parametrize("keep", [0, 7, 500, -10])
    def test_truncated_tensors(self, directory: Path, keep: int) -> None:
        path = directory / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:keep])
        self.refuse(directory, "is damaged")

    def test_config_that_is_no_json(self, directory: Path) -> None:
        (directory / "adapter_config.json").write_text("{")
        self.refuse(directory, "is not JSON")

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"peft_type": "IA3"}, "describes a 'IA3' adapter"),
            ({"use_qalora": True}, "use_qalora=True, which is not supported"),
            ({"init_lora_weights": "pissa"}, "changes the base weights"),
            ({"r": None}, "lacks 'r'"),
            ({"r": 8}, "has r=8 in its config, and tensors of rank 4 for"),
            ({"target_modules": ["q_proj"]}, "config and tensors disagree"),
        ],
    )
    def test_configs_of_another_kind(self, directory: Path, changes: dict[str, Any], match: str) -> None:
        self.edit_config(directory, **changes)
        self.refuse(directory, match)

    def test_a_missing_factor(self, directory: Path) -> None:
        self.edit_tensors(directory, lambda tensors: tensors.pop(sorted(tensors)[0]))
        self.refuse(directory, "has only lora_B")

    def test_a_missing_layer(self, directory: Path) -> None:
        def drop(tensors: dict[str, Any]) -> None:
            for key in sorted(tensors)[:2]:
                del tensors[key]

        self.edit_tensors(directory, drop)
        self.refuse(directory, r"no tensors for .* \(1 layers\)")

    def test_an_extra_layer(self, directory: Path) -> None:
        def add(tensors: dict[str, Any]) -> None:
            tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 32)
            tensors["base_model.model.model.layers.7.self_attn.q_proj.lora_B.weight"] = torch.zeros(32, 4)

        self.edit_tensors(directory, add)
        self.refuse(directory, "adapts 'model.layers.7.self_attn.q_proj', which is missing")

    def test_a_head_that_trained_whole_and_is_not_there(self, tmp_path: Path) -> None:
        saved_by_peft(models.bert_classifier, tmp_path, target_modules=["query"], modules_to_save=["classifier"])
        self.edit_tensors(tmp_path, lambda tensors: tensors.pop("base_model.model.classifier.bias"))
        self.refuse(tmp_path, "has no 'classifier.bias'", model=models.bert_classifier())

    def test_a_bias_that_the_config_does_not_train(self, tmp_path: Path) -> None:
        saved_by_peft(models.bert_classifier, tmp_path, target_modules=["query"])
        key = "base_model.model.classifier.bias"
        self.edit_tensors(tmp_path, lambda tensors: tensors.update({key: torch.ones(3)}))
        self.refuse(tmp_path, "'classifier.bias' .1 tensors., which its config does", model=models.bert_classifier())

    def test_two_adapters_of_one_layer(self, directory: Path) -> None:
        key = "base_model.model.model.layers.0.self_attn.q_proj"
        self.edit_tensors(
            directory,
            lambda t: t.update({f"{key}.base_layer.lora_{x}.weight": t[f"{key}.lora_{x}.weight"] * 2 for x in "AB"}),
        )
        self.refuse(directory, "has two adapters for 'model.layers.0.self_attn.q_proj'")

    def test_another_base(self, directory: Path) -> None:
        model = models.gpt2()
        self.refuse(directory, "missing in GPT2LMHeadModel: another base model", model=model)

    def test_a_pickle_with_code_is_not_executed(self, directory: Path) -> None:
        marker = directory / "executed"

        class Hostile:
            def __reduce__(self):
                return (os.system, (f"touch {marker}",))

        (directory / "adapter_model.safetensors").unlink()
        torch.save({"a": Hostile()}, directory / "adapter_model.bin")
        self.refuse(directory, "is damaged or holds more than tensors")
        assert not marker.exists()
