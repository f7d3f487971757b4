"""RMS norms of a frozen base that keep their output for backward, which the adapted layers behind them keep anyway.

As gated MLPs, they are recognised by what they compute: to the bit, on small numbers, in two dtypes.
"""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.fuse.structure import Snapshot, facts, keeps_books
from lightning_lora.layers.base import LoRALayer, Made, lora_class
from lightning_lora.ops.linear import autocast_dtype, is_transformed
from lightning_lora.ops.rms_norm import rms_norm
from lightning_lora.ops.sharded import is_dtensor

_FEATURES = 8


class LoRARMSNorm(Made):
    """Mixin of an RMS norm.

    It runs the base's own ``forward`` where its weight trains or is of another dtype than its input, where no gradient
    is wanted, and when the module was changed since it was recognised.
    """

    weight: Tensor  # [features]
    lora_eps: float
    lora_is_offset: bool
    lora_recognized: Snapshot
    lora_has_zeros: bool | None  # unknown until the weight is seen
    lora_seen: tuple[Any, ...]  # the weight that this was found out about, and how often it had been changed

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) != 1 or kwargs or not self._is_fused(args[0]):
            return self.lora_base_class.forward(self, *args, **kwargs)
        return rms_norm(args[0], self.weight, self.lora_eps, is_offset=self.lora_is_offset)

    def _is_fused(self, x: Tensor) -> bool:
        if not (torch.is_grad_enabled() and x.requires_grad) or torch.compiler.is_compiling() or is_transformed():
            return False
        weight = self.weight
        if weight.requires_grad or is_dtensor(weight) or weight.is_meta or autocast_dtype(x) is not None:
            return False
        if not self.lora_recognized.is_of(self) or self.lora_base_class.forward is not type(self).lora_base_forward:
            return False
        return weight.dtype == x.dtype and not self._has_zeros(weight)

    def _has_zeros(self, weight: Tensor) -> bool:
        """Whether backward cannot divide by the weight: one look at its values, and one more when it was changed."""
        if self.lora_has_zeros is None or not self._is_seen(weight):
            factor = weight + 1 if self.lora_is_offset else weight
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
    return id(weight), weight.dtype, 0 if weight.is_inference() else weight._version


def fuse_norms(parent: nn.Module, known: dict[Any, Any]) -> None:
    """Give the RMS norms beside modules with adapted layers the class that keeps their output.

    Args:
        known: what was found out about other modules of the same model.
    """
    norms = [child for child in parent._modules.values() if child is not None and _may_be_norm(child)]
    if not norms or not any(isinstance(module, LoRALayer) for module in parent.modules()):
        return
    for norm in norms:
        key = facts(norm)
        if key not in known:
            known[key] = form_of(norm)
        if known[key] is not None:
            eps, is_offset = known[key]
            norm.__class__ = lora_class(LoRARMSNorm, type(norm))
            norm.__dict__.update(lora_eps=eps, lora_is_offset=is_offset, lora_recognized=None)
            norm.__dict__.update(lora_has_zeros=None, lora_seen=())
            norm.__dict__.update(lora_recognized=Snapshot.of(norm))


def _may_be_norm(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return (
        weight is not None
        and weight.ndim == 1
        and len(module._parameters) == 1
        and not (module._modules or module._buffers or isinstance(module, Made) or keeps_books(module))
    )


def release_norm(norm: LoRARMSNorm) -> None:
    """Give the module its base class back."""
    for name in ("lora_eps", "lora_is_offset", "lora_recognized", "lora_has_zeros", "lora_seen"):
        del norm.__dict__[name]
    norm.__class__ = norm.lora_base_class  # type: ignore[assignment]  # the reverse of the class swap


def form_of(norm: nn.Module) -> tuple[float, bool] | None:
    """Return ``(eps, is_offset)`` of a module that computes :func:`rms_norm`, if it does."""
    candidates = {value for value in norm.__dict__.values() if isinstance(value, float) and 0 < value < 0.1}
    return next(
        ((eps, is_offset) for eps in candidates for is_offset in (False, True) if _computes(norm, eps, is_offset)), None
    )


@torch.no_grad()
def _computes(norm: nn.Module, eps: float, is_offset: bool) -> bool:
    """Whether a norm computes the formula, in training and evaluation, and changes nothing of its own."""
    small: Any = object.__new__(type(norm))
    small.__dict__.update(norm.__dict__)
    gives = all(_gives(small, eps, is_offset, training=training) for training in (True, False))
    return gives and Snapshot.of(norm).is_of(small)


def _gives(small: Any, eps: float, is_offset: bool, *, training: bool) -> bool:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5, _FEATURES, generator=generator, device="cpu")
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(_FEATURES, generator=generator, device="cpu").to(dtype)
        small.__dict__.update(_parameters={"weight": weight}, training=training)
        for scale in (eps**0.5, 1.0, 1e3):  # of the size that eps matters at, to that it does not
            x = (values * scale).to(dtype)
            try:
                given = type(small).forward(small, x)
            except Exception:  # a forward of any kind: what cannot be run so is left as it is
                return False
            if not (isinstance(given, Tensor) and given.dtype == x.dtype and given.shape == x.shape):
                return False
            if not torch.equal(given, rms_norm(x, weight, eps, is_offset=is_offset)):
                return False
    return True
