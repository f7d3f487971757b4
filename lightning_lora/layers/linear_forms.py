"""Which subclasses of ``nn.Linear`` compute ``x W^T + b``, so that an adapter can be merged into their weight."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from lightning_lora.layers.same_code import same_code


def is_plain_linear(cls: type[nn.Module]) -> bool:
    """Return True if the forward of a class is ``x W^T + b``: torch's own, or one of the written forms by its code."""
    for base in cls.__mro__:
        forward: Any = vars(base).get("forward")
        if forward is nn.Linear.forward or any(same_code(forward, form.forward) for form in _FORMS):
            return True
        calls_next = same_code(forward, _Inherited.forward) and forward.__closure__[0].cell_contents is base
        if forward is not None and not calls_next:
            return False
    return False


class _Plain:
    def forward(self: Any, x: Any) -> Any:
        return F.linear(x, self.weight, self.bias)


class _Inherited(nn.Linear):
    def forward(self, x: Any) -> Any:
        return super().forward(x)


class _Falcon:
    def forward(self: Any, x: Any) -> Any:
        hidden_states = x @ self.weight.T
        if self.bias is None:
            return hidden_states
        return hidden_states + self.bias


class _Idefics:
    def forward(self: Any, x: Any) -> Any:
        output = F.linear(x, self.weight, self.bias)

        if self.out_additional_features > 0:
            additional_features = self.additional_fc(x)
            output = torch.cat((output, additional_features), -1)

        return output


_FORMS: tuple[Any, ...] = (_Plain, _Falcon, _Idefics)
