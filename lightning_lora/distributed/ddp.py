"""Reduce the adapters' gradients under DDP in one all-reduce per step, in an order that never changes.

DDP sorts its buckets anew after its first backward, by the order in which gradients came. A ring all-reduce sums in an
order that depends on a number's place in the bucket, so a run that resumed would differ in the last bit from one that
never stopped. Here all gradients share a bucket, and are summed in the order of the model's parameters.

DDP also waits for the gradient of every parameter, and fails in the next forward when a rank did not use one: a layer
that is skipped at random, or that the loss does not depend on. Here an unused one counts as zero, and one that no rank
used keeps its gradient of ``None``.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.nn.parallel import DistributedDataParallel

from lightning_lora.compat.distributed import sync_buffers
from lightning_lora.compat.lightning import ddp_options, has_communication_hook
from lightning_lora.distributed.presence import Presence
from lightning_lora.model.own_parameters import owners

# adapters are tens of megabytes; a head or an embedding that trains whole may be more
BUCKET_CAP_MB = 1024


def prepare_ddp(strategy: Any) -> None:
    """Let a DDP strategy, not yet set up, put all gradients in one bucket, unless its user chose a size."""
    ddp_options(strategy).setdefault("bucket_cap_mb", BUCKET_CAP_MB)


class Reduction:
    """Sums a wrapped model's gradients in parameter order, with zeros for what a rank did not use.

    A communication hook of the user's stays in its place; an unused gradient is then zero on every rank.
    """

    def __init__(self, model: DistributedDataParallel, *, sums: bool) -> None:
        self._model_ref = weakref.ref(model)
        self._order = {id(parameter): index for index, parameter in enumerate(model.module.parameters())}
        self._owners = owners(model.module)
        self._used: set[int] = set()
        self._absent: set[int] = set()  # on this rank
        self._unused: list[nn.Parameter] = []  # on every rank
        self._is_filled = False  # since the last forward
        ignored = set(getattr(model, "parameters_to_ignore", ()))
        self._parameters = [p for name, p in model.module.named_parameters() if p.requires_grad and name not in ignored]
        used = self._used
        hooks = [p.register_post_accumulate_grad_hook(lambda one: used.add(id(one))) for p in self._parameters]
        hooks.append(model.register_forward_pre_hook(lambda *_: self.begin()))
        weakref.finalize(model, _remove, hooks)
        if sums:
            model.register_comm_hook(self, Reduction.mean)

    def begin(self) -> None:
        """Expect the next backward to reduce: a forward came before it, or DDP was prepared for it."""
        self._is_filled = False

    @contextmanager
    def filled(self) -> Iterator[None]:
        """Give what the backward inside the block does not reach a gradient of zero, so that DDP reduces all.

        Raises:
            ValueError: the last backward was filled, and no forward came since: DDP would not reduce this one.
        """
        self._used.clear()
        yield
        model = self._model_ref()
        if model is None or not model.require_backward_grad_sync or not self._used:
            return
        if self._is_filled:
            raise ValueError(
                "two backwards came after one forward under DDP, and the first did not reach all parameters: their "
                "gradients are reduced already. Add the losses up and call backward once, or run forward for each"
            )
        missed = [parameter for parameter in self._parameters if id(parameter) not in self._used]
        if missed and not model.find_unused_parameters and not model.static_graph:
            self._fill(missed)

    def _fill(self, missed: list[nn.Parameter]) -> None:
        self._is_filled = True
        self._absent = {id(parameter) for parameter in missed if parameter.grad is None}
        frozen = [parameter for parameter in missed if not parameter.requires_grad]  # for a while, by toggle_optimizer
        for parameter in frozen:
            parameter.requires_grad_(True)
        torch.autograd.backward(missed, [torch.zeros_like(parameter) for parameter in missed])
        for parameter in frozen:
            parameter.requires_grad_(False)
        for parameter in self._unused:
            parameter.grad = None
        self._absent, self._unused = set(), []

    def mean(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Average one bucket over all ranks: one all-reduce of what it has and a flag for each tensor."""
        model = self._model_ref()
        assert model is not None
        group = model.process_group
        parameters, gradients = bucket.parameters(), bucket.gradients()
        fixed = sorted(range(len(parameters)), key=lambda index: self._order[id(parameters[index])])
        present = [id(parameters[index]) not in self._absent for index in fixed]
        presence = Presence([parameters[index] for index in fixed], present, self._owners)
        flags = torch.tensor(presence.flags, dtype=bucket.buffer().dtype).to(bucket.buffer().device, non_blocking=True)
        flat = torch.cat([flags, *(gradients[index].reshape(-1) for index in fixed)])
        flat[len(flags) :].div_(group.size())
        future: torch.futures.Future[Any] = torch.distributed.all_reduce(flat, group=group, async_op=True).get_future()

        def put_back(done: torch.futures.Future[Any]) -> Tensor:
            done.value()  # raises what the collective did: a step would go on with gradients of this rank alone
            flags, *pieces = flat.split([len(presence.flags), *(gradients[index].numel() for index in fixed)])
            presence.average_over_ranks_with_rows(pieces, flags, group.size())
            for index, piece in zip(fixed, pieces, strict=True):
                gradients[index].copy_(piece.view_as(gradients[index]))
            if not all(present):  # a look at the flags waits for the device: only a rank that lacks some needs it
                for index, flag in zip(fixed, flags.tolist()[: len(fixed)], strict=True):
                    if flag == 0:
                        self._unused.append(parameters[index])  # type: ignore[arg-type]  # DDP's are parameters
            return bucket.buffer()

        return future.then(put_back)


def _remove(hooks: list[Any]) -> None:
    for hook in hooks:
        hook.remove()


def reduce_in_fixed_order(model: nn.Module, strategy: Any) -> Reduction | None:
    """Make a model that DDP wraps sum its gradients as :class:`Reduction` does; another model has none."""
    if not isinstance(model, DistributedDataParallel):
        return None
    return Reduction(model, sums=not has_communication_hook(strategy))


def share_buffers_once(model: object) -> None:
    """Give all ranks rank 0's buffers now, and not before every forward until :func:`share_buffers_again`.

    In an evaluation ranks may have unequal numbers of forwards. Called on all ranks.
    """
    if isinstance(model, DistributedDataParallel) and model.will_sync_module_buffers():
        sync_buffers(model)
        model.broadcast_buffers = False
        model.__dict__["lora_shares_buffers"] = True


def share_buffers_again(model: object) -> None:
    """Let DDP share buffers before every forward again, if it did."""
    if isinstance(model, DistributedDataParallel) and model.__dict__.pop("lora_shares_buffers", False):
        model.broadcast_buffers = True
