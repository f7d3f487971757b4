"""``linear_cross_entropy`` with an output head that 2 and 4 gloo ranks split, against transformers' own loss."""

import zlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import MegatronLoRAStrategy, linear_cross_entropy
from lightning_lora.ops.cross_entropy import tiles
from lightning_lora.ops.sharded import is_sharded, local_part, logical, spread_like, write
from tests import models
from tests.distributed.counting import counted_collectives
from tests.distributed.ranks import on_ranks
from tests.distributed.split import four_heads
from tests.distributed.training import fit, rank_loader, seeded
from tests.runs import LanguageModule

TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}  # other order of sums
ROUNDING = {"rtol": 0.05, "atol": 1e-3}  # of bfloat16, 2^-9, in several layers
HIDDEN = 32


def odd() -> nn.Module:
    """A Llama with a vocabulary that no number of ranks divides."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        vocab_size=models.VOCAB + 1,
    )  # fmt: skip
    return models._seeded(lambda: LlamaForCausalLM(config))


def capped() -> nn.Module:
    """A Gemma 2, which keeps its logits within bounds, and scales what its embedding gives."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
        head_dim=8, vocab_size=models.VOCAB, final_logit_softcapping=0.3, tie_word_embeddings=False,
    )  # fmt: skip
    return models._seeded(lambda: Gemma2ForCausalLM(config))


def padded() -> nn.Module:
    """A Llama whose padding token is in the last rank's rows."""
    model = four_heads()
    model.get_input_embeddings().padding_idx = models.VOCAB - 1
    return model


HEAD = {"target_modules": ["q_proj", "down_proj", "lm_head"]}
TABLE = {"target_modules": ["q_proj", "embed_tokens"]}
TILE = (2, 40)  # of the logits that are there at once; not what the sizes of these models would choose
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (four_heads, {}),
    "tied llama": (lambda: four_heads(tied=True), {}),
    "adapted head": (four_heads, {"lora": HEAD}),
    "adapted head with dropout": (four_heads, {"lora": {**HEAD, "dropout": 0.3}}),
    "adapted table": (four_heads, {"lora": TABLE}),
    "trained table": (four_heads, {"lora": {"modules_to_save": ["embed_tokens"]}}),
    "gemma2": (capped, {}),
    "odd vocabulary": (odd, {}),
    "padding": (padded, {}),
    "bf16": (four_heads, {"precision": "bf16-mixed"}),
    "nothing learned": (four_heads, {}),
}
# ranks, how many of them share a model, and which; on four, quarters of a vocabulary, and replicas
SPLITS = [(2, 2, case) for case in CASES] + [
    (4, 4, "llama"), (4, 4, "tied llama"), (4, 4, "padding"), (4, 4, "odd vocabulary"), (4, 2, "llama"),
]  # fmt: skip


def labels_of(batch: Tensor) -> Tensor:
    """Leave the first row's beginning, and every third position, out of the loss."""
    labels = batch.clone()
    labels[:, ::3] = -100
    labels[0, :5] = -100
    return labels


class Predicting(LanguageModule):
    """Keeps the loss and the gradients of its only step, and what went between ranks for the loss."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.model = CASES[case][0]().train()
        self.learns = case != "nothing learned"

    def loss_of(self, batch: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(self.model, self.model.model(batch).last_hidden_state, labels)

    @torch.no_grad()
    def on_train_start(self) -> None:
        """Let no factor be zero, of which the other's gradient would be too: the same values however they lie."""
        for name, parameter in self.named_parameters():
            if "lora_" in name:
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                write(parameter, 0.1 * torch.randn(logical(parameter).shape, generator=generator))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        labels = labels_of(batch) if self.learns else torch.full_like(batch, -100)
        self.num_learned = int((labels[:, 1:] != -100).sum())
        loss = self.loss_of(batch, labels)
        self.loss = loss.detach().clone()
        self._counting = counted_collectives()
        self.backward_traffic = self._counting.__enter__()
        return loss

    def on_after_backward(self) -> None:
        self._counting.__exit__(None, None, None)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.parameters_by_name = dict(self.named_parameters())
        self.gradients = {n: local_part(p.grad).clone() for n, p in self.parameters_by_name.items() if p.requires_grad}


class Counted(Predicting):
    """Counts what goes between ranks for the loss."""

    def loss_of(self, batch: Tensor, labels: Tensor) -> Tensor:
        hidden = self.model.model(batch).last_hidden_state
        with counted_collectives() as self.traffic:
            return linear_cross_entropy(self.model, hidden, labels)


class Whole(Predicting):
    """Computes the loss by transformers' own."""

    def loss_of(self, batch: Tensor, labels: Tensor) -> Tensor:
        loss = self.model(input_ids=batch, labels=labels).loss
        return loss if self.learns else 0.0 * self.model(input_ids=batch).logits.sum()  # theirs is nan


def stepped(module: Predicting, strategy: Any, case: str) -> Any:
    loaders = {"train_dataloaders": rank_loader(0, 1)}  # ranks get the same data
    with seeded(7):
        fit(None, module, strategy, loaders=loaders, limit_train_batches=1, **CASES[case][1])
    return module


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    """Return the loss and the gradients of every case on one process."""
    # dropout's mask on the head's input is of the positions that go through it
    classes = {case: Predicting if "dropout" in case else Whole for case in CASES}
    modules = {case: stepped(cls(case), "auto", case) for case, cls in classes.items()}
    return {case: (module.loss, module.gradients) for case, module in modules.items()}


@pytest.mark.parametrize(("num_ranks", "size", "case"), SPLITS)
@on_ranks()
def test_a_split_head_has_the_loss_and_all_gradients_of_one_process_for_two_numbers_per_token(
    single: dict[str, Any], num_ranks: int, size: int, case: str
) -> None:
    tiles._tile = lambda *_: TILE
    module = stepped(Counted(case), MegatronLoRAStrategy(tensor_parallel_size=size), case)
    loss, gradients = single[case]
    tolerance = ROUNDING if case == "bf16" else TOLERANCE
    torch.testing.assert_close(module.loss, loss, **tolerance)
    expected = {name: spread_like(value, module.parameters_by_name[name]).clone() for name, value in gradients.items()}
    torch.testing.assert_close(module.gradients, expected, **tolerance)

    # nothing learned is a loss of zero, and moves nothing
    learned = [bool(gradient.any()) for gradient in module.gradients.values()]
    assert all(learned) if module.learns else not any(learned) and module.loss.item() == 0.0

    # an input embedding of its own is split unless it trains
    split = {name for name, parameter in module.parameters_by_name.items() if is_sharded(parameter)}
    stays_whole = case in ("adapted table", "trained table", "odd vocabulary")
    assert ("model.model.embed_tokens.weight" in split) != stays_whole

    if case == "odd vocabulary":  # a head that ranks do not divide stays whole and costs nothing
        assert not any(module.traffic.values())
        assert "model.lm_head.weight" not in split
    else:
        assert module.traffic["all_gather"] == [2 * module.num_learned]
        assert module.traffic["all_reduce"] == module.backward_traffic["all_gather"] == []
        # the head's own, of the gradient of its input
        assert module.backward_traffic["all_reduce"][0] == module.num_learned * HIDDEN
