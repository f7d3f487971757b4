"""Training Megatron-core's ``GPTModel`` on 2 and 4 gloo ranks against Hugging Face's model on one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_lora import LoRAConfig, inject, named_adapter_parameters
from tests.distributed.counting import counted_collectives
from tests.distributed.gpt import GRADIENT_TOLERANCE, STEP_TOLERANCE, Alone, Module, adapters, run, sequence_parallelism
from tests.distributed.ranks import on_ranks
from tests.distributed.split import whole_factors
from tests.distributed.training import EXACT, alone, from_all_ranks, rank_of, state

RECOMPUTE = {"recompute_granularity": "full"}
# ranks, how many of them share a model, sequence parallelism, recomputation; on four: parts of a quarter, and replicas
LAYOUTS = [
    *((2, 2, sequence, recomputes) for sequence in (False, True) for recomputes in (False, True)),
    (4, 4, True, False),
    (4, 2, False, False),
]


class Counted(Module):
    """Counts what goes between ranks from the end of a backward to the gradients that an optimizer reads."""

    def backward(self, loss: Tensor) -> None:
        loss.backward()
        self._counting = counted_collectives()
        self.reducing = self._counting.__enter__()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._counting.__exit__(None, None, None)
        super().on_before_optimizer_step(optimizer)


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    """Return what there is to see of two epochs of Hugging Face's model."""
    module = alone(Alone(), max_epochs=2)
    return {"gradients": module.gradients, "adapters": state(module), "losses": module.losses}


@pytest.mark.parametrize(("num_ranks", "size", "sequence_parallel", "recomputes"), LAYOUTS)
@on_ranks()
def test_losses_gradients_and_eight_steps_equal_hugging_faces_model_on_one_process(
    hf: Path, single: dict[str, Any], num_ranks: int, size: int, sequence_parallel: bool, recomputes: bool
) -> None:
    module = Counted(hf, sequence_parallel=sequence_parallel, **(RECOMPUTE if recomputes else {}))
    run(None, size, module, max_epochs=2)
    losses = torch.tensor(from_all_ranks(module.losses)).mean(0)
    torch.testing.assert_close(losses, torch.tensor(single["losses"]), **STEP_TOLERANCE)
    torch.testing.assert_close(module.gradients, single["gradients"], **GRADIENT_TOLERANCE)
    torch.testing.assert_close(adapters(module), single["adapters"], **STEP_TOLERANCE)
    norm, expected = (
        torch.stack([g.norm() for g in all_of.values()]).norm() for all_of in (module.gradients, single["gradients"])
    )
    torch.testing.assert_close(norm, expected, rtol=1e-5, atol=0)
    factors = whole_factors(module)
    torch.testing.assert_close(factors, from_all_ranks(factors)[0], **EXACT)

    # whole factors take one all-reduce per step, and parts one over replicas
    traffic = module.reducing
    assert len(traffic["all_reduce"]) == (1 if size == num_ranks else 2)
    assert traffic["all_reduce"][0] > sum(value.numel() for value in factors.values())  # and flags
    assert traffic["all_gather"] == traffic["reduce_scatter"] == traffic["broadcast"] == []


@sequence_parallelism
@on_ranks(2)
def test_dropout_leaves_whole_factors_bit_equal(hf: Path, single: dict[str, Any], sequence_parallel: bool) -> None:
    module = Module(hf, sequence_parallel=sequence_parallel)
    run(None, 2, module, lora={"dropout": 0.3})
    torch.testing.assert_close(whole_factors(module), from_all_ranks(whole_factors(module))[0], **EXACT)
    assert abs(module.losses[1] - single["losses"][1]) > 1e-4


CLIPPED = {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2}


@pytest.fixture(scope="module")
def single_clipped() -> dict[str, Tensor]:
    return state(alone(Alone(), **CLIPPED))


@on_ranks(2, 4)
def test_clipping_and_accumulation_equal_one_process(hf: Path, single_clipped: dict[str, Tensor]) -> None:
    module = Module(hf)
    run(None, 2, module, **CLIPPED)  # one norm over parts and whole factors, and over replicas
    torch.testing.assert_close(adapters(module), single_clipped, **STEP_TOLERANCE)


RANKS_OF_THEIR_OWN = {"q_proj": 4, "v_proj": 2, "down_proj": 6}


@pytest.fixture(scope="module")
def single_of_some_layers() -> tuple[Any, Any]:
    module = alone(Alone(), lora={"target_modules": list(RANKS_OF_THEIR_OWN), "rank_pattern": RANKS_OF_THEIR_OWN})
    return module.gradients, state(module)


@on_ranks(2)
def test_targets_of_both_vocabularies_with_ranks_of_their_own_equal_one_process(
    hf: Path, single_of_some_layers: tuple[Any, Any]
) -> None:
    module = Module(hf)
    targets = {"target_modules": ["q_proj", "v_proj", "linear_fc2"], "rank_pattern": {"v_proj": 2, "linear_fc2": 6}}
    run(None, 2, module, lora=targets)
    gradients, expected = single_of_some_layers
    torch.testing.assert_close(module.gradients, gradients, **GRADIENT_TOLERANCE)
    torch.testing.assert_close(adapters(module), expected, **STEP_TOLERANCE)


@sequence_parallelism
@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
@on_ranks(2)
def test_half_precision_follows_the_losses_of_single_precision(
    hf: Path, single: dict[str, Any], precision: str, sequence_parallel: bool
) -> None:
    module = Module(hf, sequence_parallel=sequence_parallel)
    run(None, 2, module, precision=precision)
    expected_dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert next(module.parameters()).dtype == expected_dtype
    torch.testing.assert_close(module.losses, single["losses"][:4], rtol=0.0, atol=0.01)


@on_ranks(2)
def test_a_fused_pair_trains_and_resumes_on_another_number_of_ranks(tmp_path: Path, hf: Path) -> None:
    module, lora = Module(hf), {"fused_pairs": True}
    run(tmp_path, 2, module, lora=lora)
    names = [name for name, _ in named_adapter_parameters(module)]
    assert "decoder.layers.0.self_attention.linear_qkv.lora_A" in names
    assert len(names) == 2 * 4 * 2  # two blocks, four layers, A and B
    assert abs(module.losses[-1] - module.losses[0]) > 1e-3
    torch.testing.assert_close(whole_factors(module), from_all_ranks(whole_factors(module))[0], **EXACT)

    again = Module(hf)
    run(None, 1, again, lora=lora, ckpt_path=tmp_path / "epoch=0.ckpt", max_epochs=2)
    losses = torch.tensor(from_all_ranks(again.losses)).mean(0)  # of two replicas
    assert len(losses) == 4
    assert losses[0] < module.losses[0]  # the same batches


class Late(Module):
    """Adapts its own model, and begins to train some split factors in its second epoch."""

    def configure_model(self) -> None:
        if self.model is None:
            super().configure_model()
            inject(self.model, LoRAConfig(r=4))
            self.late = [p for n, p in self.model.named_parameters() if "layers.0" in n and "lora_B" in n]
            for parameter in self.late:
                parameter.requires_grad_(False)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            for parameter in self.late:
                parameter.requires_grad_(True)
            self.optimizers().add_param_group({"params": self.late})


@on_ranks(4)
def test_split_factors_that_are_unfrozen_later_are_averaged(hf: Path) -> None:
    module, (rank, _) = Late(hf), rank_of()
    run(None, 2, module, max_epochs=2)
    factors = {n: p.detach().clone() for n, p in module.model.named_parameters() if "lora_B" in n}
    assert all(value.any() for value in factors.values())
    torch.testing.assert_close(factors, from_all_ranks(factors)[rank % 2], **EXACT)  # the same part, of another replica
