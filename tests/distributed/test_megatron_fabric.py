"""``megatron_lora`` in Fabric on 2 and 4 gloo ranks against one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor

from tests import models
from tests.distributed.counting import counted_collectives
from tests.distributed.ranks import on_ranks
from tests.distributed.split import GRADIENT_TOLERANCE, four_heads, layouts, whole_factors
from tests.distributed.split_fabric import adapters, batches, gradients, loss_of, make, start, step
from tests.distributed.training import EXACT, PROMPTS, STEP_TOLERANCE, from_all_ranks, rank_of


def three_steps(fabric: Fabric, model: Any, optimizer: Any, data: list[Tensor]) -> list[Tensor]:
    return [step(fabric, model, optimizer, batch) for batch in data[:3]]


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    """Return what one process finds: the rows, the first gradients, and three steps."""
    fabric = start()
    model, optimizer = fabric.setup(*make())
    data = list(batches(fabric))
    fabric.backward(loss_of(model, data[0]))
    found = {"data": torch.stack(data), "gradients": gradients(model)}
    optimizer.zero_grad()
    found |= {"losses": three_steps(fabric, model, optimizer, data), "adapters": adapters(model)}
    step(fabric, model, optimizer, data[3])
    found["text"] = model.eval().generate(PROMPTS[:1], max_new_tokens=4, do_sample=False)
    return found


@layouts
@on_ranks()
def test_gradients_and_three_steps_equal_one_process(single: dict[str, Any], num_ranks: int, size: int) -> None:
    fabric, (rank, _) = start(tensor_parallel_size=size), rank_of()
    model, optimizer = fabric.setup(*make())
    data = list(batches(fabric))

    # ranks that share a model get the same rows, and others get others
    dealt = from_all_ranks(torch.stack(data))
    assert torch.equal(dealt[rank], dealt[rank - rank % size])
    together = torch.cat(dealt[::size], dim=1)
    assert torch.equal(together.sort(dim=1).values, single["data"].sort(dim=1).values)

    fabric.backward(loss_of(model, data[0]))
    torch.testing.assert_close(gradients(model), single["gradients"], **GRADIENT_TOLERANCE)
    optimizer.zero_grad()
    losses = three_steps(fabric, model, optimizer, data)
    torch.testing.assert_close(losses, single["losses"], **STEP_TOLERANCE)
    torch.testing.assert_close(adapters(model), single["adapters"], **STEP_TOLERANCE)
    factors = whole_factors(model.module)
    assert len(factors) == 14  # one factor of each adapted layer
    torch.testing.assert_close(factors, from_all_ranks(factors)[0], **EXACT)

    step(fabric, model, optimizer, data[3])
    assert torch.equal(model.eval().generate(PROMPTS[:1], max_new_tokens=4, do_sample=False), single["text"])


CLIPPING: dict[str, dict[str, float]] = {"by norm": {"max_norm": 0.05}, "by value": {"clip_val": 0.001}}
CLIPPED = [(2, 2, "by norm"), (2, 2, "by value"), (4, 2, "by norm"), (4, 2, "by value"), (4, 4, "by norm")]


def accumulated(fabric: Fabric, how: str) -> dict[str, Any]:
    """Take two steps of two backwards each, clipped; return the last gradients, and the sizes of all-reduces."""
    model, optimizer = fabric.setup(*make())
    found: dict[str, Any] = {"all-reduces": []}
    for index, batch in enumerate(batches(fabric)):
        is_last = index % 2 == 1
        loss = loss_of(model, batch) / 2
        with fabric.no_backward_sync(model, enabled=not is_last), counted_collectives() as traffic:
            fabric.backward(loss)
        found["all-reduces"].append(traffic["all_reduce"])
        if is_last:
            found["gradients"] = gradients(model)
            found["norm"] = fabric.clip_gradients(model, optimizer, **CLIPPING[how])
            found["clipped"] = gradients(model)
            optimizer.step()
            optimizer.zero_grad()
    return {**found, "adapters": adapters(model)}


@pytest.fixture(scope="module")
def single_accumulated() -> dict[str, Any]:
    return {how: accumulated(start(), how) for how in CLIPPING}


@pytest.mark.parametrize(("num_ranks", "size", "how"), CLIPPED)
@on_ranks()
def test_accumulation_and_clipping_equal_one_process_and_reduce_with_the_last_backward(
    single_accumulated: dict[str, Any], num_ranks: int, size: int, how: str
) -> None:
    expected, found = single_accumulated[how], accumulated(start(tensor_parallel_size=size), how)
    assert expected["norm"] is None or expected["norm"] > 0.1  # it is clipped
    for part in ("gradients", "norm", "clipped"):
        torch.testing.assert_close(found[part], expected[part], **GRADIENT_TOLERANCE)
    torch.testing.assert_close(found["adapters"], expected["adapters"], **STEP_TOLERANCE)

    first, last = found["all-reduces"][:2]
    assert set(first) == {4 * 8 * 32 * size // num_ranks}  # what the layers sum themselves: tokens times hidden size
    # whole factors; parts over replicas
    assert len(last) - len(first) == (1 if size == num_ranks else 2)


def read_twice(fabric: Fabric) -> list[dict[str, Tensor | None]]:
    """Return the gradients after one backward, and after two."""
    model, _ = fabric.setup(*make())
    found = []
    for batch in list(batches(fabric))[:2]:
        fabric.backward(loss_of(model, batch))
        found.append(gradients(model))
    return found


@pytest.fixture(scope="module")
def single_read_twice() -> list[dict[str, Tensor | None]]:
    return read_twice(start())


@on_ranks(4)
def test_each_backward_before_a_step_counts_once_for_who_reads(single_read_twice: list[Any]) -> None:
    fabric = start("megatron_lora")
    torch.testing.assert_close(read_twice(fabric), single_read_twice, **GRADIENT_TOLERANCE)
    # the name in the registry chooses the size from the first model
    assert fabric.strategy.device_mesh.size() == 2


@on_ranks(4)
def test_an_optimizer_made_after_the_model_trains_it_and_one_from_before_is_refused(single: dict[str, Any]) -> None:
    fabric, (model, early) = start("megatron_lora"), make()
    model = fabric.setup_module(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, eps=1e-4)
    optimizer = fabric.setup_optimizers(optimizer)
    data = list(batches(fabric))
    three_steps(fabric, model, optimizer, data)
    torch.testing.assert_close(adapters(model), single["adapters"], **STEP_TOLERANCE)
    with pytest.raises(ValueError, match=r"call fabric\.setup\(model, optimizer\) with both"):
        fabric.setup_optimizers(early)

    # a model without gradients is left alone beside another
    other, other_optimizer = fabric.setup(*make(models.qwen3))
    fabric.backward(loss_of(other, data[0]))
    assert set(gradients(model).values()) == {None}
    other_optimizer.step()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    four_heads().save_pretrained(tmp_path)
    return tmp_path


@on_ranks(4)
def test_a_base_on_meta_is_read_in_slices(saved: Path, single: dict[str, Any]) -> None:
    fabric = start(tensor_parallel_size=2, base_weights=str(saved))
    with fabric.init_module(empty_init=True):
        base = four_heads()
    assert base.model.layers[0].mlp.up_proj.weight.is_meta
    model, _ = fabric.setup(*make(lambda: base))
    fabric.backward(loss_of(model, next(iter(batches(fabric)))))
    torch.testing.assert_close(gradients(model), single["gradients"], **GRADIENT_TOLERANCE)


def test_one_process_is_a_run_like_any_other_also_after_its_group_is_gone(single: dict[str, Any]) -> None:
    for _ in range(2):
        fabric = Fabric(accelerator="cpu", devices=1, strategy="megatron_lora")
        fabric.launch()
        model, optimizer = fabric.setup(*make())
        losses = three_steps(fabric, model, optimizer, list(batches(fabric)))
        torch.testing.assert_close(losses, single["losses"], **STEP_TOLERANCE)
        torch.distributed.destroy_process_group()
