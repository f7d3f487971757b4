""":class:`FactoredWeight`, a tensor that multiplies as ``W + scaling * B A`` without building the sum."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lora.compat.torch import VERSION, plain_tensors
from lightning_lora.ops.linear import lora_linear

# attributes and methods that do not read values: they are those of the weight without its update
_METADATA = {
    "shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_meta", "is_sparse", "is_quantized",
    "itemsize",
    "requires_grad", "is_leaf", "grad_fn", "names", "nbytes", "is_mps", "is_xpu", "is_nested", "output_nr", VERSION,
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "data_ptr", "__len__",
    "is_floating_point", "is_complex", "is_contiguous", "get_device", "__hash__", "is_inference",
}  # fmt: skip


class FactoredWeight(Tensor):
    """A tensor that acts as ``W + scaling * left right`` in the products of models that read a weight.

    ``W`` is the tensor itself, ``[..., m, n]``; ``left`` is ``[..., m, r]`` and ``right`` ``[..., r, n]``. Indexing and
    transposing keep the factors apart; ``F.linear``, ``matmul``, ``bmm`` and grouped products run through them. Any
    other operation gets the sum, which costs its memory and is otherwise the same.
    """

    left: Tensor
    right: Tensor
    scaling: float

    @staticmethod
    def of(weight: Tensor, left: Tensor, right: Tensor, scaling: float) -> "FactoredWeight":
        """Return ``weight`` with an update, without a copy."""
        factored = weight.as_subclass(FactoredWeight)
        factored.left, factored.right, factored.scaling = left, right, scaling
        return factored

    def plain(self) -> Tensor:
        """Return ``W`` alone."""
        return self.as_subclass(Tensor)

    def dense(self) -> Tensor:
        """Return the sum, in W's dtype."""
        with plain_tensors():
            weight = self.plain()
            delta = torch.matmul(self.left.to(weight.dtype), self.right.to(weight.dtype))
            return torch.add(weight, delta, alpha=self.scaling)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with plain_tensors():
            name = _name_of(func)
            if name in _METADATA or name in ("as_subclass", "__repr__"):
                return func(*args, **kwargs)
            handler = _HANDLERS.get(name)
            result = NotImplemented if handler is None else handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
            return func(*_summed(args), **{key: _summed(value) for key, value in kwargs.items()})


def _name_of(func: Any) -> str:
    name = getattr(func, "__name__", "")
    if name == "__get__":
        return str(getattr(func.__self__, "__name__", ""))
    return name.split(".")[0] if "grouped_mm" in name else name


def _summed(value: Any) -> Any:
    if isinstance(value, FactoredWeight):
        return value.dense()
    if isinstance(value, (tuple, list)):
        return type(value)(_summed(item) for item in value)
    return value


def _getitem(weight: Any, index: Any) -> Any:
    # an index into the first dimension, of the experts: a number, or a tensor of numbers
    if not isinstance(weight, FactoredWeight) or weight.ndim < 3:
        return NotImplemented
    if not (isinstance(index, int) or (isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32))):
        return NotImplemented
    return FactoredWeight.of(weight.plain()[index], weight.left[index], weight.right[index], weight.scaling)


def _transpose(weight: Any, dim0: int = -2, dim1: int = -1) -> Any:
    if {dim0 % weight.ndim, dim1 % weight.ndim} != {weight.ndim - 2, weight.ndim - 1}:
        return NotImplemented
    plain = weight.plain().transpose(-2, -1)
    return FactoredWeight.of(plain, weight.right.transpose(-2, -1), weight.left.transpose(-2, -1), weight.scaling)


def _transpose_matrix(weight: Any) -> Any:
    return _transpose(weight) if weight.ndim == 2 else NotImplemented


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> Any:
    if not isinstance(weight, FactoredWeight) or weight.ndim != 2:
        return NotImplemented
    return lora_linear(input, weight.plain(), bias, weight.right, weight.left, scaling=weight.scaling)


def _matmul(left: Any, right: Any) -> Any:
    if isinstance(right, FactoredWeight) and isinstance(left, FactoredWeight):
        return NotImplemented
    if isinstance(right, FactoredWeight):
        if right.ndim == 2:
            return _linear(left, _transpose(right))
        x, dtype = left, left.dtype
        h = torch.matmul(x, right.left.to(dtype)) * right.scaling
        return torch.matmul(x, right.plain()) + torch.matmul(h, right.right.to(dtype))
    if left.ndim == 2 and right.ndim < 3:
        return NotImplemented
    h = torch.matmul(left.right.to(right.dtype), right) * left.scaling
    return torch.matmul(left.plain(), right) + torch.matmul(left.left.to(right.dtype), h)


def _rmatmul(right: Any, left: Any) -> Any:
    return _matmul(left, right)


def _grouped_mm(input: Tensor, weight: Any, offs: Tensor | None = None, **options: Any) -> Any:
    """Rows of ``input`` ``[S, m]``, sorted by expert, times each one's own weight ``[E, m, n]``."""
    if not isinstance(weight, FactoredWeight) or weight.ndim != 3 or input.ndim != 2 or options.get("bias") is not None:
        return NotImplemented
    left, right = weight.left.to(input.dtype), weight.right.to(input.dtype)
    spare = -left.shape[-1] % (16 // input.element_size())  # the kernels want rows of whole 16 bytes
    if spare:
        left, right = F.pad(left, (0, spare)), F.pad(right, (0, 0, 0, spare))
    h = _grouped(input, left, offs) * weight.scaling  # [S, r]
    return _grouped(input, weight.plain(), offs) + _grouped(h, right, offs)


def _grouped(rows: Tensor, weight: Tensor, offs: Any) -> Tensor:
    kernel: Any = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if kernel is not None and not (rows.device.type == "cpu" and rows.requires_grad and weight.dtype == torch.float64):
        product: Tensor = kernel(rows, weight, offs=offs)
        return product
    ends = offs.tolist()
    starts = [0, *ends[:-1]]
    parts = [rows[start:end] @ weight[e] for e, (start, end) in enumerate(zip(starts, ends, strict=True))]
    parts.append(rows.new_zeros(rows.shape[0] - ends[-1], weight.shape[-1]))
    return torch.cat(parts)


def _to(weight: Any, *args: Any, **kwargs: Any) -> Any:
    plain = weight.plain().to(*args, **kwargs)
    left, right = (t.to(*args, **kwargs) for t in (weight.left, weight.right))
    return FactoredWeight.of(plain, left, right, weight.scaling)


def _contiguous(weight: Any) -> Any:
    return FactoredWeight.of(weight.plain().contiguous(), weight.left, weight.right, weight.scaling)


_HANDLERS: dict[str, Callable[..., Any]] = {
    "__getitem__": _getitem,
    "transpose": _transpose,
    "swapaxes": _transpose,
    "mT": _transpose,
    "T": _transpose_matrix,
    "t": _transpose_matrix,
    "linear": _linear,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "__rmatmul__": _rmatmul,
    "mm": _matmul,
    "bmm": _matmul,
    "grouped_mm": _grouped_mm,
    "_grouped_mm": _grouped_mm,
    "grouped_mm_fallback": _grouped_mm,
    "to": _to,
    "contiguous": _contiguous,
}
