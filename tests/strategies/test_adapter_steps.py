"""What each adapter of a run has of its own: clip norm, accumulation, schedule, and the moment it stops."""

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from lightning_lora import (
    AdapterEarlyStopping,
    AdapterSchedules,
    LoRACallback,
    LoRAConfig,
    active,
    add_adapter,
    freeze,
    inject,
    named_adapter_parameters,
    parameter_groups,
)
from lightning_lora.model.own_parameters import owners
from lightning_lora.strategies.trainer.adapter_steps import accumulate
from tests import models
from tests.together import Together, batches, configs, fit, outcome, warming_up

EXACT = {"rtol": 0, "atol": 0}
FLOAT64 = {"rtol": 1e-10, "atol": 1e-10}  # other order of sums
DOUBLE = {"adapter_dtype": "float64"}


def build() -> nn.Module:
    return models.llama(dtype=torch.float64).train()


def model_with(*names: str) -> nn.Module:
    model = models.llama()
    for name in names:
        add_adapter(model, name, LoRAConfig(r=2, init="gaussian"))
    return model


def test_gradient_clip_val_is_each_adapters_own_norm() -> None:
    module = Together(build())
    norms = []
    module.on_after_backward = lambda: norms.append(norm_of(module))
    stepped = []
    fit(module, configs(**DOUBLE), batches()[:1], lora={"clip_norm": {}}, gradient_clip_val=0.01,
        callbacks=[OnStep(lambda: stepped.append(norm_of(module)))])  # fmt: skip
    assert all(norm > 0.01 for norm in norms[0].values())
    assert stepped[0] == pytest.approx(dict.fromkeys(norms[0], 0.01), rel=1e-3)  # the norm has an epsilon beside it


def norm_of(module: pl.LightningModule) -> dict[str, float]:
    """Return the norm of each adapter's gradients."""
    squares: dict[str, float] = {}
    for name, parameter in named_adapter_parameters(module):
        if parameter.grad is not None:
            adapter = name.partition(".lora.")[2].partition(".")[0]
            squares[adapter] = squares.get(adapter, 0.0) + parameter.grad.square().sum().item()
    return {name: square**0.5 for name, square in squares.items()}


class OnStep(pl.Callback):
    """Look at the gradients that the optimizer steps on."""

    def __init__(self, look: Any) -> None:
        self.look = look

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.optimizers[0].register_step_post_hook(lambda *_: self.look())


def test_an_adapter_that_accumulates_equals_a_run_that_does() -> None:
    named, data = configs(**DOUBLE), batches()
    module = Together(build())
    fit(module, named, data, lora={"accumulate": {"law": 3}})
    own = Together(build())
    # Lightning steps on what is left at the end of an epoch
    fit(own, {"law": named["law"]}, batches(only="law"), accumulate_grad_batches=3)
    found, expected = outcome(module)["law"], outcome(own)["law"]
    for key, one in expected.items():
        if isinstance(one, list) and "layers" in key:
            torch.testing.assert_close(found[key][:2], one[:2], **FLOAT64)
            assert int(one[1]["step"]) == 3


def test_gradients_that_wait_are_saved_with_the_optimizer() -> None:
    def run(saves: bool) -> dict[str, Tensor]:
        model = model_with("law", "medicine")
        optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2))
        for step in range(4):
            if saves and step == 2:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2))
                optimizer.load_state_dict(state)
            with active(model, ["law", "medicine"]):
                model(models.token_ids(2, 4, seed=step)).logits.square().sum().backward()
            accumulate(optimizer, owners(model), {"law": 3})
            optimizer.step()
            optimizer.zero_grad()
        steps = {
            name: optimizer.state[p]["step"]
            for name, p in named_adapter_parameters(model)
            if "step" in optimizer.state[p]
        }
        assert {int(step) for name, step in steps.items() if ".law." in name} == {1}
        assert {int(step) for name, step in steps.items() if ".medicine." in name} == {4}
        return {name: p.detach() for name, p in named_adapter_parameters(model)}

    torch.testing.assert_close(run(True), run(False), **EXACT)


def test_schedules_count_own_steps_and_resume() -> None:
    model = model_with("law", "medicine")
    optimizer = torch.optim.AdamW(parameter_groups(model, {"law": 1.0, "medicine": 2.0}, lora_plus_ratio=1.0))
    schedules = AdapterSchedules(optimizer, warming_up(4))
    for name in ("law", "law", "medicine", "law"):
        with active(model, name):
            model(models.token_ids(2, 4)).logits.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedules.step()
    rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
    assert (rates["law.A"], rates["medicine.A"]) == (1.0, 1.0)
    again = AdapterSchedules(optimizer, warming_up(4))
    again.load_state_dict(schedules.state_dict())
    assert [one.last_epoch for one in again.schedules.values()] == [3, 1]
    with pytest.raises(ValueError, match="schedules are for"):
        AdapterSchedules(optimizer, {"code": warming_up(4)})
    with pytest.raises(ValueError, match="looks at a metric"):
        AdapterSchedules(optimizer, lambda groups: ReduceLROnPlateau(groups))
    with pytest.raises(ValueError, match="build it of parameter_groups"):
        AdapterSchedules(torch.optim.SGD(model.parameters(), 0.1), warming_up(4))


def test_groups_have_the_numbers_of_each_adapter() -> None:
    model = model_with("law", "medicine")
    groups = parameter_groups(model, {"law": 1e-3, "medicine": 1e-4}, lora_plus_ratio=2.0, weight_decay={"law": 0.1, "medicine": 0.0})  # fmt: skip
    found = {group["name"]: (group["adapter"], group["lr"], group["weight_decay"]) for group in groups}
    assert found["law.A"] == ("law", 1e-3, 0.1)
    assert found["medicine.B"] == ("medicine", 2e-4, 0.0)
    assert sum(len(group["params"]) for group in groups) == len(list(named_adapter_parameters(model)))
    for wrong in (
        {"law": 1e-3},
        {"law": 1e-3, "medicine": 1e-3, "code": 1e-3},
        {"law": 1e-3, "medicine": 1e-3, None: 1},
    ):
        with pytest.raises(ValueError, match="must have a value for each of"):
            parameter_groups(model, wrong)
    with pytest.raises(ValueError, match="must have a value for each of"):
        parameter_groups(inject(models.llama(), LoRAConfig(r=2)), {"law": 1e-3})


def test_a_frozen_adapter_stays_and_the_others_train() -> None:
    model = model_with("law", "medicine")
    before = {name: p.detach().clone() for name, p in named_adapter_parameters(model)}
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2, weight_decay=0.1))
    freeze(model, "law")
    with active(model, ["law", "medicine"]):
        model(models.token_ids(2, 4)).logits.square().sum().backward()
    optimizer.step()
    moved = {name for name, p in named_adapter_parameters(model) if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".medicine." in name}
    with pytest.raises(ValueError, match="there is no adapter 'code'"):
        freeze(model, "code")


class Scored(Together):
    """Logs a metric of each adapter that stops getting better at once, or never."""

    def validation_step(self, batch: Any) -> None:
        self.log("loss/law", 1.0, batch_size=1)
        self.log("loss/medicine", -float(self.current_epoch), batch_size=1)

    def on_validation_epoch_end(self) -> None:
        self.__dict__.setdefault("values", []).append(
            {name: p.detach().clone() for name, p in named_adapter_parameters(self)}
        )


def test_one_adapter_stops_and_the_other_goes_on() -> None:
    module, data = Scored(build()), batches()[:1]
    named = {name: configs(**DOUBLE)[name] for name in ("law", "medicine")}
    stops = [AdapterEarlyStopping(name, f"loss/{name}", patience=2) for name in named]
    trainer = pl.Trainer(
        max_epochs=6, callbacks=[LoRACallback(adapters=named), *stops], logger=False, enable_checkpointing=False,
        enable_progress_bar=False, accelerator="cpu", num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=None), DataLoader(data, batch_size=None))
    changed = {
        adapter: [
            any(not torch.equal(one[name], other[name]) for name in one if f".{adapter}." in name)
            for one, other in zip(module.values, module.values[1:], strict=False)
        ]
        for adapter in named
    }
    assert changed == {"law": [True, True, False, False, False], "medicine": [True] * 5}
    assert [stop.has_stopped for stop in stops] == [True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"clip_norm": {"code": 1.0}}, "has no adapter 'code'"), ({"accumulate": {"law": 1.5}}, "whole numbers"),
     ({"accumulate": {"law": 0}}, "above 0")],
)  # fmt: skip
def test_wrong_numbers_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRACallback(adapters={"law": LoRAConfig()}, **options)


@pytest.mark.parametrize("options", [{"clip_norm": 1.0}, {"accumulate": 2}, {"adapters": ["law"]}])
def test_options_by_adapter_are_mappings(options: dict[str, Any]) -> None:
    (option,) = options
    with pytest.raises(TypeError, match=f"{option}=.* must have an entry for each adapter, by its name"):
        LoRACallback(**{"adapters": {"law": LoRAConfig()}, **options})
