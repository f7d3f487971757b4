"""Hold the code of known RMS norms: a class with the same code computes the same formula."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class NormForm(NamedTuple):
    """The attribute of a norm that is its eps, and whether it multiplies by ``1 + weight``."""

    eps: str
    is_offset: bool = False
    condition: Callable[[Any], bool] | None = None

    def holds(self, module: Any) -> bool:
        """Return True if the attributes of a module are such that it computes the formula."""
        return self.condition is None or self.condition(module)


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
