"""Checkpoints that do not fit are refused before anything is copied."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import LoRACallback, LoRAConfig, adapter_checkpoint, inject, load_adapter_state_dict
from tests import models
from tests.runs import LanguageModule, fitted, loader, same_adapters, trainer


class TestRefusals:
    """Each ends in one clear error, and the model is what it was."""

    @staticmethod
    def refuse(
        directory: Path, path: Path, match: str, module: Any = None, error: type = ValueError, **lora: Any
    ) -> None:
        module = module or LanguageModule()
        run = trainer(directory, LoRACallback(**{"r": 4, **lora}))
        with pytest.raises(error, match=match):
            run.validate(module, loader(), ckpt_path=path, verbose=False)
        untouched = inject(models.llama(), LoRAConfig(**{"r": 4, **lora}))
        if module.model.lora_injection.config.target_modules == "all-linear":
            assert same_adapters(module, untouched)

    def test_another_rank(self, tmp_path: Path) -> None:
        fitted(tmp_path)
        self.refuse(tmp_path, tmp_path / "last.ckpt", "has r=4 at .*, the model has r=8", r=8)

    def test_another_scale(self, tmp_path: Path) -> None:
        fitted(tmp_path)
        self.refuse(tmp_path, tmp_path / "last.ckpt", "scales .* by 2, the model by 4", alpha=16)

    def test_other_targets(self, tmp_path: Path) -> None:
        fitted(tmp_path)
        self.refuse(tmp_path, tmp_path / "last.ckpt", "differ in their adapted layers", target_modules=["q_proj"])

    def test_another_base(self, tmp_path: Path) -> None:
        fitted(tmp_path)
        module = LanguageModule()
        with torch.no_grad():
            module.model.lm_head.weight.add_(1)
        self.refuse(tmp_path, tmp_path / "last.ckpt", "another base model: .*'lm_head.weight'", module)

    @pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
    def test_damaged_sets_of_tensors(self, tmp_path: Path, change: str) -> None:
        fitted(tmp_path)
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
        name = next(iter(saved["state_dict"]))
        if change == "missing":
            del saved["state_dict"][name]
        elif change == "unexpected":
            saved["state_dict"]["model.nowhere"] = torch.zeros(1)
        else:
            saved["state_dict"][name] = torch.zeros(3, 3)
        torch.save(saved, tmp_path / "bad.ckpt")
        match = {
            "missing": "missing in the file",
            "unexpected": "'model.nowhere' not in the model",
            "shape": r"has \(3, 3\)",
        }
        self.refuse(tmp_path, tmp_path / "bad.ckpt", match[change])

    @pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
    def test_another_vocabulary_says_how_to_resize(self, target: str) -> None:
        config, larger = LoRAConfig(r=4, target_modules=[target]), models.llama()
        larger.resize_token_embeddings(104, mean_resizing=False)
        saved = adapter_checkpoint(inject(larger, config))
        with pytest.raises(ValueError, match=rf"104.* for '.*{target}.lora_.', the model has .*100") as raised:
            load_adapter_state_dict(inject(models.llama(), config), saved)
        assert "call model.resize_token_embeddings(104) before the model is adapted" in str(raised.value)

    @pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
    def test_empty_foreign_and_truncated_files(self, tmp_path: Path, content: bytes | None) -> None:
        fitted(tmp_path)
        whole = (tmp_path / "last.ckpt").read_bytes()
        (tmp_path / "bad.ckpt").write_bytes(whole[: len(whole) // 2] if content is None else content)
        self.refuse(tmp_path, tmp_path / "bad.ckpt", "bad.ckpt")

    def test_a_checkpoint_of_base_weights(self, tmp_path: Path) -> None:
        torch.save({"state_dict": models.llama().state_dict()}, tmp_path / "base.ckpt")
        self.refuse(tmp_path, tmp_path / "base.ckpt", "not an adapter checkpoint: it has no section 'lightning_lora'")

    def test_a_newer_format(self, tmp_path: Path) -> None:
        fitted(tmp_path)
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
        saved["lightning_lora"]["format_version"] = 99
        torch.save(saved, tmp_path / "new.ckpt")
        self.refuse(tmp_path, tmp_path / "new.ckpt", "format version 99")

    def test_code_in_a_file_is_never_run(self, tmp_path: Path) -> None:
        marker = tmp_path / "executed"

        class Hostile:
            def __reduce__(self):
                return (os.system, (f"touch {marker}",))

        torch.save({"state_dict": {}, "lightning_lora": Hostile()}, tmp_path / "hostile.ckpt")
        self.refuse(tmp_path, tmp_path / "hostile.ckpt", "without running code")
        run = trainer(tmp_path, LoRACallback(r=4))
        with pytest.raises(ValueError, match="without running code"):
            run.validate(LanguageModule(), loader(), ckpt_path=tmp_path / "hostile.ckpt", weights_only=False)
        assert not marker.exists()

    def test_a_missing_file(self, tmp_path: Path) -> None:
        self.refuse(tmp_path, tmp_path / "no.ckpt", "no.ckpt", error=FileNotFoundError)

    def test_hyperparameters_that_could_not_be_read_back_are_found_at_the_start(self, tmp_path: Path) -> None:
        class Objects(LanguageModule):
            def __init__(self, thing: Any) -> None:
                super().__init__()
                self.save_hyperparameters()

        with pytest.raises(ValueError, match=r"save_hyperparameters\(ignore="):
            trainer(tmp_path, LoRACallback(r=4)).fit(Objects(Path("x")), loader())
