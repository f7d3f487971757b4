"""Reducing the adapters' gradients under DDP: one all-reduce per step, in an order that never changes.

DDP sorts its buckets anew after its first backward, by the order in which gradients came. A ring all-reduce sums in an
order that depends on a number's place in the bucket, so a run that resumed would differ in the last bit from one that
never stopped. Here all gradients share a bucket, and are summed in the order of the model's parameters.
"""

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

# adapters are tens of megabytes; a head or an embedding that trains whole may be more
BUCKET_CAP_MB = 1024


def prepare_ddp(strategy: Any) -> None:
    """Let a DDP strategy, not yet set up, put all gradients in one bucket, unless its user chose a size."""
    strategy._ddp_kwargs.setdefault("bucket_cap_mb", BUCKET_CAP_MB)


def reduce_in_fixed_order(model: nn.Module, strategy: Any) -> None:
    """Make a wrapped model sum its gradients in parameter order, unless the user set a communication hook."""
    if not isinstance(model, DistributedDataParallel) or getattr(strategy, "_ddp_comm_hook", None) is not None:
        return
    order = {id(parameter): index for index, parameter in enumerate(model.module.parameters())}
    model.register_comm_hook((order, weakref.ref(model)), _mean_in_order)


def _mean_in_order(state: tuple[dict[int, int], Any], bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Average one bucket over all ranks: one all-reduce of as many bytes as the bucket has. Called on all ranks."""
    order, model = state
    group = model().process_group
    parameters, gradients = bucket.parameters(), bucket.gradients()
    fixed = sorted(range(len(parameters)), key=lambda index: order[id(parameters[index])])
    flat = torch.cat([gradients[index].reshape(-1) for index in fixed]).div_(group.size())
    future: torch.futures.Future[Any] = torch.distributed.all_reduce(flat, group=group, async_op=True).get_future()

    def put_back(done: torch.futures.Future[Any]) -> Tensor:
        done.value()  # raises what the collective did: a step would go on with gradients of this rank alone
        pieces = flat.split([gradients[index].numel() for index in fixed])
        for index, piece in zip(fixed, pieces, strict=True):
            gradients[index].copy_(piece.view_as(gradients[index]))
        return bucket.buffer()

    return future.then(put_back)


def share_buffers_once(model: object) -> None:
    """Give all ranks rank 0's buffers now, and not before every forward until :func:`share_buffers_again`.

    In an evaluation ranks may have unequal numbers of forwards. Called on all ranks.
    """
    if isinstance(model, DistributedDataParallel) and model.will_sync_module_buffers():
        model._sync_buffers()
        model.broadcast_buffers = False
        model.__dict__["lora_shares_buffers"] = True


def share_buffers_again(model: object) -> None:
    """Let DDP share buffers before every forward again, if it did."""
    if isinstance(model, DistributedDataParallel) and model.__dict__.pop("lora_shares_buffers", False):
        model.broadcast_buffers = True
