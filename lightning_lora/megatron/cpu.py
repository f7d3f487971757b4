"""Stand in for what Megatron-core hard-codes to CUDA, so that tensor-parallel runs can be tested on CPU.

Megatron-core reads ``torch.cuda`` where it makes buffers, keeps random states and copies between streams. Here the CPU
and its generator stand in: ``install()`` patches those places of Megatron-core, and of torch only
``torch.cuda.current_device``. A ``GPTModel`` of local layers, experts included, is then built and trained on gloo.
A strategy needs the patches during a run, and so do the modules of a model that it placed as long as they live: their
forward may be called after the run.
"""

import copy
import weakref
from functools import wraps
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from lightning_lora.compat.megatron import set_random_state_functions, skip_copies_to_host

_MISSING = object()
_replaced: list[tuple[Any, str, Any]] = []  # (owner, name, its value before install)
_users: "dict[int, weakref.finalize[Any, Any] | None]" = {}  # by identity: whatever needs the patches
_THIS_PROCESS = 0  # the user of install(), which is no object's identity


def install() -> None:
    """Let Megatron-core run on the CPU until :func:`uninstall`. A second call does nothing.

    Raises:
        ValueError: there is a CUDA device, which Megatron-core would then be kept from.
    """
    _users.setdefault(_THIS_PROCESS, None)
    _patch()


def install_for(*users: object) -> None:
    """Let Megatron-core run on the CPU until the last of all users is collected, or released by :func:`release`.

    Raises:
        ValueError: as for :func:`install`.
    """
    for user in users:  # before patching: a garbage collection in it may release the only other user
        if id(user) not in _users:
            finalizer = weakref.finalize(user, _drop, id(user))
            finalizer.atexit = False
            _users[id(user)] = finalizer
    _patch()


def release(user: object) -> None:
    """Need the patches for ``user`` no longer; a second call does nothing."""
    finalizer = _users.get(id(user))
    if finalizer is not None:
        finalizer()


def _drop(identity: int) -> None:
    _users.pop(identity, None)
    if not _users:
        uninstall()


def _patch() -> None:
    """Replace what is hard-coded to CUDA, once.

    Raises:
        ValueError: there is a CUDA device, which Megatron-core would then be kept from.
    """
    if torch.cuda.is_available():
        raise ValueError(
            "'megatron_lora' on CPU stands in for what Megatron-core hard-codes to CUDA, which is refused on a machine "
            "with a CUDA device: use accelerator='gpu', or hide the devices with CUDA_VISIBLE_DEVICES="
        )
    if _replaced:
        return
    before = [(owner, dict(vars(owner))) for owner in _patched_owners()]
    _draw_from_the_cpu()
    _mask_on_the_cpu()
    _norms_under_sequence_parallelism()
    _autocast_on_the_cpu()
    name_te_general_gemm()
    _dispatch_without_streams()
    torch.cuda.current_device = _cpu  # type: ignore[assignment]  # an index in torch; both name a device
    for owner, former in before:
        _replaced.extend(
            (owner, name, former.get(name, _MISSING))
            for name, value in vars(owner).items()
            if former.get(name, _MISSING) is not value
        )


def uninstall() -> None:
    """Put Megatron-core and torch back as they were before :func:`install` and :func:`install_for`."""
    for finalizer in _users.values():
        if finalizer is not None:
            finalizer.detach()
    _users.clear()
    while _replaced:
        owner, name, value = _replaced.pop()
        if value is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, value)


def _patched_owners() -> list[Any]:
    from megatron.core.fusions import fused_softmax
    from megatron.core.tensor_parallel import layers, random
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    functions = (layers.LinearWithFrozenWeight, layers.LinearWithGradAccumulationAndAsyncCommunication)
    return [torch.cuda, random, fused_softmax, WrappedTorchNorm, *functions, moe_utils, MoEAlltoAllTokenDispatcher]


def name_te_general_gemm() -> None:
    """Give the router's module the name that it reads without Transformer Engine, on CUDA devices too.

    ``moe_utils.py`` of 0.16 imports ``te_general_gemm`` with Transformer Engine alone, and its gating then asks
    ``if te_general_gemm is not None``.
    """
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def _cpu() -> torch.device:
    """Stand for the device of every ``torch.empty(..., device=torch.cuda.current_device())``."""
    return torch.device("cpu")


def _draw_from_the_cpu() -> None:
    """Let ``tensor_parallel/random.py`` see a torch whose CUDA generator is the CPU's, and that has no other.

    The states that ``add``, ``fork``, ``model_parallel_cuda_manual_seed`` and recomputation read and set are then the
    CPU's. With a second generator beside it, which would be the same one, ``fork`` warns that it moved.
    """
    from megatron.core.tensor_parallel import random

    none = torch.empty(0, dtype=torch.uint8)
    cuda = _view(
        torch.cuda,
        get_rng_state=torch.get_rng_state,
        manual_seed=torch.default_generator.manual_seed,  # torch.manual_seed seeds other devices, too
    )
    random.torch = _view(torch, cuda=cuda, get_rng_state=lambda: none, set_rng_state=lambda state: None)
    # both reach for torch.cuda.default_generators; their other arguments are a device and whether to clone
    set_random_state_functions(
        lambda *_, **__: torch.get_rng_state(), lambda new_state, *_, **__: torch.set_rng_state(new_state)
    )


def _view(module: ModuleType, **replaced: Any) -> SimpleNamespace:
    """Return a module's names with some replaced, for the one who is given it."""
    return SimpleNamespace(**{**vars(module), **replaced})


def _mask_on_the_cpu() -> None:
    """Replace ``transformer/utils.py``'s ``torch.ones(sq, sq, device="cuda")``, where the softmax imports it from."""
    from megatron.core.fusions import fused_softmax

    fused_softmax.get_default_causal_mask = lambda sq: torch.ones(sq, sq, dtype=torch.bool).triu(1)


def _norms_under_sequence_parallelism() -> None:
    """Pass ``torch_norm.py``'s ``assert not config.sequence_parallel``, and mark the weights as its other norms do.

    The mark makes Megatron-core's ``finalize_model_grads`` sum what the ranks' parts of the sequence contribute.
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    build = WrappedTorchNorm.__new__

    @wraps(build)
    def build_anyway(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        whole = copy.copy(config)
        whole.sequence_parallel = False
        norm = build(cls, whole, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = build_anyway


def _autocast_on_the_cpu() -> None:
    """Let the backward of ``tensor_parallel/layers.py`` see the CPU's autocast, where it is decorated for CUDA's."""
    from megatron.core.tensor_parallel import layers

    for function in (layers.LinearWithFrozenWeight, layers.LinearWithGradAccumulationAndAsyncCommunication):
        forward, backward = function.forward.__wrapped__, function.backward.__wrapped__
        function.forward = staticmethod(torch.amp.custom_fwd(forward, device_type="cpu"))
        function.backward = staticmethod(torch.amp.custom_bwd(backward, device_type="cpu"))


def _dispatch_without_streams() -> None:
    """Let the ``alltoall`` dispatcher of experts make no ``torch.cuda.Stream()`` and copy nothing on it to the host."""
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = object()  # made where it is None
    skip_copies_to_host(MoEAlltoAllTokenDispatcher)
