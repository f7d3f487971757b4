"""Checkpoints of a Trainer: what is in them, exact resume, what is refused, and that nothing is lost."""

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import peft
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.core import saving
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    adapter_checkpoint,
    adapter_state_dict,
    inject,
    load_adapter_state_dict,
    load_peft,
    merge,
    save_peft,
)
from lightning_lora.checkpoint import hashes
from lightning_lora.layers import LoRALayer
from tests import models
from tests.runs import LanguageModule, LazyModule, fitted, loader, same_adapters, trainer


def epochs(directory: Path, **settings: Any) -> ModelCheckpoint:
    return ModelCheckpoint(directory, save_top_k=-1, filename="{epoch}", **settings)


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


class TestWarmStart:
    @pytest.mark.parametrize("kind", ["checkpoint", "directory"])
    def test_takes_weights_and_config_and_nothing_else(self, tmp_path: Path, kind: str) -> None:
        _, module = fitted(tmp_path, use_rslora=True, alpha=8)
        save_peft(module.model, tmp_path / "peft")
        source = tmp_path / ("last.ckpt" if kind == "checkpoint" else "peft")
        twin = LanguageModule()
        run = trainer(tmp_path, LoRACallback(init_from=str(source)))
        run.fit(twin, loader())
        assert twin.model.lora_injection.config.use_rslora
        assert run.global_step == 4
        assert twin.losses[0] < module.losses[0]

    def test_a_rank_above_a_layer_that_peft_made_goes_on(self, tmp_path: Path) -> None:
        large = peft.LoraConfig(r=40, target_modules=["q_proj"])  # of 32 x 32
        peft.get_peft_model(models.llama(), large).save_pretrained(tmp_path / "peft")
        module, twin = LanguageModule(), LanguageModule()
        run = trainer(tmp_path, LoRACallback(init_from=str(tmp_path / "peft")))
        run.fit(module, loader())
        run.save_checkpoint(tmp_path / "large.ckpt")
        trainer(tmp_path, LoRACallback(init_from=str(tmp_path / "large.ckpt")), max_epochs=0).fit(twin, loader())
        assert adapter_state_dict(module)["model.layers.0.self_attn.q_proj.lora_A"].shape == (40, 32)
        assert same_adapters(LanguageModule.load_from_checkpoint(tmp_path / "large.ckpt"), module)
        assert same_adapters(twin, module)

    @pytest.fixture
    def source(self, request: pytest.FixtureRequest, tmp_path: Path) -> str:
        _, module = fitted(tmp_path, rank_pattern={"v_proj": 2})
        save_peft(module.model, tmp_path / "peft")
        return str(tmp_path / request.param)

    @pytest.mark.parametrize("source", ["last.ckpt", "peft"], indirect=True)
    def test_settings_that_fit_the_file_replace_its_own(self, tmp_path: Path, source: str) -> None:
        targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        callback = LoRACallback(init_from=source, r=4, dropout=0.25, target_modules=targets, adapter_dtype="float64")
        module = LanguageModule()
        for _ in range(2):  # a second fit finds the model as it should be
            trainer(tmp_path, callback, max_epochs=0).fit(module, loader())
        config = module.model.lora_injection.config
        assert (config.r, config.dropout, config.target_modules) == (4, 0.25, targets)
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
        for name, value in adapter_state_dict(module).items():
            assert torch.equal(value, saved[f"model.{name}"].double())

    @pytest.mark.parametrize("source", ["last.ckpt", "peft"], indirect=True)
    def test_settings_that_do_not_fit_the_file_are_refused_and_the_model_is_left_alone(
        self, tmp_path: Path, source: str
    ) -> None:
        module = LanguageModule()
        before = {name: (p.requires_grad, p.detach().clone()) for name, p in module.named_parameters()}
        for given, message in (
            ({"r": 8}, "has r=4 at .* the model has r=8"),  # the default, and given
            ({"alpha": 3}, "scales .* by 2, the model by 0.75"),
            ({"use_rslora": True}, "scales .* by"),
            ({"target_modules": ["q_proj", "v_proj"]}, "differ in their adapted layers"),
            ({"bias": "lora_only", "modules_to_save": ["lm_head"]}, "differ in their tensors that train whole"),
            ({"trainable_token_indices": [3]}, "trains rows none of embeddings"),
            ({"use_dora": True}, "lora_magnitude' and .* missing in the file"),
            ({"lora_bias": True}, "lora_bias' and .* missing in the file"),
            ({"init": "pissa"}, "lora_A0.* missing in the file"),
        ):
            for callback in (
                LoRACallback(init_from=source, **given),
                LoRACallback(LoRAConfig(**{"r": 4, "rank_pattern": {"v_proj": 2}, **given}), init_from=source),
            ):
                with pytest.raises(ValueError, match=message):
                    trainer(tmp_path, callback, max_epochs=0).fit(module, loader())
                after = dict(module.named_parameters())
                assert after.keys() == before.keys()
                assert all(
                    after[name].requires_grad == flag and torch.equal(after[name], value)
                    for name, (flag, value) in before.items()
                )

    def test_does_not_start_over_at_the_second_fit(self, tmp_path: Path) -> None:
        fitted(tmp_path)
        twin = LanguageModule()
        callback = LoRACallback(init_from=str(tmp_path / "last.ckpt"))
        trainer(tmp_path, callback).fit(twin, loader())
        trained = copy.deepcopy(adapter_state_dict(twin))
        trainer(tmp_path, callback).validate(twin, loader(), verbose=False)
        assert all(torch.equal(trained[name], value) for name, value in adapter_state_dict(twin).items())

    def test_a_file_that_does_not_fit_leaves_the_model_alone(self, tmp_path: Path) -> None:
        fitted(tmp_path)
        twin = LanguageModule()
        with torch.no_grad():
            twin.model.model.layers[0].mlp.up_proj.weight.mul_(2)
        before = {n: p.requires_grad for n, p in twin.named_parameters()}
        with pytest.raises(ValueError, match=r"another base model: .*'model.layers.0.mlp.up_proj.weight'"):
            trainer(tmp_path, LoRACallback(init_from=str(tmp_path / "last.ckpt"))).fit(twin, loader())
        assert {n: p.requires_grad for n, p in twin.named_parameters()} == before


class TestLoadFromCheckpoint:
    @pytest.mark.parametrize("strict", [None, True, False])
    def test_gives_the_adapted_module(self, tmp_path: Path, strict: bool | None) -> None:
        _, module = fitted(tmp_path)
        twin = LanguageModule.load_from_checkpoint(tmp_path / "last.ckpt", strict=strict)
        assert type(twin) is LanguageModule
        assert same_adapters(module, twin)

    def test_never_gives_another_base(self, tmp_path: Path) -> None:
        fitted(tmp_path)

        class Other(LanguageModule):
            def __init__(self, **kwargs: Any) -> None:
                super().__init__(**kwargs)
                nn.init.ones_(self.model.lm_head.weight)

        with pytest.raises(ValueError, match="'lm_head.weight' holds other values"):
            Other.load_from_checkpoint(tmp_path / "last.ckpt", strict=False)

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing
    def test_gives_a_compiled_model_as_the_run_left_it(self, tmp_path: Path) -> None:
        class Counting(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer, self.count = nn.Linear(4, 4), 0

            def forward(self, x):
                return self.layer(x)

            def get_extra_state(self):
                return {"count": self.count}

            def set_extra_state(self, state):
                self.count = state["count"]

        class Compiled(LanguageModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = torch.compile(models.llama(layers=1), backend="eager")
                self.model.model.layers[0] = torch.compile(self.model.model.layers[0], backend="eager")
                self.counting = torch.compile(Counting(), backend="eager")

            def on_train_batch_end(self, *_):
                self.counting.count += 1

        _, module = fitted(tmp_path, Compiled())
        loaded = [
            Compiled.load_from_checkpoint(tmp_path / "last.ckpt", strict=strict) for strict in (None, True, False)
        ]
        resumed = Compiled()
        run = trainer(tmp_path, LoRACallback(r=4), limit_val_batches=0)
        run.validate(resumed, loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
        for twin in (*loaded, resumed):
            assert same_adapters(module, twin)
            assert twin.counting.count == 4
        ids = models.token_ids()
        assert torch.equal(loaded[0].model(input_ids=ids).logits, module.model(input_ids=ids).logits)

    @pytest.mark.parametrize("strict", [None, False])
    def test_a_load_that_brings_no_adapter_is_an_error(self, tmp_path: Path, strict: bool | None) -> None:
        class Dropping(LanguageModule):
            def on_load_checkpoint(self, checkpoint):
                checkpoint["state_dict"] = {n: v for n, v in checkpoint["state_dict"].items() if "lora" not in n}

        fitted(tmp_path)
        with pytest.raises(ValueError, match="'model.model.layers.0.self_attn.q_proj.lora_A'.* missing in the file"):
            Dropping.load_from_checkpoint(tmp_path / "last.ckpt", strict=strict)

    def test_the_modules_own_hooks_see_the_adapted_model_and_what_its_twin_wrote(self, tmp_path: Path) -> None:
        class Prefixed(LanguageModule):
            def on_save_checkpoint(self, checkpoint):
                checkpoint["vocabulary"] = 100

            def on_load_checkpoint(self, checkpoint):
                self.seen = (
                    checkpoint["vocabulary"],
                    set(checkpoint["state_dict"]),
                    self.model.lora_injection.config.r,
                )

        _, module = fitted(tmp_path, Prefixed())
        loaded = Prefixed.load_from_checkpoint(tmp_path / "last.ckpt")
        resumed = Prefixed()
        trainer(tmp_path, LoRACallback(r=4), max_epochs=1).fit(resumed, loader(), ckpt_path=tmp_path / "last.ckpt")
        assert loaded.seen == resumed.seen == (100, {f"model.{name}" for name in adapter_state_dict(module)}, 4)
        assert "on_load_checkpoint" not in vars(loaded)

    def test_no_subclass_of_the_users_class_is_made(self, tmp_path: Path) -> None:
        made: list[type] = []

        class Registered(LanguageModule):
            def __init_subclass__(cls, *, key: str) -> None:
                made.append(cls)

        _, module = fitted(tmp_path, Registered())
        assert same_adapters(Registered.load_from_checkpoint(tmp_path / "last.ckpt"), module)
        assert made == []

    @pytest.mark.parametrize(
        ("has_list", "message"),
        [
            (True, "'os.system' from the checkpoint is not in the allowlist"),
            (False, "'os.system', and lightning .* would"),
        ],
    )
    def test_a_file_that_names_code_to_run_is_refused(
        self, has_list: bool, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fitted(tmp_path)
        content = torch.load(tmp_path / "last.ckpt", weights_only=True)
        content["hyper_parameters"] = {"_instantiator": "os.system"}
        torch.save(content, tmp_path / "bad.ckpt")
        if not has_list:  # as before lightning 2.6.6
            monkeypatch.delattr(saving, "_ALLOWED_INSTANTIATORS")
        with pytest.raises(ValueError, match=message):
            LanguageModule.load_from_checkpoint(tmp_path / "bad.ckpt")

    def test_ordinary_checkpoints_load_as_ever(self, tmp_path: Path) -> None:
        module = LanguageModule()
        run = trainer(tmp_path, max_epochs=0)
        run.fit(module, loader())
        run.save_checkpoint(tmp_path / "full.ckpt")
        twin = LanguageModule.load_from_checkpoint(tmp_path / "full.ckpt")
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))


def test_a_module_without_the_adapted_model_is_told_its_name(tmp_path: Path) -> None:
    class Renamed(LanguageModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = self._modules.pop("model")

    run = trainer(tmp_path, LoRACallback(r=2), max_steps=1)
    run.fit(LanguageModule(), loader())
    run.save_checkpoint(tmp_path / "file.ckpt")
    with pytest.raises(ValueError, match="adapters for the model at 'model', and Renamed has no module of that name"):
        Renamed.load_from_checkpoint(tmp_path / "file.ckpt")


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


def next_float(weight: torch.Tensor) -> torch.Tensor:
    """Return a weight whose last value but one is the next one up."""
    following = weight.detach().clone()
    following[-1, -2] = torch.nextafter(following[-1, -2], torch.tensor(torch.inf))
    return following


def swap_data(weight: torch.Tensor) -> None:
    weight.data = next_float(weight)


WRITES = {
    "data": lambda weight: weight.data.copy_(next_float(weight)),
    "another_data": swap_data,
    "in_place": lambda weight: weight.copy_(next_float(weight)),
    "foreach": lambda weight: torch._foreach_copy_([weight.data], [next_float(weight)]),
    "fused": lambda weight: torch._fused_sgd_(
        [weight],
        [weight - next_float(weight)],
        [],
        weight_decay=0.0,
        momentum=0.0,
        lr=1.0,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=True,
    ),
    "numpy": lambda weight: weight.numpy().__setitem__(..., next_float(weight).numpy()),
}


class TestWhatChangesIsKept:
    """State of the user's that a resume needs, though it does not require grad."""

    class Module(LanguageModule):
        def __init__(self) -> None:
            super().__init__()
            self.target = models._seeded(lambda: nn.Linear(2, 2)).requires_grad_(False)
            self.constant = models._seeded(lambda: nn.Linear(2, 2)).requires_grad_(False)
            self.norm = nn.BatchNorm1d(2, affine=False)
            self.register_buffer("seen", torch.zeros(()))

        def training_step(self, batch, batch_idx):
            self.seen += 1
            self.norm(torch.randn(4, 2))
            self.target.weight.data.add_(1)
            return super().training_step(batch, batch_idx)

    def test_target_networks_buffers_and_statistics_resume(self, tmp_path: Path) -> None:
        _, module = fitted(tmp_path, self.Module())
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
        assert "constant.weight" not in saved
        twin = self.Module()
        trainer(tmp_path, LoRACallback(r=4)).fit(twin, loader(), ckpt_path=tmp_path / "last.ckpt")
        assert torch.equal(twin.target.weight, module.target.weight)
        assert (twin.seen, twin.norm.num_batches_tracked) == (4, 4)
        assert not twin.target.weight.requires_grad

    @pytest.mark.parametrize("write", list(WRITES.values()), ids=list(WRITES))
    def test_a_teacher_that_moves_by_one_bit_in_one_place_resumes(self, tmp_path: Path, write) -> None:
        class Follower(LanguageModule):
            def __init__(self) -> None:
                super().__init__()
                self.teacher = models._seeded(lambda: nn.Linear(65, 33)).requires_grad_(False)

            def on_train_batch_end(self, outputs, batch, batch_idx):
                write(self.teacher.weight)

        start = Follower().teacher
        _, module = fitted(tmp_path, Follower())
        assert (module.teacher.weight != start.weight).sum() == 1
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
        assert torch.equal(saved["teacher.weight"], module.teacher.weight)
        assert "teacher.bias" not in saved

    def test_a_teacher_that_moved_once_is_in_all_later_files(self, tmp_path: Path) -> None:
        class Once(LanguageModule):
            def __init__(self) -> None:
                super().__init__()
                self.teacher = models._seeded(lambda: nn.Linear(9, 9)).requires_grad_(False)

            def on_train_batch_end(self, outputs, batch, batch_idx):
                if self.global_step == 1:
                    self.teacher.weight.data.mul_(1 + 1e-6)

        _, module = fitted(tmp_path, Once())
        again, twin = ModelCheckpoint(tmp_path / "b", save_last=True), Once()
        ahead = trainer(tmp_path, LoRACallback(r=4), again, max_epochs=2)
        ahead.fit(twin, loader(), ckpt_path=tmp_path / "last.ckpt")
        third = Once()
        trainer(tmp_path, LoRACallback(r=4), max_epochs=3).fit(third, loader(), ckpt_path=tmp_path / "b" / "last.ckpt")
        assert torch.equal(third.teacher.weight, module.teacher.weight)
        second = trainer(tmp_path, LoRACallback(r=4))
        second.fit(module, loader())  # a run that begins with the moved teacher
        second.save_checkpoint(tmp_path / "c.ckpt")
        saved = torch.load(tmp_path / "c.ckpt", weights_only=True)["state_dict"]
        assert torch.equal(saved["teacher.weight"], module.teacher.weight)

    @pytest.mark.parametrize("factor", [1 + 1e-6, 2.0])
    def test_a_teacher_inside_a_module_that_is_adapted_as_a_whole_resumes(self, tmp_path: Path, factor: float) -> None:
        class Whole(pl.LightningModule):
            def __init__(self) -> None:
                super().__init__()
                self.student, self.teacher = (models._seeded(lambda: nn.Linear(4, 4)) for _ in range(2))
                self.losses: list[float] = []

            def training_step(self, batch, batch_idx):
                x = batch.float()[:, :4] / 100
                loss = (self.student(x) - self.teacher(x)).square().mean() + self.student(x).sum()
                self.losses.append(loss.item())
                return loss

            def on_train_batch_end(self, outputs, batch, batch_idx):
                if self.global_step == 4:
                    self.teacher.weight.data.mul_(factor)

            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters(), lr=1e-2)

        def fit(module: Whole, epochs: int, **settings):
            run = trainer(tmp_path, LoRACallback(r=2, target_modules=["student"]), max_epochs=epochs)
            run.fit(module, loader(), **settings)
            return run

        straight, module, twin = Whole(), Whole(), Whole()
        fit(straight, 2)
        fit(module, 1).save_checkpoint(tmp_path / "x.ckpt")
        assert torch.equal(
            torch.load(tmp_path / "x.ckpt")["state_dict"]["teacher.weight"], Whole().teacher.weight * factor
        )
        fit(twin, 2, ckpt_path=tmp_path / "x.ckpt")
        assert twin.losses == straight.losses[4:]
        assert not twin.teacher.weight.requires_grad
        assert "student.weight" not in torch.load(tmp_path / "x.ckpt")["state_dict"]

    def test_a_buffer_beside_frozen_weights_of_the_base_resumes(self, tmp_path: Path) -> None:
        class Routed(LanguageModule):
            def __init__(self) -> None:
                super().__init__()
                self.model.model.embed_tokens.register_buffer("load", torch.ones(40))
                self.model.model.embed_tokens.register_buffer("still", torch.ones(40))

            def training_step(self, batch, batch_idx):
                self.model.model.embed_tokens.load[-1] += 1e-6
                return super().training_step(batch, batch_idx)

        _, module = fitted(tmp_path, Routed())
        assert "model.model.embed_tokens.still" not in torch.load(tmp_path / "last.ckpt")["state_dict"]
        twin = Routed()
        trainer(tmp_path, LoRACallback(r=4)).fit(twin, loader(), ckpt_path=tmp_path / "last.ckpt")
        assert torch.equal(twin.model.model.embed_tokens.load, module.model.model.embed_tokens.load)

    def test_a_resume_with_another_frozen_network_is_refused_by_name(self, tmp_path: Path) -> None:
        class Distilled(LanguageModule):
            def __init__(self) -> None:
                super().__init__()
                self.predicted = nn.Linear(2, 2).requires_grad_(False)  # drawn anew in every process

        fitted(tmp_path, Distilled())
        twin = Distilled()
        with pytest.raises(ValueError, match="'predicted.weight' was frozen and never changed in the run that wrote"):
            trainer(tmp_path, LoRACallback(r=4), max_epochs=2).fit(twin, loader(), ckpt_path=tmp_path / "last.ckpt")
        trainer(tmp_path, LoRACallback(r=4)).validate(twin, loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)

    def test_a_hook_that_loses_trained_tensors_is_found_at_the_save(self, tmp_path: Path) -> None:
        class Losing(LanguageModule):
            def on_save_checkpoint(self, checkpoint):
                checkpoint["state_dict"] = {f"x.{k}": v for k, v in checkpoint["state_dict"].items()}

        with pytest.raises(ValueError, match="on_save_checkpoint took 28 trained tensors out"):
            fitted(tmp_path, Losing())

    def test_keys_that_hooks_add_and_take_away_again_go_through(self, tmp_path: Path) -> None:
        class Adding(LanguageModule):
            def on_save_checkpoint(self, checkpoint):
                checkpoint["state_dict"]["mine"] = torch.ones(1)

            def on_load_checkpoint(self, checkpoint):
                self.mine = checkpoint["state_dict"].pop("mine")

        fitted(tmp_path, Adding())
        twin = Adding()
        trainer(tmp_path, LoRACallback(r=4)).validate(twin, loader(), ckpt_path=tmp_path / "last.ckpt", verbose=False)
        assert twin.mine == 1

    def test_what_could_not_be_read_back_is_found_at_the_first_save(self, tmp_path: Path) -> None:
        class Unsafe(LanguageModule):
            def on_save_checkpoint(self, checkpoint):
                checkpoint["where"] = Path("x")

        with pytest.raises(ValueError, match="objects that a safe load refuses"):
            fitted(tmp_path, Unsafe())

    def test_a_stateful_loader_shuffles_alike_after_an_epochs_end(self, tmp_path: Path) -> None:
        def run(directory: Path, ckpt_path: Path | None = None):
            pl.seed_everything(7 if ckpt_path is None else 8, verbose=False)
            module = LanguageModule()
            rows = StatefulDataLoader(models.token_ids(16, 8, seed=1), batch_size=4, shuffle=True)
            trainer(directory, LoRACallback(r=4), epochs(directory), max_epochs=2).fit(
                module, rows, ckpt_path=ckpt_path
            )
            return module

        straight = run(tmp_path / "a")
        assert run(tmp_path / "b", tmp_path / "a" / "epoch=0.ckpt").losses == straight.losses[4:]


class TestLateChanges:
    """Modules that change between runs are adapted as the callback at hand says."""

    def test_lazy_modules_follow_the_settings_of_each_trainer(self, tmp_path: Path) -> None:
        module = LazyModule()
        trainer(tmp_path, LoRACallback(r=4)).fit(module, loader())
        with pytest.raises(ValueError, match="already adapted with another config"):
            trainer(tmp_path, LoRACallback(r=2)).fit(module, loader())
        merge(module, remove=True)
        trainer(tmp_path).fit(module, loader())
        assert not any(isinstance(m, LoRALayer) for m in module.modules())

    def test_a_model_built_in_the_modules_setup_is_an_error(self, tmp_path: Path) -> None:
        class Late(LanguageModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = nn.Linear(2, 2)

            def setup(self, stage):
                self.model = models.llama()

        with pytest.raises(ValueError, match="built or changed after LoRACallback's setup"):
            trainer(tmp_path, LoRACallback(r=2)).fit(Late(), loader())

    def test_init_from_is_never_ignored(self, tmp_path: Path) -> None:
        _, source = fitted(tmp_path)
        validated = LanguageModule()
        trainer(tmp_path, LoRACallback(r=4)).validate(validated, loader(), verbose=False)
        callback = LoRACallback(init_from=str(tmp_path / "last.ckpt"))
        trainer(tmp_path, callback, max_epochs=0).fit(validated, loader())
        assert same_adapters(validated, source)
        _, trained = fitted(tmp_path / "other")
        with pytest.raises(ValueError, match="this one has adapters that trained"):
            trainer(tmp_path, callback, max_epochs=0).fit(trained, loader())
