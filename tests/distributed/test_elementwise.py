"""Which optimizers may step on parts of tensors, on two gloo ranks against steps on whole ones in one process."""

import warnings
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.optim import Optimizer

from lightning_lora import FSDPLoRAStrategy, LoRAConfig, MegatronLoRAStrategy, inject
from lightning_lora import fabric as twins
from lightning_lora.distributed.elementwise import check_steps_on_parts
from lightning_lora.ops.sharded import local_part, split_over, spread_like
from tests import models
from tests.distributed.optimizers import NOT_TRIED, OPTIMIZERS, RIGHT_ON_PARTS, Special
from tests.distributed.ranks import on_ranks
from tests.distributed.training import error_of, fit, rank_loader, rank_of
from tests.runs import LanguageModule

NUM_STEPS = 4
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}  # other order of sums


def whole_tensors(seed: int) -> list[Tensor]:
    """Return tensors of unequal rows and columns: two to be split, one to stay whole."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in ((8, 12), (6, 10), (3, 4))]
    return [tensor * torch.linspace(0.5, 4.0, len(tensor)).view(-1, 1) for tensor in tensors]


def stepped(optimizer: Optimizer, params: list[Any]) -> list[Tensor]:
    """Return what this rank holds of the parameters after a few steps, on gradients that all ranks know."""
    for index in range(NUM_STEPS):

        def closure(index: int = index) -> Tensor:
            for parameter, gradient in zip(params, whole_tensors(1 + index), strict=True):
                parameter.grad = spread_like(gradient, parameter)
            return sum((local_part(p.detach()) * local_part(p.grad)).sum() for p in params)

        closure()
        optimizer.step() if isinstance(optimizer, Special) else optimizer.step(closure)
        if hasattr(optimizer, "schedule"):
            optimizer.schedule.step()
    return [local_part(parameter.detach()).clone() for parameter in params]


def on_parts(mesh: Any, *, tagged: bool) -> list[Any]:
    """Return parameters of which this rank has rows, has columns, and has all."""
    params: list[Any] = []
    for tensor, dim in zip(whole_tensors(0), (0, 1, None), strict=True):
        if dim is None:
            params.append(nn.Parameter(tensor))
            continue
        spread = distribute_tensor(tensor, mesh, [Shard(dim)], src_data_rank=None)
        params.append(nn.Parameter(spread.to_local().contiguous() if tagged else spread))
        if tagged:
            split_over(params[-1], mesh, dim)
    return params


def whole(name: str) -> list[Tensor]:
    params = [nn.Parameter(tensor) for tensor in whole_tensors(0)]
    return stepped(OPTIMIZERS[name](params), params)


def parts_of_this_rank(tensors: list[Tensor]) -> list[Tensor]:
    rank, _ = rank_of()
    return [tensors[0].chunk(2, 0)[rank], tensors[1].chunk(2, 1)[rank], tensors[2]]


def verdict(optimizer: Optimizer) -> str:
    """Return what is said of an optimizer, which is left as it was, as the random state is."""
    params = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = [local_part(parameter.detach()).clone() for parameter in params]
    attributes, random = dict(vars(optimizer)), torch.get_rng_state()
    keys = {id(parameter): list(entry) for parameter, entry in optimizer.state.items()}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            check_steps_on_parts(optimizer)
            said = "passed"
        except ValueError as error:
            said = f"refused: {error}"
    assert attributes == vars(optimizer)
    assert keys == {id(parameter): list(entry) for parameter, entry in optimizer.state.items()}
    assert torch.equal(random, torch.get_rng_state())
    for parameter, value in zip(params, before, strict=True):
        assert torch.equal(local_part(parameter.detach()), value)
        assert parameter.grad is None
    return f"untried: {caught[0].message}" if caught else said


def is_right_on_parts(optimizer: Optimizer, params: list[Any], expected: list[Tensor]) -> bool:
    try:
        torch.testing.assert_close(stepped(optimizer, params), parts_of_this_rank(expected), **TOLERANCE)
    except AssertionError:
        return False
    return True


@pytest.fixture(scope="module")
def expected() -> dict[str, list[Tensor]]:
    """Return what every optimizer makes of whole tensors."""
    return {name: whole(name) for name in sorted(set(OPTIMIZERS) - set(NOT_TRIED))}


@on_ranks(2)
def test_an_optimizer_of_split_tensors_passes_if_and_only_if_its_steps_are_right(
    expected: dict[str, list[Tensor]],
) -> None:
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for name, build in OPTIMIZERS.items():
        params = on_parts(mesh, tagged=True)
        optimizer = build(params)
        said = verdict(optimizer)
        if name in NOT_TRIED:
            assert said.startswith(f"untried: {NOT_TRIED[name]} could not be tried"), (name, said)
            continue
        right = name in RIGHT_ON_PARTS
        assert said.startswith("passed" if right else "refused"), (name, said)
        assert is_right_on_parts(optimizer, params, expected[name]) is right, name


@on_ranks(2)
def test_an_optimizer_of_dtensors_passes_only_if_its_steps_are_right(expected: dict[str, list[Tensor]]) -> None:
    torch.distributed.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for name, build in OPTIMIZERS.items():
        params = on_parts(mesh, tagged=False)
        optimizer = build(params)
        said = verdict(optimizer)
        if name in NOT_TRIED:
            assert said.startswith(f"untried: {NOT_TRIED[name]} could not be tried"), (name, said)
        elif said == "passed":
            assert is_right_on_parts(optimizer, params, expected[name]), name
        else:
            assert "shard_adapters=False" in said, (name, said)
            if name in RIGHT_ON_PARTS:  # torch itself cannot step on them beside whole ones
                with pytest.raises(Exception):  # noqa: B017
                    stepped(optimizer, params)


class Factored(LanguageModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adafactor([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def fit_factored(strategy: Any) -> None:
    # ranks that share a model see the same batches
    data = rank_loader(0, 1) if isinstance(strategy, MegatronLoRAStrategy) else rank_loader(*rank_of())
    fit(None, Factored(), strategy, loaders={"train_dataloaders": data}, limit_train_batches=1)


def set_up_factored(strategy: Any) -> None:
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    model = inject(models.llama(), LoRAConfig(r=4))
    fabric.setup(model, torch.optim.Adafactor([p for p in model.parameters() if p.requires_grad], lr=1e-2))


@on_ranks(2)
def test_a_run_with_a_factored_optimizer_is_refused_at_the_start_where_adapters_are_in_parts() -> None:
    split, sharded = {"tensor_parallel_size": 2}, {"shard_adapters": True}
    for start, strategy, remedy in (
        (fit_factored, MegatronLoRAStrategy(**split), "strategy='fsdp_lora'"),
        (set_up_factored, twins.MegatronLoRAStrategy(**split), "strategy='fsdp_lora'"),
        (fit_factored, FSDPLoRAStrategy(**sharded), "shard_adapters=False"),
        (set_up_factored, twins.FSDPLoRAStrategy(**sharded), "shard_adapters=False"),
    ):
        error = error_of(start, strategy)
        assert "Adafactor with these settings does not step on parts" in error
        assert remedy in error
    assert error_of(fit_factored, "fsdp_lora") == error_of(set_up_factored, "fsdp_lora") == "none"
