"""LoRACallback in the Trainer: what it adapts, what trains, what it refuses, how it goes with other callbacks."""

import copy
import importlib
import pickle
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import peft
import pytest
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    adapter_state_dict,
    inject,
    load_peft,
    merge,
    named_adapter_parameters,
    remove,
)
from lightning_lora.layers import LoRALayer
from lightning_lora.model.state import named_lora_layers, named_pairs
from lightning_lora.model.summary import summary
from lightning_lora.strategies.fabric.adapter_only import adopt_fabric
from lightning_lora.strategies.trainer.adopted import adopt
from tests import models, zoo
from tests.runs import ClassifierModule, LanguageModule, LazyModule, fitted, loader, same_adapters, trainer


def test_fit_changes_adapters_and_nothing_else(tmp_path: Path) -> None:
    module = LanguageModule()
    base = copy.deepcopy(module.model.state_dict())
    trainer(tmp_path, LoRACallback(r=4)).fit(module, loader())
    state = module.model.state_dict()
    assert all(torch.equal(state[name], base[name]) for name in base)
    assert all(parameter.abs().sum() > 0 for name, parameter in named_adapter_parameters(module))
    assert module.losses[-1] < module.losses[0]


@pytest.mark.parametrize("module_class", [LanguageModule, LazyModule])
def test_every_stage_runs_however_the_model_is_built(tmp_path: Path, module_class: type) -> None:
    module = module_class()
    run = trainer(tmp_path, LoRACallback(r=4))
    run.fit(module, loader(), loader())
    after_fit = copy.deepcopy(adapter_state_dict(module))
    run.validate(module, loader(), verbose=False)
    run.test(module, loader(), verbose=False)
    predictions = run.predict(module, loader())
    assert len(predictions) == 4
    assert all(torch.equal(after_fit[n], p) for n, p in adapter_state_dict(module).items())


def test_lazy_and_eager_modules_train_alike(tmp_path: Path) -> None:
    runs = []
    for module in (LanguageModule(), LazyModule()):
        trainer(tmp_path, LoRACallback(r=4)).fit(module, loader())
        runs.append(module)
    assert runs[0].losses == runs[1].losses
    assert same_adapters(*runs)


def test_second_fit_and_second_trainer_go_on_from_where_they_were(tmp_path: Path) -> None:
    module = LanguageModule()
    run = trainer(tmp_path, LoRACallback(r=4))
    run.fit(module, loader())
    before = dict(named_adapter_parameters(module))
    trainer(tmp_path, LoRACallback(r=4)).fit(module, loader())
    after = dict(named_adapter_parameters(module))
    assert all(after[name] is before[name] for name in before)
    assert module.losses[4] < module.losses[0]


def test_another_config_on_an_adapted_module_is_refused(tmp_path: Path) -> None:
    module = LanguageModule()
    trainer(tmp_path, LoRACallback(r=4)).fit(module, loader())
    with pytest.raises(ValueError, match=r"already adapted with another config: r=8 \(there: 4\)"):
        trainer(tmp_path, LoRACallback(r=8)).fit(module, loader())


def test_module_can_be_pickled_and_copied_after_fit(tmp_path: Path) -> None:
    module = LazyModule()
    trainer(tmp_path, LoRACallback(r=4)).fit(module, loader())
    module.trainer = None
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert same_adapters(module, twin)


def test_frozen_parameters_are_in_no_optimizer_group(tmp_path: Path) -> None:
    run, module = fitted(tmp_path)
    held = [p for group in run.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in module.parameters() if p.requires_grad}
    assert len(run.optimizers[0].state) == len(held)


def test_optimizer_without_adapters_is_an_error(tmp_path: Path) -> None:
    class Early(LanguageModule):
        def __init__(self) -> None:
            super().__init__()
            self.early = torch.optim.AdamW(self.model.parameters())

        def configure_optimizers(self):
            return self.early

    with pytest.raises(ValueError, match="28 of 28 trainable tensors of the adapters are in no optimizer"):
        trainer(tmp_path, LoRACallback(r=4)).fit(Early(), loader())


def test_two_optimizers_and_manual_optimization_train_all_adapters(tmp_path: Path) -> None:
    class Manual(LanguageModule):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self):
            a = [p for n, p in self.named_parameters() if n.endswith("lora_A")]
            b = [p for n, p in self.named_parameters() if n.endswith("lora_B")]
            return torch.optim.SGD(a, 0.1), torch.optim.SGD(b, 0.1)

    module = Manual()
    run = trainer(tmp_path, LoRACallback(r=4))
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "manual.ckpt")
    twin = Manual()
    trainer(tmp_path, LoRACallback(r=4), max_epochs=2).fit(twin, loader(), ckpt_path=tmp_path / "manual.ckpt")
    assert twin.losses[0] < module.losses[0]
    assert torch.load(tmp_path / "manual.ckpt", weights_only=True)["lightning_lora"]["optimizers"][0][0][0].endswith(
        "A"
    )


def test_what_lies_outside_the_root_trains_and_is_saved(tmp_path: Path) -> None:
    module = ClassifierModule()
    callback = LoRACallback(r=2, module="backbone")
    run = trainer(tmp_path, callback)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "head.ckpt")
    saved = torch.load(tmp_path / "head.ckpt", weights_only=True)["state_dict"]
    outside = {name for name in saved if not name.startswith("backbone")}
    assert {"task.0.weight", "task.1.running_mean", "task.1.num_batches_tracked", "task.2.bias"} <= outside
    assert not any(name.startswith("teacher") for name in saved)
    twin = ClassifierModule()
    trainer(tmp_path, LoRACallback(r=2, module="backbone"), max_epochs=2).fit(
        twin, loader(), ckpt_path=tmp_path / "head.ckpt"
    )
    assert twin.task[1].num_batches_tracked == 8


def test_several_pretrained_models_need_a_choice(tmp_path: Path) -> None:
    class Distiller(LanguageModule):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = models.llama().requires_grad_(False)

    with pytest.raises(ValueError, match=r"several pretrained models: model \(LlamaForCausalLM\), teacher"):
        trainer(tmp_path, LoRACallback(r=4)).fit(Distiller(), loader())
    module = Distiller()
    run = trainer(tmp_path, LoRACallback(r=4, module="model"))
    run.fit(module, loader())
    assert not any(isinstance(m, LoRALayer) for m in module.teacher.modules())
    run.save_checkpoint(tmp_path / "d.ckpt")
    assert Distiller.load_from_checkpoint(tmp_path / "d.ckpt").model.lora_injection.config.r == 4


def test_two_callbacks_adapt_two_models_of_one_module(tmp_path: Path) -> None:
    unet = next(family for family in zoo.FAMILIES if family.name == "unet")

    class Diffusion(LanguageModule):
        def __init__(self) -> None:
            pl.LightningModule.__init__(self)
            self.unet, self.text_encoder = unet.build().train(), models.llama().model
            self.losses = []

        def training_step(self, batch, batch_idx):
            context = self.text_encoder(batch).last_hidden_state[..., :24]
            noise = torch.ones(len(batch), 4, 8, 8)
            loss = (self.unet(noise, torch.full((len(batch),), 3.0), context) - noise).square().mean()
            self.losses.append(loss.item())
            return loss

    def run(epochs: int, **start: str) -> tuple[pl.Trainer, Diffusion]:
        both = (
            LoRACallback(module="unet", r=4, target_modules=["to_q", "conv1"], save_peft=True),
            LoRACallback(module="text_encoder", r=2, use_rslora=True, target_modules=["q_proj"], save_peft=True),
        )
        module = Diffusion()
        run = trainer(tmp_path, *both, max_epochs=epochs)
        run.fit(module, loader(), **start)
        return run, module

    unbroken, module = run(2)
    first, _ = run(1)
    first.save_checkpoint(tmp_path / "half.ckpt")
    _, resumed = run(2, ckpt_path=str(tmp_path / "half.ckpt"))
    assert resumed.losses == module.losses[4:]
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in module.state_dict().items())
    assert {p.r for _, p in named_pairs(module.unet).items()} == {4}
    assert {p.r for _, p in named_pairs(module.text_encoder).items()} == {2}

    unbroken.save_checkpoint(tmp_path / "full.ckpt")
    again = Diffusion()
    load_peft(again.unet, tmp_path / "full-peft" / "unet")
    load_peft(again.text_encoder, tmp_path / "full-peft" / "text_encoder")
    loaded = Diffusion.load_from_checkpoint(tmp_path / "full.ckpt")
    for other in (again, loaded):
        assert same_adapters(other.unet, module.unet)
        assert same_adapters(other.text_encoder, module.text_encoder)

    warm = Diffusion()
    start = str(tmp_path / "full.ckpt")
    both = (LoRACallback(module="unet", init_from=start), LoRACallback(module="text_encoder", init_from=start))
    trainer(tmp_path, *both, max_epochs=0).fit(warm, loader())
    assert same_adapters(warm.unet, module.unet)
    assert same_adapters(warm.text_encoder, module.text_encoder)


def test_a_config_of_peft_is_answered_with_the_remedy() -> None:
    with pytest.raises(TypeError, match=r"got LoraConfig; write LoRAConfig.from_peft\(config\)"):
        LoRACallback(peft.LoraConfig(target_modules=["q_proj"]))


def test_a_wrong_module_name_lists_the_children(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="module='modle' names nothing in LanguageModule; its children are: model"):
        trainer(tmp_path, LoRACallback(r=4, module="modle")).fit(LanguageModule(), loader())


def test_new_classification_head_trains_whole(tmp_path: Path) -> None:
    class Classifier(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.bert = models.bert_classifier().train()

        def training_step(self, batch, batch_idx):
            return self.bert(input_ids=batch, labels=batch[:, 0] % 3).loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    module = Classifier()
    before = module.bert.classifier.weight.detach().clone()
    trainer(tmp_path, LoRACallback(r=4)).fit(module, loader())
    assert not torch.equal(module.bert.classifier.weight, before)
    assert "classifier.weight" in adapter_state_dict(module)


def test_adapter_dropout_is_on_in_a_model_left_in_eval_mode(tmp_path: Path) -> None:
    class Pretrained(LanguageModule):
        def __init__(self) -> None:
            super().__init__()
            self.model.eval()
            self.seen: dict[str, set[bool]] = {"training": set(), "validation": set()}

        def on_train_start(self) -> None:
            self.model.model.layers[1].eval()  # the user's: off, and off after a validation too

        def training_step(self, batch, batch_idx):
            self.look("training")
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            self.look("validation")

        def look(self, stage: str) -> None:
            first, second = (layer.self_attn.q_proj for layer in self.model.model.layers)
            assert not second.drops
            self.seen[stage].add(first.drops)

    module = Pretrained()
    run = trainer(tmp_path, LoRACallback(r=4, dropout=0.5), val_check_interval=1)
    with pytest.warns(UserWarning, match="in eval mode"):
        run.fit(module, loader(), loader())
    assert module.seen == {"training": {True}, "validation": {False}}
    assert not any(layer.training for layer in named_lora_layers(module.model).values())


class Noisy(nn.Linear):
    """A layer with a dropout of its own."""

    def forward(self, input):
        return nn.functional.dropout(super().forward(input), 0.5, self.training)


class Towers(pl.LightningModule):
    """Layers that drop by themselves in training, kept in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, dropout=0.5), "noisy": Noisy(8, 8)}).eval()
        self.outputs: list[torch.Tensor] = []

    def training_step(self, batch, batch_idx):
        x = torch.linspace(-1, 1, 40).view(5, 8)
        self.outputs.append(self.net["noisy"](self.net["attention"](x, x, x)[0]))
        return self.outputs[-1].square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_a_base_layers_own_dropout_stays_off(tmp_path: Path) -> None:
    module = Towers()
    trainer(tmp_path, LoRACallback(r=2, dropout=0.25, target_modules=["attention", "noisy"])).fit(module, loader())
    x = torch.linspace(-1, 1, 40).view(5, 8)
    expected = remove(module).net["noisy"](module.net["attention"](x, x, x)[0])
    for output in module.outputs:  # B is zero, so that the adapter's own dropout cannot be seen
        torch.testing.assert_close(output, expected)


def test_start_line_and_loggers_say_what_trains(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = pl.loggers.CSVLogger(tmp_path)
    with caplog.at_level("INFO"):
        trainer(tmp_path, LoRACallback(r=4), logger=logger, log_every_n_steps=1).fit(LanguageModule(), loader())
    line = next(record.message for record in caplog.records if record.message.startswith("LoRA on LlamaForCausalLM"))
    module = inject(models.llama(), LoRAConfig(r=4))
    adapters = sum(p.numel() for _, p in named_adapter_parameters(module))
    total = sum(p.numel() for p in module.parameters())
    assert "14 layers adapted" in line
    assert f"{adapters:,}" in line
    assert f"{100 * adapters / total:.2f} %" in line
    assert f"{total - adapters:,}" in line
    assert logger.experiment.hparams["lora/r"] == 4
    assert logger.experiment.hparams["lora/adapter_parameters"] == adapters


class Unfreeze(BaseFinetuning):
    """Unfreezes the embedding after the first epoch."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.model.model.embed_tokens)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model.model.embed_tokens, optimizer)


class Recorder(Logger):
    """Keeps every call, and refuses another value for a key, as MLflow does."""

    name, version, save_dir = "recorder", 0, None

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        for call in self.calls:
            assert all(call[key] == value for key, value in params.items() if key in call), "changed"
        self.calls.append(dict(params))

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        pass


class Settings(LanguageModule):
    def __init__(self, width: int, secret: str, logger: bool) -> None:
        super().__init__()
        self.save_hyperparameters("width", "secret", logger=logger)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


class Rows(pl.LightningDataModule):
    def __init__(self, rows: int, logger: bool) -> None:
        super().__init__()
        self.save_hyperparameters("rows", logger=logger)

    def train_dataloader(self):
        return loader(rows=self.hparams.rows)


@pytest.mark.parametrize("module_logs", [True, False])
@pytest.mark.parametrize("data_logs", [True, False])
def test_each_logger_is_told_once_what_lightning_tells_it_and_of_the_adapters(
    tmp_path: Path, module_logs: bool, data_logs: bool
) -> None:
    def told(name: str, *callbacks: LoRACallback, **settings: Any) -> list[dict[str, Any]]:
        loggers = [Recorder(), pl.loggers.CSVLogger(tmp_path / name)]
        run = trainer(tmp_path, *callbacks, logger=loggers, max_steps=1, log_every_n_steps=1, **settings)
        run.fit(Settings(4, "sesame", module_logs), Rows(8, data_logs))
        written = "".join(path.read_text() for path in (tmp_path / name).rglob("hparams.yaml"))
        assert ("sesame" in written) == (module_logs and settings.get("enable_autolog_hparams", True))
        return loggers[0].calls

    lightning = told("lightning")
    (call,) = told("ours", LoRACallback(r=4))
    assert {k: v for k, v in call.items() if not k.startswith("lora/")} == (lightning[0] if lightning else {})
    assert (call["lora/r"], call["lora/target_modules"]) == (4, "all-linear")
    assert told("off", LoRACallback(r=4), enable_autolog_hparams=False) == []


def test_a_resumed_run_tells_loggers_nothing_else(tmp_path: Path) -> None:
    class Filtered(LanguageModule):
        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    logger = Recorder()
    run = trainer(tmp_path, LoRACallback(r=4), Unfreeze(), logger=logger, max_epochs=2, log_every_n_steps=1)
    run.fit(Filtered(), loader())
    run.save_checkpoint(tmp_path / "two.ckpt")
    again = trainer(tmp_path, LoRACallback(r=4), Unfreeze(), logger=logger, max_epochs=3, log_every_n_steps=1)
    again.fit(Filtered(), loader(), ckpt_path=tmp_path / "two.ckpt")
    assert logger.calls[0] == logger.calls[1]
    assert len(logger.calls) == 2


def test_two_adapted_models_are_logged_under_their_names(tmp_path: Path) -> None:
    class Two(LanguageModule):
        def __init__(self) -> None:
            super().__init__()
            self.other = models.llama(layers=1)

        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + self.other(input_ids=batch, labels=batch).loss

    logger = Recorder()
    both = (LoRACallback(r=4, module="model"), LoRACallback(r=2, module="other"))
    trainer(tmp_path, *both, logger=logger, max_steps=1, log_every_n_steps=1).fit(Two(), loader())
    (call,) = logger.calls
    assert (call["lora/model/r"], call["lora/other/r"]) == (4, 2)
    sizes = [sum(p.numel() for _, p in named_adapter_parameters(inject(models.llama(layers=n), LoRAConfig(r=r))))
             for n, r in ((2, 4), (1, 2))]  # fmt: skip
    assert [call["lora/model/adapter_parameters"], call["lora/other/adapter_parameters"]] == sizes


def said(caplog: pytest.LogCaptureFixture, beginning: str) -> list[str]:
    return [record.message for record in caplog.records if record.message.startswith(beginning)]


def test_start_line_names_what_trains_outside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Scored(LanguageModule):
        def __init__(self) -> None:
            super().__init__()
            self.around = nn.ModuleDict({"model": self.model, "score": nn.Linear(32, 1)})
            del self.model
            self.temperature = nn.Parameter(torch.ones(()))

        @property
        def model(self) -> nn.Module:
            return self.around["model"]

        @model.deleter
        def model(self) -> None:
            del self._modules["model"]

    with caplog.at_level("INFO"):
        trainer(tmp_path, LoRACallback(r=4)).fit(Scored(), loader())
    (line,) = said(caplog, "LoRA on LlamaForCausalLM")
    assert "at 'around.model'" in line
    (outside,) = [one for one in line.splitlines() if "outside" in one]
    assert outside.split() == ["outside", "34", "0.12", "%", "(temperature,", "around.score)"]


def test_start_line_names_the_first_of_many_that_train_whole() -> None:
    module = LanguageModule()
    inject(module.model, LoRAConfig(r=4, modules_to_save=["mlp", "input_layernorm"]))  # 8 tensors
    (line,) = [one for one in summary(module, "model", module.model).splitlines() if "trained whole" in one]
    assert "(model.layers.0.mlp.gate_proj.weight, " in line
    assert line.endswith(" and 2 more)")


@pytest.mark.parametrize("stage", ["validate", "test", "predict"])
def test_stages_without_training_say_what_is_adapted(
    stage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        getattr(trainer(tmp_path, LoRACallback(r=4)), stage)(LanguageModule(), loader())
    (line,) = said(caplog, "LoRA on LlamaForCausalLM")
    assert "14 layers adapted" in line


def test_a_run_with_validation_says_it_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        trainer(tmp_path, LoRACallback(r=4), max_epochs=2).fit(LanguageModule(), loader(), loader())
    assert len(said(caplog, "LoRA on LlamaForCausalLM")) == 1


@pytest.mark.parametrize(("training", "dropout", "times"), [(False, 0.5, 1), (False, 0.0, 0), (True, 0.5, 0)])
@pytest.mark.filterwarnings("ignore:.*in eval mode")
def test_dropout_of_a_model_in_eval_mode_is_said(
    training: bool, dropout: float, times: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = LanguageModule()
    module.model.train(training)
    with caplog.at_level("INFO"):
        trainer(tmp_path, LoRACallback(r=4, dropout=dropout)).fit(module, loader())
    lines = said(caplog, "LlamaForCausalLM is in eval mode")
    assert len(lines) == times
    assert all("the adapters' dropout of 0.5 is on" in line and "call train() on the model" in line for line in lines)


class TestTrainerWithoutTheCallback:
    @pytest.mark.parametrize("stage", ["fit", "validate", "predict"])
    def test_on_an_adapter_file_is_told_to_add_it(self, stage: str, tmp_path: Path) -> None:
        fitted(tmp_path, dropout=0.25)
        with pytest.raises(ValueError, match=r"write Trainer\(callbacks=\[LoRACallback\(r=4, dropout=0.25\)") as raised:
            getattr(trainer(tmp_path), stage)(LanguageModule(), loader(), ckpt_path=tmp_path / "last.ckpt")
        assert "last.ckpt holds adapters" in str(raised.value)
        assert len(str(raised.value)) < 300 + len(str(tmp_path))
        assert raised.value.__suppress_context__  # Lightning's list of missing keys is not printed above it

    def test_on_an_adapter_file_is_told_so_with_loose_loading(self, tmp_path: Path) -> None:
        fitted(tmp_path)
        module = LanguageModule()
        module.strict_loading = False
        with pytest.raises(ValueError, match=r"LoRACallback\(r=4\)"):
            trainer(tmp_path).validate(module, loader(), ckpt_path=tmp_path / "last.ckpt")

    def test_is_told_the_root_where_it_would_not_be_found(self, tmp_path: Path) -> None:
        run = trainer(tmp_path, LoRACallback(r=4, module="model.model"))
        run.fit(LanguageModule(), loader())
        run.save_checkpoint(tmp_path / "inner.ckpt")
        with pytest.raises(ValueError, match=r"LoRACallback\(r=4, module='model.model'\)"):
            trainer(tmp_path).validate(LanguageModule(), loader(), ckpt_path=tmp_path / "inner.ckpt")

    def test_restores_a_module_that_was_adapted_by_hand(self, tmp_path: Path) -> None:
        _, trained = fitted(tmp_path)
        module = LanguageModule()
        inject(module.model, LoRAConfig(r=4))
        trainer(tmp_path).validate(module, loader(), ckpt_path=tmp_path / "last.ckpt")
        torch.testing.assert_close(adapter_state_dict(module), adapter_state_dict(trained), rtol=0, atol=0)

    def test_keeps_lightnings_error_for_other_files(self, tmp_path: Path) -> None:
        plain = trainer(tmp_path)
        plain.fit(LanguageModule(), loader())
        plain.save_checkpoint(tmp_path / "plain.ckpt")
        other = LanguageModule()
        other.more = nn.Linear(2, 2)
        with pytest.raises(RuntimeError, match="Missing key"):
            trainer(tmp_path).validate(other, loader(), ckpt_path=tmp_path / "plain.ckpt")


@pytest.mark.parametrize("strict", [False, True])
def test_idle_adapters_are_named_after_the_first_step(tmp_path: Path, strict: bool) -> None:
    class Partial(LanguageModule):
        def training_step(self, batch, batch_idx):
            return self.model.model.layers[0].mlp(self.model.model.embed_tokens(batch)).square().mean()

    run = trainer(tmp_path, LoRACallback(r=4, strict_idle=strict))
    context = (
        pytest.raises(ValueError, match="11 adapted layers") if strict else pytest.warns(match="11 adapted layers")
    )
    with context:
        run.fit(Partial(), loader())


def test_merged_model_cannot_be_fitted(tmp_path: Path) -> None:
    _, module = fitted(tmp_path)
    merge(module)
    with pytest.raises(ValueError, match=r"call unmerge\(model\) first"):
        trainer(tmp_path, LoRACallback(r=4)).fit(module, loader())


def test_fit_after_remove_adapts_anew(tmp_path: Path) -> None:
    _, module = fitted(tmp_path)
    remove(module)
    trainer(tmp_path, LoRACallback(r=2)).fit(module, loader())
    assert {p.shape[0] for n, p in named_adapter_parameters(module) if n.endswith("A")} == {2}


class TestPrecision:
    @pytest.mark.parametrize(
        ("precision", "base", "adapter"),
        [
            ("bf16-true", torch.bfloat16, torch.float32),
            ("bf16-mixed", torch.float32, torch.float32),
            ("64-true", torch.float64, torch.float64),
        ],
    )
    def test_base_follows_the_plugin_and_adapters_stay_wide(self, tmp_path: Path, precision, base, adapter) -> None:
        module = LanguageModule()
        trainer(tmp_path, LoRACallback(r=4), precision=precision).fit(module, loader())
        layer = module.model.model.layers[0].self_attn.q_proj
        assert (layer.weight.dtype, layer.lora_A.dtype) == (base, adapter)
        assert module.losses[-1] < module.losses[0]
        assert next(module.model.parameters()).dtype == base

    def test_init_module_with_empty_init_leaves_adapters_real(self, tmp_path: Path) -> None:
        run = trainer(tmp_path, LoRACallback(r=4))
        with run.init_module(empty_init=True):
            module = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
            inject(module, LoRAConfig(r=4))
        bound = 16**-0.5
        values = [p for n, p in named_adapter_parameters(module) if n.endswith("A")]
        assert all(0.1 * bound < p.abs().mean() < bound for p in values)

    def test_plugins_that_replace_linears_are_refused(self, tmp_path: Path) -> None:
        run = trainer(tmp_path, LoRACallback(r=4))
        run.strategy.precision_plugin.__class__ = type("TransformerEnginePrecision", (type(run.precision_plugin),), {})
        with pytest.raises(ValueError, match="TransformerEnginePrecision replaces the linear layers"):
            run.fit(LanguageModule(), loader())


class TestCompany:
    @pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
    def test_stock_sharding_strategies_are_refused_by_name(self, tmp_path: Path, strategy: type) -> None:
        run = trainer(tmp_path, LoRACallback(r=4))
        run._accelerator_connector.strategy = strategy()
        module = LanguageModule()
        with pytest.raises(ValueError, match=f"{strategy.__name__} is not supported: .* Use strategy='auto' or 'ddp'"):
            LoRACallback(r=4).setup(run, module, "fit")
        assert not any(isinstance(m, LoRALayer) for m in module.modules())

    @pytest.mark.parametrize("package", ["pytorch", "fabric"])
    def test_deepspeed_is_refused_though_it_derives_from_ddp(self, package: str) -> None:
        strategies = importlib.import_module(f"lightning.{package}.strategies")
        strategy = strategies.DeepSpeedStrategy.__new__(strategies.DeepSpeedStrategy)
        with pytest.raises(ValueError, match="DeepSpeedStrategy is not supported"):
            (adopt if package == "pytorch" else adopt_fabric)(strategy)

    @pytest.mark.parametrize("averaging", [EMAWeightAveraging, lambda: StochasticWeightAveraging(1e-2)])
    def test_averaging_callbacks_must_come_after(self, tmp_path: Path, averaging) -> None:
        with pytest.raises(ValueError, match="list LoRACallback before"):
            trainer(tmp_path, averaging(), LoRACallback(r=4)).fit(LanguageModule(), loader())

    def test_stochastic_weight_averaging_averages_adapters(self, tmp_path: Path) -> None:
        module = LanguageModule()
        base = module.model.model.layers[0].mlp.up_proj.weight.detach().clone()
        swa = StochasticWeightAveraging(1e-2, swa_epoch_start=1)
        run = trainer(tmp_path, LoRACallback(r=4), swa, max_epochs=3)
        run.fit(module, loader())
        run.save_checkpoint(tmp_path / "swa.ckpt")
        assert torch.equal(module.model.model.layers[0].mlp.up_proj.weight, base)
        assert len(torch.load(tmp_path / "swa.ckpt", weights_only=True)["state_dict"]) == 28

    def test_ema_checkpoints_are_adapter_only_and_resume(self, tmp_path: Path) -> None:
        def run(epochs: int, ckpt_path: Path | None = None) -> tuple[pl.Trainer, LanguageModule]:
            module = LanguageModule()
            one = trainer(tmp_path, LoRACallback(r=4), EMAWeightAveraging(decay=0.5), max_epochs=epochs)
            one.fit(module, loader(), ckpt_path=ckpt_path)
            return one, module

        callback = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
        straight = LanguageModule()
        trainer(tmp_path, LoRACallback(r=4), EMAWeightAveraging(decay=0.5), callback, max_epochs=2).fit(
            straight, loader()
        )
        saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
        assert set(saved["state_dict"]) == set(saved["current_model_state"])
        assert all("lora_" in name for name in saved["state_dict"])
        _, resumed = run(2, tmp_path / "epoch=0.ckpt")
        assert resumed.losses == straight.losses[4:]
        assert same_adapters(resumed, straight)

    @pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracing
    @pytest.mark.parametrize(
        "averaging", [lambda: EMAWeightAveraging(decay=0.5), lambda: StochasticWeightAveraging(1e-2, swa_epoch_start=1)]
    )
    def test_averages_of_a_compiled_tied_model_beside_a_teacher_resume_and_hold_no_base(
        self, tmp_path: Path, averaging
    ) -> None:
        class Compiled(LanguageModule):
            def __init__(self) -> None:
                super().__init__()
                self.model = torch.compile(models.llama(tied=True, layers=1), backend="eager")
                self.teacher = models._seeded(lambda: nn.Linear(3, 3)).requires_grad_(False)

        straight, resumed = Compiled(), Compiled()
        callback = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
        trainer(tmp_path, LoRACallback(r=4), averaging(), callback, max_epochs=3).fit(straight, loader())
        saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)
        averages = [state["average_model_state"] for state in saved["callbacks"].values() if "n_averaged" in state]
        for state in (saved["state_dict"], saved.get("current_model_state", {}), *averages):
            assert all("lora_" in name and "_orig_mod" not in name for name in state)
        trainer(tmp_path, LoRACallback(r=4), averaging(), max_epochs=3).fit(
            resumed, loader(), ckpt_path=tmp_path / "epoch=1.ckpt"
        )
        assert resumed.losses == straight.losses[8:]
        assert same_adapters(resumed, straight)

    @pytest.mark.parametrize("ours_first", [True, False])
    def test_base_finetuning_unfreezes_beside_adapters_and_its_weights_are_kept(
        self, tmp_path: Path, ours_first: bool
    ) -> None:
        callbacks = [LoRACallback(r=4), Unfreeze()]
        module = LanguageModule()
        module.configure_optimizers = lambda: torch.optim.AdamW(
            [p for p in module.parameters() if p.requires_grad], lr=1e-2
        )
        checkpoint = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
        run = trainer(tmp_path, *(callbacks if ours_first else callbacks[::-1]), checkpoint, max_epochs=3)
        run.fit(module, loader())
        saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
        assert "model.model.embed_tokens.weight" in saved
        assert len(saved) == 29
        twin = LanguageModule()
        twin.configure_optimizers = lambda: torch.optim.AdamW(
            [p for p in twin.parameters() if p.requires_grad], lr=1e-2
        )
        callbacks = [LoRACallback(r=4), Unfreeze()]
        trainer(tmp_path, *(callbacks if ours_first else callbacks[::-1]), max_epochs=3).fit(
            twin, loader(), ckpt_path=tmp_path / "epoch=1.ckpt"
        )
        assert twin.losses == module.losses[8:]

    def test_finetuning_that_freezes_the_adapters_is_an_error(self, tmp_path: Path) -> None:
        class FreezeAll(BaseFinetuning):
            def freeze_before_training(self, pl_module):
                self.freeze(pl_module)

            def finetune_function(self, pl_module, epoch, optimizer):
                pass

        module = LanguageModule()
        module.configure_optimizers = lambda: torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
        with pytest.raises(ValueError, match="list LoRACallback after it"):
            trainer(tmp_path, LoRACallback(r=4), FreezeAll()).fit(module, loader())

    def test_learning_rate_finder_leaves_adapters_as_they_were(self, tmp_path: Path) -> None:
        class Tunable(LanguageModule):
            def __init__(self) -> None:
                super().__init__()
                self.lr = 1e-3

            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters(), lr=self.lr)

        module = Tunable()
        run = trainer(tmp_path, LoRACallback(r=4))
        pl.tuner.Tuner(run).lr_find(module, loader(rows=160), num_training=30, early_stop_threshold=None)
        assert module.lr != 1e-3
        assert all(p.abs().sum() == 0 for n, p in named_adapter_parameters(module) if n.endswith("B"))
        assert not list(tmp_path.glob(".lr_find*"))

    def test_batch_size_scaler_leaves_adapters_as_they_were(self, tmp_path: Path) -> None:
        class Scalable(LanguageModule):
            def __init__(self) -> None:
                super().__init__()
                self.batch_size = 2

            def train_dataloader(self):
                return loader(batch_size=self.batch_size)

            val_dataloader = train_dataloader

        module = Scalable()
        run = trainer(tmp_path, LoRACallback(r=4))
        pl.tuner.Tuner(run).scale_batch_size(module, mode="power", steps_per_trial=1, max_trials=2)
        assert module.batch_size > 2
        assert all(p.abs().sum() == 0 for n, p in named_adapter_parameters(module) if n.endswith("B"))

    def test_pytorch_lightning_trainer_gets_one_error_with_the_right_import(self, tmp_path: Path) -> None:
        pytorch_lightning = pytest.importorskip("pytorch_lightning")
        run = pytorch_lightning.Trainer(
            callbacks=[LoRACallback(r=4)], accelerator="cpu", logger=False, default_root_dir=tmp_path,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, max_epochs=1,
        )  # fmt: skip

        class Module(pytorch_lightning.LightningModule):
            def training_step(self, batch, batch_idx):
                return None

            def configure_optimizers(self):
                return None

        with pytest.raises(TypeError, match="import lightning.pytorch as pl"):
            run.fit(Module(), loader())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path, use_reentrant: bool) -> None:
    class Checkpointed(LanguageModule):
        def __init__(self, checkpointing: bool) -> None:
            super().__init__()
            if checkpointing:
                models.checkpoint_activations(self.model, {"use_reentrant": use_reentrant})

        def on_before_optimizer_step(self, optimizer):
            self.gradients = {name: p.grad.clone() for name, p in named_adapter_parameters(self)}

    runs = []
    for checkpointing in (False, True):
        pl.seed_everything(0, verbose=False)
        module = Checkpointed(checkpointing)
        trainer(tmp_path, LoRACallback(r=4, dropout=0.3), max_steps=1).fit(module, loader())
        runs.append(module.gradients)
    torch.testing.assert_close(runs[1], runs[0], rtol=0, atol=0)


def test_a_model_on_the_meta_device_is_refused_with_what_fills_it(tmp_path: Path) -> None:
    class Empty(LanguageModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = self.model.to("meta")

    with pytest.raises(ValueError, match="is on the meta device, and LoRASingleDeviceStrategy has nothing to fill it"):
        trainer(tmp_path, LoRACallback(r=4)).fit(Empty(), loader())
