"""Guarded gradients: computed with as before, refused to whoever reads them."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lightning_lora.ops.guarded import GuardedGradient, PartOfGradient, bare, guard


@pytest.fixture
def parameter() -> nn.Parameter:
    parameter = nn.Parameter(torch.randn(4, 3))
    parameter.grad = torch.randn(4, 3)
    return parameter


def test_a_guard_keeps_the_object_and_its_memory(parameter: nn.Parameter) -> None:
    gradient = parameter.grad
    guard([parameter], PartOfGradient)
    assert parameter.grad is gradient
    assert bare(parameter.grad).data_ptr() == gradient.data_ptr()
    guard([parameter], Tensor)
    assert type(parameter.grad) is Tensor


def test_backward_adds_to_a_guarded_gradient(parameter: nn.Parameter) -> None:
    expected = parameter.grad + 1
    guard([parameter], PartOfGradient)
    parameter.sum().backward()
    assert isinstance(parameter.grad, PartOfGradient)
    assert torch.equal(bare(parameter.grad), expected)


def test_what_is_computed_entry_by_entry_is_served_and_stays_guarded(parameter: nn.Parameter) -> None:
    expected = (parameter.grad.clone() * 2).clamp(-1, 1)
    guard([parameter], PartOfGradient)
    parameter.grad.mul_(2)
    parameter.grad.data = parameter.grad.data.clamp(-1, 1)
    assert torch.equal(bare(parameter.grad), expected)
    for derived in (parameter.grad.detach(), parameter.grad**2, parameter.grad.view(-1), torch.cat([parameter.grad])):
        with pytest.raises(ValueError, match="split over tensor-parallel ranks"):
            derived.sum()


@pytest.mark.parametrize(
    "read",
    [
        lambda g: g.norm(), lambda g: g.max(), lambda g: g.tolist(), lambda g: g.numpy(), lambda g: g.isnan().any(),
        lambda g: torch.equal(g, g), lambda g: torch.einsum("ij,ij->", g, g), lambda g: torch._foreach_norm([g]),
        lambda g: g[:1].item(),
    ],
)  # fmt: skip
def test_what_makes_fewer_numbers_of_it_is_refused(parameter: nn.Parameter, read) -> None:  # type: ignore[no-untyped-def]
    guard([parameter], PartOfGradient)
    with pytest.raises(ValueError, match="self.clip_gradients"):
        read(parameter.grad)


def test_copies_and_files_hold_plain_tensors(parameter: nn.Parameter, tmp_path: Path) -> None:
    expected = parameter.grad.clone()
    guard([parameter], PartOfGradient)
    torch.save(parameter.grad, tmp_path / "gradient.pt")
    copies = [
        torch.load(tmp_path / "gradient.pt", weights_only=True),
        copy.deepcopy(parameter.grad),
        pickle.loads(pickle.dumps(parameter.grad)),
    ]
    for one in copies:
        assert not isinstance(one, GuardedGradient)
        assert torch.equal(one, expected)
