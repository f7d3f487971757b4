""":class:`PackedStack`: the packed matrices of experts, of which one at a time is made dense.

Models multiply by one expert's matrix after the other. So do ours, which take a stack in the place of a tensor. Neither
kind of object is a tensor; torch asks them what ``F.linear`` and other functions do with them.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.ops.linear import lora_linears
from lightning_lora.ops.linear_tensors import ScaledDropout, StoredLinearTensors
from lightning_lora.ops.packed import PackedWeight
from lightning_lora.ops.stored import stored_linear


class Update(NamedTuple):
    """What is added to a stack, ``scaling * left right``: ``[experts, m, r]`` and ``[experts, r, n]``."""

    left: Tensor
    right: Tensor
    scaling: float


class _Turned:
    """What a stack and its matrices share: a packed weight, whose last two dimensions may be exchanged."""

    def __init__(self, stored: PackedWeight, *, transposed: bool = False, update: Update | None = None) -> None:
        *first, rows, columns = stored.shape
        self.stored, self.transposed, self.update = stored, transposed, update
        self.shape = torch.Size([*first, columns, rows] if transposed else stored.shape)
        self.ndim, self.dtype, self.device = len(self.shape), stored.dtype, stored.device

    @property
    def mT(self) -> Any:
        """The same with its last two dimensions exchanged."""
        update = self.update
        if update is not None:
            update = Update(update.right.mT, update.left.mT, update.scaling)
        return type(self)(self.stored, transposed=not self.transposed, update=update)

    def transpose(self, dim0: int, dim1: int) -> Any:
        """Return :attr:`mT`; other dimensions cannot be exchanged."""
        if {dim0 % self.ndim, dim1 % self.ndim} != {self.ndim - 2, self.ndim - 1}:
            raise TypeError(_refusal(f"transpose({dim0}, {dim1})"))
        return self.mT

    def dim(self) -> int:
        return self.ndim

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def __len__(self) -> int:
        return self.shape[0]


class PackedMatrix(_Turned):
    """One packed matrix, a :class:`~lightning_lora.ops.stored.StoredWeight`, with an update or without.

    Products with it keep its bytes for backward and make it dense again there. Other functions get the dense sum.
    """

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Return the values in ``dtype``, without the update."""
        dense = self.stored.dense(dtype)
        return dense.mT if self.transposed else dense

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name == "linear" and isinstance(kwargs.get("weight", args[-1] if len(args) == 1 else args[1]), cls):
            return _linear(*args, **kwargs)
        if name in ("matmul", "__matmul__", "mm") and isinstance(args[0], Tensor):
            return _linear(args[0], args[1].mT)
        return func(*map(_summed, args), **{key: _summed(value) for key, value in kwargs.items()})


class PackedStack(_Turned):
    """Packed matrices ``[experts, rows, columns]``: ``stack[e]`` is a :class:`PackedMatrix`.

    What needs them all dense at once raises ``TypeError``: it would take the memory that packing saves.
    """

    def __getitem__(self, index: int | Tensor) -> PackedMatrix:
        if isinstance(index, bool) or not (isinstance(index, int) or (isinstance(index, Tensor) and index.ndim == 0)):
            raise TypeError(_refusal("indexing by more than one number"))
        place = int(index)
        update = self.update
        if update is not None:
            update = Update(update.left[place], update.right[place], update.scaling)
        return PackedMatrix(matrix_of(self.stored, place), transposed=self.transposed, update=update)

    def unbind(self) -> tuple[PackedMatrix, ...]:
        """Return all matrices, packed."""
        return tuple(self[index] for index in range(len(self)))

    def with_update(self, left: Tensor, right: Tensor, scaling: float) -> "PackedStack":
        """Return the stack that acts as ``W + scaling * left right``."""
        return PackedStack(self.stored, transposed=self.transposed, update=Update(left, right, scaling))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.__name__ in ("grouped_mm", "_grouped_mm"):
            return _grouped(*args, **(kwargs or {}))
        raise TypeError(_refusal(func.__name__))


def matrix_of(stored: PackedWeight, index: int) -> PackedWeight:
    """Return one matrix of a packed stack ``[experts, rows, columns]``, a view of its blocks."""
    shape = torch.Size(stored.shape[1:])
    blocks = shape.numel() // stored.block_size(stored.shape)
    first = index % stored.shape[0] * blocks
    parts = {
        name: part if name in stored.whole_parts else part[first : first + blocks]
        for name, part in stored.tensors.items()
    }
    return replace(stored, tensors=parts, shape=shape, place=(first, blocks, blocks))


def can_stack(form: type[PackedWeight], shape: torch.Size) -> bool:
    """Whether blocks of a stack ``[experts, rows, columns]`` end where its matrices do."""
    return len(shape) == 3 and shape.numel() > 0 and shape[1] * shape[2] % form.block_size(shape) == 0


def _linear(input: Tensor, weight: PackedMatrix, bias: Tensor | None = None) -> Tensor:
    if weight.update is None:
        return stored_linear(input, weight, bias)
    B, A, scaling = weight.update
    return lora_linears(input, [StoredLinearTensors(weight, bias, A, B)], ScaledDropout(scaling))[0]


def _grouped(input: Tensor, mat2: PackedStack, offs: Tensor | None = None, **options: Any) -> Tensor:
    """Return rows ``[S, m]``, sorted by expert, each times its own matrix of ``[E, m, n]``."""
    if not isinstance(mat2, PackedStack) or offs is None or input.ndim != 2 or options.get("bias") is not None:
        raise TypeError(_refusal("a grouped product of another layout"))
    ends = offs.tolist()
    spans = zip([0, *ends], ends, strict=False)
    parts = [_linear(input[start:end], matrix.mT) for matrix, (start, end) in zip(mat2.unbind(), spans, strict=True)]
    rest = input.new_zeros(input.shape[0] - (ends[-1] if ends else 0), mat2.shape[2])
    return torch.cat([*parts, rest.to(parts[0].dtype) if parts else rest])


def _summed(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(map(_summed, value))
    if not isinstance(value, PackedMatrix):
        return value
    dense = value.dense(value.dtype)
    if value.update is None:
        return dense
    left, right, scaling = value.update
    return torch.add(dense, F.linear(left.to(dense.dtype), right.mT.to(dense.dtype)), alpha=scaling)


def _refusal(what: str) -> str:
    return (
        f"{what} would make the packed matrices of all experts dense at once: read one expert at a time, let "
        "transformers do so by model.set_experts_implementation('grouped_mm') or 'eager', or leave the experts whole "
        "with quantize_exclude"
    )
