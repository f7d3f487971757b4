"""Fabric on one device: adapter-only files that interchange with the Trainer's and plain torch's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import FSDPStrategy
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, adapter_checkpoint, adapter_state_dict, inject
from tests import models
from tests.distributed.loop import Loop, epochs_of_loop
from tests.runs import LanguageModule, fitted, loader, same_adapters, trainer


def start(r: int = 4, **config: Any) -> tuple[Fabric, Any, Any]:
    fabric = Fabric(accelerator="cpu", devices=1)
    model = inject(models.llama(), LoRAConfig(r=r, **config))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return fabric, *fabric.setup(model, optimizer)


def train(fabric: Fabric, model: Any, optimizer: Any, steps: int = 3) -> list[float]:
    losses = []
    for batch in list(loader())[:steps]:
        loss = model(input_ids=batch, labels=batch).loss
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_save_is_adapter_only_and_load_resumes_exactly(tmp_path: Path) -> None:
    fabric, model, optimizer = start()
    train(fabric, model, optimizer)
    fabric.save(tmp_path / "a.ckpt", {"model": model, "optimizer": optimizer, "step": 3})
    straight = train(fabric, model, optimizer)

    twin_fabric, twin, twin_optimizer = start()
    state = {"model": twin, "optimizer": twin_optimizer, "step": 0}
    rest = twin_fabric.load(tmp_path / "a.ckpt", state)
    assert (state["step"], rest) == (3, {})
    assert train(twin_fabric, twin, twin_optimizer) == straight
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(saved["model"]) == set(adapter_state_dict(model))


def test_a_resume_draws_on_where_the_loop_was_saved(tmp_path: Path) -> None:
    epochs = epochs_of_loop(tmp_path, "auto", 1)
    assert epochs["resumed"] == epochs["straight"]
    saved = torch.load(tmp_path / "auto.ckpt", weights_only=True)["lightning_lora"]
    assert len(saved["random_states"]) == 1


def test_weights_alone_leave_the_random_generators_alone(tmp_path: Path) -> None:
    loop = Loop("auto", 1, 7)
    loop.fabric.save(tmp_path / "a.ckpt", loop.state)
    loop.fabric.save(tmp_path / "weights.ckpt", {"model": loop.model})
    before = torch.rand(1), torch.get_rng_state()
    loop.fabric.load(tmp_path / "a.ckpt", {"model": loop.model})
    assert torch.equal(torch.get_rng_state(), before[1])
    assert "random_states" not in torch.load(tmp_path / "weights.ckpt", weights_only=True)["lightning_lora"]
    loop.fabric.load(tmp_path / "a.ckpt", loop.state)
    assert torch.equal(torch.rand(1), before[0])


def test_filter_still_applies(tmp_path: Path) -> None:
    fabric, model, _ = start()
    fabric.save(tmp_path / "a.ckpt", {"model": model}, filter={"model": lambda name, _: name.endswith("lora_B")})
    assert all(name.endswith("lora_B") for name in torch.load(tmp_path / "a.ckpt", weights_only=True)["model"])


def test_models_without_adapters_are_saved_as_ever(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    model = fabric.setup(nn.Linear(2, 2))
    fabric.save(tmp_path / "a.ckpt", {"model": model})
    assert set(torch.load(tmp_path / "a.ckpt", weights_only=True)) == {"model"}
    fabric.load(tmp_path / "a.ckpt", {"model": model})


@pytest.mark.parametrize("writer", ["trainer", "plain"])
def test_reads_files_of_trainer_and_plain_torch(tmp_path: Path, writer: str) -> None:
    _, module = fitted(tmp_path)
    if writer == "plain":
        torch.save(adapter_checkpoint(module), tmp_path / "last.ckpt")
    fabric, model, _ = start()
    fabric.load(tmp_path / "last.ckpt", {"model": model})
    assert same_adapters(module, model)
    fabric, model, _ = start()
    fabric.load_raw(tmp_path / "last.ckpt", model)
    assert same_adapters(module, model)


def test_takes_the_trainers_optimizer_state_by_name(tmp_path: Path) -> None:
    run, module = fitted(tmp_path)
    fabric, model, optimizer = start()
    fabric.load(tmp_path / "last.ckpt", {"model": model, "optimizer": optimizer})
    theirs, ours = run.optimizers[0].state_dict()["state"], optimizer.state_dict()["state"]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_trainer_reads_fabrics_file_for_evaluation_and_says_why_not_for_fit(tmp_path: Path) -> None:
    fabric, model, optimizer = start()
    train(fabric, model, optimizer)
    fabric.save(tmp_path / "f.ckpt", {"model": model, "optimizer": optimizer})
    module = LanguageModule()
    run = trainer(tmp_path, LoRACallback(r=4))
    run.validate(module, loader(), ckpt_path=tmp_path / "f.ckpt", verbose=False)
    assert same_adapters(module, model)
    with pytest.raises(ValueError, match="no optimizer and loop state"):
        run.fit(LanguageModule(), loader(), ckpt_path=tmp_path / "f.ckpt")
    warm = LanguageModule()
    trainer(tmp_path, LoRACallback(init_from=str(tmp_path / "f.ckpt")), max_epochs=0).fit(warm, loader())
    assert same_adapters(warm, model)


def test_nothing_is_loaded_when_anything_does_not_fit(tmp_path: Path) -> None:
    fabric, model, optimizer = start()
    train(fabric, model, optimizer)
    fabric.save(tmp_path / "a.ckpt", {"model": model, "optimizer": optimizer})
    fabric, twin, twin_optimizer = start()
    fresh = {name: value.clone() for name, value in adapter_state_dict(twin).items()}
    with pytest.raises(KeyError, match="has no 'step'"):
        fabric.load(tmp_path / "a.ckpt", {"model": twin, "optimizer": twin_optimizer, "step": 0})
    assert all(torch.equal(fresh[name], value) for name, value in adapter_state_dict(twin).items())
    fabric, wide, _ = start(r=8)
    with pytest.raises(ValueError, match="has r=4 at .*, the model has r=8"):
        fabric.load(tmp_path / "a.ckpt", {"model": wide})


def test_two_adapted_models_share_a_file(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    one, other = inject(models.llama(), LoRAConfig(r=2)), inject(models.qwen3(), LoRAConfig(r=3))
    models.fill_adapters(one)
    models.fill_adapters(other)
    fabric.save(tmp_path / "two.ckpt", {"one": one, "other": other})
    twins = {"one": inject(models.llama(), LoRAConfig(r=2)), "other": inject(models.qwen3(), LoRAConfig(r=3))}
    fabric.load(tmp_path / "two.ckpt", dict(twins))
    assert same_adapters(twins["one"], one)
    assert same_adapters(twins["other"], other)


def test_an_adapted_part_of_a_larger_module_keeps_the_rest_that_trains(tmp_path: Path) -> None:
    def build() -> nn.Module:
        whole = nn.ModuleDict({"body": models.encoder(), "head": nn.Linear(3, 2)})
        inject(whole["body"], LoRAConfig(r=2))
        return whole

    fabric = Fabric(accelerator="cpu", devices=1)
    model = build()
    fabric.save(tmp_path / "part.ckpt", {"model": model})
    assert {"head.weight", "head.bias"} < set(torch.load(tmp_path / "part.ckpt", weights_only=True)["model"])
    twin = build()
    fabric.load(tmp_path / "part.ckpt", {"model": twin})
    assert torch.equal(twin["head"].weight, model["head"].weight)


def test_stock_fsdp_is_refused_by_name(tmp_path: Path) -> None:
    fabric, model, _ = start()
    fabric._strategy = FSDPStrategy()
    with pytest.raises(ValueError, match="FSDPStrategy is not supported"):
        fabric.save(tmp_path / "a.ckpt", {"model": model})
    assert not (tmp_path / "a.ckpt").exists()


class Distilled(nn.Module):
    """An adapted student and, outside it, a frozen teacher that follows."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.student = inject(models.llama(), LoRAConfig(r=2))
        self.teacher = models.llama().requires_grad_(False)
        torch.manual_seed(seed)
        self.fixed = nn.Linear(2, 2).requires_grad_(False)

    def forward(self, **batch: Any) -> Any:
        return self.student(**batch)


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_a_teacher_that_moves_a_little_is_in_the_file(tmp_path: Path, strategy: str) -> None:
    def start(seed: int = 0) -> tuple[Fabric, Any, Any, Any]:
        fabric = Fabric(accelerator="cpu", devices=1, strategy=strategy)
        fabric.launch()
        module = Distilled(seed)
        model, optimizer = fabric.setup(module, torch.optim.AdamW([p for p in module.parameters() if p.requires_grad]))
        return fabric, module, model, optimizer

    fabric, module, model, optimizer = start()
    train(fabric, model, optimizer)
    module.teacher.lm_head.weight.data.mul_(1 + 1e-6)
    fabric.save(tmp_path / "a.ckpt", {"model": model, "optimizer": optimizer})
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["model"]
    assert [name for name in saved if not name.startswith("student.")] == ["teacher.lm_head.weight"]
    twin_fabric, twin, twin_model, twin_optimizer = start()
    twin_fabric.load(tmp_path / "a.ckpt", {"model": twin_model, "optimizer": twin_optimizer})
    twin_fabric.save(tmp_path / "b.ckpt", {"model": twin_model, "optimizer": twin_optimizer})
    for there in (twin.teacher.lm_head.weight, torch.load(tmp_path / "b.ckpt")["model"]["teacher.lm_head.weight"]):
        assert torch.equal(there, module.teacher.lm_head.weight)
    other_fabric, _, other_model, other_optimizer = start(seed=1)
    with pytest.raises(ValueError, match="'fixed.weight' was frozen and never changed"):
        other_fabric.load(tmp_path / "a.ckpt", {"model": other_model, "optimizer": other_optimizer})
    other_fabric.load(tmp_path / "a.ckpt", {"model": other_model})  # of its weights alone


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_precisions_keep_adapters_wide(precision: str) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    model = inject(models.llama(), LoRAConfig(r=4))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer = fabric.setup(model, optimizer)
    losses = train(fabric, model, optimizer, 4)
    wanted = torch.float64 if precision == "64-true" else torch.float32
    assert {value.dtype for value in adapter_state_dict(model).values()} == {wanted}
    assert losses[-1] < losses[0]


def test_one_optimizer_over_an_adapted_model_and_a_head_resumes(tmp_path: Path) -> None:
    def build() -> dict[str, Any]:
        model, head = inject(models.llama(), LoRAConfig(r=4)), nn.Linear(2, 2)
        trained = [*(p for p in model.parameters() if p.requires_grad), *head.parameters()]
        return {"model": model, "head": head, "optimizer": torch.optim.AdamW(trained, lr=1e-2)}

    fabric, state, twin = Fabric(accelerator="cpu", devices=1), build(), build()
    for parameter in state["optimizer"].param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    state["optimizer"].step()
    fabric.save(tmp_path / "both.ckpt", state)
    fabric.load(tmp_path / "both.ckpt", twin)
    moments = [one["optimizer"].state_dict()["state"] for one in (state, twin)]
    torch.testing.assert_close(moments[1], moments[0], rtol=0, atol=0)
    assert torch.equal(twin["head"].weight, state["head"].weight)


def test_a_bare_model_never_takes_an_adapter_file_in_silence(tmp_path: Path) -> None:
    fabric, model, _ = start()
    path = tmp_path / "a.ckpt"
    fabric.save(path, {"model": model})
    told = pytest.raises(ValueError, match="a.ckpt holds adapters, and no model in the state has any: call inject")
    for strict in (True, False):
        for state in ({"model": models.llama()}, {"other": models.llama()}, {"model": fabric.setup(models.llama())}):
            with told:
                fabric.load(path, state, strict=strict)
        with told:
            fabric.load(path=path, state=models.llama(), strict=strict)
        with told:
            fabric.load_raw(path, obj=models.llama(), strict=strict)
    assert "lightning_lora" in fabric.load(path)


def test_errors_about_other_files_stay_lightnings(tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.save(tmp_path / "plain.ckpt", {"model": nn.Linear(2, 2)})
    with pytest.raises(RuntimeError, match="Missing key"):
        fabric.load(tmp_path / "plain.ckpt", {"model": models.llama()})
    with pytest.raises(FileNotFoundError):
        fabric.load(tmp_path / "none.ckpt", {"model": models.llama()})


def test_a_missing_optimizer_is_left_alone_when_not_strict(tmp_path: Path) -> None:
    fabric, model, optimizer = start()
    fabric.save(tmp_path / "a.ckpt", {"model": model})
    fabric.load(tmp_path / "a.ckpt", {"model": model, "optimizer": optimizer}, strict=False)
    with pytest.raises(KeyError, match="no optimizer 'optimizer'"):
        fabric.load(tmp_path / "a.ckpt", {"model": model, "optimizer": optimizer})


def test_an_adapted_model_in_a_nested_state_is_refused(tmp_path: Path) -> None:
    fabric, model, _ = start()
    with pytest.raises(ValueError, match=r"state\['train'\] holds an adapted model inside a container"):
        fabric.save(tmp_path / "a.ckpt", {"train": {"model": model}})
    assert not (tmp_path / "a.ckpt").exists()
