"""Several backwards before a manual step under ``megatron_lora``, on 2 and 4 gloo ranks against one process."""

import pytest
import torch
from torch import Tensor

from tests.distributed.ranks import on_ranks
from tests.distributed.split import GRADIENT_TOLERANCE, Module, four_heads, run, whole_factors
from tests.distributed.training import STEP_TOLERANCE, Finetuned, alone, state


class TwoBackwards(Finetuned):
    def __init__(self) -> None:
        super().__init__()
        self.model = four_heads()

    def norm(self) -> float:
        return 0.0  # of a part it would be refused


@pytest.fixture(scope="module")
def first_gradients() -> dict[str, Tensor]:
    return alone(Module(), limit_train_batches=1).gradients


@on_ranks(2, 4)
def test_two_backwards_before_a_manual_step_count_once_each(first_gradients: dict[str, Tensor]) -> None:
    _, module = run(None, 2, TwoBackwards(), limit_train_batches=1, validates=False)
    for name in whole_factors(module):
        name = name.removeprefix("model.")
        torch.testing.assert_close(module.gradients[name], first_gradients[name], **GRADIENT_TOLERANCE)


class MixedSteps(Finetuned):
    """Runs one of two backwards before a step itself, past the strategy."""

    def __init__(self, raw: tuple[bool, bool]) -> None:
        super().__init__()
        self.model, self.raw = four_heads(), raw

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer = self.optimizers()
        for is_raw in self.raw:
            loss = self.model(input_ids=batch, labels=batch).loss / 2
            loss.backward() if is_raw else self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def single_mixed() -> dict[str, Tensor]:
    return state(alone(MixedSteps((True, False))))


@pytest.mark.parametrize("raw", [(True, False), (False, True)], ids=["raw first", "raw last"])
@on_ranks(2, 4)
def test_a_backward_past_the_strategy_counts_once_too(single_mixed: dict[str, Tensor], raw: tuple[bool, bool]) -> None:
    _, module = run(None, 2, MixedSteps(raw), validates=False)
    torch.testing.assert_close(state(module), single_mixed, **STEP_TOLERANCE)
