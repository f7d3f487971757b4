"""``linear_cross_entropy`` on 2 and 4 gloo ranks, and on one process, against transformers' own loss."""

import itertools
import math
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lora import LoRAConfig, inject, linear_cross_entropy, named_adapter_parameters
from tests import models, zoo
from tests.distributed.launch import Launches
from tests.distributed.loss_script import AVERAGED, CASES, HEADLESS, SPLITS, TILE, Predicting, labels_of, unequal_labels
from tests.distributed.training import BATCH, fit
from tests.runs import ROWS

TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}  # other order of sums
ROUNDING = {"rtol": 0.05, "atol": 1e-3}  # of bfloat16, 2^-9, in several layers
HIDDEN = 32


class Whole(Predicting):
    """The same by transformers' own loss."""

    def loss(self, batch: Tensor, labels: Tensor) -> Tensor:
        loss = self.model(input_ids=batch, labels=labels).loss
        return loss if self.learns else 0.0 * self.model(input_ids=batch).logits.sum()  # theirs is nan


class Unequal(Whole):
    """The whole of a batch that ranks have unequal parts of."""

    def labels(self, batch: Tensor) -> Tensor:
        return unequal_labels(batch)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("loss")
    single = {}
    for case, (_, settings) in CASES.items():
        # dropout's mask on the head's input is of the positions that go through it
        single[case] = Predicting(case) if "dropout" in case else Whole(case)
        seed_everything(7, verbose=False)
        fit(None, single[case], "auto", limit_train_batches=1, **settings)
    for case, num_batches in itertools.product(("llama", "tied llama"), (1, 2)):
        module = Unequal(case)
        loaders = {"train_dataloaders": DataLoader(models.token_ids(ROWS, 8, seed=1), batch_size=BATCH * num_batches)}
        fit(None, module, "auto", lora=HEADLESS, loaders=loaders, limit_train_batches=1)
        single[f"whole {case}, {num_batches}"] = module
    torch.save({case: module.found["gradients"] for case, module in single.items()}, directory / "single.pt")
    return {"single": single, "found": Launches("loss_script.py", directory)}


def splits(run: dict[str, Any], case: str) -> list[dict[str, Any]]:
    """Return what every rank found of a case, split over two ranks and, of some, over four."""
    ranks = [rank for num_ranks in (2, 4) for rank in run["found"](num_ranks, "split")]
    return [found for rank in ranks for name, found in rank.items() if name.startswith(f"{case}, ")]


@pytest.mark.parametrize("case", CASES)
def test_loss_and_all_gradients_are_those_of_one_process(run: dict[str, Any], case: str) -> None:
    tolerance = ROUNDING if case == "bf16" else TOLERANCE
    for found in splits(run, case):
        torch.testing.assert_close(found["loss"], run["single"][case].found["loss"], **tolerance)
        torch.testing.assert_close(found["gradients"], found["expected"], **tolerance)
        assert all(gradient.any() for gradient in found["gradients"].values()) == (case != "nothing learned")
    assert len(splits(run, case)) == sum(num_ranks for num_ranks, of in SPLITS.items() for _, one in of if one == case)


@pytest.mark.parametrize("case", sorted(set(CASES) - {"odd vocabulary"}))
def test_a_split_head_costs_two_numbers_per_token(run: dict[str, Any], case: str) -> None:
    for found in splits(run, case):
        tokens, traffic, backward = found["learned"], found["traffic"], found["backward"]
        assert traffic["all_gather"] == [2 * tokens]
        assert traffic["all_reduce"] == backward["all_gather"] == []
        assert backward["all_reduce"][0] == tokens * HIDDEN  # the head's own, of the gradient of its input


def test_a_head_that_ranks_do_not_divide_stays_whole_and_costs_nothing(run: dict[str, Any]) -> None:
    for found in splits(run, "odd vocabulary"):
        assert not any(found["traffic"].values())
        assert not {"model.lm_head.weight", "model.model.embed_tokens.weight"} & set(found["split"])


def test_nothing_learned_is_a_loss_of_zero_and_moves_nothing(run: dict[str, Any]) -> None:
    for found in splits(run, "nothing learned"):
        assert found["loss"].item() == 0.0
        assert not any(gradient.any() for gradient in found["gradients"].values())


@pytest.mark.parametrize("num_batches", [1, 2])
@pytest.mark.parametrize("strategy", AVERAGED)
def test_gradients_over_unequal_ranks_are_those_of_the_whole_batch(
    run: dict[str, Any], strategy: str, num_batches: int
) -> None:
    expected = run["single"][f"whole {AVERAGED[strategy][0]}, {num_batches}"].found
    ranks = [rank[f"{strategy}, {num_batches}"] for rank in run["found"](4, "averaged")]
    counts = [number for rank in ranks for number in rank["labels"]]
    assert len(set(counts)) > 1
    assert strategy == "megatron_lora" or 0 in counts
    torch.testing.assert_close(
        torch.tensor([loss for rank in ranks for loss in rank["losses"]]).mean(), expected["loss"]
    )
    for number, rank in enumerate(ranks):
        torch.testing.assert_close(rank["gradients"], rank["expected"], **TOLERANCE)
        replica = ranks[number % 2 if strategy == "megatron_lora" else 0]
        torch.testing.assert_close(rank["gradients"], replica["gradients"], rtol=0.0, atol=0.0)
    if strategy == "megatron_lora":
        assert ranks[0]["losses"] == ranks[1]["losses"]


@pytest.mark.parametrize("num_batches", [1, 2])
def test_a_sharded_head_is_gathered_once_for_all_tiles(run: dict[str, Any], num_batches: int) -> None:
    for rank in run["found"](4, "averaged"):
        found = rank[f"fsdp_lora, {num_batches}"]
        for traffic in found["traffic"]:
            assert traffic["all_gather"] == [25 * HIDDEN]  # on the rank without labels too
            assert not traffic["all_reduce"]
        assert len(found["backward"]["all_gather"]) == 1  # the first block's


def test_no_strategy_has_more_than_a_tile_of_logits(run: dict[str, Any]) -> None:
    for strategy in AVERAGED:
        found = [rank[f"{strategy}, 2"] for rank in run["found"](4, "averaged")]
        assert max(max(one["largest"]) for one in found) == math.prod(TILE)
        assert max(max(one["labels"]) for one in found) > 2 * TILE[0]


@pytest.mark.parametrize("case", CASES)
def test_an_input_embedding_of_its_own_is_split_unless_it_trains(run: dict[str, Any], case: str) -> None:
    stays_whole = case in ("adapted table", "trained table", "odd vocabulary")
    for found in splits(run, case):
        assert ("model.model.embed_tokens.weight" in found["split"]) != stays_whole


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_the_loss_of_a_whole_head_is_transformers_own(name: str) -> None:
    model = next(f for f in zoo.FAMILIES if f.name == name).build()
    batch = models.token_ids(4, 8)
    inject(model, LoRAConfig(r=4))
    models.fill_adapters(model)
    labels = labels_of(batch)
    loss = linear_cross_entropy(model, model.model(batch).last_hidden_state, labels)
    torch.testing.assert_close(loss, model(batch, labels=labels).loss)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for _, p in named_adapter_parameters(model))


def test_nothing_learned_on_a_whole_head_has_zero_gradients() -> None:
    model = inject(models.llama(), LoRAConfig(r=4))
    batch = models.token_ids()
    loss = linear_cross_entropy(model, model.model(batch).last_hidden_state, torch.full_like(batch, -100))
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is not None and not p.grad.any() for _, p in named_adapter_parameters(model))


def test_another_index_can_stand_for_what_is_not_learned() -> None:
    model, batch = models.llama(), models.token_ids()
    hidden, labels = model.model(batch).last_hidden_state, labels_of(batch)
    expected = linear_cross_entropy(model, hidden, labels)
    assert torch.equal(
        linear_cross_entropy(model, hidden, labels.masked_fill(labels < 0, -1), ignore_index=-1), expected
    )


def test_what_the_loss_does_not_know_is_said() -> None:
    batch = models.token_ids()
    hidden = torch.zeros(*batch.shape, HIDDEN)
    with pytest.raises(ValueError, match=r"hidden \[2, 6, 32\] and labels \[2, 7\] must be"):
        linear_cross_entropy(models.llama(), hidden[:, 1:], batch)
    with pytest.raises(ValueError, match="Encoder has no output head: pass a transformers causal"):
        linear_cross_entropy(models.encoder(), hidden, batch)
    scaled = models.llama()
    scaled.config.logits_scaling = 4.0
    with pytest.raises(ValueError, match=r"logits_scaling=4.0, which this loss does not know: use model\(.*labels"):
        linear_cross_entropy(scaled, hidden, batch)
