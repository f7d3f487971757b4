"""Make RMS norms of a frozen base save their output for backward instead of their input."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.compat.torch import is_transformed, version_of
from lightning_lora.fuse.forms import always, form_of
from lightning_lora.layers.base import LoRALayer
from lightning_lora.layers.class_swap import SwappedModule, swap_class
from lightning_lora.ops.autocast import autocast_dtype
from lightning_lora.ops.rms_norm import rms_norm
from lightning_lora.ops.sharded import is_dtensor


class NormForm(NamedTuple):
    """The attribute of a norm that is its eps, and whether it multiplies by ``1 + weight``."""

    eps: str
    is_offset: bool = False
    condition: Callable[[Any], bool] = always


class LoRARMSNorm(SwappedModule):
    """Mixin of an RMS norm.

    Fusing is skipped, and the base's own ``forward`` runs, where the weight trains, holds zeros, lies in shards or has
    another dtype than the input, where no gradient is wanted, and once the forward was replaced.
    """

    weight: Tensor  # [features]
    lora_form: NormForm
    lora_has_zeros: bool | None  # None until the weight is read
    lora_seen: tuple[Any, ...]  # identity and version of the weight that was read

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not self._is_fused(args[0]):
            return self.lora_base_class.forward(self, *args, **kwargs)
        form = self.lora_form
        return rms_norm(args[0], self.weight, getattr(self, form.eps), is_offset=form.is_offset)

    def _is_fused(self, x: Tensor) -> bool:
        if not (torch.is_grad_enabled() and x.requires_grad) or torch.compiler.is_compiling() or is_transformed():
            return False
        weight = self.weight
        if weight.requires_grad or is_dtensor(weight) or weight.is_meta or autocast_dtype(x) is not None:
            return False
        if not self.lora_form.condition(self) or self.lora_base_class.forward is not type(self).lora_base_forward:
            return False
        return weight.dtype == x.dtype and not self._has_zeros(weight)

    def _has_zeros(self, weight: Tensor) -> bool:
        """Return True if backward cannot divide by the weight. Its values are read again after it was written."""
        if self.lora_has_zeros is None or not self._is_seen(weight):
            factor = weight + 1 if self.lora_form.is_offset else weight
            self.lora_has_zeros = not bool((factor.abs() >= torch.finfo(factor.dtype).tiny).all())
            self.lora_seen = _identity(weight)
        return self.lora_has_zeros

    def _is_seen(self, weight: Tensor) -> bool:
        if not isinstance(weight, nn.Parameter):  # a view of this one forward: of a unit of weights that are gathered
            return True
        return _identity(weight) == self.lora_seen

    @override
    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.lora_has_zeros = None
        super()._load_from_state_dict(*args, **kwargs)


def _identity(weight: Tensor) -> tuple[Any, ...]:
    return id(weight), weight.dtype, 0 if weight.is_inference() else version_of(weight)


def fuse_norms(parent: nn.Module) -> None:
    """Give the RMS norms beside modules with adapted layers the class that saves their output."""
    children = [child for child in parent._modules.values() if child is not None and _has_only_a_weight(child)]
    forms = [(child, form_of(type(child), NORM_FORMS)) for child in children]
    found = [(child, form) for child, form in forms if form is not None]
    if not found or not any(isinstance(module, LoRALayer) for module in parent.modules()):
        return
    for norm, form in found:
        swap_class(norm, LoRARMSNorm)
        norm.__dict__.update(lora_form=form, lora_has_zeros=None, lora_seen=())


def _has_only_a_weight(module: nn.Module) -> bool:
    if isinstance(module, SwappedModule) or module._modules or module._buffers:
        return False
    return [name for name, parameter in module._parameters.items() if parameter is not None] == ["weight"]


# the code of known norms: a class with the same code computes the same formula
class _LlamaNorm:
    def forward(self: Any, x: Any) -> Any:
        input_dtype = x.dtype
        x = x.to(torch.float32)
        variance = x.pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * x.to(input_dtype)


class _GemmaNorm:
    def _norm(self: Any, x: Any) -> Any:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self: Any, x: Any) -> Any:
        output = self._norm(x.float())
        output = output * (1.0 + self.weight.float())
        return output.type_as(x)


class _T5Norm:
    def forward(self: Any, x: Any) -> Any:
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + self.variance_epsilon)
        if self.weight.dtype in [torch.float16, torch.bfloat16]:
            x = x.to(self.weight.dtype)
        return self.weight * x


class _Llama4Norm:
    _norm = _GemmaNorm._norm

    def forward(self: Any, x: Any) -> Any:
        output = self._norm(x.float()).type_as(x)
        return output * self.weight


def _reduces_in_float32(module: Any) -> bool:
    return bool(module.force_float32_reductions and module.bias is None)


class _XLSTMNorm:
    def _apply_weight_bias(self: Any, x: Any) -> Any:
        if self.weight is not None:
            x = x * self.weight
        if self.bias is not None:
            x = x + self.bias
        return x

    def _rms_normalize(self: Any, x: Any) -> Any:
        in_dtype = x.dtype
        if self.force_float32_reductions:
            x = x.float()
        x = x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return x.to(in_dtype)

    def forward(self: Any, x: Any) -> Any:
        x = self._rms_normalize(x)
        x = self._apply_weight_bias(x)
        return x


NORM_FORMS: dict[type, NormForm] = {
    _LlamaNorm: NormForm("variance_epsilon"),
    _GemmaNorm: NormForm("eps", is_offset=True),
    _T5Norm: NormForm("variance_epsilon"),
    _Llama4Norm: NormForm("eps"),
    _XLSTMNorm: NormForm("eps", condition=_reduces_in_float32),
}
