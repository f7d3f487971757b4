"""Loss scaling on 2 and 4 gloo ranks: all skip the step in which one rank finds an overflow in its part."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision as TrainerMixedPrecision
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject, named_adapter_parameters
from lightning_lora.distributed.overflow import keep_overflows, share_overflows
from lightning_lora.fabric import FSDPLoRAStrategy
from lightning_lora.ops.sharded import is_sharded, local_part
from tests import models
from tests.distributed import split
from tests.distributed.ranks import on_ranks
from tests.distributed.split import four_heads, whole_factors
from tests.distributed.split_fabric import batches, gradients, loss_of, make, start
from tests.distributed.training import EXACT, from_all_ranks

INIT_SCALE = 256.0


def half_precision(cls: Any = MixedPrecision) -> Any:
    # Lightning makes 16-mixed into bf16-mixed on CPU, unless it is given the plugin
    return cls("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=INIT_SCALE))


def spoil(trained: list[nn.Parameter], rank: int) -> None:
    """Put an infinite entry into the last rank's part of a gradient."""
    if rank == torch.distributed.get_world_size() - 1:
        part = next(p for p in trained if is_sharded(p) and local_part(p.grad).numel() > 0)
        local_part(part.grad).view(-1)[0] = float("inf")


class Steps:
    """What a step did to this rank's tensors, and to the scale, of which the second overflowed."""

    def __init__(self) -> None:
        self.moved: list[set[bool]] = []
        self.scales: list[float] = []

    def add(self, before: list[Tensor], after: list[Tensor], scale: float) -> None:
        self.moved.append({not torch.equal(old, new) for old, new in zip(before, after, strict=True)})
        self.scales.append(scale)

    def assert_second_was_skipped(self, model: nn.Module) -> None:
        assert self.moved == [{True}, {False}, {True}]
        assert self.scales == [INIT_SCALE, INIT_SCALE / 2, INIT_SCALE / 2]
        factors = whole_factors(model)
        torch.testing.assert_close(factors, from_all_ranks(factors)[0], **EXACT)


def assert_overflow_is_skipped(fabric: Fabric, made: Any, *, clips: bool = False) -> None:
    """Take three steps, in the second of which the last rank finds an infinite entry."""
    model, optimizer = fabric.setup(*made)
    scaler, trained, steps = (
        fabric.strategy.precision.scaler,
        [p for p in model.parameters() if p.requires_grad],
        Steps(),
    )
    for index, batch in enumerate(list(batches(fabric))[:3]):
        fabric.backward(loss_of(model, batch))
        if index == 1:
            spoil(trained, fabric.global_rank)
        if clips:
            fabric.clip_gradients(model, optimizer, max_norm=1e3, error_if_nonfinite=False)
        before = [local_part(p.detach()).clone() for p in trained]
        optimizer.step()
        optimizer.zero_grad()
        steps.add(before, [local_part(p.detach()) for p in trained], scaler.get_scale())
    steps.assert_second_was_skipped(model.module)


@on_ranks(2, 4)
def test_all_ranks_skip_a_step_in_which_one_finds_an_overflow() -> None:
    assert_overflow_is_skipped(start(tensor_parallel_size=2, plugins=half_precision()), make())


@on_ranks(2, 4)
def test_all_ranks_skip_a_clipped_step_in_which_one_finds_an_overflow(num_ranks: int) -> None:
    fabric = start(tensor_parallel_size=num_ranks, plugins=half_precision())
    assert_overflow_is_skipped(fabric, make(), clips=True)


@on_ranks(2)
def test_all_ranks_skip_a_fused_step_in_which_one_finds_an_overflow() -> None:
    assert_overflow_is_skipped(start(tensor_parallel_size=2, plugins=half_precision()), make(fused=True))


@pytest.fixture(scope="module")
def first_gradients() -> dict[str, Tensor]:
    """Return the gradients of one process in single precision."""
    fabric = start()
    model, _ = fabric.setup(*make())
    fabric.backward(loss_of(model, next(iter(batches(fabric)))))
    return gradients(model)


@on_ranks(2, 4)
def test_gradients_are_reduced_in_the_scaled_domain(first_gradients: dict[str, Tensor], num_ranks: int) -> None:
    fabric = start(tensor_parallel_size=num_ranks, plugins=half_precision())
    model, _ = fabric.setup(*make())
    fabric.backward(loss_of(model, next(iter(batches(fabric)))))
    for name, gradient in gradients(model).items():
        expected = first_gradients[name]
        error = (gradient / INIT_SCALE - expected).norm() / expected.norm()
        assert error < 0.02, name  # ten bits of float16, through two blocks


class Headed(nn.Module):
    """A head outside the pretrained model, which stays whole beside adapters in shards."""

    def __init__(self) -> None:
        super().__init__()
        self.model = four_heads()
        self.head = nn.Linear(models.VOCAB, models.VOCAB)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        output = self.model(input_ids=input_ids)
        output.loss = nn.functional.cross_entropy(self.head(output.logits).flatten(0, 1).float(), labels.flatten())
        return output


@on_ranks(2)
def test_all_ranks_skip_a_step_on_adapters_in_shards_in_which_one_finds_an_overflow() -> None:
    fabric = start(FSDPLoRAStrategy(shard_adapters=True, min_shard_numel=0), plugins=half_precision())
    model = models._seeded(Headed)
    inject(model.model, LoRAConfig(r=4))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    assert_overflow_is_skipped(fabric, (model, optimizer))


class Spoiling(Callback):
    """Puts an infinite entry into the last rank's part of a factor after the second backward, and looks at each step."""

    def __init__(self) -> None:
        self.before: list[Tensor] = []
        self.steps = Steps()

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Give the adapters values, so that all of them have gradients from the first step."""
        with torch.no_grad():
            for name, parameter in named_adapter_parameters(pl_module):
                if name.endswith("lora_B"):
                    parameter.fill_(0.01)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = [p.detach().clone() for p in pl_module.parameters() if p.requires_grad]

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == 1 and not self.steps.scales[1:]:
            spoil([p for p in pl_module.parameters() if p.requires_grad], trainer.global_rank)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        after = [p.detach() for p in pl_module.parameters() if p.requires_grad]
        self.steps.add(self.before, after, trainer.precision_plugin.scaler.get_scale())


@on_ranks(2)
def test_a_trainer_skips_such_a_step_too_and_its_scaler_is_its_own_again_after_the_run(tmp_path: Path) -> None:
    plugin, module, spoiling = half_precision(TrainerMixedPrecision), split.Module(), Spoiling()
    split.run(
        tmp_path, 2, module, plugins=plugin, callbacks=(spoiling,), limit_train_batches=3, validates=False,
        gradient_clip_val=1e3,
    )  # fmt: skip
    spoiling.steps.assert_second_was_skipped(module)
    assert "_unscale_grads_" not in vars(plugin.scaler)


def test_gradients_are_reduced_before_the_check_and_a_scaler_is_wrapped_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer, scaler = torch.optim.SGD([parameter]), torch.amp.GradScaler("cpu", init_scale=2.0)
    calls: list[Any] = []
    for _ in range(2):
        share_overflows(scaler, lambda: calls.append(parameter.grad.clone()))
    scaler.scale(parameter.sum()).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(calls, [torch.full((2,), 2.0)])
    torch.testing.assert_close(parameter.grad, torch.ones(2))
    keep_overflows(scaler)
    assert "_unscale_grads_" not in vars(scaler)


def test_a_scaler_without_the_method_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="not served with NoScaler of torch .* no '_unscale_grads_'"):
        share_overflows(NoScaler(), lambda: None)


class NoScaler:
    pass
