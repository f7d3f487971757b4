""":class:`LoRALayer`, the mixin of all adapted layers: what a kind of layer defines, and what it inherits."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.layers.class_swap import SwappedModule
from lightning_lora.layers.stored import StoredForm
from lightning_lora.ops.dropout import LayerSeeds
from lightning_lora.ops.sharded import is_sharded
from lightning_lora.ops.weights import merged_weight

MAX_SEED = 2**31 - 1


@dataclass(frozen=True)
class Pair:
    """One low-rank pair of a layer: its term is ``scaling * B A``."""

    A: Tensor
    B: Tensor
    scaling: float
    r: int


@dataclass(frozen=True)
class Part:
    """What one low-rank pair adapts: a layer, one of the weights that it stacks, or a parameter of a module.

    Attributes:
        name: what patterns match and what the starting values are drawn by.
        local: which part of the layer; ``""`` is all of it.
        features: ``(in_features, out_features)``; ``None`` are those of the layer.
        matrices: how many matrices the parameter stacks.
    """

    name: str
    local: str = ""
    features: tuple[int, int] | None = None
    matrices: int = 1


class LoRALayer(SwappedModule):
    """Mixin of all adapted layers; ``isinstance(layer, LoRALayer)`` is how the package recognises them.

    Attributes:
        lora_A: ``[r, in_features]``.
        lora_B: ``[out_features, r]``; zero at first, so that an adapted layer starts as its base.
        lora_scaling: factor of the adapter's term.
        lora_dropout: dropout probability on the adapter's input while the adapter's dropout is on.
        lora_mode: an empty module whose ``training`` says whether the adapter's dropout is on; only with dropout.
        lora_dtype: the narrowest dtype that the adapter may have, or ``None`` to follow the base.
        lora_active: False while the layer is merged or disabled: the base class's forward then runs.
        lora_original: the base tensors as they were while the layer is merged, else ``None``: on CPU, or a
            :class:`~lightning_lora.layers.plain_weight.Former`.
        lora_salt: makes dropout differ between data-parallel ranks that share a seed.
        lora_host: the layer whose base this adapter with a name adapts, else ``None``: the layer holds its base itself.
        lora_seeds: of the dropout of an adapter with a name, else ``None``: the default generator then gives them.
        lora_stored: how the base weight is read where it is no plain tensor, else ``None``.
    """

    base_name: ClassVar[str] = "weight"  # of the base tensor that is adapted
    is_linear: ClassVar[bool] = False  # whether "all-linear" means layers of this kind
    uses_init: ClassVar[bool] = True  # whether the pairs start as the config's init says
    can_mix: ClassVar[bool] = True  # whether rows of one input may have adapters of their own
    row_dim: ClassVar[int] = 0  # the dimension of the input that these rows lie along

    adapter_names: tuple[str, ...] = ("lora_A", "lora_B")
    frozen_names: tuple[str, ...] = ()  # adapter tensors that never train

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scaling: float
    lora_dropout: float
    lora_dtype: torch.dtype | None
    lora_active: bool
    lora_original: dict[str, Any] | None
    lora_salt: int
    lora_seeds: LayerSeeds | None = None
    lora_host: nn.Module | None = None
    lora_stored: StoredForm | None = None

    @property
    def drops(self) -> bool:
        """Whether the adapter's dropout is on. It has its own mode: users train adapters with base layers in eval mode.

        It starts as the base layer's mode, and follows ``train()`` and ``eval()`` of any module around it.
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
    def check_use(cls, modules: Mapping[str, nn.Module], name: str, config: Any) -> None:
        """Raise ``ValueError`` where the layer called ``name`` cannot be adapted for what its model does with it, or
        cannot have what ``config`` asks for.
        """

    @classmethod
    def parts(cls, modules: Mapping[str, nn.Module], name: str, *, fused: bool) -> list[Part]:
        """Return what can have a pair of its own in the layer called ``name``: the layer itself, if nothing smaller.

        Args:
            modules: all modules of the model, by name.
            fused: count a layer that stacks several weights as one.
        """
        return [Part(name)]

    @classmethod
    def adapt_parts(
        cls, modules: Mapping[str, nn.Module], name: str, pairs: Mapping[str, tuple[int, float]], **options: Any
    ) -> "LoRALayer":
        """Turn the layer called ``name`` into a :class:`LoRALayer` in place, with all-zero pairs.

        Args:
            pairs: rank and scaling by :attr:`Part.local`.
            options: ``dropout`` and ``dtype``.
        """
        from lightning_lora.layers.adapt import adapt  # which imports this file

        ((r, scaling),) = pairs.values()
        return adapt(modules[name], cls, r=r, scaling=scaling, **options)

    @classmethod
    def tag_parts(cls, model: nn.Module) -> None:
        """Keep this rank's part of the adapters in ``model`` whose base is split over ranks, and tag what is a part.

        Called once, with the starting values drawn.
        """

    def start(self) -> None:
        """Set what depends on the starting values of the pairs, once they are drawn."""

    @classmethod
    def shapes(cls, layer: nn.Module, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B for rank ``r``."""
        in_features, out_features = cls.features(layer)
        return (r, in_features), (out_features, r)

    @classmethod
    def more_shapes(cls, layer: nn.Module, r: int) -> dict[str, tuple[int, ...]]:
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
        """Return what the rows of ``W + scaling * B A`` are multiplied by, ``[out_features]``; ``None`` by default."""
        return None

    def merged_tensors(self) -> dict[str, Tensor]:
        """Return the values that a merge writes, by the local name of the base tensor that it overwrites."""
        return {self.base_name: self.merged()}

    def merge_obstacle(self) -> str | None:
        """Return why this layer cannot be merged, or ``None`` if the merged base layer gives the same output."""
        return None

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A ``[r, in_features]`` and B ``[out_features, r]`` of the whole update, also of a layer with parts."""
        return self.lora_A, self.lora_B

    def pairs(self) -> dict[str, Pair]:
        """Return the layer's pairs by the name of the parameter that each one adapts; ``""`` is the layer itself."""
        return {"": Pair(self.lora_A, self.lora_B, self.lora_scaling, self.lora_A.shape[0])}

    @property
    def base_layer(self) -> nn.Module:
        """The module that holds the base's tensors: this one, or the host of an adapter with a name."""
        return self if self.lora_host is None else self.lora_host

    @property
    def may_act(self) -> bool:
        """Whether a forward may run this adapter: it is not merged or disabled, nor is another one merged."""
        choice: Any = None if self.lora_host is None else self.lora_host.lora_choice
        return self.lora_active and (choice is None or choice.chosen is not None)

    @property
    def r(self) -> int:
        """Rank."""
        return self.lora_A.shape[0]

    @property
    def base_weight(self) -> Tensor:
        """The weight of the base, made dense if need be, also where reading ``weight`` gives the effective one."""
        if self.lora_stored is not None:
            return self.lora_stored.dense(self)
        stored = self._parameters.get(self.base_name)
        return getattr(self, self.base_name) if stored is None else stored

    @property
    def reads_effective(self) -> bool:
        """Whether reading the base weight gives the effective one: never of an inactive adapter or a sharded weight."""
        return self.lora_active and not is_sharded(self.base_weight)

    def base_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the base class's ``forward`` on the weight as it is stored."""
        return self.lora_base_class.forward(self, *args, **kwargs)

    def base_tensors(self) -> dict[str, Tensor | None]:
        """Return the stored base tensors that a merge writes to, by local name; ``None`` for a computed one."""
        return {self.base_name: self._parameters.get(self.base_name)}

    def dropout_seed(self) -> Tensor | None:
        """Return a fresh seed for one call's dropout mask, or ``None`` when nothing is to be dropped.

        It is drawn from the default CPU generator, which activation checkpointing restores before it recomputes, or
        from the seeds of an adapter with a name, which advance only where that adapter acts.
        """
        if not self.drops:
            return None
        seed = torch.randint(MAX_SEED, (), device="cpu") if self.lora_seeds is None else self.lora_seeds.draw()
        return seed + self.lora_salt * MAX_SEED

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Local names of all adapter tensors, trained and frozen ones."""
        return self.adapter_names + self.frozen_names

    def named_adapter_tensors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield this layer's own adapter tensors with their local names."""
        for name in self.tensor_names:
            yield name, getattr(self, name)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # the adapter follows fn only to another device or a wider dtype: to_empty() must not empty it, and half() must
        # not narrow it
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
            convert_parameter(parameter, dtype, like.device)
        return self

    @override
    def extra_repr(self) -> str:
        pairs = (f"{name and name + ': '}r={p.r}, scaling={p.scaling:g}" for name, p in self.pairs().items())
        return ", ".join([super().extra_repr(), *pairs])


def not_narrower(dtype: torch.dtype, floor: torch.dtype | None) -> torch.dtype:
    """Return ``dtype``, or ``floor`` where that has more bits or as many."""
    if floor is None or torch.finfo(dtype).bits > torch.finfo(floor).bits:
        return dtype
    return floor


def convert_parameter(parameter: nn.Parameter, dtype: torch.dtype, device: torch.device | None = None) -> None:
    """Move a parameter and its gradient to a dtype and a device; it stays the same object."""
    device = device or parameter.device
    if (parameter.dtype, parameter.device) != (dtype, device):
        parameter.data = parameter.data.to(device=device, dtype=dtype)
        if parameter.grad is not None:
            parameter.grad = parameter.grad.to(device=device, dtype=dtype)
