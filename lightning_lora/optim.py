"""``LoRAAdamW``: AdamW for many small tensors, in one call of torch's fused kernel."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_lora.gradient_norm import total_norm
from lightning_lora.optim_buckets import Buckets


class LoRAAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019), bit for bit torch's with ``fused=True``, with less work around the kernel.

    All parameters of a group go through one call of the fused kernel. Their moments are pieces of one buffer, and so
    are their step counts, which one addition counts up. The parameters and their gradients stay where they are, so that
    nothing changes for who shares, moves, saves or replaces them. One without a gradient is skipped, as by AdamW.

    The state reads like AdamW's, and its files are AdamW's in both directions: a run may go on with either. Stepped too
    are tensors that torch's fused step refuses or gets wrong: DTensors beside ordinary tensors, complex ones, strided
    parameters, gradients with other strides than their parameters.

    Args:
        params: parameters, ``named_parameters()``, or groups of them with settings of their own.
        lr: learning rate, which schedules may change; a tensor is read at every step.
        betas, eps, weight_decay, amsgrad, maximize: as of ``torch.optim.AdamW``.
        max_norm: clip the gradients before every step, so that the norm over all groups is at most this:
            ``g / max(1, (norm + 1e-6) / max_norm)``. The norm is taken in float32. Over tensors in shards it is that of
            the whole, for one all-reduce of one number; every rank must step then. Several optimizers clip each their
            own. ``None`` leaves it to ``Trainer(gradient_clip_val=...)`` or ``fabric.clip_gradients``.

    Attributes:
        gradient_norm: with ``max_norm``, the norm of the last step's gradients before they were clipped.

    Raises:
        ValueError: a setting is out of range.

    Example::

        def configure_optimizers(self):
            return LoRAAdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3, max_norm=1.0)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        max_norm: float | None = None,
    ) -> None:
        if max_norm is not None and not max_norm > 0.0:
            raise ValueError(f"max_norm={max_norm} must be a positive number, or None to leave gradients as they are")
        # not with fused=True: groups say how to step to AdamW when it reads the file, and Lightning does not clip then
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize)
        self.max_norm = max_norm
        self.gradient_norm: Tensor | None = None
        self._buckets = Buckets()

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "max_norm": self.max_norm}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's
        for group in self.param_groups:  # a file of another AdamW's names its own way of stepping
            group.update(fused=None, foreach=None, capturable=False, differentiable=False)
        self.gradient_norm = None
        self._buckets = Buckets()

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step, with the gradients that ``closure`` computes if it is given.

        Returns:
            What ``closure`` returned.

        Raises:
            ValueError: a parameter has another dtype or device than its state.
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [[parameter.grad for parameter in group["params"]] for group in self.param_groups]
        buckets = self._buckets.of(self.param_groups, gradients, self.state)
        scale = None if self.max_norm is None else self._clip(self.max_norm)
        for group, own_gradients, own_buckets in zip(self.param_groups, gradients, buckets, strict=True):
            for bucket in own_buckets:
                bucket.step(own_gradients, group, scale)
        return loss

    def _clip(self, max_norm: float) -> Tensor:
        """Return what gradients are to be divided by, one float32 number."""
        held: list[nn.Parameter] = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.gradient_norm = total_norm(held)
        return ((self.gradient_norm + 1e-6) / max_norm).clamp(min=1.0)
