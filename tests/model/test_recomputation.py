"""Activation checkpointing beside disabled(model): what is recomputed has the adapters that its forward had."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import LoRAConfig, disabled, inject
from lightning_lora.megatron.core import megatron_core
from lightning_lora.model.wrapping import keep_state_of_forward, switched
from tests import models

IDS = models.token_ids(2, 6)


def adapted(**options) -> nn.Module:
    """A model whose adapters and trained biases are away from their start."""
    model = inject(
        models._seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))), config(**options)
    )
    models.fill_adapters(model)
    with torch.no_grad():
        model[0].bias.add_(0.5)
    return model


def config(**options) -> LoRAConfig:
    return LoRAConfig(r=2, target_modules=["0", "2"], bias="lora_only", **options)


def reentrant(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(function, x, use_reentrant=True)


def non_reentrant(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(function, x, use_reentrant=False)


def megatron(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    from megatron.core.tensor_parallel import random

    return random.CheckpointFunction.apply(function, False, x)


@pytest.fixture(params=[reentrant, non_reentrant, megatron])
def run(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Tensor]]:
    if request.param is megatron:
        megatron_core()  # an import that leaves out what it would let safe loads build
        from megatron.core.tensor_parallel import random

        monkeypatch.setattr(random, "_get_all_rng_states", tuple)  # they ask for a GPU's
        monkeypatch.setattr(random, "_set_all_rng_states", lambda: None)
        keep_state_of_forward()
    yield request.param
    assert not switched


def forward_inside(model: nn.Module, run: Callable[..., Tensor], x: Tensor) -> None:
    with disabled(model):
        y = run(model, x)
    y.square().sum().backward()


def backward_inside(model: nn.Module, run: Callable[..., Tensor], x: Tensor) -> None:
    y = run(model, x)
    with disabled(model):
        y.square().sum().backward()


def inside_the_block(model: nn.Module, run: Callable[..., Tensor], x: Tensor) -> None:
    def block(x: Tensor) -> Tensor:
        with disabled(model):
            reference = model(x)
        return model(x) - reference

    run(block, x).square().sum().backward()


def both_in_one_graph(model: nn.Module, run: Callable[..., Tensor], x: Tensor) -> None:
    y = run(model, x)
    with disabled(model):
        reference = run(model, x)
        with disabled(model):
            (y - 2 * reference).square().sum().backward()


def gradients(how: Callable[..., None], run: Callable[..., Tensor], model: nn.Module) -> list[Tensor | None]:
    x = torch.linspace(-1, 1, 18).view(3, 6).requires_grad_()
    how(model, run, x)
    return [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("how", [forward_inside, backward_inside, inside_the_block, both_in_one_graph])
def test_gradients_are_those_without_checkpoints(how: Callable[..., None], run: Callable[..., Tensor]) -> None:
    expected = gradients(how, lambda function, x: function(x), adapted())
    given = gradients(how, run, adapted())
    assert [g is None for g in given] == [g is None for g in expected]
    for own, other in zip(given, expected, strict=True):
        if own is not None:
            torch.testing.assert_close(own, other)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_transformers_model_with_checkpoints_may_be_disabled_before_backward(use_reentrant: bool) -> None:
    def found(checkpoints: bool) -> list[Tensor]:
        model = inject(models.llama().train(), LoRAConfig(r=2))
        models.fill_adapters(model)
        if checkpoints:
            models.checkpoint_activations(model, {"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        logits = model(IDS).logits
        with disabled(model):
            reference = model(IDS).logits
            (logits - reference).square().sum().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for own, other in zip(found(True), found(False), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def test_a_failure_in_what_is_recomputed_leaves_the_state_as_it_was(run: Callable[..., Tensor]) -> None:
    model, fails = adapted(), False

    def block(x: Tensor) -> Tensor:
        if fails:
            raise KeyError("again")
        return model(x)

    y = run(block, torch.ones(3, 6, requires_grad=True))
    fails = True
    with disabled(model):
        with pytest.raises(KeyError, match="again"):
            y.sum().backward()
        assert not model[0].lora_active
    assert model[0].lora_active


def test_checkpoints_are_wrapped_once() -> None:
    from torch.utils.checkpoint import CheckpointFunction, _CheckpointFrame

    inject(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2))
    before = CheckpointFunction.forward, _CheckpointFrame.__init__
    inject(nn.Sequential(nn.Linear(4, 4)), LoRAConfig(r=2))
    assert before == (CheckpointFunction.forward, _CheckpointFrame.__init__)
    assert all(not hasattr(method.__wrapped__, "__wrapped__") for method in before)
