"""A ``GPTModel`` on two gloo ranks beside other things: tools, parallel layers of the user's, Fabric."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor

from lightning_lora import LoRACallback, LoRAConfig, MegatronLoRAStrategy, disabled, inject
from lightning_lora.megatron.core import mesh_of
from lightning_lora.megatron.models import gpt_model
from lightning_lora.megatron.weights import load_hf_weights
from lightning_lora.ops.sharded import split_over, whole
from tests import models
from tests.distributed.gpt import (
    BATCH,
    LOGIT_TOLERANCE,
    STEP_TOLERANCE,
    Alone,
    Module,
    adapters,
    expected_logits,
    hugging_face,
    launched,
    logits_of,
    run,
)
from tests.distributed.ranks import on_ranks
from tests.distributed.split import AfterTheSearch
from tests.distributed.training import EXACT, alone, from_all_ranks, rank_loader, state


class Bare(Module):
    """Leaves reading the weights to the strategy."""

    loads = False


@on_ranks(2)
def test_a_run_begins_with_the_adapters_of_a_file(tmp_path: Path, hf: Path) -> None:
    run(tmp_path, 2, Module(hf))
    path, module = tmp_path / "epoch=0.ckpt", Bare(hf)
    run(None, 2, module, lora={"init_from": path}, max_epochs=0, options={"base_weights": str(hf)})
    written = torch.load(path, weights_only=True)["state_dict"]["model.decoder.layers.1.mlp.linear_fc2.lora_B"]
    torch.testing.assert_close(adapters(module)["model.layers.1.mlp.down_proj.lora_B"], written, **EXACT)


@on_ranks(2)
def test_tools_around_a_run_see_the_model_that_it_is(tmp_path: Path, hf: Path) -> None:
    module, search = Bare(hf), AfterTheSearch(num_training_steps=3, early_stop_threshold=None)
    trainer, _ = run(tmp_path, 2, module, callbacks=(search,), options={"base_weights": str(hf)})
    assert all(not value.any() for name, value in search.adapters.items() if "lora_B" in name)
    with disabled(module):
        torch.testing.assert_close(logits_of(module), expected_logits(hugging_face()), **LOGIT_TOLERANCE)
    predicting = pl.Trainer(
        accelerator="cpu", devices=2, strategy=MegatronLoRAStrategy(tensor_parallel_size=2), logger=False,
        callbacks=[LoRACallback(r=4)], use_distributed_sampler=False, enable_model_summary=False,
        enable_progress_bar=False,
    )  # fmt: skip
    [predicted] = predicting.predict(module, torch.utils.data.DataLoader(BATCH, batch_size=4))
    torch.testing.assert_close(predicted, logits_of(module), **EXACT)

    num_searched = len(module.losses) - trainer.global_step
    assert num_searched > 0
    trainer.fit_loop.max_epochs = 2
    trainer.callbacks.remove(search)
    trainer.fit(module, rank_loader(0, 1))
    assert len(module.losses) == num_searched + 4 + 4  # of two epochs


class Taught(Module):
    """Beside the adapted model holds a teacher of the same weights, and a parallel head of the user's own that trains."""

    def configure_model(self) -> None:
        from megatron.core.tensor_parallel import ColumnParallelLinear

        if self.model is None:
            super().configure_model()
            self.teacher = gpt_model(self.source)
            load_hf_weights(self.teacher, self.source)
            self.teacher.requires_grad_(False)
            torch.manual_seed(4)
            self.head = ColumnParallelLinear(
                models.VOCAB, 4, config=self.model.config, init_method=torch.nn.init.xavier_normal_, bias=False,
                gather_output=True,
            )  # fmt: skip
            self.first = self.whole_head()

    def whole_head(self) -> Tensor:
        weight = self.head.weight.detach().clone()
        split_over(weight, mesh_of(self.head.tp_group, "cpu"), 0)
        return whole(weight).clone()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.head(self.logits(batch))[0].square().mean()


@on_ranks(2)
def test_a_teacher_keeps_its_parts_and_a_parallel_head_trains_in_parts_and_is_saved_whole(
    tmp_path: Path, hf: Path
) -> None:
    module = Taught(hf)
    run(tmp_path, 2, module, lora={"module": "model"})
    head = module.whole_head()
    assert (head - module.first).abs().max() < 0.1 < head.std()
    assert not torch.equal(head, module.first)
    torch.testing.assert_close(head, from_all_ranks(head)[0], **EXACT)
    saved = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]["head.weight"]
    torch.testing.assert_close(saved, head, **EXACT)
    module.model = module.teacher
    torch.testing.assert_close(logits_of(module), expected_logits(hugging_face()), **LOGIT_TOLERANCE)


@pytest.fixture(scope="module")
def single_clipped() -> dict[str, Any]:
    module = alone(Alone(), gradient_clip_val=0.05)
    norm = torch.stack([gradient.norm() for gradient in alone(Alone()).gradients.values()]).norm()
    return {"adapters": state(module), "losses": module.losses, "first norm": norm}


@on_ranks(2)
def test_losses_steps_and_norms_in_fabric_equal_one_process_and_its_file_is_read_back(
    tmp_path: Path, hf: Path, single_clipped: dict[str, Any]
) -> None:
    def set_up(fabric: Fabric, sequence_parallel: bool) -> tuple[Module, Any, Any]:
        module = Module(hf, sequence_parallel=sequence_parallel)
        module.configure_model()
        inject(module.model, LoRAConfig(r=4))
        return module, *fabric.setup(module.model, module.configure_optimizers())

    fabric, norms = launched(2), []
    module, model, optimizer = set_up(fabric, sequence_parallel=True)
    for batch in rank_loader(0, 1):
        fabric.backward(module.training_step(batch, 0))
        norms.append(fabric.clip_gradients(model, optimizer, max_norm=0.05, error_if_nonfinite=True))
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(adapters(module), single_clipped["adapters"], **STEP_TOLERANCE)
    torch.testing.assert_close(norms[0], single_clipped["first norm"], rtol=1e-5, atol=0)
    losses = torch.tensor(from_all_ranks(module.losses)).mean(0)
    torch.testing.assert_close(losses, torch.tensor(single_clipped["losses"]), **STEP_TOLERANCE)

    fabric.save(tmp_path / "fabric.ckpt", {"model": model, "optimizer": optimizer})
    without_sequences = launched(2)
    again, other, other_optimizer = set_up(without_sequences, sequence_parallel=False)
    without_sequences.load(tmp_path / "fabric.ckpt", {"model": other, "optimizer": other_optimizer})
    torch.testing.assert_close(adapters(again), adapters(module), **EXACT)
