"""Checkpoints of a Trainer: what is in them, exact resume, what is refused, and that nothing is lost."""

import copy
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
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
    merge,
    save_peft,
)
from lightning_lora.files import write_atomically
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

    def test_ordinary_checkpoints_load_as_ever(self, tmp_path: Path) -> None:
        module = LanguageModule()
        run = trainer(tmp_path, max_epochs=0)
        run.fit(module, loader())
        run.save_checkpoint(tmp_path / "full.ckpt")
        twin = LanguageModule.load_from_checkpoint(tmp_path / "full.ckpt")
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))


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


class TestAtomicity:
    def test_killed_at_any_moment_the_former_file_is_readable(self, tmp_path: Path) -> None:
        script = (
            "import sys, torch\n"
            "from pathlib import Path\n"
            "from lightning_lora.strategies.atomic_io import AtomicCheckpointIO\n"
            "n = 0\n"
            "while True:\n"
            "    AtomicCheckpointIO().save_checkpoint({'n': n, 'x': torch.full((500_000,), n)}, sys.argv[1])\n"
            "    n += 1\n"
        )
        path = tmp_path / "last.ckpt"
        for delay in (0.01, 0.037, 0.08):
            process = subprocess.Popen([sys.executable, "-c", script, str(path)])
            while not path.exists() and process.poll() is None:
                time.sleep(0.01)
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            process.wait()
            saved = torch.load(path, weights_only=True)
            assert torch.equal(saved["x"], torch.full((500_000,), saved["n"]))

    def test_a_full_disk_leaves_the_former_file_and_no_litter(self, tmp_path: Path, monkeypatch) -> None:
        path = tmp_path / "last.ckpt"
        write_atomically(path, b"former")
        monkeypatch.setattr(
            os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
        )
        with pytest.raises(
            OSError, match=r"cannot write 3 bytes to .*last.ckpt: No space left on device; a former file"
        ):
            write_atomically(path, b"new")
        assert path.read_bytes() == b"former"
        assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]

    def test_ranks_write_to_one_path_at_the_same_time(self, tmp_path: Path) -> None:
        script = (
            "import sys, torch\n"
            "from pathlib import Path\n"
            "from lightning_lora.files import write_atomically\n"
            "directory, rank = Path(sys.argv[1]), int(sys.argv[2])\n"
            "torch.distributed.init_process_group(\n"
            "    'gloo', store=torch.distributed.FileStore(str(directory / 'store'), 2), rank=rank, world_size=2\n"
            ")\n"
            "for _ in range(200):\n"
            "    write_atomically(directory / 'adapter' / 'x', b'x' * 5000)\n"
            "torch.distributed.barrier()\n"
        )
        processes = [
            subprocess.Popen([sys.executable, "-c", script, str(tmp_path), rank], stderr=subprocess.PIPE, text=True)
            for rank in ("0", "1")
        ]
        errors = [process.communicate(timeout=1800)[1] for process in processes]
        assert [process.returncode for process in processes] == [0, 0], errors
        assert [p.name for p in (tmp_path / "adapter").iterdir()] == ["x"]

    def test_a_write_that_the_system_cuts_short_leaves_the_former_file(self, tmp_path: Path) -> None:
        path = tmp_path / "last.ckpt"
        write_atomically(path, b"former")
        script = (
            "import resource, sys\n"
            "from pathlib import Path\n"
            "from lightning_lora.files import write_atomically\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
            "write_atomically(Path(sys.argv[1]), b'x' * 5000)\n"
        )
        result = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
        assert "cannot write 5,000 bytes to" in result.stderr
        assert path.read_bytes() == b"former"
        assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


class TestPeftBeside:
    def test_directories_come_and_go_with_their_checkpoints(self, tmp_path: Path) -> None:
        callback = ModelCheckpoint(tmp_path, monitor="epoch", mode="max", save_top_k=1, filename="{epoch}")

        class Logged(LanguageModule):
            def on_train_epoch_end(self):
                self.log("epoch", float(self.current_epoch))

        module = Logged()
        trainer(tmp_path, LoRACallback(r=4, save_peft=True), callback, max_epochs=3).fit(module, loader())
        assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch=2-peft", "epoch=2.ckpt"]
        from lightning_lora import load_peft

        assert same_adapters(load_peft(models.llama(), tmp_path / "epoch=2-peft"), module)


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
