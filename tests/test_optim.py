"""``LoRAAdamW`` against ``torch.optim.AdamW``: values, state and files, also where torch's fused step errs or refuses."""

import copy
import io
import pickle
import sys
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI, OptimizerCallable
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lora import LoRAAdamW, LoRACallback, LoRAConfig, adapter_state_dict, inject, save_peft
from lightning_lora.optim.flat import zeros_together
from tests import models
from tests.runs import LanguageModule, loader, same_adapters, trainer

SHAPES = [(8, 32), (16, 8), (7,), (), (3, 5, 2), (33, 8)]
SETTINGS = [
    {},
    {"betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.3},
    {"amsgrad": True},
    {"maximize": True, "weight_decay": 0.0},
    {"lr": torch.tensor(0.05)},
]


def parameters(dtype: torch.dtype = torch.float32, shapes=None) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes or SHAPES
    ]


def fill(params: list[nn.Parameter], step: int, absent=lambda step, i: False) -> None:
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(100 * step + i)
        gradient = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        p.grad = None if absent(step, i) else gradient


def run(optimizer, params: list[nn.Parameter], steps=range(5), **kwargs) -> None:
    for step in steps:
        fill(params, step, **kwargs)
        optimizer.step()


def assert_equal(ours, theirs, params: list[nn.Parameter], others: list[nn.Parameter]) -> None:
    """Parameters and state are the same to the bit."""
    assert all(map(torch.equal, params, others))
    mine, other = ours.state_dict(), theirs.state_dict()
    torch.testing.assert_close(mine["state"], other["state"], rtol=0, atol=0)
    assert {type(entry["step"]) for entry in mine["state"].values()} == {Tensor}


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_five_steps_are_those_of_the_fused_adamw_to_the_bit(settings, dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    one, other = LoRAAdamW(ours, **settings), AdamW(theirs, fused=True, **settings)
    run(one, ours)
    run(other, theirs)
    assert_equal(one, other, ours, theirs)


@pytest.mark.parametrize("settings", SETTINGS[:4], ids=str)
def test_five_steps_are_those_of_the_for_loop_in_float64(settings) -> None:
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    run(LoRAAdamW(ours, **settings), ours)
    run(AdamW(theirs, foreach=False, **settings), theirs)
    # the same formula in another order of operations, each rounded to 1e-16
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_a_parameter_without_gradient_is_skipped_and_keeps_its_own_step_count() -> None:
    def absent(step: int, i: int) -> bool:  # one never has a gradient, one comes late, others come and go
        return i == 0 or (i == 1 and step < 3) or (i + step) % 3 == 0

    ours, theirs = parameters(), parameters()
    one, other = LoRAAdamW(ours, weight_decay=0.1), AdamW(theirs, weight_decay=0.1, fused=True)
    run(one, ours, range(7), absent=absent)
    run(other, theirs, range(7), absent=absent)
    assert_equal(one, other, ours, theirs)
    assert not one.state.get(ours[0])
    assert len({entry["step"].item() for entry in one.state.values() if entry}) > 1


def test_a_step_without_any_gradient_changes_nothing() -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    LoRAAdamW(params).step()
    assert all(map(torch.equal, params, before))


def test_groups_have_their_own_settings_and_dtypes() -> None:
    def build(make, **settings):
        p = [*parameters(), *parameters(torch.float64)]
        groups = [{"params": p[::2], "lr": 1e-2}, {"params": p[1::2], "lr": 16e-2, "weight_decay": 0.0}]
        return p, make(groups, betas=(0.7, 0.9), **settings)

    ours, one = build(LoRAAdamW)
    theirs, other = build(AdamW, fused=True)
    for step in range(4):
        one.param_groups[1]["lr"] = other.param_groups[1]["lr"] = 0.1 / (step + 1)
        run(one, ours, [step])
        run(other, theirs, [step])
    assert_equal(one, other, ours, theirs)


def test_a_group_added_later_starts_from_its_own_first_step() -> None:
    results = []
    for make, settings in ((LoRAAdamW, {}), (AdamW, {"fused": True})):
        params = parameters()
        optimizer = make(params[:3], **settings)
        run(optimizer, params[:3], range(2))
        optimizer.add_param_group({"params": params[3:], "lr": 0.3})
        run(optimizer, params, range(2, 5))
        results.append((optimizer, params))
    (one, ours), (other, theirs) = results
    assert_equal(one, other, ours, theirs)


def test_named_parameters_keep_their_names() -> None:
    model = nn.Linear(3, 4)
    optimizer = LoRAAdamW(model.named_parameters())
    run(optimizer, list(model.parameters()))
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


def test_schedules_change_the_learning_rate() -> None:
    results = []
    for make, settings in ((LoRAAdamW, {}), (AdamW, {"fused": True})):
        params = parameters()
        optimizer = make(params, lr=0.1, **settings)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8)  # moves beta1 too
        for step in range(6):
            run(optimizer, params, [step])
            schedule.step()
        results.append((optimizer, params))
    (one, ours), (other, theirs) = results
    assert_equal(one, other, ours, theirs)


class TestStridesAndKinds:
    """What torch's fused step takes for contiguous, or refuses."""

    def test_gradients_with_other_strides_than_their_parameters(self) -> None:
        ours, theirs = parameters(shapes=[(4, 6), (8,)]), parameters(shapes=[(4, 6), (8,)])
        one, other = LoRAAdamW(ours, lr=0.1), AdamW(theirs, lr=0.1, foreach=False)
        for step in range(3):
            fill(ours, step)
            fill(theirs, step)
            ours[0].grad = ours[0].grad.t().contiguous().t()
            one.step()
            other.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # float32, another order of operations

    @pytest.mark.parametrize("view", [lambda t: t[:, :3], lambda t: t.t(), lambda t: t[::2]], ids="cth")
    def test_strided_parameters_leave_what_lies_between_alone(self, view) -> None:
        whole = torch.arange(40.0).reshape(4, 10)
        ours, theirs = nn.Parameter(torch.zeros(1)), nn.Parameter(view(whole).clone())
        ours.data = view(whole)
        untouched = torch.ones_like(whole, dtype=torch.bool)
        view(untouched).fill_(False)
        run(LoRAAdamW([ours], lr=0.1), [ours])
        run(AdamW([theirs], lr=0.1, foreach=False), [theirs])
        torch.testing.assert_close(ours.data, theirs.data, rtol=1e-6, atol=1e-6)
        assert torch.equal(whole[untouched], torch.arange(40.0).reshape(4, 10)[untouched])
        assert ours._version > 0

    def test_complex_parameters(self) -> None:
        ours, theirs = parameters(torch.complex128), parameters(torch.complex128)
        run(LoRAAdamW(ours), ours)
        run(AdamW(theirs, foreach=False), theirs)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)  # as in float64

    def test_sparse_gradients_are_refused_before_anything_is_stepped(self) -> None:
        dense, table = parameters()[0], nn.Embedding(5, 3, sparse=True)
        dense.grad, before = torch.ones_like(dense), dense.detach().clone()
        table(torch.tensor([1])).sum().backward()
        with pytest.raises(RuntimeError, match="sparse=False"):
            LoRAAdamW([dense, *table.parameters()]).step()
        assert torch.equal(dense, before)

    def test_empty_parameters(self) -> None:
        ours = [*parameters(), nn.Parameter(torch.zeros(0, 4))]
        run(LoRAAdamW(ours), ours)


class TestWhatOthersReplace:
    """The optimizer steps what is there, not what was there at its first step."""

    @pytest.mark.parametrize("what", ["data", "state", "moment", "entry", "all states"])
    def test_replaced_tensors_are_stepped(self, what: str) -> None:
        results = []
        for make, settings in ((LoRAAdamW, {}), (AdamW, {"fused": True})):
            params = parameters()
            optimizer = make(params, **settings)
            run(optimizer, params, range(2))
            entry = optimizer.state[params[0]]
            if what == "data":
                params[0].data = torch.ones(8, 32)
            elif what == "state":
                entry["step"] = torch.tensor(7.0)
            elif what == "moment":
                entry["exp_avg"] = torch.ones(8, 32)
            elif what == "entry":
                optimizer.state[params[0]] = {}
            else:
                optimizer.state.clear()
            run(optimizer, params, range(2, 4))
            results.append((optimizer, params))
        (one, ours), (other, theirs) = results
        assert_equal(one, other, ours, theirs)

    def test_parameters_replaced_in_their_group_are_stepped(self) -> None:
        params = parameters()
        optimizer = LoRAAdamW(params)
        run(optimizer, params, range(2))
        new = nn.Parameter(torch.ones(2))
        optimizer.param_groups[0]["params"][:] = [new]
        run(optimizer, [new], [2])
        assert not torch.equal(new, torch.ones(2))

    def test_parameters_cast_after_steps_are_refused_with_the_remedy(self) -> None:
        model = nn.Linear(3, 4)
        optimizer = LoRAAdamW(model.parameters())
        run(optimizer, list(model.parameters()))
        model.double()
        fill(list(model.parameters()), 5)
        with pytest.raises(ValueError, match=r"optimizer\.load_state_dict\(optimizer\.state_dict\(\)\)"):
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
    def test_a_step_between_forward_and_backward_is_noticed(self, dtype: torch.dtype) -> None:
        params = parameters(dtype)
        optimizer = LoRAAdamW(params)
        run(optimizer, params)
        loss = (params[0] ** 2).abs().sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


class TestFiles:
    @pytest.mark.parametrize("other", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str)
    def test_a_run_goes_on_from_either_file_with_either_optimizer(self, other) -> None:
        def go_on(make, first, **settings):
            file = io.BytesIO()
            torch.save(first.state_dict(), file)
            file.seek(0)
            params = copy.deepcopy(first.param_groups[0]["params"])
            optimizer = make(params, **settings)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
            run(optimizer, params, range(3, 6))
            return optimizer, params

        ours, theirs, others = parameters(), parameters(), parameters()
        one, two, three = LoRAAdamW(ours, lr=0.1), AdamW(others, lr=0.1, **other), AdamW(theirs, lr=0.1)
        run(one, ours, range(3))
        run(two, others, range(3))
        assert one.state_dict()["param_groups"] == AdamW(theirs, lr=0.1).state_dict()["param_groups"]
        run(three, theirs, range(6))
        for optimizer, params in (go_on(LoRAAdamW, one), go_on(AdamW, one), go_on(LoRAAdamW, two), go_on(AdamW, two)):
            # float32, another order of operations in each step
            torch.testing.assert_close(params, theirs, rtol=1e-5, atol=1e-6)
            assert {entry["step"].item() for entry in optimizer.state.values()} == {6.0}

    def test_a_saved_state_is_one_buffer_a_moment(self) -> None:
        params = parameters()
        optimizer = LoRAAdamW(params)
        run(optimizer, params)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert len({optimizer.state[p][name].untyped_storage().data_ptr() for p in params}) == 1

    @pytest.mark.parametrize(
        "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
    )
    def test_a_copy_goes_on_by_itself(self, duplicate) -> None:
        params = parameters()
        optimizer = LoRAAdamW(params, lr=0.1, max_norm=1.0)
        run(optimizer, params, range(2))
        twin, others = duplicate((optimizer, params))
        run(optimizer, params, range(2, 4))
        run(twin, others, range(2, 4))
        assert_equal(twin, optimizer, others, params)
        assert twin.max_norm == 1.0

    def test_copies_have_state_for_whom_it_may_concern(self) -> None:
        used, unused = parameters(shapes=[(4,), (4,)])
        optimizer = LoRAAdamW([used, unused])
        used.grad = torch.ones(4)
        optimizer.step()
        twin, (_, other) = copy.deepcopy((optimizer, [used, unused]))
        assert twin.state[other] == {}
        assert copy.copy(optimizer).state[used]["exp_avg"] is optimizer.state[used]["exp_avg"]

    def test_it_goes_to_other_processes_with_the_memory_that_it_has(self) -> None:
        params = parameters(shapes=[(4, 4)])
        optimizer = LoRAAdamW(params)
        run(optimizer, params, range(1))
        torch.multiprocessing.reductions.init_reductions()
        ForkingPickler.dumps(optimizer)  # moves memory to where others reach it; that of a passing copy would be gone
        assert all(value.is_shared() for entry in optimizer.state.values() for value in entry.values())

    def test_buffers_of_pieces_do_not_overlap(self) -> None:
        _, pieces = zeros_together([torch.empty(shape) for shape in SHAPES])
        for i, piece in enumerate(pieces):
            assert piece.shape == SHAPES[i]
            assert piece.is_contiguous()
            piece.fill_(i + 1.0)
        assert all((piece == i + 1.0).all() for i, piece in enumerate(pieces))


class TestClipping:
    @pytest.mark.parametrize("max_norm", [0.5, 1e6])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_it_equals_clip_grad_norm_before_the_step(self, max_norm: float, dtype: torch.dtype) -> None:
        ours, theirs = [*parameters(dtype), *parameters()], [*parameters(dtype), *parameters()]
        one = LoRAAdamW([{"params": ours[::2]}, {"params": ours[1::2], "lr": 0.3}], lr=0.1, eps=1e-3, max_norm=max_norm)
        other = AdamW([{"params": theirs[::2]}, {"params": theirs[1::2], "lr": 0.3}], lr=0.1, eps=1e-3, fused=True)
        for step in range(4):
            fill(ours, step, absent=lambda step, i: i == step)
            fill(theirs, step, absent=lambda step, i: i == step)
            norm = nn.utils.clip_grad_norm_(theirs, max_norm)
            one.step()
            other.step()
            # the norm, and so the scale, is one float32 number
            torch.testing.assert_close(one.gradient_norm, norm, rtol=1e-6, atol=0, check_dtype=False)
            gradients = [[p.grad for p in params if p.grad is not None] for params in (ours, theirs)]
            torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

    def test_strided_gradients_are_clipped_in_place_too(self) -> None:
        p = parameters(shapes=[(4, 6)])[0]
        p.grad = torch.full((6, 4), 3.0).t()
        LoRAAdamW([p], max_norm=1.0).step()
        torch.testing.assert_close(p.grad.norm(), torch.tensor(1.0))

    @pytest.mark.parametrize("max_norm", [0.0, -1.0, float("nan")])
    def test_a_norm_that_is_not_positive_is_refused(self, max_norm: float) -> None:
        with pytest.raises(ValueError, match="must be a positive number"):
            LoRAAdamW(parameters(), max_norm=max_norm)


class Kernels(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aten":  # not the profiler's marks
            self.names.append(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def test_a_step_is_two_kernels_for_any_number_of_tensors() -> None:
    for count in (3, 300):
        params = parameters(shapes=[(8, 4)] * count)
        optimizer = LoRAAdamW(params)
        run(optimizer, params, range(2))
        with Kernels() as kernels:
            optimizer.step()
        assert kernels.names == ["add_", "_fused_adamw_"]


def descend(optimizer, params: list[nn.Parameter], steps, reached=lambda step, i: True, set_to_none=None) -> None:
    """Steps whose gradients come from a backward, as in training."""
    for step in steps:
        optimizer.zero_grad() if set_to_none is None else optimizer.zero_grad(set_to_none)
        generator = torch.Generator().manual_seed(step)
        factors = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for p in params]
        loss = sum((p * p * f).sum() for i, (p, f) in enumerate(zip(params, factors, strict=True)) if reached(step, i))
        loss.backward()
        optimizer.step()


class TestFlat:
    """``flat=True``: parameters and gradients in one buffer each."""

    @pytest.fixture(autouse=True)
    def whole_vectors(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Sizes as of adapters: torch's kernel rounds what does not fill a vector otherwise than what does."""
        monkeypatch.setattr(f"{__name__}.SHAPES", [(8, 32), (16, 8), (64,), (32, 1), (4, 4, 2), (33, 32)])

    @pytest.mark.parametrize("settings", SETTINGS, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_steps_are_those_of_the_fused_adamw_to_the_bit(self, settings, dtype: torch.dtype) -> None:
        ours, theirs = parameters(dtype), parameters(dtype)
        one, other = LoRAAdamW(ours, flat=True, **settings), AdamW(theirs, fused=True, **settings)
        descend(one, ours, range(5))
        descend(other, theirs, range(5))
        assert_equal(one, other, ours, theirs)
        assert len({p.untyped_storage().data_ptr() for p in ours}) == 1
        assert len({p.grad.untyped_storage().data_ptr() for p in ours}) == 1

    def test_sizes_that_fill_no_vector_are_rounded_in_the_same_way_at_every_step(self) -> None:
        def build(steps: range, **state) -> tuple[LoRAAdamW, list[nn.Parameter]]:
            params = copy.deepcopy(state["params"]) if state else parameters(shapes=[(7,), (), (3, 5), (8, 33)])
            optimizer = LoRAAdamW(params, lr=0.1, flat=True, max_norm=0.5)
            if state:
                optimizer.load_state_dict(state["state"])
            descend(optimizer, params, steps)
            return optimizer, params

        optimizer, params = build(range(3))
        saved = {"params": params, "state": copy.deepcopy(optimizer.state_dict())}
        again, others = build(range(3, 6), **saved)
        descend(optimizer, params, range(3, 6))
        assert_equal(again, optimizer, others, params)

    def test_the_kernel_sees_one_tensor_and_so_does_the_norm(self, monkeypatch: pytest.MonkeyPatch) -> None:
        params, sizes = parameters(), []
        optimizer = LoRAAdamW(params, flat=True, max_norm=1.0)
        descend(optimizer, params, range(2))
        for name in ("_fused_adamw_", "_foreach_norm"):
            kernel = getattr(torch, name)
            monkeypatch.setattr(torch, name, lambda one, *a, k=kernel, **kw: sizes.append(len(one)) or k(one, *a, **kw))
        descend(optimizer, params, range(2, 5))
        assert sizes == [1] * 6

    def test_what_a_backward_does_not_reach_has_a_gradient_of_zero(self) -> None:
        def reached(step: int, i: int) -> bool:
            return i != 0 and not (step > 1 and (i + step) % 3 == 0)

        ours, theirs = parameters(), parameters()
        one, other = LoRAAdamW(ours, flat=True), AdamW(theirs, fused=True)
        descend(one, ours, range(5), reached)
        descend(other, theirs, range(5), reached, set_to_none=False)
        assert_equal(one, other, ours, theirs)
        assert ours[0].grad is None  # it never had one
        one.zero_grad(set_to_none=True)
        assert all(p.grad is None for p in ours)

    def test_step_counts_that_differ_stay_so(self) -> None:
        results = []
        for make, settings in ((LoRAAdamW, {"flat": True}), (AdamW, {"fused": True})):
            params = parameters()
            optimizer = make(params, lr=0.1, **settings)
            run(optimizer, params, range(2), absent=lambda step, i: i == 1 and step == 0)
            descend(optimizer, params, range(2, 5), set_to_none=None if make is LoRAAdamW else False)
            results.append((optimizer, params))
        (one, ours), (other, theirs) = results
        assert_equal(one, other, ours, theirs)
        assert one.state[ours[1]]["step"] == 4

    @pytest.mark.parametrize("again", ["data", "load", "state", "late"])
    def test_what_was_replaced_is_stepped_and_becomes_flat_again(self, again: str) -> None:
        results = []
        for make, settings in ((LoRAAdamW, {"flat": True}), (AdamW, {"fused": True})):
            params = parameters()
            optimizer = make(params, **settings)
            descend(optimizer, params, range(2), lambda step, i: again != "late" or i != 2)
            if again == "data":
                params[0].data = torch.ones(8, 32)
            elif again == "load":
                optimizer.load_state_dict(copy.deepcopy({**optimizer.state_dict()}))
                optimizer.param_groups[0].update(fused=make is AdamW or None)
            elif again == "state":
                optimizer.state[params[1]]["exp_avg"] = torch.ones(16, 8)
            descend(optimizer, params, range(2, 5))
            results.append((optimizer, params))
        (one, ours), (other, theirs) = results
        assert_equal(one, other, ours, theirs)
        for tensors in (ours, [p.grad for p in ours]):
            assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1

    @pytest.mark.parametrize("how", ["data", "module"])
    def test_gradients_that_got_other_memory_are_stepped_and_zeroed(self, how: str) -> None:
        results = []
        for make, settings in ((LoRAAdamW, {"flat": True}), (AdamW, {"fused": True})):
            module = nn.ParameterList(parameters())
            optimizer = make(module.parameters(), lr=0.1, **settings)
            for step in range(5):
                optimizer.zero_grad()
                sum(p.square().sum() for p in module).backward()
                if how == "data":
                    for p in module:
                        p.grad.data = -0.5 * p.grad.data
                optimizer.step()
                if how == "module" and step == 2:  # as by module.cpu() and back
                    module._apply(lambda tensor: tensor.clone())
            results.append((optimizer, list(module)))
        (one, ours), (other, theirs) = results
        assert_equal(one, other, ours, theirs)

    def test_what_is_frozen_between_steps_stays_as_it_is(self) -> None:
        results = []
        for make, settings in ((LoRAAdamW, {"flat": True}), (AdamW, {"fused": True})):
            params = parameters()
            optimizer = make(params, lr=0.1, **settings)
            for trains in (True, False, True):
                params[0].requires_grad_(trains)
                before = params[0].clone()
                descend(optimizer, params, range(2))
                assert torch.equal(params[0], before) is not trains
            results.append((optimizer, params))
        (one, ours), (other, theirs) = results
        assert_equal(one, other, ours, theirs)

    def test_memory_that_others_look_at_stays_theirs(self) -> None:
        params, base = parameters(), torch.zeros(4, 6)
        params.append(nn.Parameter(base[:2]))  # a piece of what others hold
        twin = nn.Parameter(params[1].data)
        params[4].data = params[4].data.clone().share_memory_()
        state = {"detached": params[0].detach(), "twin": twin, "base": base[:2]}
        optimizer = LoRAAdamW(params, flat=True)
        descend(optimizer, params, range(3))
        late = params[2].detach()
        params.append(nn.Parameter(torch.ones(3)))
        optimizer.add_param_group({"params": params[-1:]})
        descend(optimizer, params, range(3, 5))
        for alias, p in zip([*state.values(), late], [params[i] for i in (0, 1, 6, 2)], strict=True):
            assert torch.equal(alias, p)
        assert params[4].is_shared()

    def test_parameters_that_are_shared_with_other_processes_later_stay_shared(self) -> None:
        params, others = parameters(), parameters()
        optimizer, other = LoRAAdamW(params, flat=True), AdamW(others, fused=True)
        descend(optimizer, params, range(2))
        params[0].share_memory_()
        descend(optimizer, params, range(2, 4))
        descend(other, others, range(4))
        assert params[0].is_shared()
        assert all(map(torch.equal, params, others))

    def test_a_square_parameter_that_is_transposed_in_its_place_is_stepped_in_its_new_order(self) -> None:
        ours, theirs = (parameters(torch.float64, shapes=[(16, 16), (8, 32)]) for _ in range(2))
        one, other = LoRAAdamW(ours, lr=0.1, flat=True), AdamW(theirs, lr=0.1, foreach=False)
        for optimizer, params in ((one, ours), (other, theirs)):
            descend(optimizer, params, range(2))
            params[0].data = params[0].data.t()  # the same address and shape
            fill(params, 2)
            optimizer.step()
        for mine, others in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, others, rtol=1e-12, atol=1e-12)

    def test_bits_that_are_read_as_another_dtype_are_refused(self) -> None:
        params = parameters(torch.bfloat16)
        optimizer = LoRAAdamW(params, flat=True)
        run(optimizer, params, range(1))
        for p in params:
            p.grad, p.data = None, p.data.view(torch.float16)
        fill(params, 1)
        with pytest.raises(ValueError, match="moved or cast"):
            optimizer.step()

    def test_a_step_between_forward_and_backward_is_noticed(self) -> None:
        params = parameters()
        optimizer = LoRAAdamW(params, flat=True)
        descend(optimizer, params, range(2))
        loss = (params[0] ** 2).sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()

    def test_gradients_that_others_made_are_clipped_in_place_and_absent_ones_count_for_nothing(self) -> None:
        results = []
        for make, settings in ((LoRAAdamW, {"flat": True, "max_norm": 0.5}), (AdamW, {"fused": True})):
            params = parameters()
            optimizer = make(params, eps=1e-3, **settings)
            for step in range(5):
                fill(params, step, absent=lambda step, i: (i + step) % 3 == 0)
                if make is AdamW:
                    nn.utils.clip_grad_norm_(params, 0.5)
                optimizer.step()
            results.append((params, [p.grad for p in params if p.grad is not None]))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)  # the norm is rounded in another order

    def test_gradients_add_up_over_backwards_and_are_clipped_together(self) -> None:
        results = []
        for make, settings in ((LoRAAdamW, {"flat": True, "max_norm": 0.5}), (AdamW, {"fused": True})):
            params = parameters()
            optimizer = make(params, eps=1e-3, **settings)
            for _ in range(4):
                optimizer.zero_grad()
                for _ in range(2):
                    sum(p.square().sum() for p in params).backward()
                if make is AdamW:
                    nn.utils.clip_grad_norm_(params, 0.5)
                optimizer.step()
            results.append(params)
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)  # the norm is rounded in another order

    @pytest.mark.parametrize(
        "duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
    )
    def test_a_copy_goes_on_by_itself(self, duplicate) -> None:
        params = parameters()
        optimizer = LoRAAdamW(params, flat=True)
        descend(optimizer, params, range(2))
        twin, others = duplicate((optimizer, params))
        descend(optimizer, params, range(2, 4))
        descend(twin, others, range(2, 4))
        assert_equal(twin, optimizer, others, params)


def test_closures_and_hooks_run_as_with_any_optimizer() -> None:
    params, calls = parameters(), []
    optimizer = LoRAAdamW(params)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first
    assert calls == ["before", "after"] * 2


def test_a_grad_scaler_unscales_and_skips_overflows() -> None:
    ours, theirs = parameters(), parameters()
    one, other = LoRAAdamW(ours), AdamW(theirs, foreach=False)
    for optimizer, params in ((one, ours), (other, theirs)):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in range(3):
            optimizer.zero_grad()
            factor = float("inf") if step == 1 else 1.0
            scaler.scale(sum((p.square() * factor).sum() for p in params)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(params, 1.0)
            scaler.step(optimizer)
            scaler.update()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)  # float32, another order of operations
    assert one.state[ours[0]]["step"] == 2


class Stepped(LanguageModule):
    make = LoRAAdamW

    def configure_optimizers(self):
        optimizer = self.make([p for p in self.parameters() if p.requires_grad], lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]


class Flat(Stepped):
    make = staticmethod(lambda params, lr: LoRAAdamW(params, lr=lr, flat=True))


class Fused(Stepped):
    make = staticmethod(lambda params, lr: AdamW(params, lr=lr, fused=True))


class TestTrainer:
    def fit(self, directory: Path, module: LanguageModule, max_epochs: int, **settings) -> LanguageModule:
        ckpt_path = settings.pop("ckpt_path", None)
        callbacks = LoRACallback(r=4), ModelCheckpoint(directory, save_top_k=-1, filename="{epoch}")
        trainer(directory, *callbacks, max_epochs=max_epochs, **settings).fit(module, loader(), ckpt_path=ckpt_path)
        return module

    def test_a_run_stops_and_goes_on_with_either_optimizer(self, tmp_path: Path) -> None:
        ours, theirs = self.fit(tmp_path / "ours", Stepped(), 2), self.fit(tmp_path / "theirs", Fused(), 2)
        assert ours.losses == theirs.losses
        assert same_adapters(ours, theirs)
        for module, source in ((Stepped(), "theirs"), (Stepped(), "ours"), (Fused(), "ours")):
            self.fit(tmp_path / "resumed", module, 2, ckpt_path=tmp_path / source / "epoch=0.ckpt")
            assert same_adapters(ours, module)  # so that AdamW steps as it was made to: our file names no way

    def test_a_flat_run_is_the_same_and_resumes_to_the_bit(self, tmp_path: Path) -> None:
        settings = {"gradient_clip_val": 0.01, "accumulate_grad_batches": 2}
        flat, theirs = Flat(), Fused()
        self.fit(tmp_path / "flat", flat, 2, **settings)
        self.fit(tmp_path / "theirs", theirs, 2, **settings)
        assert same_adapters(flat, theirs)
        again = self.fit(tmp_path / "again", Flat(), 2, ckpt_path=tmp_path / "flat" / "epoch=0.ckpt", **settings)
        assert same_adapters(flat, again)
        sizes = [(tmp_path / name / "epoch=1.ckpt").stat().st_size for name in ("flat", "theirs")]
        assert sizes[0] < sizes[1]
        save_peft(flat.model, tmp_path / "peft")

    def test_lightning_clips_before_its_step(self, tmp_path: Path) -> None:
        ours = self.fit(tmp_path, Stepped(), 1, gradient_clip_val=0.01)
        theirs = self.fit(tmp_path, Fused(), 1, gradient_clip_val=0.01)
        assert same_adapters(ours, theirs)

    def test_the_adapters_are_exported_as_before(self, tmp_path: Path) -> None:
        module = self.fit(tmp_path, Stepped(), 1)
        save_peft(module.model, tmp_path / "peft")
        total = sum(value.numel() for value in adapter_state_dict(module).values())
        assert (tmp_path / "peft" / "adapter_model.safetensors").stat().st_size < 4 * total + 10_000

    def test_the_command_line_names_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        settings = {"lr": 0.01, "betas": [0.8, 0.9], "max_norm": 0.5}
        optimizer = {"class_path": "lightning_lora.LoRAAdamW", "init_args": settings}
        lora = {"class_path": "lightning_lora.LoRACallback", "init_args": {"r": 2}}
        quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
        config = {
            "model": {"optimizer": optimizer},
            "trainer": {"accelerator": "cpu", "max_steps": 2, "callbacks": [lora], **quiet},
        }
        (tmp_path / "input.yaml").write_text(yaml.safe_dump(config))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["cli", "fit", "--config", "input.yaml"])
        cli = LightningCLI(FromConfig, seed_everything_default=0)
        optimizer = cli.trainer.optimizers[0]
        assert type(optimizer) is LoRAAdamW
        assert (optimizer.max_norm, optimizer.param_groups[0]["betas"]) == (0.5, (0.8, 0.9))
        assert optimizer.gradient_norm > 0


class FromConfig(LanguageModule):
    """Takes its optimizer from the command line; adapters are there only when the Trainer asks for it."""

    def __init__(self, optimizer: OptimizerCallable = AdamW) -> None:
        super().__init__()
        self.make = optimizer

    def configure_optimizers(self):
        return self.make([p for p in self.parameters() if p.requires_grad])

    def train_dataloader(self):
        return loader()


def test_fabric_clips_and_steps(tmp_path: Path) -> None:
    results = []
    for make, settings in ((LoRAAdamW, {}), (AdamW, {"fused": True})):
        fabric = Fabric(accelerator="cpu", devices=1)
        model = inject(models.llama(), LoRAConfig(r=4))
        trained = [p for p in model.parameters() if p.requires_grad]
        model, optimizer = fabric.setup(model, make(trained, lr=1e-2, **settings))
        for batch in loader():
            fabric.backward(model(input_ids=batch, labels=batch).loss)
            fabric.clip_gradients(model, optimizer, max_norm=0.1)
            optimizer.step()
            optimizer.zero_grad()
        results.append(adapter_state_dict(model))
    torch.testing.assert_close(*results, rtol=0, atol=0)
