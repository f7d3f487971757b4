"""Checkpoints of a Trainer: what is in them, exact resume, and the PEFT directories beside them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import peft
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    adapter_checkpoint,
    adapter_state_dict,
    inject,
    load_adapter_state_dict,
    load_peft,
)
from lightning_lora.checkpoint import hashes
from tests import models
from tests.runs import LanguageModule, epochs, fitted, loader, same_adapters, trainer


def test_file_holds_what_trains_and_how_it_was_made(tmp_path: Path) -> None:
    _, module = fitted(tmp_path)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(saved["state_dict"]) == {f"model.{name}" for name in adapter_state_dict(module)}
    section = saved["lightning_lora"]
    (adapter,) = section["adapters"]
    assert section["format_version"] == 1
    assert adapter["root"] == "model"
    assert LoRAConfig.from_dict(adapter["config"]) == LoRAConfig(r=4)
    assert len(adapter["base"]["names"]) == len(list(models.llama().parameters()))
    adapter_bytes = sum(p.numel() * p.element_size() for p in adapter_state_dict(module).values())
    assert (tmp_path / "last.ckpt").stat().st_size < 3 * adapter_bytes + 80_000  # weights, two moments, names


def test_a_save_reads_the_base_for_one_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, module = fitted(tmp_path)
    hashed = []
    monkeypatch.setattr(hashes, "sample_hash", lambda tensor, *_, **__: hashed.append(id(tensor)) or torch.tensor(0))
    run.save_checkpoint(tmp_path / "more.ckpt")
    base = [p for p in module.parameters() if not p.requires_grad]
    assert len(hashed) == len(base) + 1  # the last row of the embedding is hashed too


@pytest.mark.parametrize("weights_only", [False, True])
def test_no_way_of_saving_writes_the_base(tmp_path: Path, weights_only: bool) -> None:
    callback = ModelCheckpoint(
        tmp_path / "top", monitor="val_loss", save_top_k=1, save_last=True, save_weights_only=weights_only
    )
    run = trainer(tmp_path, LoRACallback(r=4), callback, max_epochs=2)
    run.fit(LanguageModule(), loader(), loader())
    run.save_checkpoint(tmp_path / "by_hand.ckpt", weights_only=weights_only)
    run.save_checkpoint(run._checkpoint_connector.hpc_save_path(str(tmp_path)))
    files = list(tmp_path.rglob("*.ckpt"))
    assert len(files) == 4
    for file in files:
        names = torch.load(file, weights_only=True)["state_dict"]
        assert len(names) == 28
        assert all(".lora_" in name for name in names)


def test_async_writer_writes_the_same_and_is_awaited(tmp_path: Path) -> None:
    callback = ModelCheckpoint(tmp_path, save_last=True, save_top_k=0)
    module = LanguageModule()
    trainer(tmp_path, LoRACallback(r=4), callback, plugins=[AsyncCheckpointIO()]).fit(module, loader())
    twin = LanguageModule()
    trainer(tmp_path, LoRACallback(r=4)).validate(twin, loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert same_adapters(module, twin)


class TestResume:
    """A run that stopped and resumed equals one that never stopped, bit for bit."""

    @staticmethod
    def run(
        directory: Path, max_epochs: int, make_loader: Callable[[], Any], ckpt_path: Path | None = None, **lora: Any
    ):
        pl.seed_everything(7 if ckpt_path is None else 1234, verbose=False)  # the resumed process starts elsewhere
        module = LanguageModule(dropout=0.1)
        every = {"every_n_train_steps": 3} if lora.pop("mid_epoch", False) else {}
        callback = ModelCheckpoint(directory, save_top_k=-1, filename="{epoch}-{step}", **every)
        run = trainer(directory, LoRACallback(r=4, dropout=0.1, **lora), callback, max_epochs=max_epochs)
        run.fit(module, make_loader(), loader(), ckpt_path=ckpt_path)
        return run, module

    @staticmethod
    def assert_same_end(one: tuple[pl.Trainer, Any], other: tuple[pl.Trainer, Any]) -> None:
        (straight, module), (resumed, twin) = one, other
        assert same_adapters(module, twin)
        assert (straight.global_step, straight.current_epoch) == (resumed.global_step, resumed.current_epoch)
        states = [[o.state_dict() for o in run.optimizers] for run in (straight, resumed)]
        torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
        schedulers = [run.lr_scheduler_configs[0].scheduler.state_dict() for run in (straight, resumed)]
        assert schedulers[0] == schedulers[1]

    def test_at_an_epochs_end_with_shuffling_and_dropout(self, tmp_path: Path) -> None:
        straight = self.run(tmp_path / "a", 3, lambda: loader(shuffle=True))
        resumed = self.run(tmp_path / "b", 3, lambda: loader(shuffle=True), tmp_path / "a" / "epoch=0-step=4.ckpt")
        assert resumed[1].losses == straight[1].losses[4:]
        self.assert_same_end(straight, resumed)

    def test_in_mid_epoch_with_a_stateful_loader(self, tmp_path: Path) -> None:
        def make():
            return StatefulDataLoader(models.token_ids(32, 8, seed=1), batch_size=4, shuffle=True)

        straight = self.run(tmp_path / "a", 2, make, mid_epoch=True)
        resumed = self.run(tmp_path / "b", 2, make, tmp_path / "a" / "epoch=0-step=3.ckpt", mid_epoch=True)
        assert resumed[1].losses == straight[1].losses[3:]
        self.assert_same_end(straight, resumed)

    def test_in_mid_epoch_a_plain_loader_gets_a_line_with_the_numbers(self, tmp_path: Path, caplog) -> None:
        self.run(tmp_path / "a", 1, lambda: loader(rows=32), mid_epoch=True)
        with caplog.at_level("INFO"), pytest.warns(UserWarning, match="not resumable"):
            self.run(tmp_path / "b", 1, lambda: loader(rows=32), tmp_path / "a" / "epoch=0-step=3.ckpt", mid_epoch=True)
        assert "Resuming after batch 3 of epoch 0" in caplog.text
        assert "for the 5 of 8 batches left" in caplog.text

    def test_accumulation_and_clipping_resume_too(self, tmp_path: Path) -> None:
        def run(ckpt_path: Path | None = None):
            module = LanguageModule()
            one = trainer(
                tmp_path,
                LoRACallback(r=4),
                epochs(tmp_path),
                max_epochs=2,
                accumulate_grad_batches=2,
                gradient_clip_val=0.1,
            )
            one.fit(module, loader(), ckpt_path=ckpt_path)
            return module

        straight = run()
        resumed = run(tmp_path / "epoch=0.ckpt")
        assert resumed.losses == straight.losses[4:]

    def test_optimizer_state_follows_names_not_positions(self, tmp_path: Path) -> None:
        class Reversed(LanguageModule):
            def configure_optimizers(self):
                return torch.optim.AdamW(list(self.parameters())[::-1], lr=1e-2)

        class Straight(LanguageModule):
            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters(), lr=1e-2)

        straight, resumed = Straight(), Reversed()
        trainer(tmp_path, LoRACallback(r=4), epochs(tmp_path), max_epochs=2).fit(straight, loader())
        trainer(tmp_path, LoRACallback(r=4), max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "epoch=0.ckpt")
        assert resumed.losses == straight.losses[4:]

    def test_other_optimizer_groups_are_an_error(self, tmp_path: Path) -> None:
        fitted(tmp_path)

        class Grouped(LanguageModule):
            def configure_optimizers(self):
                a = [p for n, p in self.named_parameters() if n.endswith("A")]
                b = [p for n, p in self.named_parameters() if n.endswith("B")]
                return torch.optim.AdamW([{"params": a}, {"params": b}])

        with pytest.raises(ValueError, match=r"sizes of groups \[28\] there, \[14, 14\] here"):
            trainer(tmp_path, LoRACallback(r=4), max_epochs=2).fit(
                Grouped(), loader(), ckpt_path=tmp_path / "last.ckpt"
            )

    def test_weights_only_file_cannot_resume_but_warm_starts(self, tmp_path: Path) -> None:
        run, module = fitted(tmp_path)
        run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
        with pytest.raises(ValueError, match="LoRACallback\\(init_from="):
            trainer(tmp_path, LoRACallback(r=4)).fit(LanguageModule(), loader(), ckpt_path=tmp_path / "weights.ckpt")
        twin = LanguageModule()
        trainer(tmp_path, LoRACallback(init_from=str(tmp_path / "weights.ckpt")), max_epochs=0).fit(twin, loader())
        assert same_adapters(module, twin)


class TestPeftBeside:
    def test_directories_come_and_go_with_their_checkpoints(self, tmp_path: Path) -> None:
        callback = ModelCheckpoint(tmp_path, monitor="epoch", mode="max", save_top_k=1, filename="{epoch}")

        class Logged(LanguageModule):
            def on_train_epoch_end(self):
                self.log("epoch", float(self.current_epoch))

        module = Logged()
        trainer(tmp_path, LoRACallback(r=4, save_peft=True), callback, max_epochs=3).fit(module, loader())
        assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch=2-peft", "epoch=2.ckpt"]
        assert same_adapters(load_peft(models.llama(), tmp_path / "epoch=2-peft"), module)

    @pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"], "bias": "all"}])
    @pytest.mark.parametrize("averaging", ["ema", "swa", "own"])
    def test_a_directory_holds_what_its_file_holds_and_not_the_live_values(
        self, tmp_path: Path, averaging: str, options: dict[str, Any]
    ) -> None:
        class Halving(LanguageModule):
            def on_save_checkpoint(self, checkpoint):
                state = checkpoint["state_dict"]
                state |= {name: value / 2 for name, value in state.items() if name.endswith("lora_B")}

        module = Halving() if averaging == "own" else LanguageModule()
        callbacks = {
            "ema": [EMAWeightAveraging(decay=0.9)],
            "swa": [StochasticWeightAveraging(1e-2, swa_epoch_start=1)],
            "own": [],
        }[averaging]
        every_epoch = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
        lora = LoRACallback(r=4, save_peft=True, **options)
        run = trainer(tmp_path, lora, *callbacks, every_epoch, max_epochs=2)
        run.fit(module, loader())
        run.save_checkpoint(tmp_path / "end.ckpt")
        ids = models.token_ids()
        for name in ("epoch=0", "epoch=1", "end"):
            saved = LanguageModule.load_from_checkpoint(tmp_path / f"{name}.ckpt").model
            read = peft.PeftModel.from_pretrained(models.llama(), tmp_path / f"{name}-peft")
            torch.testing.assert_close(read(input_ids=ids).logits, saved(input_ids=ids).logits, rtol=1e-5, atol=1e-6)
            assert same_adapters(load_peft(models.llama(), tmp_path / f"{name}-peft"), saved)

    def test_a_tokenizer_of_the_model_goes_with_it(self, tmp_path: Path) -> None:
        class Tokenizer:
            def save_pretrained(self, directory):
                (directory / "tokenizer.json").write_text("{}")

        module = LanguageModule()
        module.model.tokenizer = Tokenizer()
        fitted(tmp_path, module, save_peft=True)
        assert (tmp_path / "last-peft" / "tokenizer.json").is_file()


class TestPlainTorch:
    def test_files_of_trainer_and_plain_torch_interchange(self, tmp_path: Path) -> None:
        _, module = fitted(tmp_path)
        plain = inject(models.llama(), LoRAConfig(r=4))
        load_adapter_state_dict(plain, torch.load(tmp_path / "last.ckpt", weights_only=True))
        assert same_adapters(module, plain)
        torch.save(adapter_checkpoint(plain), tmp_path / "plain.ckpt")
        twin = LanguageModule()
        trainer(tmp_path, LoRACallback(r=4)).validate(twin, loader(), ckpt_path=tmp_path / "plain.ckpt", verbose=False)
        assert same_adapters(module, twin)

    def test_flat_state_is_checked_by_name_and_shape(self) -> None:
        model = inject(models.llama(), LoRAConfig(r=4))
        state = adapter_state_dict(inject(models.llama(), LoRAConfig(r=4, target_modules=["q_proj"])))
        with pytest.raises(ValueError, match="missing in the file"):
            load_adapter_state_dict(model, state)
