"""``linear_cross_entropy(num_items=...)`` over ranks with unequal numbers of labels: the gradients of one large batch."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora import FSDPLoRAStrategy, MegatronLoRAStrategy, linear_cross_entropy
from lightning_lora.ops.cross_entropy import tiles
from lightning_lora.ops.sharded import local_part, logical, spread_like, write
from tests import models
from tests.distributed.counting import counted_collectives
from tests.distributed.ranks import on_ranks
from tests.distributed.split import four_heads
from tests.distributed.training import BATCH, EXACT, SHARDED, fit, from_all_ranks, rank_loader, rank_of
from tests.live_bytes import watched
from tests.runs import ROWS, LanguageModule

TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}  # other order of sums
HIDDEN = 32
TILE = (2, 40)  # of the logits that are there at once; not what the sizes of these models would choose
STRATEGIES: dict[str, tuple[Any, int]] = {  # and how many ranks share a model
    "ddp": (lambda: "ddp", 1),
    "fsdp_lora": (lambda: FSDPLoRAStrategy(**SHARDED), 1),
    "fsdp_lora, tied": (lambda: FSDPLoRAStrategy(**SHARDED), 1),
    "megatron_lora": (lambda: MegatronLoRAStrategy(tensor_parallel_size=2), 2),
}


def labels_of(batch: Tensor) -> Tensor:
    """Learn the tokens that are larger than their row's first; some rows have none."""
    return batch.masked_fill(batch <= batch[:, :1], -100)


class Whole(LanguageModule):
    """Keeps the loss and the gradients of its only step, on a batch that ranks have unequal parts of."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.model = four_heads(tied=tied).train()

    @torch.no_grad()
    def on_train_start(self) -> None:
        """Let no factor be zero, of which the other's gradient would be too: the same values however they lie."""
        for index, parameter in enumerate(p for n, p in self.named_parameters() if "lora_" in n):
            generator = torch.Generator().manual_seed(index)
            write(parameter, 0.1 * torch.randn(logical(parameter).shape, generator=generator))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.model(input_ids=batch, labels=labels_of(batch)).loss
        self.loss = loss.detach().clone()
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.parameters_by_name = dict(self.named_parameters())
        self.gradients = {n: local_part(p.grad).clone() for n, p in self.parameters_by_name.items() if p.requires_grad}


class Averaged(Whole):
    """Divides by the mean number of labels, of which every row has others and some have none."""

    def __init__(self, tied: bool, num_items: float | None = None) -> None:
        super().__init__(tied)
        self.num_items = num_items
        self.num_labels: list[int] = []
        self.largest: list[int] = []
        self.losses: list[float] = []
        self.traffic: list[dict[str, list[int]]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        labels = labels_of(batch)
        num_labels = (labels[:, 1:] != -100).sum().float()
        self.num_labels.append(int(num_labels))  # reduce() changes it in place
        num_items = self.num_items or self.trainer.strategy.reduce(num_labels, reduce_op="mean")
        hidden = self.model.model(batch).last_hidden_state
        with counted_collectives() as traffic, watched(self.model.lm_head.weight.shape[1]) as found:
            loss = linear_cross_entropy(self.model, hidden, labels, num_items=num_items)
        self.traffic.append(dict(traffic))
        self.largest.append(found.largest)
        self.losses.append(loss.detach().item())
        self._counting = counted_collectives()
        self.backward_traffic = self._counting.__enter__()
        return loss

    def on_after_backward(self) -> None:
        self._counting.__exit__(None, None, None)


def stepped(module: Whole, strategy: Any, loader: Any, num_batches: int = 1) -> Any:
    lora, loaders = {"target_modules": ["q_proj", "down_proj"]}, {"train_dataloaders": loader}
    settings = {"limit_train_batches": num_batches, "accumulate_grad_batches": num_batches}
    fit(None, module, strategy, lora=lora, loaders=loaders, **settings)
    return module


def rows(num_batches: int) -> Tensor:
    return models.token_ids(ROWS, 8, seed=1)[: BATCH * num_batches]


@pytest.fixture(scope="module")
def single() -> dict[tuple[bool, int], Any]:
    """Return the loss and the gradients of one step on one process, by whether embedding and head are tied."""
    found = {}
    for tied, num_batches in ((False, 1), (False, 2), (True, 1), (True, 2)):
        batch = DataLoader(rows(num_batches), batch_size=BATCH * num_batches)
        module = stepped(Whole(tied), "auto", batch)
        found[tied, num_batches] = (module.loss, module.gradients)
    return found


@pytest.mark.parametrize("num_batches", [1, 2])
@pytest.mark.parametrize("name", STRATEGIES)
@on_ranks(4)
def test_gradients_over_unequal_ranks_are_those_of_the_whole_batch(
    single: dict[tuple[bool, int], Any], name: str, num_batches: int
) -> None:
    tiles._tile = lambda *_: TILE
    strategy, sharing = STRATEGIES[name]
    tied, (rank, num_ranks) = "tied" in name, rank_of()
    replicas = num_ranks // sharing
    num_labels = int((labels_of(rows(num_batches))[:, 1:] != -100).sum())
    module = Averaged(tied, num_labels / (replicas * num_batches) if num_batches > 1 else None)
    stepped(module, strategy(), rank_loader(rank // sharing, replicas), num_batches)

    loss, gradients = single[tied, num_batches]
    everyones = from_all_ranks(module.losses)
    torch.testing.assert_close(torch.tensor(everyones).mean(), loss)
    expected = {name: spread_like(value, module.parameters_by_name[name]).clone() for name, value in gradients.items()}
    torch.testing.assert_close(module.gradients, expected, **TOLERANCE)
    # of ranks with the same part; and ranks that share a model have one loss
    torch.testing.assert_close(module.gradients, from_all_ranks(module.gradients)[rank % sharing], **EXACT)
    assert module.losses == everyones[rank - rank % sharing]

    counts = [count for counts in from_all_ranks(module.num_labels) for count in counts]
    assert len(set(counts)) > 1
    assert name == "megatron_lora" or 0 in counts

    # no rank has more than a tile of logits
    if num_batches == 2:
        assert max(max(largest) for largest in from_all_ranks(module.largest)) == math.prod(TILE)
        assert max(counts) > 2 * TILE[0]

    if name == "fsdp_lora":  # a sharded head is gathered once for all tiles, on the rank without labels too
        for traffic in module.traffic:
            assert traffic["all_gather"] == [25 * HIDDEN]
            assert not traffic["all_reduce"]
        assert len(module.backward_traffic["all_gather"]) == 1  # the first block's
