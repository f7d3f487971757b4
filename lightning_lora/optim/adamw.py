"""``LoRAAdamW``: AdamW for many small tensors, in one call of torch's fused kernel."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from typing_extensions import override

from lightning_lora.distributed.gradient_norm import norm_over_ranks
from lightning_lora.ops.sharded import local_part
from lightning_lora.optim.buckets import Buckets
from lightning_lora.optim.step import Bucket


class LoRAAdamW(torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter 2019), bit for bit torch's with ``fused=True``, with less work around the kernel.

    All parameters of a group go through one call of the fused kernel. Their moments are pieces of one buffer, and so
    are their step counts, which one addition counts up. A parameter without a gradient is skipped, as by AdamW.

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
        flat: make the parameters pieces of one buffer too, at the first step, and their gradients pieces of another:
            the kernel then sees one tensor, and so does the norm. ``zero_grad()`` zeros that buffer instead of dropping
            the gradients, so a parameter that a backward does not reach has a gradient of zero, and its moments and
            weight decay go on, as after torch's ``zero_grad(set_to_none=False)``; one that was frozen since stays as it
            is. Parameters that never had a gradient are left where they are, and so are those whose memory others look
            at: shared, tied, views, DTensors. ``torch.save`` of a few of them writes the whole buffer: clone them.
            ``pickle`` does so for every one, and for every moment, with or without ``flat``: ``torch.save`` does not.

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
        flat: bool = False,
    ) -> None:
        if max_norm is not None and not max_norm > 0.0:
            raise ValueError(f"max_norm={max_norm} must be a positive number, or None to leave gradients as they are")
        # not with fused=True: groups say how to step to AdamW when it reads the file, and Lightning does not clip then
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize)
        self.max_norm = max_norm
        self.flat = flat
        self.gradient_norm: Tensor | None = None
        self._buckets = Buckets(flat)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "max_norm": self.max_norm, "flat": self.flat}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's
        for group in self.param_groups:  # a file of another AdamW's names its own way of stepping
            group.update(fused=None, foreach=None, capturable=False, differentiable=False)
        self.gradient_norm = None
        if "_buckets" in self.__dict__:
            self._buckets.forget()
        else:  # a copy's
            self._buckets = Buckets(self.flat)

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
        work = [
            (bucket, bucket.of_group(own), group)
            for group, own, of_group in zip(self.param_groups, gradients, buckets, strict=True)
            for bucket in of_group
        ]
        gathered = [(bucket, bucket.gather(own)) for bucket, own, _ in work]
        scale = None if self.max_norm is None else self._clip(self.max_norm, gathered)
        for bucket, own, group in work:
            bucket.step(own, group, scale)
        return loss

    @override
    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Drop the gradients; with ``flat`` make those of flat parameters zero instead, in one fill."""
        if self.flat and set_to_none is None:
            self._buckets.zero_gradients(self.param_groups)
        else:
            super().zero_grad(set_to_none is not False)

    def _clip(self, max_norm: float, gathered: Sequence[tuple[Bucket, list[Tensor]]]) -> Tensor:
        """Return what gradients are to be divided by, one float32 number."""
        spread = [(bucket.parameters[0], tensors) for bucket, tensors in gathered if bucket.is_spread and tensors]
        whole = [tensor for bucket, tensors in gathered if not bucket.is_spread for tensor in tensors]
        parts = [local_part(tensor) for _, tensors in spread for tensor in tensors]
        self.gradient_norm = norm_over_ranks(whole, parts, [parameter for parameter, _ in spread])
        return ((self.gradient_norm + 1e-6) / max_norm).clamp(min=1.0)
