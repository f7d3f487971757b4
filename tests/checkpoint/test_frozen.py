"""What changes without requiring grad is kept: frozen networks and buffers that a resume needs."""

from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_lora import LoRACallback
from tests import models
from tests.runs import LanguageModule, epochs, fitted, loader, trainer


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
