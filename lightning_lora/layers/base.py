"""What every adapted layer is: :class:`LoRALayer`, and how a layer becomes one and stops being one.

A layer is adapted in place. Its class is swapped for a made class ``LoRA<Base>(mixin, Base)``, and it gains the
parameters ``lora_A`` and ``lora_B``, and with dropout an empty module ``lora_mode``; names, hooks, ties and tensors of
the base stay what they were.
"""

import copyreg
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.ops.linear import merged_weight
from lightning_lora.ops.sharded import is_sharded

MAX_SEED = 2**31 - 1


class AdapterMode(nn.Module):
    """Hold the mode of one adapter's dropout, where ``train()``, ``eval()`` and Lightning's validation find it."""


@dataclass(frozen=True)
class Pair:
    """One low-rank pair of a layer: its term is ``scaling * B A``."""

    A: Tensor
    B: Tensor
    scaling: float
    r: int


class Made(nn.Module):
    """Mixin of the classes that are made at run time, ``LoRA<Base>(mixin, Base)``, for modules that change in place."""

    class_prefix: ClassVar[str] = "LoRA"
    lora_base_class: ClassVar[type[nn.Module]]
    lora_base_forward: ClassVar[Any]  # the base class's when this one was made: somebody may patch it later

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        # the made class has no importable name: pickle and deepcopy make it again from its two parents
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        function, arguments, *state = reduced
        assert function is copyreg.__newobj__, function  # type: ignore[attr-defined]  # missing in the stubs
        mixin, base = type(self).__bases__
        return (_new_module, (mixin, _recipe(base), *arguments[1:]), *state)


class LoRALayer(Made):
    """Mixin of all adapted layers; ``isinstance(layer, LoRALayer)`` is how the package recognises them.

    Attributes:
        lora_A: ``[r, in_features]``.
        lora_B: ``[out_features, r]``; zero at first, so that an adapted layer starts as its base.
        lora_scaling: factor of the adapter's term.
        lora_dropout: dropout probability on the adapter's input while the adapter's dropout is on.
        lora_mode: an empty module whose ``training`` says whether the adapter's dropout is on; only with dropout.
        lora_dtype: dtype that the adapter never falls below, or ``None`` to follow the base.
        lora_active: False while the layer is merged or disabled: the layer is then its base class.
        lora_original: the base tensors as they were, on CPU, while the layer is merged; else ``None``.
        lora_salt: makes dropout differ between data-parallel ranks that share a seed.
    """

    base_name: ClassVar[str] = "weight"  # of the base tensor that is adapted

    adapter_names: tuple[str, ...] = ("lora_A", "lora_B")
    frozen_names: tuple[str, ...] = ()  # adapter tensors that never train

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scaling: float
    lora_dropout: float
    lora_dtype: torch.dtype | None
    lora_active: bool
    lora_original: dict[str, Tensor] | None
    lora_salt: int

    @property
    def drops(self) -> bool:
        """Whether the adapter's dropout is on: by a mode of its own, since the base layer may be kept in eval mode.

        It starts as the base layer's mode and then follows ``train()`` and ``eval()`` of any module around it.
        """
        return self.lora_dropout > 0.0 and self._modules.get("lora_mode", self).training  # type: ignore[union-attr]

    def start_dropout(self) -> None:
        """Switch the adapter's dropout on and leave the base layer in its mode."""
        mode = self._modules.get("lora_mode")
        if mode is not None:
            mode.train()

    @classmethod
    def features(cls, layer: nn.Module) -> tuple[int, int]:
        """Return ``(in_features, out_features)`` of a base layer of this kind."""
        raise NotImplementedError(f"{cls.__name__} does not say its features")

    @classmethod
    def check(cls, layer: nn.Module) -> None:
        """Raise ``ValueError``, with the reason, for a base layer of this kind that cannot be adapted."""

    @classmethod
    def shapes(cls, layer: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B for rank ``r``."""
        in_features, out_features = cls.features(layer)
        return (r, in_features), (out_features, r)

    @classmethod
    def more_shapes(cls, layer: nn.Module) -> dict[str, tuple[int, ...]]:
        """Return the shapes of adapter parameters beside A and B, by their local names."""
        return {}

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Return a tensor that is shaped as the base weight as ``[out_features, in_features]``."""
        return weight

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """Return a matrix ``[out_features, in_features]`` in the shape of the base weight."""
        return matrix

    def merged(self) -> Tensor:
        """Return ``W + scaling * B A`` in the shape and dtype of the base weight."""
        return self.from_matrix(
            merged_weight(self.as_matrix(self.base_weight), *self.factors(), self.lora_scaling, ratio=self.row_ratio())
        )

    def row_ratio(self) -> Tensor | None:
        """Return what the rows of ``W + scaling * B A`` are multiplied by, ``[out_features]``, if by anything."""
        return None

    def merged_tensors(self) -> dict[str, Tensor]:
        """Return what a merge writes, by the local name of the base tensor that it writes to."""
        return {self.base_name: self.merged()}

    def merge_obstacle(self) -> str | None:
        """Return why the base layer with the merged weight would not give what the adapted layer gives, if so."""
        return None

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A ``[r, in_features]`` and B ``[out_features, r]`` of all that the layer adds to its base."""
        return self.lora_A, self.lora_B

    def pairs(self) -> dict[str, Pair]:
        """Return the layer's pairs by the name of the parameter that each one adapts; ``""`` is the layer itself."""
        return {"": Pair(self.lora_A, self.lora_B, self.lora_scaling, self.lora_A.shape[0])}

    @property
    def r(self) -> int:
        """Rank."""
        return self.lora_A.shape[0]

    @property
    def base_weight(self) -> Tensor:
        """The weight of the base as it is stored, also where reading ``weight`` gives the effective one."""
        stored = self._parameters.get(self.base_name)
        return getattr(self, self.base_name) if stored is None else stored

    @property
    def reads_effective(self) -> bool:
        """Whether reading the base weight gives the effective one; in shards, between forwards, it is as stored."""
        return self.lora_active and not is_sharded(self.base_weight)

    def base_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base class's ``forward`` on the weight as it is stored."""
        return self.lora_base_class.forward(self, *args, **kwargs)

    def base_tensors(self) -> dict[str, Tensor | None]:
        """Return the stored base tensors that a merge writes to, by local name; ``None`` for a computed one."""
        return {self.base_name: self._parameters.get(self.base_name)}

    def dropout_seed(self) -> Tensor | None:
        """Return a fresh seed for one call's dropout mask, or ``None`` when nothing is to be dropped.

        It is drawn from the default CPU generator, which activation checkpointing restores before it recomputes.
        """
        if not self.drops:
            return None
        return torch.randint(MAX_SEED, (), device="cpu") + self.lora_salt * MAX_SEED

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Local names of all adapter tensors, those that train and those that never do."""
        return self.adapter_names + self.frozen_names

    def named_adapter_tensors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield this layer's own adapter tensors with their local names."""
        for name in self.tensor_names:
            yield name, getattr(self, name)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # the base goes its way; of what fn does to the adapter only device and wider dtype count, so that to_empty()
        # cannot empty it and a conversion to half precision cannot narrow it
        adapter = {name: self._parameters.pop(name) for name in self.tensor_names}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters.update(adapter)
        for parameter in adapter.values():
            assert parameter is not None
            with torch.no_grad():
                like = fn(parameter.data)
            if like.device.type == "meta":
                continue
            dtype = not_narrower(like.dtype, self.lora_dtype)
            if (like.device, dtype) != (parameter.device, parameter.dtype):
                parameter.data = parameter.data.to(device=like.device, dtype=dtype)
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.to(device=like.device, dtype=dtype)
        return self

    @override
    def extra_repr(self) -> str:
        pairs = (f"{name and name + ': '}r={p.r}, scaling={p.scaling:g}" for name, p in self.pairs().items())
        return ", ".join([super().extra_repr(), *pairs])


M = TypeVar("M", bound=Made)
_MADE_CLASSES: dict[tuple[type[nn.Module], type[nn.Module]], Any] = {}


def lora_class(mixin: type[M], base: type[nn.Module]) -> type[M]:
    """Return the class ``LoRA<Base>(mixin, Base)``, or with another prefix, the same object on every call."""
    if (mixin, base) not in _MADE_CLASSES:
        namespace: dict[str, Any] = {"__module__": base.__module__, "__doc__": base.__doc__}
        namespace |= {"lora_base_class": base, "lora_base_forward": base.forward}
        _MADE_CLASSES[mixin, base] = type(f"{mixin.class_prefix}{base.__name__}", (mixin, base), namespace)
    made: type[M] = _MADE_CLASSES[mixin, base]
    return made


def adapt(
    layer: nn.Module, mixin: type[LoRALayer], *, r: int, scaling: float, dropout: float, dtype: torch.dtype | None
) -> LoRALayer:
    """Turn ``layer`` into a :class:`LoRALayer` in place, with all-zero A and B.

    The parameters are real also where the base is on the meta device: they are then on CPU.
    """
    shape_A, shape_B = mixin.shapes(layer, r)
    more_shapes = mixin.more_shapes(layer)
    swap_class(layer, mixin, scaling=scaling, dropout=dropout, dtype=dtype)
    assert isinstance(layer, LoRALayer)
    weight = layer._parameters.get(mixin.base_name)
    like = getattr(layer, mixin.base_name, None) if weight is None else weight
    put(layer, like, lora_A=shape_A, lora_B=shape_B, **more_shapes)
    return layer


def swap_class(
    layer: nn.Module, mixin: type[LoRALayer], *, scaling: float, dropout: float, dtype: torch.dtype | None
) -> None:
    """Give ``layer`` the made class and the plain attributes of a :class:`LoRALayer`."""
    layer.__class__ = lora_class(mixin, type(layer))
    # past nn.Module.__setattr__, which looks for parameters and modules among them
    layer.__dict__.update(lora_scaling=scaling, lora_dropout=dropout, lora_dtype=dtype)
    layer.__dict__.update(lora_active=True, lora_original=None, lora_salt=0)
    if dropout > 0.0:
        layer.add_module("lora_mode", AdapterMode().train(layer.training))


def put(layer: LoRALayer, like: Any, **shapes: tuple[int, ...]) -> None:
    """Register all-zero adapter parameters of the given shapes, where ``like`` lies if that is a real tensor."""
    device = like.device if isinstance(like, Tensor) and like.device.type != "meta" else torch.device("cpu")
    own = like.dtype if isinstance(like, Tensor) and like.is_floating_point() else torch.float32
    for name, shape in shapes.items():
        values = torch.zeros(shape, device=device, dtype=layer.lora_dtype or own)
        layer.register_parameter(name, nn.Parameter(values))


def unadapt(layer: LoRALayer) -> nn.Module:
    """Give the layer its base class back and drop the adapter. The base weight is left as it is."""
    for name in layer.tensor_names:
        del layer._parameters[name]
    for name in [name for name in layer.__dict__ if name.startswith("lora_")]:
        del layer.__dict__[name]
    for name in ("adapter_names", "frozen_names"):
        layer.__dict__.pop(name, None)
    layer._modules.pop("lora_mode", None)
    base = layer.lora_base_class
    layer.__class__ = base  # type: ignore[assignment]  # the reverse of the class swap
    return layer


def _recipe(cls: type[nn.Module]) -> Any:
    """Return what pickle can write of a class: itself, or the two that it was made from."""
    made = _MADE_CLASSES.get(cls.__bases__) if len(cls.__bases__) == 2 else None
    return (cls.__bases__[0], _recipe(cls.__bases__[1])) if made is cls else cls


def _class_of(recipe: Any) -> type[nn.Module]:
    return lora_class(recipe[0], _class_of(recipe[1])) if isinstance(recipe, tuple) else recipe


def _new_module(mixin: type[Made], base: Any, *arguments: Any) -> Made:
    cls = lora_class(mixin, _class_of(base))
    return cls.__new__(cls, *arguments)


def not_narrower(dtype: torch.dtype, floor: torch.dtype | None) -> torch.dtype:
    """Return ``dtype``, or ``floor`` where that has more bits or as many."""
    if floor is None or torch.finfo(dtype).bits > torch.finfo(floor).bits:
        return dtype
    return floor
