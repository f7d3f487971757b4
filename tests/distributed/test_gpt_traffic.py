"""What adapters add to the collectives of Megatron-core's layers, and of a whole ``GPTModel``, on two gloo ranks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from lightning_lora import LoRAConfig, inject
from tests import models
from tests.distributed.counting import Traffic, counted_collectives
from tests.distributed.gpt import LOGIT_TOLERANCE, Module, launched
from tests.distributed.ranks import on_ranks

TOKENS, HIDDEN, RANK = 2 * 8, 32, 4  # batches of 2 x 8 tokens, 32 wide


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count Megatron-core's collectives too, which it looked up when it was imported."""
    from megatron.core.tensor_parallel import layers, mappings, utils

    with counted_collectives() as sizes:
        gather = {"dist_all_gather_func": torch.distributed.all_gather_into_tensor}
        scatter = {"dist_reduce_scatter_func": torch.distributed.reduce_scatter_tensor}
        with (
            mock.patch.multiple(layers, **gather, **scatter),
            mock.patch.multiple(mappings, **gather, **scatter),
            mock.patch.multiple(utils, **gather),
        ):
            yield sizes


def layer(kind: str, sequence_parallel: bool, **lora: Any) -> Any:
    """Return a frozen layer in a container: ``"column"`` 32 -> 64, ``"row"`` 64 -> 32; adapted if ``lora`` says how."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

    torch.manual_seed(3)
    shared = {
        "config": layer_config(sequence_parallel), "init_method": torch.nn.init.xavier_normal_, "bias": False,
        "skip_bias_add": True,
    }  # fmt: skip
    if kind == "column":
        linear = ColumnParallelLinear(32, 64, gather_output=False, **shared)
    else:
        linear = RowParallelLinear(64, 32, input_is_parallel=True, **shared)
    container = torch.nn.Sequential(linear)
    linear.weight.requires_grad_(False)
    return inject(container, LoRAConfig(r=RANK, target_modules=["0"], **lora)) if lora else container


def layer_config(sequence_parallel: bool) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, use_cpu_initialization=True, add_bias_linear=False,
        tensor_model_parallel_size=2, sequence_parallel=sequence_parallel,
    )  # fmt: skip


def traffic_of_layer(kind: str, sequence_parallel: bool, adapted: bool) -> list[dict[str, list[int]]]:
    """Return the elements that a rank sends in forward and in backward."""
    [linear] = layer(kind, sequence_parallel, **({"dropout": 0.1} if adapted else {}))
    tokens = 4 if sequence_parallel and kind == "column" else 8
    x = torch.randn(tokens, 2, 32, requires_grad=True)  # half the columns of a row-parallel layer's input
    with counted() as forward:
        y = linear(x)[0]
    with counted() as backward:
        y.sum().backward()
    return [dict(forward), dict(backward)]


def assert_added(base: Any, adapted: Any, gathered: list[int]) -> None:
    """Adapters add gathers in the forward and the same scatters in the backward, and nothing else."""
    base, adapted = deepcopy(base), deepcopy(adapted)
    assert sorted(adapted[0].pop("all_gather")) == sorted([*base[0].pop("all_gather"), *gathered])
    assert sorted(adapted[1].pop("reduce_scatter")) == sorted([*base[1].pop("reduce_scatter"), *gathered])
    assert adapted == base


@on_ranks(2)
def test_a_layer_adds_nothing_without_sequence_parallelism() -> None:
    launched(2)
    for kind in ("column", "row"):
        forward, backward = traffic_of_layer(kind, False, True)
        assert [forward, backward] == traffic_of_layer(kind, False, False)
        assert (forward if kind == "row" else backward)["all_reduce"] == [TOKENS * HIDDEN]


@on_ranks(2)
def test_with_it_a_row_adds_nothing_and_a_column_r_numbers_per_token() -> None:
    launched(2)
    row = traffic_of_layer("row", True, True)
    assert row == traffic_of_layer("row", True, False)
    assert row[1]["all_gather"] == [TOKENS * HIDDEN // 2]
    base, adapted = (traffic_of_layer("column", True, adapted) for adapted in (False, True))
    assert_added(base, adapted, [TOKENS * RANK // 2])


def traffic_of_model(hf: Path, sequence_parallel: bool, adapted: bool) -> list[dict[str, list[int]]]:
    module = Module(hf, sequence_parallel=sequence_parallel)
    module.configure_model()
    module.model.requires_grad_(False)
    module.model.embedding.register_forward_hook(lambda *args: args[2].requires_grad_(True))
    if adapted:
        inject(module.model, LoRAConfig(r=RANK))
    with counted() as forward:
        loss = module.training_step(models.token_ids(2, 8, seed=1), 0)
    with counted() as backward:
        loss.backward()
    return [dict(forward), dict(backward)]


@on_ranks(2)
def test_a_whole_model_adds_nothing_but_those(hf: Path) -> None:
    launched(2)
    assert traffic_of_model(hf, False, True) == traffic_of_model(hf, False, False)
    base, adapted = (traffic_of_model(hf, True, adapted) for adapted in (False, True))
    ranks = [3 * RANK, 2 * RANK] * 2  # q, k, v and gate, up of two blocks
    assert_added(base, adapted, [TOKENS * r // 2 for r in ranks])


def dropped_column(sequence_parallel: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, A's whole gradient and the input's of a layer with dropout, for one seed."""
    [linear], rank = layer("column", sequence_parallel, dropout=0.4), int(os.environ["RANK"])
    torch.manual_seed(4)
    x = torch.randn(8, 2, 32)
    linear.lora_B.data.copy_(torch.randn(64, RANK).chunk(2)[rank])
    x = x.chunk(2)[rank] if sequence_parallel else x
    x.requires_grad_()
    with mock.patch.object(type(linear), "dropout_seed", return_value=torch.tensor(123)):
        y = linear(x)[0]
    y.square().sum().backward()
    grad_A, grad_x = linear.lora_A.grad.clone(), x.grad
    torch.distributed.all_reduce(grad_A)
    if sequence_parallel:
        parts = [torch.empty_like(grad_x) for _ in range(2)]
        torch.distributed.all_gather(parts, grad_x)
        grad_x = torch.cat(parts)
    return y.detach(), grad_A, grad_x


@on_ranks(2)
def test_dropout_does_not_depend_on_sequence_parallelism() -> None:
    launched(2)
    torch.testing.assert_close(dropped_column(True), dropped_column(False), **LOGIT_TOLERANCE)
