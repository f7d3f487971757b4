"""``fsdp_lora`` in Fabric on 2 gloo ranks: accumulation, files, several models, layers that some ranks lack."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn

from lightning_lora import LoRAConfig, adapter_state_dict, inject, merge, named_adapter_parameters, remove
from lightning_lora.ops.sharded import whole
from tests import models
from tests.distributed.hand_written import Outside, Routed, TwoSided
from tests.distributed.ranks import on_ranks
from tests.distributed.sharded import EVERYTHING, start
from tests.distributed.training import EXACT, STEP_TOLERANCE, from_all_ranks, rank_of


def adapted() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a model whose factors are not zero, and an optimizer of all parameters: what is frozen has to be dropped."""
    model = inject(models.llama(), LoRAConfig(r=2)).eval()
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for _, parameter in named_adapter_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)


def rows() -> Tensor:
    """Return this rank's rows."""
    return models.token_ids(4, 6, seed=5).chunk(2)[rank_of()[0]]


def loss_of(model: Any) -> Tensor:
    return model(input_ids=rows(), labels=rows()).loss


def backward(fabric: Fabric, model: Any) -> Tensor:
    loss = loss_of(model)
    fabric.backward(loss)
    return loss


def two_steps(fabric: Fabric, model: Any, optimizer: Any) -> dict[str, Any]:
    """Return the loss and the gradients of the first step, and the adapters after both."""
    found: dict[str, Any] = {}
    for index in range(2):
        loss = backward(fabric, model)
        if index == 0:
            gradients = {n: p.grad for n, p in model.module.named_parameters() if p.grad is not None}
            found["gradients"] = {n: whole(gradient).clone() for n, gradient in gradients.items()}
            found["loss"] = loss.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
    found["adapters"] = {name: value.clone() for name, value in adapter_state_dict(model.module).items()}
    return found


@on_ranks(2)
def test_fabric_accumulates_clips_saves_and_goes_on(tmp_path: Path) -> None:
    def run(shards: bool) -> tuple[Tensor, dict[str, Tensor]]:
        fabric = start(shard_adapters=shards)
        model, optimizer = fabric.setup(*adapted())
        for _ in range(2):
            for micro in range(2):
                with fabric.no_backward_sync(model, enabled=micro == 0):
                    fabric.backward(loss_of(model) / 2)
            norm = fabric.clip_gradients(model, optimizer, max_norm=0.05)
            optimizer.step()
            optimizer.zero_grad()
        path = tmp_path / f"{shards}.ckpt"
        fabric.save(path, {"model": model, "optimizer": optimizer, "step": 2})
        twin, twin_optimizer = fabric.setup(*adapted())
        state = {"model": twin, "optimizer": twin_optimizer, "step": 0}
        fabric.load(path, state)
        assert state["step"] == 2
        going_on = two_steps(fabric, model, optimizer)
        torch.testing.assert_close(two_steps(fabric, twin, twin_optimizer), going_on, **EXACT)
        return whole(norm), going_on["adapters"]

    (norm, adapters), (sharded_norm, sharded_adapters) = run(False), run(True)
    torch.testing.assert_close(sharded_norm, norm, rtol=1e-5, atol=0)
    torch.testing.assert_close(sharded_adapters, adapters, **STEP_TOLERANCE)
    first_norm, first_adapters = from_all_ranks((norm, adapters))[0]
    torch.testing.assert_close(norm, first_norm, rtol=1e-5, atol=0)
    torch.testing.assert_close(adapters, first_adapters, **STEP_TOLERANCE)


@on_ranks(2)
def test_a_first_forward_in_inference_mode_leaves_a_model_that_trains() -> None:
    fabric = start(**EVERYTHING)
    model, optimizer = fabric.setup(*adapted())
    with torch.inference_mode():  # as a generate in the user's code
        before = loss_of(model).clone()
    torch.testing.assert_close(before, backward(fabric, model).detach(), rtol=1e-6, atol=0)
    optimizer.step()


def gradients_of(model: nn.Module) -> dict[str, Tensor | None]:
    return {n: None if p.grad is None else whole(p.grad) for n, p in named_adapter_parameters(model)}


@on_ranks(2)
def test_what_no_rank_reaches_has_no_gradient_and_what_one_reaches_counts_as_zero_elsewhere() -> None:
    def build() -> nn.Module:
        model = inject(models._seeded(TwoSided), LoRAConfig(r=2, target_modules=["first", "odd", "never"]))
        models.fill_adapters(model)
        return model

    inputs, single = [torch.full((2, 4), sign) for sign in (-1.0, 1.0)], build()  # rank 0 does not reach the odd layer
    for x in inputs:
        (single(x).square().sum() / 2).backward()
    fabric = start()
    model = fabric.setup(build())
    fabric.backward(model(inputs[rank_of()[0]]).square().sum())
    gradients = gradients_of(model.module)
    assert {name for name, value in gradients.items() if value is None} == {"never.lora_A", "never.lora_B"}
    torch.testing.assert_close(gradients, gradients_of(single), rtol=1e-5, atol=1e-6)


@on_ranks(2)
def test_adapters_in_shards_that_ranks_lack_count_as_zero_there() -> None:
    config = LoRAConfig(r=2, init="pissa")  # an A and a B that both train from the start
    inputs = [torch.full((2, 8), sign) for sign in (-1.0, 1.0)]
    single = inject(models._seeded(Routed), config)
    for x in inputs:
        (single(x).square().sum() / 2).backward()
    fabric = start(shard_adapters=True, **EVERYTHING)
    model = fabric.setup(inject(models._seeded(Routed), config))
    fabric.backward(model(inputs[rank_of()[0]]).square().sum())
    gradients, expected = gradients_of(model.module), gradients_of(single)
    assert {name for name, value in gradients.items() if value is None} == {n for n in expected if ".never." in n}
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)


@on_ranks(2)
def test_a_backward_may_reach_one_model_of_two() -> None:
    fabric = start()
    (one, optimizer), (two, _) = fabric.setup(*adapted()), fabric.setup(*adapted())
    backward(fabric, one)
    optimizer.step()
    assert all(parameter.grad is None for parameter in two.parameters())


@on_ranks(2)
def test_an_optimizer_of_the_parameters_before_sharding_is_refused() -> None:
    fabric, (model, optimizer) = start(shard_adapters=True, **EVERYTHING), adapted()
    fabric.setup(model)
    with pytest.raises(ValueError, match=r"call fabric\.setup\(model, optimizer\) with both"):
        fabric.setup_optimizers(optimizer)


TAKEN_OUT: dict[str, Callable[[Any], Any]] = {"removed": remove, "merged": functools.partial(merge, remove=True)}


@pytest.mark.parametrize("way", TAKEN_OUT)
@on_ranks(2)
def test_sharded_adapters_are_taken_out_for_good(way: str) -> None:
    base, expected = loss_of(models.llama().eval()).detach(), loss_of(adapted()[0]).detach()
    fabric, (model, _) = start(shard_adapters=True, **EVERYTHING), adapted()
    fabric.setup(model)
    loss_of(model)
    TAKEN_OUT[way](model)
    torch.testing.assert_close(loss_of(model).detach(), base if way == "removed" else expected, rtol=1e-5, atol=1e-6)
    assert [name for name, _ in model.named_parameters() if ".lora_" in name] == []

    # the base, which is in shards, can be adapted again
    inject(model, LoRAConfig(r=3))
    trained = [p for p in model.parameters() if p.requires_grad]
    again, optimizer = fabric.setup(model, torch.optim.SGD(trained, lr=1.0))
    backward(fabric, again)
    optimizer.step()
    adapters = {n: whole(p.detach()) for n, p in named_adapter_parameters(again.module)}
    assert {value.shape[0] for name, value in adapters.items() if name.endswith("lora_A")} == {3}
    torch.testing.assert_close(adapters, from_all_ranks(adapters)[0], **EXACT)


@on_ranks(2)
def test_what_is_outside_trains_alike_and_stays_tied() -> None:
    def trained(shards: bool) -> dict[str, Tensor]:
        model = Outside(LoRAConfig(r=2, modules_to_save=["embed_tokens"]))
        models.fill_adapters(model)
        fabric = start(shard_adapters=shards, **EVERYTHING)
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.model.parameters(), lr=0.1))
        model.module.frozen.requires_grad_(True)
        optimizer.add_param_group({"params": [*model.module.frozen.parameters()]})
        for _ in range(2):
            fabric.backward(model(rows()))
            optimizer.step()
            optimizer.zero_grad()
        return {n: whole(p.detach()).clone() for n, p in model.module.named_parameters() if p.requires_grad}

    replicated = trained(False)
    torch.testing.assert_close(replicated, from_all_ranks(replicated)[0], **EXACT)
    torch.testing.assert_close(trained(True), replicated, **STEP_TOLERANCE)
