"""Many small tensors as pieces of one buffer: what is done to all of them is done in one call."""

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.ops.sharded import local_part

# pieces begin where a cache line does, and where vector instructions may load
_ALIGNMENT_BYTES = 64


def zeros_together(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return a new buffer of zeros, and a contiguous piece of it for each of ``tensors``, all of one dtype and device.

    The pieces have version counters of their own. Behind each may lie zeros, see :func:`padded`.
    """
    like = tensors[0] if tensors else torch.empty(0)
    flat = torch.zeros(sum(_padded_sizes(tensors)), dtype=like.dtype, device=like.device)
    return flat, _pieces(flat, tensors)


def _pieces(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    parts = zip(padded(flat, tensors), tensors, strict=True)
    return [part[: tensor.numel()].view(tensor.shape).data for part, tensor in parts]


def packed(tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Copy tensors of one dtype and device into one new buffer; return it and its pieces."""
    flat, pieces = zeros_together(tensors)
    torch._foreach_copy_(pieces, [tensor.detach() for tensor in tensors])
    return flat, pieces


def padded(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the pieces of a buffer for ``tensors`` with the zeros behind them, in whole vectors.

    A kernel rounds what fills no vector in another way: on these it gives the very bits that it gives on the buffer.
    """
    return list(flat.split(_padded_sizes(tensors)))


def _padded_sizes(tensors: Sequence[Tensor]) -> list[int]:
    unit = max(_ALIGNMENT_BYTES // tensors[0].element_size(), 1) if tensors else 1
    return [-(-tensor.numel() // unit) * unit for tensor in tensors]


def counted_together(counts: Sequence[Tensor], device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Copy numbers into one float32 buffer ``[len(counts)]`` on ``device``: to count all up is one addition.

    Returns:
        The buffer, and its elements as tensors without dimensions.
    """
    flat = torch.stack([count.detach().reshape(()).to(device, torch.float32) for count in counts])
    return flat, list(flat.unbind())


class FlatParameters:
    """Parameters of one dtype and device as pieces of one buffer, beside one for their gradients with the same layout.

    Making it moves the parameters there, and keeps every parameter the object that it is.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = parameters
        self.values, pieces = packed(parameters)
        self.gradients, self._gradient_pieces = zeros_together(parameters)
        for parameter, piece in zip(parameters, pieces, strict=True):
            parameter.data = piece
        self.padded_values, self.padded_gradients = padded(self.values, pieces), padded(self.gradients, pieces)
        self._addresses = list(map(Tensor.data_ptr, parameters))
        self._gradient_addresses = list(map(Tensor.data_ptr, self._gradient_pieces))

    def is_private(self) -> bool:
        """Whether none but the parameters looks at the memory that they lie in."""
        storage = self.values.untyped_storage()
        inside = sum(p.untyped_storage().data_ptr() == storage.data_ptr() for p in self._parameters)
        return _num_users(storage) == inside + len(self.padded_values) + _num_users_of_one_tensor()

    @property
    def address(self) -> int:
        """Where the memory of the parameters begins."""
        return self.values.untyped_storage().data_ptr()

    def holds_parameters(self) -> bool:
        """Whether nobody gave a parameter other memory, or strides."""
        parameters = self._parameters
        return list(map(Tensor.data_ptr, parameters)) == self._addresses and all(map(Tensor.is_contiguous, parameters))

    def holds_gradients(self, gradients: Sequence[Tensor | None]) -> bool:
        """Whether these, one for each parameter, are the pieces of the buffer for gradients."""
        return self.are_pieces(gradients) and self._has_its_pieces()

    def are_pieces(self, gradients: Sequence[Tensor | None]) -> bool:
        """Tell the same of gradients that were gathered, without a look at where they lie."""
        return all(map(is_, gradients, self._gradient_pieces))

    def _has_its_pieces(self) -> bool:
        return list(map(Tensor.data_ptr, self._gradient_pieces)) == self._gradient_addresses

    def _renew_pieces(self) -> None:
        """Make pieces anew where one was given other memory, as by ``p.grad.data = ...`` or ``module.to(device)``."""
        if not self._has_its_pieces():
            self._gradient_pieces = _pieces(self.gradients, self._parameters)

    def gather(self, gradients: Sequence[Tensor | None]) -> None:
        """Copy gradients into the buffer where they are not in it, and zeros for those that are ``None``."""
        self._renew_pieces()
        pieces = [(piece, g) for piece, g in zip(self._gradient_pieces, gradients, strict=True) if g is not piece]
        there = [(piece, gradient) for piece, gradient in pieces if gradient is not None]
        absent = [piece for piece, gradient in pieces if gradient is None]
        if there:
            torch._foreach_copy_([piece for piece, _ in there], [gradient for _, gradient in there])
        if absent:
            torch._foreach_zero_(absent)

    def give_back(self, gradients: Sequence[Tensor | None]) -> None:
        """Copy the buffer's values into gradients that are not in it."""
        for piece, gradient in zip(self._gradient_pieces, gradients, strict=True):
            if gradient is not None and gradient is not piece:
                gradient.copy_(piece)

    def zero_gradients(self) -> None:
        """Make the gradient of every parameter that trains a piece of the buffer, all zero: one fill."""
        self.gradients.zero_()
        gradients = [parameter.grad for parameter in self._parameters if parameter.requires_grad]
        if len(gradients) < len(self._parameters) or not self.holds_gradients(gradients):
            self._renew_pieces()
            for parameter, piece in zip(self._parameters, self._gradient_pieces, strict=True):
                parameter.grad = piece if parameter.requires_grad else None


def may_move(parameter: Any, private: set[int]) -> bool:
    """Whether a parameter can get other memory unnoticed: none but itself looks at its own.

    Args:
        private: addresses of the memory of those :class:`FlatParameters` that are private.
    """
    if type(parameter) is not nn.Parameter or not parameter.is_contiguous() or parameter.numel() == 0:
        return False
    if parameter.device.type == "cpu" and parameter.is_shared():  # with other processes
        return False
    storage = local_part(parameter).untyped_storage()
    if storage.data_ptr() in private:
        return True
    is_all = storage.nbytes() == parameter.numel() * parameter.element_size()
    return is_all and _num_users(storage) == _num_users_of_one_tensor()


def _num_users(storage: torch.UntypedStorage) -> int:
    return int(torch._C._storage_Use_Count(storage._cdata))


def _num_users_of_one_tensor() -> int:
    alone = torch.empty(1)
    return _num_users(alone.untyped_storage())
