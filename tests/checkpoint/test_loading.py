"""Warm starts from checkpoints, ``load_from_checkpoint``, and modules that change between runs."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch.core import saving
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, adapter_state_dict, merge, save_peft
from lightning_lora.layers import LoRALayer
from tests import models
from tests.runs import LanguageModule, LazyModule, fitted, loader, same_adapters, trainer


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
