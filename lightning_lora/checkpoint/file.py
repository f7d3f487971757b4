"""What an adapter checkpoint holds, and how it is described in it.

An adapter checkpoint is an ordinary ``torch.save`` file. Its tensors are the adapters and whatever else trains, under
their names in the module that was saved; a section ``"lightning_lora"`` says how they were made.
"""

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lora.checkpoint.all_ranks import meet
from lightning_lora.checkpoint.fingerprint import fingerprint, without
from lightning_lora.compat.torch import non_persistent_buffers
from lightning_lora.layers import LoRALayer
from lightning_lora.layers.quantized import QuantizedModule
from lightning_lora.model.families import is_pretrained
from lightning_lora.model.names import clean_name, is_inside_any, joined
from lightning_lora.model.one_adapter import each_adapter
from lightning_lora.model.side_effects import FrozenStatistics
from lightning_lora.model.spread import reshard
from lightning_lora.model.state import (
    check_finite,
    check_not_disabled,
    injected_roots,
    named_adapter_parameters,
    named_pairs,
    named_token_rows,
    named_trained_whole,
    require_injection,
    require_root,
)
from lightning_lora.ops.sharded import is_part, local_part, logical, whole

SECTION = "lightning_lora"
FORMAT_VERSION = 1
# what other formats keep of an adapted model in a checkpoint, by name: plain values that each function returns
PARTS: dict[str, Callable[[nn.Module, dict[str, Any]], dict[str, Any]]] = {}


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapters, and the heads and biases that train with them, as ``{name: full tensor}``.

    Names are relative to the adapted model. As with ``state_dict``, the tensors are the live ones, detached; those that
    are spread over ranks are gathered (call on all ranks then).

    Raises:
        ValueError: only some of the ranks called it that all must.
    """
    tensors = trained_tensors(require_root(model))
    if any(map(is_part, tensors.values())):
        meet("adapter_state_dict")
    return {name: whole(tensor) for name, tensor in tensors.items()}


def adapter_checkpoint(model: nn.Module) -> dict[str, Any]:
    """Return the adapters with their config and the fingerprint of their base, ready for ``torch.save``.

    Trainer (``LoRACallback(init_from=...)``), Fabric and :func:`load_adapter_state_dict` read the file. An adapter that
    holds NaN or infinity gets a warning, since a save must not end a run; reading it is an error.
    """
    root = require_root(model)
    state = adapter_state_dict(root)
    check_finite(adapters_in(state, root), "the checkpoint", "warn")
    return {"state_dict": state, SECTION: describe(root, "state_dict")}


def adapters_in(tensors: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """Return the adapters of ``module``, and the heads and biases that train with them, from tensors by name."""
    names = [
        joined(path, name)
        for path, root in injected_roots(module).items()
        for name in (*(name for name, _ in named_adapter_parameters(root)), *named_trained_whole(root))
    ]
    return {name: tensors[name] for name in names if name in tensors}


def trained_tensors(module: nn.Module, also: Collection[int] = ()) -> "OrderedDict[str, Tensor]":
    """Return what a checkpoint of ``module`` holds: adapters, parameters that train, and buffers that may change.

    Inside the adapted models those are the buffers beside parameters that train, and of what the user's own
    LightningModule holds; outside, all persistent ones. Tensors that are spread over ranks come as they are.

    Args:
        also: identities (``id``) of further parameters and buffers to hold, such as those of an optimizer.
    """
    roots = injected_roots(module)
    reshard(module)
    for root in roots.values():
        check_not_disabled(root)
    state: OrderedDict[str, Tensor] = OrderedDict()
    wanted = {id(p) for root in roots.values() for p in named_trained_whole(root).values()} | set(also)
    pretrained = _pretrained_paths(module)
    whole = [joined(path, name) for path, root in roots.items() for name in require_injection(root).trained_whole]
    for name, owner in module.named_modules():
        clean = clean_name(name)
        adapters = owner.tensor_names if isinstance(owner, LoRALayer) else ()
        own = {local: parameter for local, parameter in owner._parameters.items() if parameter is not None}
        for local, parameter in own.items():
            if parameter.requires_grad or local in adapters or id(parameter) in wanted:
                state[joined(clean, local)] = logical(parameter).detach()
        holds_no_base = not own and not isinstance(owner, FrozenStatistics) and not is_inside_any(clean, pretrained)
        keeps_buffers = (
            any(parameter.requires_grad for parameter in own.values())
            or not is_inside_any(clean, roots)
            or holds_no_base
            or is_inside_any(clean, whole)
        )
        for local, buffer in named_persistent_buffers(owner):
            if keeps_buffers or id(buffer) in wanted:
                state[joined(clean, local)] = buffer.detach()
    return _without_second_names(state)


def named_persistent_buffers(owner: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the module's own buffers that its ``state_dict`` holds under their names."""
    hidden = non_persistent_buffers(owner) | set(owner.part_names() if isinstance(owner, QuantizedModule) else ())
    return [(name, buffer) for name, buffer in owner._buffers.items() if buffer is not None and name not in hidden]


def _pretrained_paths(module: nn.Module) -> list[str]:
    """Return where the adapted models are, but for a user's own module that is adapted as a whole."""
    return [path for path, root in injected_roots(module).items() if root is not module or is_pretrained(root)]


def describe(module: nn.Module, state_key: str, moved: Collection[int] = ()) -> dict[str, Any]:
    """Return the section ``"lightning_lora"`` of a checkpoint of ``module``, in plain values and tensors.

    Args:
        state_key: the checkpoint's key that the module's tensors are under.
        moved: identities of frozen parameters that the checkpoint holds, since they moved: no part of the base.
    """
    adapters = []
    for path, root in injected_roots(module).items():
        base = fingerprint(root)
        held = {clean_name(name) for name, parameter in root.named_parameters() if id(parameter) in moved}
        compared = without(base, held)
        adapters += [
            {
                "name": "default",
                **({"name": name, "is_named": True} if name else {}),
                "state_key": state_key,
                "root": path,
                "config": require_injection(own).config.to_dict(),
                **structure(own),
                "base": compared,
                **{part: describe_part(own, base) for part, describe_part in PARTS.items()},
            }
            for name, own in each_adapter(root).items()
        ]
    return {"format_version": FORMAT_VERSION, "adapters": adapters}


def structure(root: nn.Module) -> dict[str, Any]:
    """Return what two models must share for the same tensors to mean the same: pairs, rows, and what trains whole."""
    return {
        "layers": {name: (pair.r, pair.scaling) for name, pair in named_pairs(root).items()},
        "prunes_ranks": require_injection(root).config.adalora is not None,
        "token_rows": named_token_rows(root),
        "trained_whole": list(named_trained_whole(root)),
    }


def other_state(module: nn.Module) -> dict[str, Any]:
    """Return what a state dict holds besides tensors of modules: extra state, persistent states of metrics.

    The pretrained models' own, and packed weights, are left out.
    """
    tensors, base = named_tensors(module), _pretrained_paths(module)
    for path, owner in module.named_modules():
        if isinstance(owner, QuantizedModule):
            base += [joined(clean_name(path), name) for name in owner.state_names()]
    state = {clean_name(name): value for name, value in module.state_dict().items()}
    return {n: value for n, value in state.items() if n not in tensors and not is_inside_any(n, base)}


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers under all of their clean names."""
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {clean_name(name): tensor for name, tensor in named}


def _without_second_names(state: "OrderedDict[str, Tensor]") -> "OrderedDict[str, Tensor]":
    """Keep the first name of a tied tensor."""
    kept: OrderedDict[Any, tuple[str, Tensor]] = OrderedDict()
    for name, tensor in state.items():
        address = local_part(tensor).data_ptr()
        has_no_address = tensor.numel() == 0 or address == 0
        kept.setdefault(name if has_no_address else (address, tuple(tensor.shape), tensor.stride()), (name, tensor))
    return OrderedDict(kept.values())
