"""A model that is spread over ranks: gather and drop whole copies; raise an error where a file would hold parts.

Modules, parameters and optimizers are guarded once, when the model is placed. ``copy`` and ``pickle`` look up their
methods on the instance, so that no class has to change.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.compat.distributed import fsdp_groups, is_fsdp, set_parameters
from lightning_lora.ops.sharded import is_dtensor, is_part, is_sharded, logical, part_of, split_over, whole


def sharded_parameters(module: Any) -> list[Any]:
    """Return FSDP2's records of the parameters that it gathers for this very module; none for any other module."""
    if not is_fsdp(module):
        return []
    return [parameter for group in fsdp_groups(module) for parameter in group.fsdp_params]


def stop_gathering(root: nn.Module, parameters: set[int]) -> None:
    """Make FSDP2 stop gathering parameters that were taken out of ``root``: it would put them back at the next forward.

    Args:
        parameters: identities of what is gone, as it is in shards.
    """
    for part in root.modules():
        groups = fsdp_groups(part) if is_fsdp(part) else []
        for group in list(groups):
            kept = [one for one in group.fsdp_params if id(one.sharded_param) not in parameters]
            if len(kept) == len(group.fsdp_params):
                continue
            set_parameters(group, kept)
            if not kept:
                groups.remove(group)


def class_name(module: nn.Module) -> str:
    """Return the name of a module's class, without the prefix of the class that FSDP2 makes of it."""
    cls = type(module)
    return cls.__name__.removeprefix("FSDP") if is_fsdp(module) else cls.__name__


def without_fsdp(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class that FSDP2 made ``cls`` from, or ``cls`` itself."""
    return cls.__bases__[1] if is_fsdp(cls) else cls


def reshard(module: nn.Module) -> None:
    """Drop the gathered copies that FSDP2 keeps after a forward, so that the parameters are the stored ones."""
    for part in module.modules():
        if callable(getattr(part, "reshard", None)) and is_fsdp(part):
            part.reshard()  # type: ignore[operator]  # an FSDPModule


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Hold whole copies of ``module``'s own and its children's sharded parameters inside the block, for reading; of an
    adapter with a name also those of its host.

    Called on all ranks; gathers each parameter once. The copies are dropped at the end.
    """
    module = module.__dict__.get("lora_host", module)
    swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
    copies: dict[int, nn.Parameter] = {}
    try:
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None and is_sharded(parameter):
                    if id(parameter) not in copies:
                        copies[id(parameter)] = nn.Parameter(whole(parameter).detach(), parameter.requires_grad)
                    swapped.append((part, name, parameter))
        for part, name, parameter in swapped:
            part._parameters[name] = copies[id(parameter)]
        yield
    finally:
        for part, name, parameter in swapped:
            part._parameters[name] = parameter


WHAT_TO_WRITE = (
    "To write the adapter, call save_peft(model, directory), trainer.save_checkpoint(path) or fabric.save(path, state) "
    "on all ranks. To write the whole model, load that checkpoint in one process, "
    "merge(YourModule.load_from_checkpoint(path), remove=True), and save the result"
)


def refuse(*_: Any) -> Any:
    """Stand in for a method that would copy or write what one rank holds."""
    raise ValueError(
        "the model is spread over ranks, and a copy or a file of this rank would hold its parts alone. " + WHAT_TO_WRITE
    )


_COPIES = {"__deepcopy__": refuse, "__reduce_ex__": refuse}
_FILES = {"__reduce_ex__": refuse, "untyped_storage": refuse, "storage": refuse}  # torch.save, safetensors


def guard_parts(module: nn.Module) -> None:
    """Make copies and files of the parts in ``module`` an error, and its ``state_dict()`` whole.

    ``pickle``, ``torch.save`` and ``deepcopy`` of a module with parts raise ``ValueError``. Its ``state_dict()`` holds
    DTensors of the whole shape, FSDP2's or made from tagged parts: they can be kept, copied, gathered and loaded again,
    and writing one to a file raises. ``load_state_dict`` takes them, or whole tensors. A second call does nothing.
    """
    for holder in module.modules():
        if any(is_sharded(parameter) for parameter in holder.parameters()):
            holder.__dict__.update(_COPIES)
        own = [parameter for parameter in holder._parameters.values() if is_part(parameter)]
        for parameter in own:  # a copy of a DTensor is a DTensor too
            parameter.__dict__.update({"__reduce_ex__": refuse} if is_dtensor(parameter) else _COPIES)
        if own and "lora_shows_whole" not in vars(holder):
            vars(holder)["lora_shows_whole"] = True
            holder.register_state_dict_post_hook(_show_whole)
            holder.register_load_state_dict_pre_hook(_take_parts)


def guard_state(optimizer: Optimizer) -> None:
    """Make ``optimizer.state_dict()`` hold DTensors for the state of spread parameters, as the model's own does."""
    if "lora_shows_whole" not in vars(optimizer):
        vars(optimizer)["lora_shows_whole"] = True
        optimizer.register_state_dict_post_hook(_show_whole_state)
        optimizer.register_load_state_dict_pre_hook(_take_parts_of_state)


def as_whole(value: Any, parameter: Any) -> Any:
    """Return a tensor of an optimizer's state as a DTensor of the whole shape, if its parameter is a part."""
    split = getattr(parameter, "lora_split", None)
    if split is not None and isinstance(value, Tensor) and not is_dtensor(value) and value.shape == parameter.shape:
        value = value.detach()
        split_over(value, *split)
    return logical(value)


def _show_whole(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    for name, parameter in module._parameters.items():
        value = state_dict.get(f"{prefix}{name}")
        # keep_vars=True asks for the parameters themselves
        if value is not None and value is not parameter and is_part(parameter):
            state_dict[f"{prefix}{name}"] = _shown(value if is_dtensor(value) else logical(parameter))


def _take_parts(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in module._parameters.items():
        value = state_dict.get(f"{prefix}{name}")
        if isinstance(value, Tensor):
            state_dict[f"{prefix}{name}"] = part_of(value, parameter)


def _show_whole_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    return _changed(
        optimizer, state, lambda value, like: _shown(as_whole(value.detach(), like)) if is_part(like) else value
    )


def _take_parts_of_state(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    return _changed(optimizer, state, part_of)


def _changed(
    optimizer: Optimizer, state: dict[str, Any], change: Callable[[Tensor, nn.Parameter], Tensor]
) -> dict[str, Any]:
    """Return an optimizer state in which tensors of their parameter's shape, or the whole's, are changed."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = dict(state["state"])
    for index, like in enumerate(parameters):
        shapes = (like.shape, logical(like).shape)
        if isinstance(entries.get(index), dict):
            entries[index] = {
                name: change(value, like) if isinstance(value, Tensor) and value.shape in shapes else value
                for name, value in entries[index].items()
            }
    return {**state, "state": entries}


def _shown(value: Tensor) -> Tensor:
    """Return a DTensor after making it an error to write it to a file."""
    value.__dict__.update(_FILES)
    return value
