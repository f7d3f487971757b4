"""The rates of a run: LoRA+'s groups in a Trainer and on the command line, and what the first lines say of a rate."""

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import LearningRateFinder, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import CSVLogger
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, LinearLR, OneCycleLR

from lightning_lora import LoRACallback, LoRAConfig, inject, parameter_groups
from lightning_lora.model.learning_rate import rate_line
from tests import models
from tests.runs import LanguageModule, LazyModule, loader, same_adapters, trainer
from tests.strategies.test_cli import ARGUMENTS, Base, Data, Plain

LORA = {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "use_dora": True}


class Grouped(LanguageModule):
    """Builds its optimizer with ``build``, and a schedule with ``schedule``."""

    build: Callable[[Any], Optimizer]
    schedule: Callable[[Any], Any] | None

    def configure_optimizers(self) -> Any:
        optimizer = self.build(self)
        return optimizer if self.schedule is None else ([optimizer], [self.schedule(optimizer)])


def grouped(build: Callable[[Any], Optimizer], schedule: Callable[[Any], Any] | None = None) -> Grouped:
    module = Grouped()
    vars(module).update(build=build, schedule=schedule)
    return module


def plus(module: Any) -> Optimizer:
    return AdamW(parameter_groups(module, 1e-3, lora_plus_ratio=8.0, embedding_lr=1e-4))


def decaying(optimizer: Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda epoch: 1 / (1 + epoch))


def run(directory: Path, module: Any, *callbacks: Any, ckpt_path: Any = None, **settings: Any) -> pl.Trainer:
    settings = {"max_epochs": 1, **settings}
    one = trainer(directory, LoRACallback(**LORA), *callbacks, **settings)
    one.fit(module, loader(), ckpt_path=ckpt_path)
    return one


def names_and_rates(module: pl.LightningModule) -> list[tuple[list[str], float]]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = module.trainer.optimizers[0].param_groups
    return [([names[id(one)] for one in group["params"]], group["lr"]) for group in groups]


def test_a_lightning_module_trains_in_the_groups_of_the_plain_model(tmp_path: Path) -> None:
    class Lazy(LazyModule):
        def configure_optimizers(self) -> Any:
            return plus(self)

    plain = inject(models.llama(), LoRAConfig(**LORA))
    names = {id(parameter): f"model.{name}" for name, parameter in plain.named_parameters()}
    groups = parameter_groups(plain, 1e-3, lora_plus_ratio=8.0, embedding_lr=1e-4)
    expected = [([names[id(one)] for one in group["params"]], group["lr"]) for group in groups]
    for module in (grouped(plus), Lazy()):
        run(tmp_path, module)
        assert names_and_rates(module) == expected
    assert [rate for _, rate in expected] == [1e-3, 1e-4, 8e-3, 8e-3]


@pytest.mark.parametrize("schedule", [decaying, lambda one: LinearLR(one, 0.1, total_iters=2)])
def test_a_run_in_groups_resumes_exactly(tmp_path: Path, schedule: Any) -> None:
    whole = grouped(plus, schedule)
    run(tmp_path, whole, ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}"), max_epochs=3)
    resumed = grouped(plus, schedule)
    run(tmp_path, resumed, ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=3)
    assert resumed.losses == whole.losses[4:]
    assert same_adapters(resumed, whole)
    assert names_and_rates(resumed) == names_and_rates(whole)
    assert [group["name"] for group in resumed.trainer.optimizers[0].param_groups] == [
        "A",
        "embedding",
        "B",
        "B_no_decay",
    ]


def test_members_of_a_group_are_matched_by_name_in_any_order(tmp_path: Path) -> None:
    def reversed_members(module: Any) -> Optimizer:
        groups = parameter_groups(module, 1e-3, lora_plus_ratio=8.0, embedding_lr=1e-4)
        return AdamW([{**group, "params": group["params"][::-1]} for group in groups])

    whole, resumed = grouped(plus), grouped(reversed_members)
    run(tmp_path, whole, ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}"), max_epochs=2)
    run(tmp_path, resumed, ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=2)
    assert resumed.losses == whole.losses[4:]
    assert same_adapters(resumed, whole)


def test_a_resume_with_another_ratio_says_that_the_rates_of_the_file_go_on(tmp_path: Path, caplog: Any) -> None:
    def other(module: Any) -> Optimizer:
        return AdamW(parameter_groups(module, 1e-3, lora_plus_ratio=2.0, embedding_lr=1e-4))

    caplog.set_level("INFO")
    for name, configure in (("same", plus), ("other", other)):
        run(tmp_path, grouped(plus), ModelCheckpoint(tmp_path, filename=name))
        caplog.clear()
        resumed = run(tmp_path, grouped(configure), ckpt_path=tmp_path / f"{name}.ckpt", max_epochs=2)
        said = [line for line in caplog.messages if "rates are part of its state" in line]
        assert len(said) == (name == "other")
        assert [group["lr_ratio"] for group in resumed.optimizers[0].param_groups][2] == 8.0
    assert "'B' at 8 times the rate of A, and not at 2 times" in said[0]
    assert "embedding" not in said[0]


def one_group(module: Any) -> Optimizer:
    return AdamW(module.parameters(), lr=1e-3)


def reordered(module: Any) -> Optimizer:
    return AdamW(parameter_groups(module, 1e-3)[::-1])


def without_empty(module: Any) -> Optimizer:
    return AdamW([group for group in parameter_groups(module, 1e-3) if group["params"]])


@pytest.mark.parametrize(
    ("first", "then"), [(plus, one_group), (one_group, plus), (plus, reordered), (plus, without_empty)]
)
def test_another_number_or_order_of_groups_is_refused_and_nothing_is_copied(
    tmp_path: Path, first: Any, then: Any
) -> None:
    run(tmp_path, grouped(first), ModelCheckpoint(tmp_path, filename="first"))
    module = grouped(then)
    with pytest.raises(ValueError, match=r"the optimizer state in .*first.ckpt is for other parameters or groups"):
        run(tmp_path, module, ckpt_path=tmp_path / "first.ckpt", max_epochs=2)
    assert not module.losses


def test_fabric_resumes_groups_by_name(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)

    def start() -> dict[str, Any]:
        model = inject(models.llama(), LoRAConfig(**LORA))
        model, optimizer = fabric.setup(model, AdamW(parameter_groups(model, 1e-3, lora_plus_ratio=8.0)))
        return {"model": model, "optimizer": optimizer}

    def train(state: dict[str, Any], steps: range) -> list[float]:
        losses = []
        for index in steps:
            ids = models.token_ids(2, 7, seed=index)
            loss = state["model"](input_ids=ids, labels=ids).loss
            state["optimizer"].zero_grad()
            fabric.backward(loss)
            state["optimizer"].step()
            losses.append(loss.item())
        return losses

    straight = start()
    train(straight, range(3))
    fabric.save(tmp_path / "file.ckpt", straight)
    resumed = start()
    fabric.load(tmp_path / "file.ckpt", resumed)
    assert train(resumed, range(3, 6)) == train(straight, range(3, 6))


def test_the_monitor_logs_each_group_by_its_name(tmp_path: Path) -> None:
    monitor = LearningRateMonitor(logging_interval="step")
    run(tmp_path, grouped(plus), monitor, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    assert set(monitor.lrs) == {f"lr-AdamW/{name}" for name in ("A", "embedding", "B", "B_no_decay")}


@pytest.mark.parametrize(
    "schedule",
    [
        lambda one: OneCycleLR(one, max_lr=1e-3, total_steps=9),
        lambda one: CyclicLR(one, 1e-4, 1e-3, cycle_momentum=False),
    ],
)
def test_a_schedule_that_levels_the_groups_is_refused(tmp_path: Path, schedule: Any) -> None:
    with pytest.raises(ValueError, match=r"A and B of LoRA\+ the same rate, .* in place of a ratio of 8: give it one"):
        run(tmp_path, grouped(plus, schedule))


def test_a_cycle_with_a_peak_for_each_group_keeps_the_ratio(tmp_path: Path) -> None:
    module = grouped(plus, lambda one: CyclicLR(one, 1e-6, [1e-3, 1e-4, 8e-3, 8e-3], cycle_momentum=False))
    run(tmp_path, module)
    assert len(module.losses) == 4


def test_a_ratio_of_one_may_be_levelled(tmp_path: Path) -> None:
    level = grouped(
        lambda module: AdamW(parameter_groups(module, 1e-3, lora_plus_ratio=1)),
        lambda one: OneCycleLR(one, max_lr=1e-3, total_steps=9),
    )
    run(tmp_path, level)
    assert len(level.losses) == 4


def rate_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "learning rate" in record.message]


def adam(lr: float) -> Callable[[Any], Optimizer]:
    return lambda module: AdamW(module.parameters(), lr=lr)


@pytest.mark.parametrize(
    ("build", "schedule", "said"),
    [
        (adam(2e-5), None, "2e-05 is ten times or more below the 0.0002 to 0.001"),
        (adam(1e-2), None, "0.01 is ten times or more above the 0.0002 to 0.001"),
        (adam(1e-5), decaying, "1e-05 is ten times or more below"),
        (adam(1e-2), lambda one: LambdaLR(one, lambda step: step / 10), "0.01 is ten times or more above"),
        (adam(1e-4), lambda one: OneCycleLR(one, 4e-2, total_steps=9), "0.04 is ten times or more above"),
        (lambda m: AdamW(parameter_groups(m, 1e-5)), None, "1e-05 is ten times or more below"),
        (lambda m: AdamW(parameter_groups(m, 2e-2, lora_plus_ratio=2.0)), None, "0.02 is ten times or more above"),
    ],
)
def test_a_rate_ten_times_off_is_said_in_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, build: Any, schedule: Any, said: str
) -> None:
    with caplog.at_level("INFO"):
        run(tmp_path, grouped(build, schedule))
    (line,) = rate_lines(caplog)
    assert said in line
    assert "\n" not in line


ROOT = Path(__file__).parent.parent.parent
TEXTS = [ROOT / "README.md", *(ROOT / "docs").glob("quickstart.md"), *(ROOT / "examples").glob("*.[py]*")]


def test_nothing_is_said_of_the_rates_of_the_examples() -> None:
    given = [re.findall(r"\blr(?:: float)? ?[=:] ?(\d[\d.e-]*)", path.read_text()) for path in TEXTS]
    rates = {float(number) for numbers in given for number in numbers}
    assert {2e-4, 1e-3, 2e-3} <= rates
    model = inject(models.llama(), LoRAConfig(**LORA))
    assert [rate for rate in rates if rate_line(model, [AdamW(model.parameters(), lr=rate)], []) is not None] == []


def with_a_head(module: Any) -> Optimizer:
    # the head's own group may have any rate
    return AdamW([{"params": module.model.parameters(), "lr": 3e-4}, {"params": module.head.parameters(), "lr": 0.05}])


@pytest.mark.parametrize(
    ("build", "schedule"),
    [
        (adam(5e-3), None),
        (adam(3e-5), None),
        (adam(2e-4), lambda one: LambdaLR(one, lambda step: step / 10)),  # starts at 0
        (adam(2e-4), lambda one: LinearLR(one, 1e-4, total_iters=9)),
        (adam(1.0), lambda one: LambdaLR(one, lambda step: 1e-4 * (step + 1))),  # the function gives the rate itself
        (adam(0.0), None),  # set by the user's own code before each step
        (adam(1e-3), lambda one: OneCycleLR(one, 1e-3, total_steps=9)),  # starts at a 25th of the peak
        (adam(1e-3), lambda one: CyclicLR(one, 1e-6, 1e-3, cycle_momentum=False)),
        (lambda module: SGD(module.parameters(), lr=0.1), None),
        (lambda module: AdamW(parameter_groups(module, 1e-3)), None),  # B at 1.6e-2, embeddings at 1e-6
        (with_a_head, None),
    ],
)
def test_nothing_is_said_of_a_rate_that_may_be_right(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, build: Any, schedule: Any
) -> None:
    module = grouped(build, schedule)
    module.head = torch.nn.Linear(2, 2)
    with caplog.at_level("INFO"):
        run(tmp_path, module)
    assert rate_lines(caplog) == []


def test_nothing_is_said_where_a_search_sets_the_rate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = grouped(lambda module: AdamW(module.parameters(), lr=module.lr))
    module.lr = 1e-6
    with caplog.at_level("INFO"):
        run(tmp_path, module, LearningRateFinder(num_training_steps=4))
    assert not [line for line in rate_lines(caplog) if "ten times or more" in line]


def command(directory: Path, monkeypatch: pytest.MonkeyPatch, *more: str, model: type = Plain) -> LightningCLI:
    monkeypatch.setattr(sys, "argv", ["cli"])
    arguments = [f"--model={model.__module__}.{model.__name__}", *ARGUMENTS, f"--trainer.default_root_dir={directory}"]
    return LightningCLI(
        Base, Data, subclass_mode_model=True, seed_everything_default=0, args=["fit", *arguments, *more],
        save_config_kwargs={"overwrite": True},
    )  # fmt: skip


def test_the_command_lines_optimizer_gets_the_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = ["--optimizer=torch.optim.AdamW", "--optimizer.lr=0.001", "--optimizer.weight_decay=0.1"]
    ratio = "--trainer.callbacks.lora_plus_ratio=8"
    schedule = ["--lr_scheduler=StepLR", "--lr_scheduler.step_size=1", "--lr_scheduler.gamma=0.5"]
    cli = command(tmp_path, monkeypatch, *optimizer, ratio, *schedule)
    written = grouped(
        lambda module: AdamW(parameter_groups(module, 1e-3, lora_plus_ratio=8.0, weight_decay=0.1)),
        lambda one: torch.optim.lr_scheduler.StepLR(one, 1, 0.5),
    )
    trainer(tmp_path, LoRACallback(r=4), max_epochs=2).fit(written, loader())
    assert cli.model.losses == written.losses
    assert names_and_rates(cli.model) == names_and_rates(written)
    assert "parameters" not in vars(cli.model)
    (path,) = tmp_path.rglob("*.ckpt")
    resumed = command(
        tmp_path, monkeypatch, *optimizer, ratio, *schedule, "--trainer.max_epochs=3", f"--ckpt_path={path}"
    )
    trainer(tmp_path, LoRACallback(r=4), max_epochs=3).fit(written, loader(), ckpt_path=path)
    assert resumed.model.losses == written.losses[8:]


def test_the_ratio_is_written_into_the_yaml_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ratio = "--trainer.callbacks.lora_plus_ratio=4"
    first = command(tmp_path / "first", monkeypatch, "--optimizer=torch.optim.AdamW", ratio)
    content = yaml.safe_load((tmp_path / "first" / "config.yaml").read_text())
    assert content["trainer"]["callbacks"][0]["init_args"]["lora_plus_ratio"] == 4.0
    monkeypatch.setattr(sys, "argv", ["cli"])
    again = LightningCLI(
        Base, Data, subclass_mode_model=True,
        args=["fit", f"--config={tmp_path}/first/config.yaml", f"--trainer.default_root_dir={tmp_path}/again"],
    )  # fmt: skip
    assert again.model.losses == first.model.losses
    assert [rate for _, rate in names_and_rates(again.model)] == [1e-3, 1e-6, 4e-3, 4e-3]


def test_a_ratio_that_no_optimizer_takes_up_is_refused_with_what_to_write(tmp_path: Path) -> None:
    for module in (LanguageModule(), grouped(plus)):  # without groups, and with another ratio
        run = trainer(tmp_path, LoRACallback(r=4, lora_plus_ratio=16))
        with pytest.raises(ValueError, match=r"lora_plus_ratio=16 of LoRACallback .*parameter_groups\(self, lr, lora"):
            run.fit(module, loader())


def test_two_callbacks_with_two_ratios_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    second = [
        "--trainer.callbacks.lora_plus_ratio=8", "--trainer.callbacks.module=model.model.layers.0",
        "--trainer.callbacks+=lightning_lora.LoRACallback",
        "--trainer.callbacks.module=model.model.layers.1", "--trainer.callbacks.lora_plus_ratio=4",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"share its optimizer; they ask for lora_plus_ratio=\[4.0, 8.0\]"):
        command(tmp_path, monkeypatch, "--optimizer=torch.optim.AdamW", *second)


@pytest.mark.parametrize("ratio", [0, -2.0, float("inf")])
def test_a_bad_ratio_is_refused_at_once(ratio: float) -> None:
    with pytest.raises(ValueError, match=f"lora_plus_ratio={ratio!r} must be a finite number above 0"):
        LoRACallback(r=4, lora_plus_ratio=ratio)
