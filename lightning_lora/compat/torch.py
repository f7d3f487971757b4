"""Private names of torch: autograd, modules, optimizers, activation checkpoints."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd import forward_ad

from lightning_lora.compat.lookup import missing, private


def has_transforms() -> bool:
    """Whether ``torch.func`` transforms what runs. Relies on torch._C; without it raises."""
    try:
        return torch._C._are_functorch_transforms_active()
    except AttributeError as error:
        raise missing("torch", torch._C, "_are_functorch_transforms_active") from error


def is_transformed() -> bool:
    """Whether ``torch.func`` or forward-mode AD transforms what runs, or ``torch.jit.trace`` records it.

    Layers are then computed by torch's own operations: those can be transformed, an autograd function cannot. Relies on
    torch._C and forward_ad's level; without them raises.
    """
    if torch.compiler.is_compiling():
        return bool(_has_transforms_in_graph())
    try:
        active = torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    except AttributeError as error:
        raise missing("torch", error.obj, str(error.name)) from error
    return active or torch.jit.is_tracing()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_transforms_in_graph() -> bool:
    return has_transforms()


@contextlib.contextmanager
def untraced() -> Iterator[None]:
    """Let ``torch.jit.trace`` take what a block computes for constants. Relies on torch._C; without it raises."""
    get, put = (private("torch", torch._C, f"_{verb}_tracing_state") for verb in ("get", "set"))
    state = get()
    put(None)
    try:
        yield
    finally:
        put(state)


def plain_tensors() -> AbstractContextManager[Any]:
    """Treat tensor subclasses as tensors in a block. Relies on torch._C, as torch's documentation does; else raises."""
    context: AbstractContextManager[Any] = private("torch", torch._C, "DisableTorchFunctionSubclass")()
    return context


VERSION = "_version"  # the attribute that version_of reads


def version_of(tensor: Tensor) -> int:
    """Return how often a tensor was written in place. Relies on Tensor; without it raises."""
    try:
        return tensor._version
    except AttributeError as error:
        raise missing("torch", Tensor, "_version") from error


def tree_leaves(tree: Any) -> list[Any]:
    """Return what lies in nested containers. Relies on torch's pytree, which has no public name; without it raises."""
    leaves: list[Any] = private("torch", "torch.utils._pytree", "tree_leaves")(tree)
    return leaves


def unsafe_view(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a reshaped tensor that is no view to autograd. Relies on an aten operation; without it raises."""
    try:
        reshaped: Tensor = torch.ops.aten._unsafe_view.default(tensor, shape)
    except AttributeError as error:
        raise missing("torch", torch.ops.aten, "_unsafe_view") from error
    return reshaped


def foreach_norm(tensors: Sequence[Tensor], order: float, dtype: torch.dtype) -> list[Tensor]:
    """Return the norm of each tensor, in few kernels. Relies on _foreach_norm; without it one kernel for each."""
    norm = getattr(torch, "_foreach_norm", None)
    if norm is None:
        return [torch.linalg.vector_norm(tensor, order, dtype=dtype) for tensor in tensors]
    return list(norm(tensors, order, dtype=dtype))


def foreach_div_(tensors: Sequence[Tensor], numbers: Sequence[float]) -> None:
    """Divide each tensor by its number, in few kernels. Relies on _foreach_div_; without it one kernel for each."""
    _foreach("div_", tensors, numbers)


def foreach_mul_(tensors: Sequence[Tensor], number: Tensor) -> None:
    """Multiply each tensor by one number, in few kernels. Relies on _foreach_mul_; without it one kernel for each."""
    run = getattr(torch, "_foreach_mul_", None)
    if run is not None:
        run(tensors, number)
        return
    for tensor in tensors:
        tensor.mul_(number)


def foreach_copy_(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy each value into its target, in few kernels. Relies on _foreach_copy_; without it one kernel for each."""
    _foreach("copy_", targets, values)


def _foreach(name: str, tensors: Sequence[Tensor], others: Sequence[Any]) -> None:
    run = getattr(torch, f"_foreach_{name}", None)
    if run is not None:
        run(list(tensors), list(others))
        return
    for tensor, other in zip(tensors, others, strict=True):
        getattr(tensor, name)(other)


def forward_hooks(module: nn.Module) -> dict[int, Any]:
    """Return a module's own forward hooks. Relies on nn.Module's dictionary of them."""
    return module._forward_hooks


def forward_pre_hooks(module: nn.Module) -> dict[int, Any]:
    """Return a module's own forward pre-hooks. Relies on nn.Module's dictionary of them."""
    return module._forward_pre_hooks


def hooks_of(module: nn.Module) -> list[Any]:
    """Return the hooks that a call of a module runs. Relies on nn.Module's four dictionaries of them."""
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return [hook for kind in kinds for hook in kind.values()]


def has_hooks(module: nn.Module) -> bool:
    """Whether a call of a module runs hooks of its own. Relies on nn.Module's four dictionaries of them."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def has_global_hooks() -> bool:
    """Whether hooks are registered for all modules. Relies on torch's four dictionaries of them."""
    all_modules = nn.modules.module
    return bool(
        all_modules._global_forward_hooks
        or all_modules._global_forward_pre_hooks
        or all_modules._global_backward_hooks
        or all_modules._global_backward_pre_hooks
    )


def is_compiled(module: nn.Module) -> bool:
    """Whether ``module.compile()`` was called. Relies on its attribute; without it no module counts as compiled."""
    return getattr(module, "_compiled_call_impl", None) is not None


def compiled_module(module: nn.Module) -> nn.Module | None:
    """Return what ``torch.compile(module)`` wrapped, else ``None``. Relies on the child's name, :data:`COMPILED`."""
    return module._modules.get(COMPILED)


COMPILED = "_orig_mod"  # part of the names of a compiled model's parameters


def remove_load_hook(module: nn.Module, function: Callable[..., Any]) -> None:
    """Remove a hook of ``load_state_dict``. Relies on nn.Module's dictionary of them; without it raises."""
    hooks = private("torch", module, "_load_state_dict_pre_hooks")
    for key in [key for key, hook in hooks.items() if getattr(hook, "hook", None) is function]:
        del hooks[key]


def non_persistent_buffers(module: nn.Module) -> set[str]:
    """Return the names of a module's own buffers that are not saved. Relies on nn.Module's set; without it raises."""
    names: set[str] = private("torch", module, "_non_persistent_buffers_set")
    return names


def batch_norm_class() -> type[nn.Module]:
    """Return the base class of every batch normalisation. Relies on torch's; without it raises."""
    base: type[nn.Module] = private("torch", nn.modules.batchnorm, "_BatchNorm")
    return base


def collect_weights(module: nn.RNNBase) -> None:
    """Let a recurrent layer read its weights again after a change. Relies on its own method; without it raises."""
    private("torch", module, "_init_flat_weights")()


def convolve(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """Return a convolution of ``x`` with another weight. Relies on the layer's own method; without it raises."""
    y: Tensor = private("torch", module, "_conv_forward")(x, weight, None)
    return y


def padding_on_both_sides(module: nn.Module) -> Sequence[int]:
    """Return the padding of a convolution as ``F.pad`` takes it. Relies on the layer's own; without it raises."""
    padding: Sequence[int] = private("torch", module, "_reversed_padding_repeated_twice")
    return padding


def is_optimizer_hook(name: str) -> bool:
    """Whether an attribute of an optimizer holds hooks. Relies on the prefix that ``Optimizer`` gives all of them."""
    return name.startswith("_optimizer_")


def checkpoint_frame() -> Any:
    """Return the class of a non-reentrant activation checkpoint. Relies on torch's; without it raises."""
    return private("torch", torch.utils.checkpoint, "_CheckpointFrame")


UNSCALE = "_unscale_grads_"  # the method by which a GradScaler unscales and looks for overflows


def unscaling_of(scaler: Any) -> Callable[..., Any]:
    """Return the function by which a ``GradScaler`` unscales, in both of its ways. Relies on its method.

    Raises:
        ValueError: the scaler has no such method.
    """
    unscale: Callable[..., Any] | None = getattr(type(scaler), UNSCALE, None)
    if unscale is None:
        raise ValueError(
            f"precision='16-mixed' is not served with {type(scaler).__name__} of torch {torch.__version__}, which has "
            f"no {UNSCALE!r}: an overflow on one rank would make that rank alone skip its step. Use 'bf16-mixed'"
        )
    return unscale


# what torch's schedulers keep for each group of an optimizer
_PER_GROUP = ("base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums")


def move_groups(state: dict[str, Any], places: Sequence[int | None], own: dict[str, Any]) -> None:
    """Put what a scheduler's state has for each group in the order of the groups at present, in place.

    Relies on the names of these lists, and of the one of inner schedulers; without them they stay as they are.

    Args:
        places: of each group in the state; ``None`` takes the value of ``own``, the scheduler's own state.
    """
    for key in _PER_GROUP:
        if isinstance(values := state.get(key), list):
            state[key] = [own[key][i] if place is None else values[place] for i, place in enumerate(places)]
    for inner, ours in zip(state.get("_schedulers", ()), own.get("_schedulers", ()), strict=True):
        move_groups(inner, places, ours)
