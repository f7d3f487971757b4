"""How the weight of a layer is read where it is no plain tensor: by the class of the layer, or of the weight.

:func:`register_stored_weight` adds a form.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from lightning_lora.layers.bitsandbytes import computes_in_dtype_of, multiplies_dense, read_4bit, read_8bit
from lightning_lora.layers.torchao import read_weight
from lightning_lora.ops.stored import StoredWeight

Read = Callable[[Any], StoredWeight | None]
IsProduct = Callable[[Any, Tensor], bool]


def always(layer: nn.Module, x: Tensor) -> bool:
    """Return True: the layer computes ``x W^T + b`` of its dense weight for any x."""
    return True


class StoredForm(NamedTuple):
    """How the weight of a layer is read; the arguments of :func:`register_stored_weight`."""

    read: Read
    is_product: IsProduct = always
    is_transposed: bool = False

    def product(self, layer: nn.Module, x: Tensor) -> StoredWeight | None:
        """Return what ``layer`` multiplies ``x`` by; ``None`` where its own forward is to run."""
        return self.read(layer) if self.is_product(layer, x) else None

    def dense(self, layer: nn.Module) -> Tensor:
        """Return the weight as a tensor, in the dtype that it has and in the layout of the layer's parameter."""
        stored = self.read(layer)
        if stored is None:
            raise ValueError(
                f"the weight of a {type(layer).__name__} is not quantised yet: move the model to its device first"
            )
        dense = stored.dense(stored.dtype)
        return dense.t() if self.is_transposed else dense


# keys are classes, or full names of classes whose package need not be installed
_FORMS: dict[type | str, StoredForm] = {
    "bitsandbytes.nn.modules.Linear4bit": StoredForm(read_4bit, computes_in_dtype_of),
    "bitsandbytes.nn.modules.Embedding4bit": StoredForm(read_4bit),
    "bitsandbytes.nn.modules.Linear8bitLt": StoredForm(read_8bit, multiplies_dense),
    "bitsandbytes.nn.modules.Embedding8bit": StoredForm(read_8bit),
    "torchao.utils.TorchAOBaseTensor": StoredForm(read_weight),
}


def register_stored_weight(
    kind: type | str, read: Read, *, is_product: IsProduct = always, is_transposed: bool = False
) -> None:
    """Declare how the weight of a linear layer is read that is no plain tensor, so that adapters are fused with it.

    The layer computes ``x W^T + b``. Adapters then treat it as a linear layer: the weight is made dense each time that
    it is multiplied by, and nothing but its stored form is kept for backward.

    Example::

        class HalfSize:
            def __init__(self, layer):
                self.values, self.dtype = layer.values, torch.float32
                self.shape, self.device = self.values.shape, self.values.device

            def dense(self, dtype):
                return self.values.to(dtype)

        register_stored_weight(MyLinear, HalfSize)

    Args:
        kind: a class of layers, or of weights, with its subclasses; or its full name ``"package.module.Class"``.
        read: returns the weight of a layer, an object with ``shape``, ``dtype``, ``device`` and ``dense(dtype)``;
            called in every forward. ``None`` where the layer's own forward has to run. It raises ``ValueError`` for a
            weight that cannot be read, which :func:`~lightning_lora.plan` reports with the name of the layer.
        is_product: given the layer and x, returns False where its own forward computes something else than the product.
        is_transposed: the layer's parameter is ``[in_features, out_features]``; what ``read`` returns never is.

    Raises:
        TypeError: ``kind`` is neither a class nor a name.
    """
    if not isinstance(kind, (type, str)):
        raise TypeError(f"register_stored_weight takes a class of layers or of weights, or its full name, got {kind!r}")
    _FORMS[kind] = StoredForm(read, is_product, is_transposed)


def stored_form(layer: nn.Module, name: str = "weight") -> StoredForm | None:
    """Return how the parameter called ``name`` is read; ``None`` for a plain tensor and for what is not registered."""
    weight = layer._parameters.get(name)
    classes = [*type(layer).__mro__, *(() if weight is None else type(weight).__mro__)]
    for cls in classes:
        form = _FORMS.get(cls) or _FORMS.get(f"{cls.__module__}.{cls.__qualname__}")
        if form is not None:
            return form
    return None
