"""What adapted linear layers are to the functions that multiply by them: tensors, scaling and dropout."""

from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from lightning_lora.ops.dropout import keep_mask


class _LinearTensors(NamedTuple):
    weight: Any  # Tensor | StoredWeight | None, [out, in]
    bias: Any  # Tensor | None, [out]
    lora_A: Any  # Tensor, [r, in]
    lora_B: Any  # Tensor, [out, r]


class LinearTensors(_LinearTensors):
    """The tensors of one adapted linear layer; ``weight`` is ``None`` for the adapter's term alone."""

    __slots__ = ()
    is_stored: ClassVar[bool] = False


class StoredLinearTensors(LinearTensors):
    """The same with a :class:`~lightning_lora.ops.stored.StoredWeight`, or with ``None``."""

    __slots__ = ()
    is_stored: ClassVar[bool] = True


class ScaledDropout(NamedTuple):
    """Scaling and dropout shared by all adapters that read one input: the arguments of :func:`lora_linear`."""

    scaling: float
    dropout: float = 0.0
    seed: Tensor | None = None
    columns: tuple[int, int] | None = None
    first_row: int = 0
    has_stored: bool = False  # whether a weight is a StoredWeight: said by the functions that take the layers

    @property
    def factor(self) -> float:
        """What a product with the kept entries is multiplied by."""
        return self.scaling if self.seed is None else self.scaling / (1 - self.dropout)

    def mask(self, like: Tensor, num_columns: int) -> Tensor:
        """Return zeros where an entry is dropped and ones elsewhere, ``[T, num_columns]``; only with a seed."""
        assert self.seed is not None
        return keep_mask(self.seed, like, self.dropout, self.columns, self.first_row, num_columns=num_columns)
