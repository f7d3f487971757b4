"""Store base parameters that train (heads, biases) in a wider dtype, and cast them where their modules read them.

In a narrow dtype small updates would be rounded away.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.compat.torch import collect_weights
from lightning_lora.layers.base import convert_parameter, not_narrower
from lightning_lora.layers.class_swap import SwappedModule, restore_class, swap_class
from lightning_lora.ops.sharded import is_dtensor

_NO_DTYPES: dict[str, torch.dtype] = {}


class KeptWide(SwappedModule):
    """Mixin of a module whose trained parameters are stored in a wider dtype than its code computes in.

    Reading ``module.weight`` gives the parameter in the dtype of the base. Its gradient is summed, and the optimizer
    updates it, in the wider dtype. Moving and converting the module changes the dtype that is read, and never
    narrows the parameter below ``_lora_floor``. Reading may give a copy: write to ``parameters()``.
    """

    class_prefix: ClassVar[str] = ""

    _lora_read_dtypes: dict[str, torch.dtype]  # by the parameter's local name
    _lora_floor: torch.dtype

    def __getattr__(self, name: str) -> Any:
        value: Any = super().__getattr__(name)
        dtype = self.__dict__.get("_lora_read_dtypes", _NO_DTYPES).get(name)
        if dtype is None or value is None or value.dtype == dtype or is_dtensor(value):
            return value  # in shards, between forwards: FSDP2 looks for its own parameter here
        return value if _bits(dtype) > _bits(value.dtype) else value.to(dtype)  # FSDP2 may gather it narrow

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        for child in self.children() if recurse else ():
            child._apply(fn)
        dtypes = self.__dict__.get("_lora_read_dtypes", _NO_DTYPES)
        held = {name: self._parameters[name] for name in dtypes if self._parameters.get(name) is not None}
        wide: dict[int, torch.dtype] = {}
        for name, parameter in held.items():
            assert parameter is not None
            dtypes[name] = fn(torch.zeros(1, dtype=dtypes[name], device=parameter.device)).dtype
            for tensor in (parameter, parameter.grad):
                wide[id(tensor)] = not_narrower(dtypes[name], self._lora_floor)

        def applied(tensor: Tensor) -> Tensor:
            result, dtype = fn(tensor), wide.get(id(tensor))
            if dtype is None or result.dtype == dtype:
                return result
            # not from the result, which may have been rounded
            return (result if tensor.is_meta else tensor).to(device=result.device, dtype=dtype)

        super()._apply(applied, recurse=False)  # type: ignore[no-untyped-call]
        return self

    @override
    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        for name in self.__dict__.get("_lora_read_dtypes", ()):  # assign=True puts in what the state holds
            _widen(self._parameters.get(name), self._lora_floor)


class KeptWideRecurrent(KeptWide):
    """The same for ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``, which keep a list of their weights."""

    _flat_weights_names: list[str]

    @property
    def _flat_weights(self) -> list[Any]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Any]) -> None:
        """Ignore the list: the getter reads the weights anew."""


def keep_wide(model: nn.Module, parameters: Iterable[nn.Parameter], floor: torch.dtype | None) -> None:
    """Store ``parameters`` in ``floor`` or wider, in place, and cast them where the modules of ``model`` read them.

    ``floor=None`` changes nothing.
    """
    wanted = {id(parameter) for parameter in parameters if parameter.is_floating_point()}
    if floor is None or not wanted:
        return
    held = {}
    for module in model.modules():
        own = {name: p for name, p in module._parameters.items() if p is not None and id(p) in wanted}
        if own:
            held[module] = own
    for module, own in held.items():
        mixin = KeptWideRecurrent if isinstance(module, nn.RNNBase) else KeptWide
        dtypes = {name: parameter.dtype for name, parameter in own.items()}
        swap_class(module, mixin)
        module.__dict__.update(_lora_read_dtypes=dtypes, _lora_floor=floor)
    for own in held.values():
        for parameter in own.values():
            _widen(parameter, floor)


@contextmanager
def as_stored(module: nn.Module) -> Iterator[None]:
    """Let ``module.weight`` give the stored parameter itself inside the block, for code that writes to it."""
    read = {part: part.__dict__.pop("_lora_read_dtypes", None) for part in module.modules()}
    try:
        yield
    finally:
        for part, dtypes in read.items():
            if dtypes is not None:
                part.__dict__["_lora_read_dtypes"] = dtypes


def restore_dtypes(model: nn.Module) -> None:
    """Undo :func:`keep_wide`: round every parameter once to the dtype that its module read.

    Sharded parameters stay wide, and are still cast where they are read.
    """
    for module in model.modules():
        if not isinstance(module, KeptWide) or "_lora_read_dtypes" not in module.__dict__:
            continue
        if any(is_dtensor(module._parameters.get(name)) for name in module._lora_read_dtypes):
            continue
        dtypes = module.__dict__.pop("_lora_read_dtypes")
        del module.__dict__["_lora_floor"]
        if type(module).__bases__[0] in (KeptWide, KeptWideRecurrent):
            restore_class(module)
        for name, dtype in dtypes.items():
            parameter = module._parameters.get(name)
            if parameter is not None:
                convert_parameter(parameter, dtype)
        if isinstance(module, nn.RNNBase):
            collect_weights(module)


def _widen(parameter: nn.Parameter | None, floor: torch.dtype) -> None:
    if parameter is not None:
        convert_parameter(parameter, not_narrower(parameter.dtype, floor))


def _bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits
