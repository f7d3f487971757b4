"""``megatron_lora`` in Fabric on 2 and 4 gloo ranks against one process, and loss scaling over ranks."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric

from lightning_lora import LoRACallback
from lightning_lora.distributed.overflow import keep_overflows, share_overflows
from lightning_lora.fabric import MegatronLoRAStrategy
from tests import runs
from tests.distributed import megatron_fabric_script as script
from tests.distributed.launch import Launches
from tests.distributed.training import Recorded

STEP_TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # lr 1e-2 / eps 1e-4 turns a rounding of 1e-8 into 1e-6 per step
GRADIENT_TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}  # other order of sums
EXACT = {"rtol": 0.0, "atol": 0.0}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fabric")


@pytest.fixture(scope="module")
def single(directory: Path) -> dict[str, Any]:
    """What one process finds, and its files."""
    script.four_heads().save_pretrained(directory / "saved")
    fabric = script.start()
    found = {
        **script.three_steps(fabric, directory / "one process.ckpt"),
        "by norm": script.accumulated(fabric, max_norm=0.05),
        "by value": script.accumulated(fabric, clip_val=0.001),
        "twice": script.twice_before_a_step(fabric),
    }
    module = Recorded()
    module.model = script.four_heads()
    trainer = runs.trainer(directory, LoRACallback(r=4), limit_train_batches=2)
    trainer.fit(module, runs.loader())
    trainer.save_checkpoint(directory / "trainer.ckpt")
    return found


@pytest.fixture(scope="module")
def found(directory: Path, single: Any) -> Launches:
    return Launches("megatron_fabric_script.py", directory, first="training")


both = pytest.mark.parametrize("num_ranks", [2, 4])
LAYOUTS = [(2, 2), (4, 2), (4, 4)]  # ranks, and how many of them share a model
layouts = pytest.mark.parametrize(("num_ranks", "size"), LAYOUTS)
CLIPPED = [(2, 2, "by norm"), (2, 2, "by value"), (4, 2, "by norm"), (4, 2, "by value"), (4, 4, "by norm")]


def trained(found: Launches, num_ranks: int, size: int) -> list[Any]:
    """Return what each rank found of training in one layout."""
    return [rank[f"tp{size}"] for rank in found(num_ranks, "training")]


class TestTraining:
    @layouts
    def test_gradients_and_three_steps_equal_one_process(
        self, found: Launches, single: Any, num_ranks: int, size: int
    ) -> None:
        for rank in trained(found, num_ranks, size):
            torch.testing.assert_close(rank["gradients"], single["gradients"], **GRADIENT_TOLERANCE)
            torch.testing.assert_close(rank["adapters"], single["adapters"], **STEP_TOLERANCE)
            torch.testing.assert_close(rank["losses"], single["losses"], **STEP_TOLERANCE)

    @layouts
    def test_whole_factors_are_bit_equal_on_all_ranks(self, found: Launches, num_ranks: int, size: int) -> None:
        first, *others = trained(found, num_ranks, size)
        for rank in others:
            assert len(rank["raw"]) == 14  # one factor of each adapted layer
            torch.testing.assert_close(rank["raw"], first["raw"], **EXACT)

    @layouts
    def test_ranks_that_share_a_model_get_the_same_rows_and_others_get_others(
        self, found: Launches, single: Any, num_ranks: int, size: int
    ) -> None:
        dealt = [rank["data"] for rank in trained(found, num_ranks, size)]
        for index, data in enumerate(dealt):
            assert torch.equal(data, dealt[index - index % size])
        together = torch.cat(dealt[::size], dim=1)
        assert torch.equal(together.sort(dim=1).values, single["data"].sort(dim=1).values)

    @pytest.mark.parametrize(("num_ranks", "size", "how"), CLIPPED)
    def test_accumulation_and_clipping_equal_one_process(
        self, found: Launches, single: Any, num_ranks: int, size: int, how: str
    ) -> None:
        expected = single[how]
        assert expected["norm"] is None or expected["norm"] > 0.1  # it is clipped
        for rank in trained(found, num_ranks, size):
            for part in ("accumulated", "norm", "clipped"):
                torch.testing.assert_close(rank[how][part], expected[part], **GRADIENT_TOLERANCE)
            torch.testing.assert_close(rank[how]["adapters"], expected["adapters"], **STEP_TOLERANCE)

    @layouts
    def test_gradients_move_only_with_the_last_backward(self, found: Launches, num_ranks: int, size: int) -> None:
        rank = trained(found, num_ranks, size)[0]["by norm"]
        rows = 4 * 8 * 32 * size // num_ranks  # what the layers sum themselves: tokens times hidden size
        assert set(rank["first"]) == {rows}
        # whole factors; parts over replicas
        assert len(rank["last"]) - len(rank["first"]) == (1 if size == num_ranks else 2)

    def test_each_backward_before_a_step_counts_once_for_who_reads(self, found: Launches, single: Any) -> None:
        for rank in found(4, "orders"):
            for read, expected in zip(rank["twice"]["reads"], single["twice"]["reads"], strict=True):
                torch.testing.assert_close(read, expected, **GRADIENT_TOLERANCE)

    @layouts
    def test_texts_are_those_of_one_process(self, found: Launches, single: Any, num_ranks: int, size: int) -> None:
        assert all(torch.equal(rank["text"], single["text"]) for rank in trained(found, num_ranks, size))


class TestOrders:
    def test_an_optimizer_made_after_the_model_trains_it_and_one_from_before_is_refused(
        self, found: Launches, single: Any
    ) -> None:
        for rank in found(4, "orders"):
            torch.testing.assert_close(rank["apart"], single["adapters"], **STEP_TOLERANCE)
            assert "call fabric.setup(model, optimizer) with both" in rank["early"]

    def test_the_name_in_the_registry_chooses_the_size_from_the_first_model(self, found: Launches) -> None:
        assert [rank["ranks"] for rank in found(4, "orders")] == [2] * 4

    def test_a_model_without_gradients_is_left_alone_beside_another(self, found: Launches) -> None:
        for rank in found(4, "orders"):
            assert set(rank["company"].values()) == {None}

    def test_a_base_on_meta_is_read_in_slices(self, found: Launches, single: Any) -> None:
        for rank in found(4, "orders"):
            assert rank["was_meta"]
            torch.testing.assert_close(rank["meta"], single["gradients"], **GRADIENT_TOLERANCE)


class TestFiles:
    @layouts
    def test_a_step_after_loading_is_that_of_a_run_that_went_on(
        self, found: Launches, num_ranks: int, size: int
    ) -> None:
        for rank in trained(found, num_ranks, size):
            assert rank["step"] == 3
            torch.testing.assert_close(rank["resumed"], rank["going_on"], **EXACT)

    @layouts
    def test_the_file_is_that_of_one_process(self, found: Launches, num_ranks: int, size: int) -> None:
        found(num_ranks, "training")
        expected, read = (read_file(found, num_ranks, name) for name in ("one process", f"tp{size}"))
        torch.testing.assert_close(read["model"], expected["model"], **STEP_TOLERANCE)
        torch.testing.assert_close(read["optimizer"]["state"], expected["optimizer"]["state"], **STEP_TOLERANCE)
        ours, theirs = (file["lightning_lora"]["adapters"][0]["base"] for file in (read, expected))
        assert torch.equal(ours["hashes"], theirs["hashes"])

    @pytest.mark.parametrize("source", script.SOURCES)
    def test_any_file_is_written_again_as_it_was_read(self, found: Launches, source: str) -> None:
        found(2, "files")
        original, again = (read_file(found, 2, name) for name in (source, f"{source} again"))
        torch.testing.assert_close(again["model"], tensors_of(original), **EXACT)
        torch.testing.assert_close(again["optimizer"]["state"], moments_of(original), **EXACT)

    def test_fsdp_and_one_process_read_it(self, found: Launches) -> None:
        found(2, "files")
        original, again = (read_file(found, 2, name) for name in ("tp2", "tp2 by fsdp"))
        torch.testing.assert_close(again["model"], original["model"], **EXACT)
        torch.testing.assert_close(again["optimizer"]["state"], original["optimizer"]["state"], **EXACT)
        fabric = script.start()
        model, optimizer = fabric.setup(*script.make())
        fabric.load(found.directory(2) / "tp2.ckpt", {"model": model, "optimizer": optimizer})
        torch.testing.assert_close(script.adapters(model), original["model"], **EXACT)
        torch.testing.assert_close(optimizer.state_dict()["state"], original["optimizer"]["state"], **EXACT)


def read_file(found: Launches, num_ranks: int, name: str) -> Any:
    return torch.load(found.directory(num_ranks) / f"{name}.ckpt", weights_only=True)


def tensors_of(file: dict[str, Any]) -> Any:
    """Return the adapters of Fabric's file, or of the Trainer's."""
    if "model" in file:
        return file["model"]
    return {name.removeprefix("model."): value for name, value in file["state_dict"].items()}


def moments_of(file: dict[str, Any]) -> Any:
    return (file["optimizer"] if "optimizer" in file else file["optimizer_states"][0])["state"]


class TestOverflow:
    @both
    def test_all_ranks_skip_the_step_in_which_one_finds_an_overflow_and_take_the_next(
        self, found: Launches, num_ranks: int
    ) -> None:
        first, *_ = ranks = found(num_ranks, "overflows")
        assert len(first) == (5 if num_ranks == 2 else 2)
        for case in first:
            for rank in ranks:
                assert [any_moved for any_moved, _ in rank[case]["moved"]] == [True, False, True], case
                assert [all_moved for _, all_moved in rank[case]["moved"]] == [True, False, True], case
                assert rank[case]["scales"] == [script.INIT_SCALE, script.INIT_SCALE / 2, script.INIT_SCALE / 2], case
                torch.testing.assert_close(rank[case]["raw"], first[case]["raw"], **EXACT)

    @both
    def test_gradients_are_reduced_in_the_scaled_domain(self, found: Launches, single: Any, num_ranks: int) -> None:
        for rank in found(num_ranks, "overflows"):
            for name, gradient in rank["clipped"]["gradients"].items():
                expected = single["gradients"][name]
                error = (gradient / script.INIT_SCALE - expected).norm() / expected.norm()
                assert error < 0.02, name  # ten bits of float16, through two blocks

    def test_a_trainers_scaler_is_its_own_again_after_the_run(self, found: Launches) -> None:
        assert all(rank["trainer"]["is_undone"] for rank in found(2, "overflows"))

    def test_gradients_are_reduced_before_the_check_and_a_scaler_is_wrapped_once(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_: None)
        parameter = torch.nn.Parameter(torch.ones(2))
        optimizer, scaler = torch.optim.SGD([parameter]), torch.amp.GradScaler("cpu", init_scale=2.0)
        calls: list[Any] = []
        for _ in range(2):
            share_overflows(scaler, lambda: calls.append(parameter.grad.clone()))
        scaler.scale(parameter.sum()).backward()
        scaler.unscale_(optimizer)
        torch.testing.assert_close(calls, [torch.full((2,), 2.0)])
        torch.testing.assert_close(parameter.grad, torch.ones(2))
        keep_overflows(scaler)
        assert "_unscale_grads_" not in vars(scaler)

    def test_a_scaler_without_the_method_is_refused_by_name(self) -> None:
        with pytest.raises(ValueError, match="not served with NoScaler of torch .* no '_unscale_grads_'"):
            share_overflows(NoScaler(), lambda: None)


class NoScaler:
    pass


class TestRefusals:
    @pytest.mark.parametrize(
        ("case", "message"),
        [
            ("bare", "'megatron_lora' .* LlamaForCausalLM holds no adapters"),
            ("batches", "ranks that share a model were given different batches"),
            ("auto before a model", r"call fabric.setup\(model\) before fabric.setup_dataloaders"),
            ("other groups", "another strategy has laid the ranks out since this one did: 1 share a model, and here"),
            ("data of other groups", "1 share a model, and here"),
        ],
    )
    def test_what_cannot_be_served_is_said(self, found: Launches, case: str, message: str) -> None:
        for rank in found(2, "refusals"):
            assert re.search(message, rank[case]), rank[case]

    @both
    def test_groups_of_a_given_size_are_there_after_launch(self, found: Launches, num_ranks: int) -> None:
        assert {rank["groups"] for rank in found(num_ranks, "refusals")} == {str(num_ranks)}

    @both
    def test_a_later_model_that_the_ranks_do_not_divide_is_said_with_the_numbers(
        self, found: Launches, num_ranks: int
    ) -> None:
        field, heads = ("num_attention_heads", 6) if num_ranks == 4 else ("num_key_value_heads", 3)
        message = f"{field}={heads} of LlamaForCausalLM is not divisible by tensor_parallel_size={num_ranks}"
        for rank in found(num_ranks, "refusals"):
            assert message in rank["later model"]


def test_options_are_those_of_the_trainers(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="has no option 'tensor_paralel_size'; nearest: tensor_parallel_size"):
        MegatronLoRAStrategy(tensor_paralel_size=2)
    with pytest.raises(ValueError, match="pipeline_parallel_size=2 is not served"):
        MegatronLoRAStrategy(pipeline_parallel_size=2)


def test_one_process_is_a_run_like_any_other_also_after_its_group_is_gone(single: Any) -> None:
    for _ in range(2):
        fabric = Fabric(accelerator="cpu", devices=1, strategy="megatron_lora")
        fabric.launch()
        model, optimizer = fabric.setup(*script.make())
        losses = [script.step(fabric, model, optimizer, batch) for batch in list(script.batches(fabric))[:3]]
        torch.testing.assert_close(losses, single["losses"], **STEP_TOLERANCE)
        torch.distributed.destroy_process_group()
