"""AdaLoRA in the Trainer: the schedule, the loss term under every way to step, and exact resume."""

import copy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_lora import (
    AdaLoRA,
    LoRACallback,
    LoRAConfig,
    adapter_state_dict,
    inject,
    named_adapter_parameters,
    save_peft,
)
from lightning_lora.model.state import named_lora_layers
from tests import models
from tests.distributed.launch import ROOT
from tests.runs import LanguageModule, loader, same_adapters, trainer

SMALL = {"target_r": 2, "init_r": 4}
EXACT = {"rtol": 0.0, "atol": 0.0}
CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # other order of float32 sums


class Gradients(Callback):
    """Keeps the adapters' gradients as the optimizer's first step reads them."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def keep(*_: Any) -> None:
            if not self.kept:
                self.kept = {name: p.grad.clone() for name, p in named_adapter_parameters(pl_module)}

        for optimizer in trainer.optimizers:
            optimizer.register_step_post_hook(keep)


class Plain(LanguageModule):
    """Steps with SGD, so that nothing hides a gradient's size."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def callback(**schedule: Any) -> LoRACallback:
    return LoRACallback(adalora=AdaLoRA(**{**SMALL, **schedule}))


def gradients(
    directory: Path, module: Any = None, schedule: dict[str, Any] | None = None, **options: Any
) -> dict[str, Tensor]:
    keeper = Gradients()
    run = trainer(directory, callback(**(schedule or {})), keeper, **{"max_steps": 2, **options})
    run.fit(module or Plain(), loader())
    return keeper.kept


def expected_gradients(batches: list[Tensor], weight: float = 0.5) -> dict[str, Tensor]:
    """Return the gradients of the mean loss of ``batches`` plus the term, by autograd."""
    model = inject(models.llama(), LoRAConfig(adalora=AdaLoRA(**SMALL)))
    norms = []
    for layer in named_lora_layers(model).values():
        identity = torch.eye(4)
        norms += [torch.linalg.norm(layer.lora_A @ layer.lora_A.T - identity)]
        norms += [torch.linalg.norm(layer.lora_B.T @ layer.lora_B - identity)]
    losses = [model(input_ids=batch, labels=batch).loss for batch in batches]
    (sum(losses) / len(losses) + weight * sum(norms) / len(norms)).backward()
    return {name: p.grad for name, p in named_adapter_parameters(model)}


def rows() -> list[Tensor]:
    return list(loader())


def clipped(given: dict[str, Tensor], max_norm: float) -> dict[str, Tensor]:
    norm = torch.stack([g.square().sum() for g in given.values()]).sum().sqrt()
    assert norm > max_norm
    return {name: g * max_norm / (norm + 1e-6) for name, g in given.items()}


def test_nobody_calls_anything_and_the_ranks_reach_their_number(tmp_path: Path) -> None:
    lora = callback()
    module = LanguageModule()
    run = trainer(tmp_path, lora, max_epochs=3)
    run.fit(module, loader())
    layers = named_lora_layers(module)
    assert lora.rank_history()[0] == list(range(1, 13))  # three epochs of four batches
    assert sum(int((layer.lora_E != 0).sum()) for layer in layers.values()) == 2 * len(layers)
    assert run.callback_metrics["train/adalora_rank"] == 2
    assert run.callback_metrics["train/adalora_orthogonality"] > 0


def test_the_term_is_in_the_gradients_of_an_ordinary_step(tmp_path: Path) -> None:
    torch.testing.assert_close(gradients(tmp_path), expected_gradients(rows()[:1]), **CLOSE)


def test_it_is_there_once_when_batches_are_accumulated(tmp_path: Path) -> None:
    ours = gradients(tmp_path, accumulate_grad_batches=2)
    torch.testing.assert_close(ours, expected_gradients(rows()[:2]), **CLOSE)


def test_it_is_there_when_training_step_returns_a_dictionary(tmp_path: Path) -> None:
    class Returning(Plain):
        def training_step(self, batch, batch_idx):
            return {"loss": super().training_step(batch, batch_idx), "more": 1}

    torch.testing.assert_close(gradients(tmp_path, Returning()), expected_gradients(rows()[:1]), **CLOSE)


def test_it_is_clipped_with_the_rest(tmp_path: Path) -> None:
    ours = gradients(tmp_path, gradient_clip_val=0.01)
    torch.testing.assert_close(ours, clipped(expected_gradients(rows()[:1]), 0.01), **CLOSE)


def half_precision(init_scale: float) -> MixedPrecision:
    # Lightning makes 16-mixed into bf16-mixed on CPU, unless it is given the plugin
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale))


def test_it_is_scaled_with_the_loss(tmp_path: Path) -> None:
    schedule = {"orth_reg_weight": 5.0}
    ours = gradients(tmp_path, schedule=schedule, plugins=[half_precision(256.0)])
    expected = expected_gradients(rows()[:1], weight=5.0)
    for name, gradient in ours.items():
        # the loss is computed in float16
        torch.testing.assert_close(
            gradient, expected[name], rtol=5e-2, atol=2e-3 * float(expected[name].abs().max()) + 1e-5
        )


def test_steps_that_overflow_do_not_count(tmp_path: Path) -> None:
    lora = callback(total_step=6)
    run = trainer(tmp_path, lora, max_steps=4, plugins=[half_precision(2.0**40)])
    with pytest.warns(UserWarning, match="the layers have not reached their ranks"):
        run.fit(Plain(), loader())
    assert lora.rank_history()[0] == []  # all four overflowed
    assert all(torch.isfinite(value).all() for value in adapter_state_dict(run.lightning_module).values())


class Fused(Plain):
    """Steps with an optimizer that unscales gradients, and skips steps, itself."""

    fused = True

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=self.fused)


def test_an_optimizer_that_unscales_by_itself_prunes_alike(tmp_path: Path) -> None:
    states = []
    for fused in (True, False):
        lora, module = callback(tinit=3), Fused()
        module.fused = fused
        trainer(tmp_path, lora, max_steps=4, plugins=[half_precision(1024.0)]).fit(module, loader())
        states.append(lora.state_dict()["adalora"])
    assert states[0]["history"]["steps"] == [1, 2, 3, 4]
    for name, layer in states[0]["layers"].items():
        for key, value in layer.items():
            # other order of float32 operations in the optimizer
            torch.testing.assert_close(value, states[1]["layers"][name][key], rtol=1e-2, atol=1e-12)


def test_steps_that_it_skips_do_not_count(tmp_path: Path) -> None:
    lora = callback(total_step=6)
    run = trainer(tmp_path, lora, max_steps=4, plugins=[half_precision(2.0**40)])
    with pytest.warns(UserWarning, match="the layers have not reached their ranks"):
        run.fit(Fused(), loader())
    assert lora.rank_history()[0] == []
    assert all(torch.isfinite(value).all() for value in adapter_state_dict(run.lightning_module).values())


class Manual(Plain):
    """Steps by itself, after two backwards."""

    automatic_optimization = False
    max_norm: float | None = None
    by_hand = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        if batch_idx % 2 == 0:
            optimizer.zero_grad()
        loss = super().training_step(batch, batch_idx) / 2
        loss.backward() if self.by_hand else self.manual_backward(loss)
        if batch_idx % 2:
            if self.max_norm is not None:
                self.clip_gradients(optimizer, gradient_clip_val=self.max_norm, gradient_clip_algorithm="norm")
            optimizer.step()


@pytest.mark.parametrize("by_hand", [False, True])
def test_it_is_there_once_under_manual_optimization(tmp_path: Path, by_hand: bool) -> None:
    module = Manual()
    module.by_hand = by_hand
    torch.testing.assert_close(gradients(tmp_path, module), expected_gradients(rows()[:2]), **CLOSE)


def test_under_manual_optimization_it_is_clipped_with_the_rest(tmp_path: Path) -> None:
    module = Manual()
    module.max_norm = 0.01
    expected = clipped(expected_gradients(rows()[:2]), 0.01)
    torch.testing.assert_close(gradients(tmp_path, module), expected, **CLOSE)


def test_two_optimizers_where_one_holds_the_layers_count_its_steps(tmp_path: Path) -> None:
    class Two(LanguageModule):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.critic = nn.Linear(2, 1)

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            self.toggle_optimizer(second)
            second.zero_grad()
            self.manual_backward(self.critic(torch.ones(2)).sum())
            second.step()
            self.untoggle_optimizer(second)
            self.toggle_optimizer(first)
            first.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            first.step()
            self.untoggle_optimizer(first)

        def configure_optimizers(self):
            return torch.optim.SGD(self.model.parameters(), 0.1), torch.optim.SGD(self.critic.parameters(), 0.1)

    lora = callback(total_step=4)
    trainer(tmp_path, lora).fit(Two(), loader())
    assert lora.rank_history()[0] == [1, 2, 3, 4]


def test_layers_in_two_optimizers_are_refused(tmp_path: Path) -> None:
    class Split(LanguageModule):
        automatic_optimization = False

        def configure_optimizers(self):
            own = dict(named_adapter_parameters(self))
            return [
                torch.optim.SGD([p for n, p in own.items() if (n[-1] == "A") is is_A], 0.1) for is_A in (True, False)
            ]

    with pytest.raises(ValueError, match="2 of 2 optimizers do: give all of their lora_A, lora_B and lora_E to one"):
        trainer(tmp_path, callback()).fit(Split(), loader())


def files(directory: Path) -> ModelCheckpoint:
    return ModelCheckpoint(directory, every_n_train_steps=2, save_top_k=-1, filename="{step}")


def resumable() -> StatefulDataLoader:
    return StatefulDataLoader(models.token_ids(16, 8, seed=1), batch_size=4)


class Saves(Callback):
    """Writes a checkpoint after some steps, one of them between two prunings."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step in RESUMED_AT:
            trainer.save_checkpoint(self.directory / f"{trainer.global_step}.ckpt")


RESUMED_AT = (3, 7, 10)  # before the first pruning, between two, after the last
PHASES = {"tinit": 3, "tfinal": 3, "deltaT": 2}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Train three epochs of four steps without a stop."""
    directory = tmp_path_factory.mktemp("straight")
    lora, module = callback(**PHASES), LanguageModule()
    run = trainer(directory, lora, Saves(directory), max_epochs=3)
    run.fit(module, resumable())
    return {"directory": directory, "lora": lora, "module": module, "run": run}


@pytest.mark.parametrize("step", RESUMED_AT)
def test_a_run_resumed_in_mid_schedule_is_the_run_that_was_not_stopped(straight: dict[str, Any], step: int) -> None:
    lora, module = callback(**PHASES), LanguageModule()
    resumed = trainer(straight["directory"], lora, max_epochs=3)
    resumed.fit(module, resumable(), ckpt_path=straight["directory"] / f"{step}.ckpt")
    assert resumed.global_step == 12
    assert module.losses == straight["module"].losses[step:]
    assert same_adapters(module, straight["module"])
    assert lora.rank_history() == straight["lora"].rank_history()
    torch.testing.assert_close(lora.state_dict(), straight["lora"].state_dict(), **EXACT)
    states = [run.optimizers[0].state_dict() for run in (resumed, straight["run"])]
    torch.testing.assert_close(*states, **EXACT)


def test_a_killed_run_goes_on_as_the_run_that_was_not_stopped(straight: dict[str, Any], tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from tests.distributed.launch import ROOT
from tests.runs import LanguageModule, trainer
from tests.strategies.test_adalora import PHASES, Saves, callback, resumable

class Kill(Saves):
    def on_train_batch_end(self, run, *_):
        super().on_train_batch_end(run)
        if run.global_step == 8:
            os.kill(os.getpid(), signal.SIGKILL)

folder = Path({str(tmp_path)!r})
trainer(folder, callback(**PHASES), Kill(folder), max_epochs=3).fit(LanguageModule(), resumable())
"""
    killed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    module = LanguageModule()
    run = trainer(tmp_path, callback(**PHASES), max_epochs=3)
    run.fit(module, resumable(), ckpt_path=tmp_path / "7.ckpt")
    assert same_adapters(module, straight["module"])
    assert module.losses == straight["module"].losses[7:]


@pytest.mark.parametrize("step", RESUMED_AT[:2])
def test_without_the_averages_the_resumed_run_is_another(straight: dict[str, Any], step: int, tmp_path: Path) -> None:
    content = torch.load(straight["directory"] / f"{step}.ckpt", weights_only=True)
    (state,) = content["callbacks"].values()
    for averages in state["adalora"]["layers"].values():
        for name in averages:
            averages[name] = averages[name] if name == "kept" else torch.zeros_like(averages[name])
    torch.save(content, tmp_path / "changed.ckpt")
    module = LanguageModule()
    run = trainer(tmp_path, callback(**PHASES), max_epochs=3)
    run.fit(module, resumable(), ckpt_path=tmp_path / "changed.ckpt")
    assert not same_adapters(module, straight["module"])


def test_a_checkpoint_of_another_schedule_or_of_none_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, callback(), files(tmp_path), max_epochs=1)
    run.fit(LanguageModule(), loader())
    path = tmp_path / "step=2.ckpt"
    with pytest.raises(ValueError, match=r"other settings: tinit=1 \(there: 0\)"):
        trainer(tmp_path, callback(tinit=1)).fit(LanguageModule(), loader(), ckpt_path=path)
    with pytest.raises(ValueError, match=r"total_step=9 \(there: 4\)"):
        trainer(tmp_path, callback(total_step=9)).fit(LanguageModule(), loader(), ckpt_path=path)
    content = torch.load(path, weights_only=True)
    content["callbacks"] = {}
    torch.save(content, tmp_path / "bare.ckpt")
    with pytest.raises(ValueError, match="its checkpoint holds no state of AdaLoRA"):
        trainer(tmp_path, callback()).fit(LanguageModule(), loader(), ckpt_path=tmp_path / "bare.ckpt")


def test_plain_and_adaptive_checkpoints_are_not_mixed_up(tmp_path: Path) -> None:
    trainer(tmp_path, callback(), files(tmp_path / "ada")).fit(LanguageModule(), loader())
    trainer(tmp_path, LoRACallback(r=4, alpha=8), files(tmp_path / "plain")).fit(LanguageModule(), loader())
    with pytest.raises(ValueError, match="adapted by AdaLoRA, and the other is not: give adalora"):
        trainer(tmp_path, LoRACallback(r=4, alpha=8)).fit(
            LanguageModule(), loader(), ckpt_path=tmp_path / "ada" / "step=2.ckpt"
        )
    with pytest.raises(ValueError, match="adapted by AdaLoRA, and the other is not: leave adalora out"):
        trainer(tmp_path, callback()).fit(LanguageModule(), loader(), ckpt_path=tmp_path / "plain" / "step=2.ckpt")


def test_a_second_fit_goes_on_with_the_schedule(tmp_path: Path) -> None:
    lora, module = callback(total_step=8), LanguageModule()
    run = trainer(tmp_path, lora, max_epochs=1)
    with pytest.warns(UserWarning, match="the run ended after 4 steps"):
        run.fit(module, loader())
    run.fit_loop.max_epochs = 2
    run.fit(module, loader())
    assert lora.rank_history()[0] == list(range(1, 9))


def test_another_model_in_the_same_trainer_is_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, callback(), max_epochs=1)
    run.fit(LanguageModule(), loader())
    run.fit_loop.max_epochs = 2
    other = LanguageModule()
    with pytest.raises(ValueError, match="goes on at step 4 of the run of another model"):
        run.fit(other, loader())
    assert other.losses == []


def test_a_new_run_from_a_file_starts_the_schedule_anew(tmp_path: Path) -> None:
    trainer(tmp_path, callback(), files(tmp_path)).fit(LanguageModule(), loader())
    lora = LoRACallback(init_from=str(tmp_path / "step=2.ckpt"), adalora=AdaLoRA(**SMALL, tinit=1))
    module = LanguageModule()
    trainer(tmp_path, lora).fit(module, loader())
    assert lora.rank_history()[0] == [1, 2, 3, 4]
    assert lora.rank_history()[1]["model.layers.0.self_attn.q_proj"][0] == 4


def test_a_new_run_from_a_directory_of_peft_starts_with_its_factors(tmp_path: Path) -> None:
    first = LanguageModule()
    trainer(tmp_path, callback(total_step=4)).fit(first, loader())
    save_peft(first, tmp_path / "peft")
    lora, module = LoRACallback(init_from=str(tmp_path / "peft"), adalora=AdaLoRA(**SMALL, tinit=2)), LanguageModule()
    run = trainer(tmp_path, lora)
    run.validate(module, loader(), verbose=False)
    assert same_adapters(first, module)
    run.fit(module, loader())
    assert lora.rank_history()[0] == [1, 2, 3, 4]


def test_a_run_of_unknown_length_needs_its_number_of_steps(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set max_steps, or give AdaLoRA\(total_step="):
        trainer(tmp_path, callback(), max_epochs=-1).fit(LanguageModule(), loader())
    lora = callback(total_step=5)

    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= 5

    trainer(tmp_path, lora, Stop(), max_epochs=-1).fit(LanguageModule(), loader())
    assert lora.rank_history()[0] == [1, 2, 3, 4, 5]


def test_a_run_too_short_for_its_phases_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no step is left to prune in"):
        trainer(tmp_path, callback(tinit=3, tfinal=1)).fit(LanguageModule(), loader())


def test_a_trial_run_is_not_too_short(tmp_path: Path) -> None:
    trainer(tmp_path, callback(tinit=30, tfinal=10), fast_dev_run=True).fit(LanguageModule(), loader())


def test_a_run_shorter_than_its_schedule_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"), pytest.warns(UserWarning, match="have not reached their ranks"):
        trainer(tmp_path, callback(total_step=20), max_steps=2).fit(LanguageModule(), loader())
    assert "AdaLoRA prunes up to step 20 of total_step=20, and this run ends at max_steps=2" in caplog.text


def test_an_adapter_that_reaches_no_loss_is_named(tmp_path: Path) -> None:
    class Idle(LanguageModule):
        def __init__(self) -> None:
            super().__init__()
            self.model.beside = nn.Linear(32, 32)

    with pytest.warns(UserWarning, match="1 adapted layers got no gradient in the first step: beside"):
        trainer(tmp_path, callback()).fit(Idle(), loader())


def test_the_run_leaves_no_hook_on_the_optimizer(tmp_path: Path) -> None:
    run = trainer(tmp_path, callback())
    run.fit(LanguageModule(), loader())
    assert not run.optimizers[0]._optimizer_step_post_hooks


def test_a_run_without_adalora_keeps_no_state(tmp_path: Path) -> None:
    lora = LoRACallback(r=4)
    trainer(tmp_path, lora).fit(LanguageModule(), loader())
    assert lora.state_dict() == {}
    with pytest.raises(ValueError, match="adalora"):
        lora.rank_history()


def test_the_callback_can_be_copied_before_a_run() -> None:
    assert copy.deepcopy(callback()).config == callback().config
