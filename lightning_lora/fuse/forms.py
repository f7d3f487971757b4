"""Hold the code of known gated MLPs: a class with the same code computes the same formula.

All but a few of the classes in transformers are copies of these texts. A class that is written in another way says
what it is with :func:`~lightning_lora.fuse.gated_mlp.register_gated_mlp`.
"""

import math
from collections.abc import Callable
from types import FunctionType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from lightning_lora.layers.same_code import same_code


def activation_name(function: Any) -> str | None:
    """Return the name in :data:`~lightning_lora.ops.gated_mlp.ACTIVATIONS` of a module or function, if it is there."""
    if type(function) is nn.GELU:
        return "gelu_tanh" if function.approximate == "tanh" else "gelu"
    if not isinstance(function, nn.Module):
        return next((name for known, name in _ACTIVATIONS.items() if known is function), None)
    cls = type(function)
    return _ACTIVATIONS.get(cls) or _ACTIVATIONS.get(f"{cls.__module__}.{cls.__qualname__}")


_ACTIVATIONS: dict[Any, str] = {
    nn.SiLU: "silu",
    nn.ReLU: "relu",
    F.silu: "silu",
    F.gelu: "gelu",
    F.relu: "relu",
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
}


def always(module: Any) -> bool:
    """Return True: the condition of a form that computes its formula whatever the module's attributes are."""
    return True


class GatedForm(NamedTuple):
    """The names of a gated MLP's layers and of the activation, ``down(activation(gate(x)) * up(x))``.

    Attributes:
        activation: the name of an attribute, or of a function in ``ACTIVATIONS``.
        condition: what a module's attributes have to be for the formula; looked at in every forward.
    """

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    activation: str = "act_fn"
    condition: Callable[[Any], bool] = always


def _drops_nothing(module: Any) -> bool:
    dropout = module.dropout
    return type(dropout) is nn.Identity or (type(dropout) is nn.Dropout and not (dropout.p and dropout.training))


def _has_no_limit(module: Any) -> bool:
    return bool(module.limit == math.inf)


def _has_weights_of_its_own(module: Any) -> bool:
    return bool(module.config.weight_mode == "single")


class _Bound:
    def forward(self: Any, x: Any) -> Any:
        down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return down_proj


class _Returned:
    def forward(self: Any, x: Any) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class _Llama4:
    def forward(self: Any, x: Any) -> Any:
        down_proj = self.activation_fn(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(down_proj)


class _RecurrentGemma:
    def forward(self: Any, x: Any) -> Any:
        gate = self.act_fn(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))


class _Lfm2:
    def forward(self: Any, x: Any) -> Any:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class _T5Gemma:
    def forward(self: Any, x: Any) -> Any:
        hidden_states = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        hidden_states = self.dropout(hidden_states)
        down_proj = self.down_proj(hidden_states)
        return down_proj


class _T5:
    def forward(self: Any, x: Any) -> Any:
        hidden_gelu = self.act(self.wi_0(x))
        hidden_linear = self.wi_1(x)
        x = hidden_gelu * hidden_linear
        x = self.dropout(x)
        if (
            isinstance(self.wo.weight, torch.Tensor)
            and x.dtype != self.wo.weight.dtype
            and self.wo.weight.dtype != torch.int8
        ):
            x = x.to(self.wo.weight.dtype)
        x = self.wo(x)
        return x


class _Step3p7:
    def forward(self: Any, x: Any) -> Any:
        gate = self.act_fn(self.gate_proj(x)).clamp(max=self.limit)
        up = self.up_proj(x).clamp(min=-self.limit, max=self.limit)
        return self.down_proj(gate * up)


class _XLSTM:
    def forward(self: Any, x: Any) -> Any:
        if self.config.weight_mode == "single":
            x = self.act_fn(self.proj_up_gate(x)) * self.proj_up(x)
        elif self.config.weight_mode == "fused":
            x = self.proj_up_gate_z(x)
            gate, z = torch.tensor_split(x, (self.up_proj_dim,), dim=-1)
            x = self.act_fn(gate) * z

        y = self.proj_down(x)
        return y


GATED_FORMS: dict[type, GatedForm] = {
    _Bound: GatedForm(),
    _Returned: GatedForm(),
    _Llama4: GatedForm(activation="activation_fn"),
    _RecurrentGemma: GatedForm(),
    _Lfm2: GatedForm("w1", "w3", "w2", "silu"),
    _T5Gemma: GatedForm(condition=_drops_nothing),
    _T5: GatedForm("wi_0", "wi_1", "wo", "act", _drops_nothing),
    _Step3p7: GatedForm(condition=_has_no_limit),
    _XLSTM: GatedForm("proj_up_gate", "proj_up", "proj_down", condition=_has_weights_of_its_own),
}


def form_of(cls: type, forms: dict[type, Any]) -> Any:
    """Return what a class computes, if its methods have the code of a written form."""
    return next((meaning for form, meaning in forms.items() if _has_code_of(cls, form)), None)


def _has_code_of(cls: type, form: type) -> bool:
    written = {name: value for name, value in vars(form).items() if isinstance(value, FunctionType)}
    return all(same_code(getattr(cls, name, None), function) for name, function in written.items())
