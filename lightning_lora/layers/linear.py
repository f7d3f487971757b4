"""Adapted linear layers: ``nn.Linear`` and its subclasses, Hugging Face's ``Conv1D``."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.plain_weight import plain_base, weight_shape
from lightning_lora.layers.read_weight import ReadWeight
from lightning_lora.layers.same_code import is_plain_linear
from lightning_lora.layers.split import SplitLinear
from lightning_lora.layers.stored import stored_form
from lightning_lora.ops.linear import lora_linears
from lightning_lora.ops.linear_tensors import LinearTensors, ScaledDropout, StoredLinearTensors
from lightning_lora.ops.quantized import check_plain
from lightning_lora.ops.stored import stored_linear


class LoRALinear(LoRALayer):
    """``nn.Linear``, or a subclass whose own ``forward`` is kept: ``y = base(x) + scaling * dropout(x) A^T B^T``."""

    is_linear = True

    weight: Tensor  # [out_features, in_features]
    bias: Tensor | None
    lora_siblings: Any = None  # fuse/siblings.py: the group of layers that are computed with this one
    lora_place: int  # in that group

    @classmethod
    @override
    def features(cls, layer: nn.Module) -> tuple[int, int]:
        return int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]

    @classmethod
    @override
    def check(cls, layer: nn.Module) -> None:
        form = stored_form(layer)
        if form is not None:
            form.read(layer)  # raises for what cannot be read
        elif type(layer).forward is nn.Linear.forward:  # a subclass's own knows what its weight is
            check_plain("its weight", layer._parameters.get("weight"))

    @override
    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.lora_active:
            stored = None if self.lora_stored is None else self.lora_stored.product(self, input)
            if stored is not None:  # bitsandbytes' own forward rounds its scales in eval mode, in place
                return stored_linear(input, stored, self.bias)
            return self.base_forward(input, *args, **kwargs)  # type: ignore[no-any-return]
        is_plain = self.lora_base_class.forward is nn.Linear.forward
        if is_plain or self.lora_stored is not None:
            y = None if self.lora_siblings is None else self.lora_siblings.output(self, input)
            if y is not None:
                return y  # type: ignore[no-any-return]
            if self.lora_stored is None:
                own = self._parameters.get("weight")  # what reading it gives may have the update in it
                return self._lora_linear(input, self.weight if own is None else own, self.bias)
            stored = self.lora_stored.product(self, input)
            if stored is not None:
                return self._lora_linear(input, stored, self.bias)
        y = self.base_forward(input, *args, **kwargs)
        return y + self._lora_linear(input, None, None).to(y.dtype)  # type: ignore[no-any-return]

    @override
    def merge_obstacle(self) -> str | None:
        if is_plain_linear(plain_base(self.lora_base_class)):
            return None
        return (
            f"{self.lora_base_class.__name__} has a forward of its own, which is not known to be x W^T + b, and then a "
            "changed weight need not give what base plus adapter gives. Keep the adapter unmerged"
        )

    def _lora_linear(self, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        kind = LinearTensors if self.lora_stored is None else StoredLinearTensors
        layer = kind(weight, bias, self.lora_A, self.lora_B)
        return lora_linears(x, [layer], self.scaled_dropout())[0]

    def scaled_dropout(self) -> ScaledDropout:
        """Return scaling and dropout of the adapter for one call, with a new seed."""
        seed = self.dropout_seed() if self.lora_dropout else None
        if seed is None:
            return ScaledDropout(self.lora_scaling)
        return ScaledDropout(self.lora_scaling, self.lora_dropout, seed, self.dropout_columns())

    def scaled_dropout_of(self, layers: Iterable["LoRALinear"]) -> ScaledDropout:
        """Return scaling and dropout for one call that computes the outputs of ``layers``, this one among them."""
        settings = self.scaled_dropout()
        if settings.seed is not None:
            for layer in layers:
                if layer.lora_seeds is not None and layer is not self:
                    layer.lora_seeds.pass_over()
        return settings

    def dropout_columns(self) -> tuple[int, int] | None:
        """Return the position of the input's first feature and the number of all, if it is a slice of them."""
        return None


class LoRAConv1D(LoRALinear):
    """transformers' ``Conv1D`` (GPT-2): a linear layer whose weight is stored ``[in_features, out_features]``."""

    @classmethod
    @override
    def features(cls, layer: nn.Module) -> tuple[int, int]:
        in_features, out_features = weight_shape(layer, "weight")
        return int(in_features), int(out_features)

    @classmethod
    @override
    def check(cls, layer: nn.Module) -> None:
        if stored_form(layer) is None:
            check_plain("its weight", layer._parameters.get("weight"))

    @override
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]  # Conv1D's own name
        if not self.lora_active:
            return super(LoRALinear, self).forward(x)  # type: ignore[no-any-return]
        return self._lora_linear(
            x, self.weight.t() if self.lora_stored is None else self.lora_stored.read(self), self.bias
        )

    @override
    def merge_obstacle(self) -> str | None:
        return None

    @override
    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.t()

    @override
    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.t()


def is_plain(layer: LoRALinear) -> bool:
    """Return True if the layer is W and B A, without a magnitude, bias or start of its own or another forward."""
    mixin, base = type(layer).__bases__[0], layer.lora_base_class
    is_product = base.forward is nn.Linear.forward or layer.lora_stored is not None
    return issubclass(base, SplitLinear) or (mixin is LoRALinear and is_product)


class LoRAReadLinear(ReadWeight, LoRALinear):
    """A linear layer whose parent reads ``weight``, such as ``nn.MultiheadAttention.out_proj``."""
