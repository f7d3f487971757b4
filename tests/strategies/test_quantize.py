"""``LoRACallback(quantize=...)``: runs over a quantised base, resumed exactly and over other forms of it."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import BackboneFinetuning

from lightning_lora import LoRACallback, LoRAConfig, inject, merge, merge_receipt, quantize, remove
from lightning_lora.layers.quantized_linear import QuantizedLinear
from tests.runs import LanguageModule, LazyModule, epochs, fitted, loader, same_adapters, trainer


def run(directory: Path, module: pl.LightningModule, *callbacks: Any, ckpt_path: Any = None, **lora: Any) -> Any:
    settings = {"r": 4, "quantize": "nf4", **lora}
    one = trainer(directory, LoRACallback(**settings), *callbacks, max_epochs=2)
    one.fit(module, loader(), ckpt_path=ckpt_path)
    return one


def form(module: pl.LightningModule) -> str:
    layer = module.model.model.layers[0].mlp.up_proj
    return layer.stored("weight").kind if isinstance(layer, QuantizedLinear) else str(layer.weight.dtype)


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


@pytest.fixture(autouse=True)
def _logged(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO")


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq", "int8"])
@pytest.mark.parametrize("build", [LanguageModule, LazyModule])
def test_a_run_quantises_the_base_trains_and_says_so(tmp_path, kind, build, caplog) -> None:
    module = build()
    run(tmp_path, module, quantize=kind)
    assert form(module) == kind
    assert module.losses[-1] < module.losses[0]
    (summary,) = [line for line in lines(caplog) if line.startswith("LoRA on")]
    assert f"base in {kind}: 14 linear layers" in summary
    assert "lm_head (output head)" in summary
    frozen = sum(p.numel() for p in LanguageModule().parameters())
    assert f"{frozen:,}" in summary


def test_the_losses_are_those_of_a_run_over_the_dense_values(tmp_path) -> None:
    module, dense, packed = LanguageModule(), LanguageModule(), LanguageModule().model
    quantize(packed, "nf4")
    names = dense.model.state_dict()
    dense.model.load_state_dict({name: packed.get_submodule(name.removesuffix(".weight")).weight for name in names})
    run(tmp_path, module)
    run(tmp_path, dense, quantize=None)
    torch.testing.assert_close(module.losses, dense.losses, rtol=1e-5, atol=0.0)  # other order of sums


def test_the_same_callback_serves_every_stage_and_trainer(tmp_path) -> None:
    module, callback = LanguageModule(), LoRACallback(r=4, quantize="nf4", quantize_exclude=["o_proj"])
    for one in (trainer(tmp_path, callback), trainer(tmp_path, callback)):
        one.fit(module, loader())
        before = {name: value.clone() for name, value in module.state_dict().items()}
        one.test(module, loader(), verbose=False)
        one.predict(module, loader())
        after = module.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items())
    trainer(tmp_path, LoRACallback(r=4)).test(module, loader(), verbose=False)
    with pytest.raises(ValueError, match="build the base anew"):
        trainer(tmp_path, LoRACallback(r=4, quantize="int8")).fit(module, loader())


def test_a_base_that_was_quantised_by_hand_is_taken_as_it_is(tmp_path) -> None:
    module = LanguageModule()
    quantize(module.model, "nf4")
    run(tmp_path, module)
    remove(module.model)
    run(tmp_path, module)
    assert form(module) == "nf4"


def test_quantise_after_inject_is_refused(tmp_path) -> None:
    module = LanguageModule()
    inject(module.model, LoRAConfig(r=4))
    with pytest.raises(ValueError, match=r"call remove\(model\) first"):
        run(tmp_path, module)


class WithBackbone(LanguageModule):
    @property
    def backbone(self) -> Any:
        return self.model.model


def test_a_callback_that_would_unfreeze_the_packed_base_is_refused_before_the_first_step(tmp_path) -> None:
    module = WithBackbone()
    with pytest.raises(ValueError, match=r"BackboneFinetuning unfreezes module\.backbone in epoch 1, and it holds"):
        trainer(tmp_path, BackboneFinetuning(1, verbose=False), LoRACallback(r=4, quantize="nf4")).fit(module, loader())
    assert module.losses == []


def test_wrong_words_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match="quantize must be one of"):
        LoRACallback(quantize="fp4")
    with pytest.raises(ValueError, match="needs quantize="):
        LoRACallback(quantize_exclude=["q_proj"])
    with pytest.raises(ValueError, match="needs quantize="):
        inject(LanguageModule().model, LoRAConfig(r=4), quantize_exclude=["q_proj"])


@pytest.mark.parametrize("kind", ["nf4", "nf4-dq"])
def test_a_resume_over_the_same_form_is_bit_exact(tmp_path, kind) -> None:
    straight = LanguageModule()
    run(tmp_path, straight, epochs(tmp_path), quantize=kind)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert all(".lora_" in name for name in saved["state_dict"])
    resumed = LanguageModule()  # built anew from its floating-point weights
    run(tmp_path, resumed, ckpt_path=tmp_path / "epoch=0.ckpt", quantize=kind)
    assert resumed.losses == straight.losses[len(straight.losses) // 2 :]
    assert same_adapters(resumed, straight)


@pytest.mark.parametrize(
    ("first", "then", "line"),
    [
        ("nf4", None, "trained over nf4, loaded over float32"),
        (None, "int8", "trained over float32, loaded over int8"),
        ("nf4", "nf4-dq", "trained over nf4, loaded over nf4-dq"),
    ],
)
def test_a_resume_over_another_form_says_what_changed_in_one_line(tmp_path, caplog, first, then, line) -> None:
    run(tmp_path, LanguageModule(), epochs(tmp_path), quantize=first)
    caplog.clear()
    module = LanguageModule()
    run(tmp_path, module, ckpt_path=tmp_path / "epoch=0.ckpt", quantize=then)
    said = [text for text in lines(caplog) if "trained over" in text]
    assert said == [f"{tmp_path / 'epoch=0.ckpt'}: {line}"]
    assert form(module) == (then or "torch.float32")
    assert "into the trained base," in merge_receipt(merge(module)).summary()  # it trained over this one since


@pytest.mark.parametrize("source", ["last.ckpt", "last-peft"])
def test_init_from_quantises_the_base_first(tmp_path, source, caplog) -> None:
    _, before = fitted(tmp_path, save_peft=True)
    module = LanguageModule()
    trainer(tmp_path, LoRACallback(init_from=str(tmp_path / source), quantize="nf4")).test(
        module, loader(), verbose=False
    )
    assert form(module) == "nf4"
    assert same_adapters(module, before)
    assert any("trained over float32, loaded over nf4" in line for line in lines(caplog))


@pytest.mark.parametrize("source", ["last.ckpt", "last-peft"])
@pytest.mark.parametrize("wrong", ["base", "rank"])
def test_a_refused_file_leaves_the_base_in_floats(tmp_path, source, wrong) -> None:
    fitted(tmp_path, save_peft=True)
    module = LanguageModule()
    if wrong == "base":
        module.model.model.layers[0].mlp.up_proj.weight.data.mul_(2)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    given = {"r": 8} if wrong == "rank" else {}
    callback = LoRACallback(init_from=str(tmp_path / source), quantize="nf4", **given)
    with pytest.raises(ValueError, match="another base model" if wrong == "base" else "rank|shape|r="):
        trainer(tmp_path, callback, max_epochs=1).fit(module, loader())
    assert form(module) == "torch.float32"
    assert before.keys() == module.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_load_from_checkpoint_adapts_the_floating_point_base(tmp_path, caplog) -> None:
    _, before = fitted(tmp_path, quantize="nf4")
    module = LanguageModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert same_adapters(module, before)
    assert any("trained over nf4, loaded over float32" in line for line in lines(caplog))


def test_what_surrounds_the_base_is_no_part_of_its_state(tmp_path) -> None:
    """A user's own module that is adapted as a whole."""

    class Own(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(8, 64), torch.nn.Linear(64, 1)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.second(self.first(batch.float() / 100)).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters())

    run(tmp_path, Own(), epochs(tmp_path), r=1, quantize="nf4-dq")
    saved = torch.load(tmp_path / "epoch=1.ckpt", weights_only=True)["state_dict"]
    assert sorted(saved) == [f"{name}.lora_{one}" for name in ("first", "second") for one in "AB"]


def test_fabric_trains_saves_and_loads_over_a_quantised_base(tmp_path) -> None:
    from tests import models

    def ready() -> Any:
        torch.manual_seed(0)
        model = inject(models.llama(), LoRAConfig(r=4), quantize="nf4")
        fabric = Fabric(accelerator="cpu", devices=1)
        return fabric, *fabric.setup(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))

    def steps(fabric: Any, model: Any, optimizer: Any, count: int) -> None:
        for _ in range(count):
            fabric.backward(model(input_ids=models.token_ids(), labels=models.token_ids()).loss)
            optimizer.step()
            optimizer.zero_grad()

    fabric, model, optimizer = ready()
    steps(fabric, model, optimizer, 2)
    fabric.save(tmp_path / "file.ckpt", {"model": model, "optimizer": optimizer})
    steps(fabric, model, optimizer, 3)
    other_fabric, other, other_optimizer = ready()
    other_fabric.load(tmp_path / "file.ckpt", {"model": other, "optimizer": other_optimizer})
    steps(other_fabric, other, other_optimizer, 3)
    assert same_adapters(other.module, model.module)
