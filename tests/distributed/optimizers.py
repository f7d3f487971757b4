"""Optimizers of torch and hand-written ones: those that are right on parts of tensors, and others."""

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers.optimization import Adafactor

# what torch documents, or what is written in the script, as computed entry by entry or over ranks
RIGHT_ON_PARTS = {
    "ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
    "AdamW foreach", "AdamW fused", "AdamW amsgrad maximize", "Adam weight_decay decoupled_weight_decay",
    "SGD momentum nesterov weight_decay", "SGD momentum foreach", "SGD fused", "RMSprop centered momentum",
    "Adagrad lr_decay",
    "NeedsClosure ", "special", "grouped",
}  # fmt: skip
# wants sparse gradients; cannot be copied; knows a model; keeps tensors of the parameters' sizes outside of its state
NOT_TRIED = {"SparseAdam": "SparseAdam", "locked": "Locked", "holding": "Holding", "lookahead": "Lookahead"}


class TrustRatio(Optimizer):
    """SGD whose steps are scaled by the norms of weight and gradient, as LARS's and LAMB's are."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                ratio = parameter.data.norm() / parameter.grad.norm()
                parameter.data -= group["lr"] * ratio * parameter.grad


class Special(Optimizer):
    """Entry by entry; needs an argument, knows parameters by name, takes no closure."""

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], *, decay: dict[str, float]) -> None:
        named = list(named)
        self.named, self.decay = dict(named), decay
        super().__init__([parameter for _, parameter in named], {"lr": 0.1})

    def step(self) -> None:  # type: ignore[override]
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter -= 0.1 * (parameter.grad + self.decay[name] * parameter)


class NeedsClosure(torch.optim.SGD):
    """Computes the gradients twice in a step."""

    def step(self, closure: Any) -> Any:  # type: ignore[override]
        closure()
        return super().step(closure)


class Lookahead(Optimizer):
    """Steps by another optimizer, and back half of the way at every second step."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner, self.count = inner, 0
        self.slow = {p: p.detach().clone() for group in inner.param_groups for p in group["params"]}
        super().__init__(inner.param_groups, {})
        self.param_groups = inner.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.inner.step(closure)
        self.count += 1
        for parameter, slow in self.slow.items():
            if self.count % 2 == 0:
                slow += 0.5 * (parameter - slow)
                parameter.copy_(slow)


class Holding(torch.optim.SGD):
    """Knows a model, which may be large."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.model = nn.Linear(1, 1)


class Locked(torch.optim.SGD):
    """Cannot be copied."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.lock = threading.Lock()


def warming_up(params: list[nn.Parameter]) -> Optimizer:
    """Its learning rate is zero at the first step, by a schedule that has put its own step in the place of step."""
    optimizer = torch.optim.Adafactor(params, lr=0.1)
    optimizer.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 2)  # type: ignore[attr-defined]
    return optimizer


def grouped(params: list[nn.Parameter]) -> Optimizer:
    groups = [{"params": [p], "lr": 0.05 * (i + 1), "weight_decay": 0.1 * i} for i, p in enumerate(params)]
    return torch.optim.AdamW(groups)


def of(cls: Any, **settings: Any) -> Callable[[list[nn.Parameter]], Optimizer]:
    return lambda params: cls(params, **settings)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    **{
        name: of(getattr(torch.optim, name), lr=0.1)
        for name in torch.optim.__all__
        if isinstance(cls := getattr(torch.optim, name, None), type) and issubclass(cls, Optimizer) and cls is not Optimizer
    },
    **{
        f"{cls.__name__} {' '.join(settings)}": of(cls, lr=0.1, **settings)
        for cls, settings in [
            (torch.optim.AdamW, {"foreach": True}),
            (torch.optim.AdamW, {"fused": True}),
            (torch.optim.AdamW, {"amsgrad": True, "maximize": True}),
            (torch.optim.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
            (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
            (torch.optim.SGD, {"momentum": 0.9, "foreach": True}),
            (torch.optim.SGD, {"fused": True}),
            (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
            (torch.optim.Adagrad, {"lr_decay": 0.1}),
            (torch.optim.LBFGS, {"line_search_fn": "strong_wolfe"}),
            (TrustRatio, {}),
            (NeedsClosure, {}),
        ]
    },
    "transformers' Adafactor": lambda params: Adafactor(params, scale_parameter=True, relative_step=True),
    "special": lambda params: Special(
        ((str(i), p) for i, p in enumerate(params)), decay={str(i): 0.1 for i in range(len(params))}
    ),
    "lookahead": lambda params: Lookahead(torch.optim.SGD(params, lr=0.1)),
    "locked": Locked,
    "holding": Holding,
    "warming up": warming_up,
    "grouped": grouped,
}  # fmt: skip
