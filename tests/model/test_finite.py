"""Adapters that hold NaN or infinity are named by whatever writes or reads them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch import nn

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    adapter_checkpoint,
    adapter_state_dict,
    check_portable,
    combine,
    convert,
    inject,
    load_adapter_state_dict,
    load_peft,
    save_peft,
)
from tests import models
from tests.runs import LanguageModule, fitted, loader, trainer

BROKEN = "layers.1.mlp.up_proj.lora_B"
NAMED = rf"{BROKEN}(\.weight)?' holds NaN or infinity"


def broken(value: float = torch.nan, quantize: Any = None, **config: Any) -> nn.Module:
    model = inject(models.llama(), LoRAConfig(r=2, **config), quantize=quantize)
    with torch.no_grad():
        model.get_parameter(f"model.{BROKEN}")[3, 1] = value
    return model


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Return a directory with the adapter as ``last.ckpt``, ``plain.ckpt``, ``fabric.ckpt`` and ``peft``."""

    class Diverging(LanguageModule):
        def on_train_end(self) -> None:
            self.model.get_parameter(f"model.{BROKEN}").data[3, 1] = torch.nan

    run, _ = fitted(tmp_path, Diverging(), r=2)
    with pytest.warns(UserWarning, match=r"last.ckpt: .* holds NaN or infinity"):
        run.save_checkpoint(tmp_path / "last.ckpt")
    with pytest.warns(UserWarning, match=NAMED):
        torch.save(adapter_checkpoint(broken()), tmp_path / "plain.ckpt")
    with pytest.warns(UserWarning, match=NAMED):
        save_peft(broken(), tmp_path / "peft", on_nonfinite="warn")
    with pytest.warns(UserWarning, match=NAMED):
        Fabric(accelerator="cpu", devices=1).save(tmp_path / "fabric.ckpt", {"model": broken()})
    return tmp_path


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_save_peft_writes_nothing(tmp_path: Path, value: float, quantize: Any, portable: bool) -> None:
    with pytest.raises(ValueError, match=NAMED):
        save_peft(broken(value, quantize), tmp_path / "peft", portable=portable)
    assert not (tmp_path / "peft").exists()


def test_heads_and_other_tensors_that_train_count(tmp_path: Path) -> None:
    model = inject(models.bert_classifier(), LoRAConfig(r=2, use_dora=True))
    for name in ("classifier.bias", "bert.encoder.layer.0.attention.self.query.lora_magnitude"):
        before = model.get_parameter(name).data.clone()
        model.get_parameter(name).data[0] = torch.inf
        with pytest.raises(ValueError, match="holds NaN or infinity"):
            save_peft(model, tmp_path / "peft")
        with pytest.raises(ValueError, match="holds NaN or infinity"):
            load_adapter_state_dict(model, adapter_state_dict(model))
        model.get_parameter(name).data.copy_(before)
    save_peft(model, tmp_path / "peft")


def test_what_the_user_keeps_outside_may_be_infinite(tmp_path: Path) -> None:
    class Best(LanguageModule):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("best", torch.tensor(-torch.inf))

    fitted(tmp_path, Best())
    trainer(tmp_path, LoRACallback(r=4), max_epochs=2).fit(Best(), loader(), ckpt_path=tmp_path / "last.ckpt")


def fit(**settings: Any) -> Callable[[Path], Any]:
    return lambda files: trainer(files, LoRACallback(r=2, **settings)).fit(LanguageModule(), loader())


def resume(files: Path, **lora: Any) -> None:
    trainer(files, LoRACallback(r=2, **lora), max_epochs=2).fit(
        LanguageModule(), loader(), ckpt_path=files / "last.ckpt"
    )


def load_with_fabric(files: Path) -> None:
    model = inject(models.llama(), LoRAConfig(r=2))
    Fabric(accelerator="cpu", devices=1).load(files / "fabric.ckpt", {"model": model})


def load_state(files: Path, name: str | None, **options: Any) -> None:
    model = inject(models.llama(), LoRAConfig(r=2))
    state = torch.load(files / name, weights_only=True) if name else adapter_state_dict(broken())
    load_adapter_state_dict(model, state, **options)


READERS = {
    "resume": resume,
    "init_from": lambda files: fit(init_from=str(files / "last.ckpt"))(files),
    "init_from_directory": lambda files: fit(init_from=str(files / "peft"))(files),
    "load_from_checkpoint": lambda files: LanguageModule.load_from_checkpoint(files / "last.ckpt"),
    "load_peft": lambda files: load_peft(models.llama(), files / "peft"),
    "checkpoint": lambda files: load_state(files, "plain.ckpt"),
    "state": lambda files: load_state(files, None),
    "convert": lambda files: convert(files / "plain.ckpt", files / "out"),
    "convert_portable": lambda files: convert(files / "plain.ckpt", files / "out", portable=True),
    "combine": lambda files: combine([files / "peft"], None, files / "out"),
    "fabric": load_with_fabric,
    "resume_quantised": lambda files: resume(files, quantize="nf4"),
    "load_peft_quantised": lambda files: load_peft(models.llama(), files / "peft", quantize="nf4"),
}


def test_every_reader_names_the_first(files: Path) -> None:
    for read in READERS.values():
        with pytest.raises(ValueError, match=NAMED):
            read(files)
    assert not (files / "out").exists()
    for reader in ("vllm", "sglang", "llama.cpp"):
        assert any("lora_B.weight' holds NaN" in sentence for sentence in check_portable(files / "peft", reader))


def test_every_reader_takes_it_on_demand(files: Path) -> None:
    warned: list[Callable[[], Any]] = [
        lambda: fit(init_from=str(files / "last.ckpt"), on_nonfinite="warn")(files),
        lambda: fit(init_from=str(files / "peft"), on_nonfinite="warn")(files),
        lambda: load_peft(models.llama(), files / "peft", on_nonfinite="warn"),
        lambda: load_state(files, "plain.ckpt", on_nonfinite="warn"),
        lambda: convert(files / "plain.ckpt", files / "out", on_nonfinite="warn"),
        lambda: combine([files / "peft"], None, files / "out", on_nonfinite="warn"),
    ]
    for read in warned:
        with pytest.warns(UserWarning, match=NAMED):
            read()
    with pytest.raises(ValueError, match="on_nonfinite='ignore' is not known"):
        load_peft(models.llama(), files / "peft", on_nonfinite="ignore")  # type: ignore[arg-type]


def test_a_load_that_is_refused_changes_nothing(files: Path) -> None:
    model = inject(models.llama(), LoRAConfig(r=2))
    before = {name: value.clone() for name, value in adapter_state_dict(model).items()}
    with pytest.raises(ValueError, match=NAMED):
        load_adapter_state_dict(model, torch.load(files / "plain.ckpt", weights_only=True))
    torch.testing.assert_close(adapter_state_dict(model), before, rtol=0, atol=0)
    base = models.llama()
    with pytest.raises(ValueError, match=NAMED):
        load_peft(base, files / "peft")
    assert not hasattr(base, "lora_injection")


class Diverging(LanguageModule):
    """An adapter becomes NaN in the third step, and the fourth fails by an error of the user's."""

    fails = False

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.global_step == 3 and self.fails:
            raise RuntimeError("the user's own")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step == 3:
            self.model.get_parameter(f"model.{BROKEN}").data[3, 1] = torch.nan


@pytest.mark.filterwarnings(
    "ignore::UserWarning"
)  # those of other files, and Lightning's about a trainer without model
class TestMiddleOfARun:
    def test_a_save_warns_and_the_run_goes_on(self, tmp_path: Path) -> None:
        every = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
        run = trainer(tmp_path, LoRACallback(r=2, save_peft=True), every)
        with pytest.warns(UserWarning, match=r"step=4.ckpt: .model\..* holds NaN"):
            run.fit(Diverging(), loader())
        assert run.global_step == 4
        assert {path.name for path in tmp_path.glob("step=4*")} == {"step=4.ckpt", "step=4-peft"}

    def test_on_demand_it_ends_the_run_and_keeps_the_former_file(self, tmp_path: Path) -> None:
        last = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=0, save_last=True)
        run = trainer(tmp_path, LoRACallback(r=2, on_nonfinite="error"), last)
        with pytest.raises(ValueError, match="last.ckpt: 'model.model.layers.0.self_attn.q_proj.lora_A' holds NaN"):
            run.fit(Diverging(), loader())
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
        assert saved["global_step"] == 2
        assert all(value.isfinite().all() for value in saved["state_dict"].values())

    @pytest.mark.parametrize("on_nonfinite", [None, "error", "warn"])
    def test_an_error_of_the_users_is_what_ends_a_run(self, tmp_path: Path, on_nonfinite: Any) -> None:
        module, callback = Diverging(), LoRACallback(r=2, on_nonfinite=on_nonfinite)
        module.fails = True
        run = trainer(tmp_path, callback, OnExceptionCheckpoint(tmp_path), enable_checkpointing=True)
        with pytest.warns(UserWarning, match=NAMED), pytest.raises(RuntimeError, match="the user's own"):
            run.fit(module, loader())
        saved = torch.load(tmp_path / "on_exception.ckpt", weights_only=True)
        assert saved["state_dict"][f"model.model.{BROKEN}"].isnan().any()

    def test_an_unknown_word_is_refused_at_once(self) -> None:
        with pytest.raises(ValueError, match="on_nonfinite='raise' is not known; expected 'error', 'warn' or None"):
            LoRACallback(on_nonfinite="raise")  # type: ignore[arg-type]
