"""Keep frozen parameters out of optimizers, and gather and spread their state."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_lora.checkpoint.packed_optimizer import (
    WRITTEN_BY,
    is_packed,
    packer,
    parts_of,
)
from lightning_lora.model.names import listed
from lightning_lora.model.spread import as_whole
from lightning_lora.model.state import injected_roots, named_adapter_parameters, named_trained_whole
from lightning_lora.ops.sharded import is_sharded, logical, on_rank_zero, spread_like


def prepare_optimizers(optimizers: Sequence[Optimizer], module: nn.Module) -> None:
    """Take the frozen base out of the groups in place, and make sure that what should train is in some group.

    What lies outside the adapted models, and adapters that their user froze, stay where the user put them: they may be
    unfrozen later.

    Raises:
        ValueError: adapters are frozen or in no optimizer, so that they would train in silence to nothing.
    """
    roots = injected_roots(module).values()
    ours = [named for root in roots for named in (*named_adapter_parameters(root), *named_trained_whole(root).items())]
    frozen = {id(p) for root in roots for p in root.parameters() if not p.requires_grad}
    base = frozen - {id(parameter) for _, parameter in ours}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            kept = [i for i, parameter in enumerate(group["params"]) if id(parameter) not in base]
            if "param_names" in group:
                group["param_names"] = [group["param_names"][i] for i in kept]
            for i in set(range(len(group["params"]))) - set(kept):
                optimizer.state.pop(group["params"][i], None)
            group["params"][:] = [group["params"][i] for i in kept]
    if not optimizers:
        return
    for root in roots:
        adapters = [parameter for _, parameter in named_adapter_parameters(root)]
        if not adapters:
            raise ValueError(
                f"the adapted layers of {type(root).__name__} were built or changed after LoRACallback's setup, in the "
                "module's own setup() perhaps: build the model in __init__ or configure_model"
            )
        if not any(parameter.requires_grad for parameter in adapters):
            raise ValueError(
                "all adapters are frozen. Another callback, such as BaseFinetuning, froze them after they were "
                "put in: list LoRACallback after it"
            )
    held = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, parameter in ours if parameter.requires_grad and id(parameter) not in held]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(ours)} trainable tensors of the adapters are in no optimizer and would "
            f"never change: {listed(missing, 3)}. Build the optimizer in configure_optimizers (not in __init__, when "
            "there were no adapters yet), from [p for p in self.parameters() if p.requires_grad]"
        )


def follow_parameters(
    optimizer: Optimizer, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]
) -> None:
    """Give an optimizer the parameters that stand under the same names now, and drop those that are frozen.

    Raises:
        ValueError: it has taken steps already, or would be left with nothing to train.
    """
    names = {id(parameter): name for name, parameter in before.items()}
    new = {key: after[name] for key, name in names.items()}
    gone = {key for key, parameter in new.items() if not parameter.requires_grad}
    if any(id(parameter) in names and new[id(parameter)] is not parameter for parameter in optimizer.state):
        raise ValueError("the optimizer has taken steps before the model was sharded: set both up first")
    for group in optimizer.param_groups:
        kept = [parameter for parameter in group["params"] if id(parameter) not in gone]
        group["params"][:] = [new.get(id(parameter), parameter) for parameter in kept]
    if not any(group["params"] for group in optimizer.param_groups):
        raise ValueError(
            "the optimizer holds none of the model's trainable parameters: make it after inject(model, config), from "
            "[p for p in model.parameters() if p.requires_grad]"
        )


def gathered_state(state: dict[str, Any], optimizer: Optimizer, *, is_zero: bool) -> dict[str, Any]:
    """Return an optimizer's state with what is spread over ranks gathered to rank 0. Called on all ranks."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = {
        key: _gathered(entry, parameters[key] if isinstance(key, int) else None, is_zero=is_zero)
        for key, entry in state.get("state", {}).items()
    }
    written_by = {} if (own := packer(optimizer)) is None else {WRITTEN_BY: own}
    return {**state, "state": entries, **written_by} if entries else {**state, **written_by}


def _gathered(value: Any, parameter: Any, *, is_zero: bool) -> Any:
    if isinstance(value, dict):
        return {name: _gathered(one, parameter, is_zero=is_zero) for name, one in value.items()}
    if isinstance(value, (list, tuple)):  # LBFGS's past steps
        return type(value)(_gathered(one, parameter, is_zero=is_zero) for one in value)
    whole = on_rank_zero(as_whole(value, parameter), is_zero=is_zero)
    return parts_of(whole) if is_packed(whole) else whole


def spread_state(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """Return a whole optimizer state with the entries of sharded parameters spread as those are.

    Raises:
        ValueError: an entry is shaped otherwise than its sharded parameter, so that nothing says how to spread it.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = dict(state["state"])
    for index, parameter in enumerate(parameters):
        if is_sharded(parameter) and index in entries:
            entries[index] = {name: _spread_entry(name, v, parameter) for name, v in entries[index].items()}
    return {**state, "state": entries}


def _spread_entry(name: str, value: Any, parameter: nn.Parameter) -> Any:
    shape = tuple(logical(parameter).shape)
    if not isinstance(value, Tensor) or value.ndim == 0 or (value.numel() == 1 and tuple(value.shape) != shape):
        return value
    if tuple(value.shape) != shape:
        raise ValueError(
            f"the optimizer keeps {name!r} of shape {tuple(value.shape)} for a sharded parameter of shape {shape}, "
            "which cannot be spread over ranks: resume with an optimizer that keeps one number per entry, as AdamW "
            "does, or with a strategy that keeps adapters whole ('ddp', or 'fsdp_lora' with shard_adapters=False)"
        )
    return spread_like(value, parameter)
