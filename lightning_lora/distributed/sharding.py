"""Shard the frozen base of an adapted model with FSDP2, one unit per block; what trains stays whole."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from lightning_lora.checkpoint.fingerprint import remember_fingerprint
from lightning_lora.compat.distributed import make_fsdp_root
from lightning_lora.distributed.base_weights import materialize
from lightning_lora.distributed.bitsandbytes import check_bitsandbytes, move_scales, scales_of, store_as_bytes
from lightning_lora.distributed.blocks import wrap_blocks
from lightning_lora.distributed.replication import (
    broadcast_replicated,
    broadcast_together,
    make_equal,
    move_to,
    refuse_other_sizes,
)
from lightning_lora.distributed.sharded_gradients import count_unused_as_zero
from lightning_lora.distributed.units import Units, find_units
from lightning_lora.model.names import clean_name, is_inside
from lightning_lora.model.spread import class_name, guard_parts, reshard, sharded_parameters
from lightning_lora.model.state import injected_roots, named_trained_whole, require_injection
from lightning_lora.ops.sharded import is_sharded, local_part, spread_like

# a norm's weight is not worth a collective
MIN_SHARD_NUMEL = 2**20


@dataclass
class ShardingOptions:
    """What a user may choose; see :class:`~lightning_lora.FSDPLoRAStrategy`."""

    replicate_size: int = 1
    shard_modules: Sequence[str] | None = None
    shard_adapters: bool = False
    min_shard_numel: int = MIN_SHARD_NUMEL
    base_weights: str | None = None
    reshard_after_forward: bool = True
    activation_checkpointing: bool = False
    compile: bool | str = False
    cpu_offload: bool = False

    def __post_init__(self) -> None:
        for name, least in (("replicate_size", 1), ("min_shard_numel", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r} must be a positive integer" + ("" if least else ", or 0"))
        if isinstance(self.shard_modules, str):
            raise TypeError(f"shard_modules={self.shard_modules!r} must be a list: [{self.shard_modules!r}]")
        for entry in self.shard_modules or ():
            if not isinstance(entry, str):
                name = getattr(entry, "__name__", "Block")
                raise TypeError(f"shard_modules holds {entry!r}, which is no name; write {name!r}")
        for name in ("shard_adapters", "reshard_after_forward", "activation_checkpointing", "cpu_offload"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r} must be True or False")
        if not isinstance(self.compile, (bool, str)):
            raise TypeError(f"compile={self.compile!r} must be True, False or the name of a torch.compile backend")


def shard(module: nn.Module, mesh: DeviceMesh, device: torch.device, options: ShardingOptions, mixed: Any) -> None:
    """Shard the adapted models inside ``module`` over ``mesh`` in place, and bring the rest to ``device``.

    Base parameters become DTensors that their block gathers for its forward and backward. Adapters, and all else that
    trains, stay ordinary tensors, equal on all ranks, unless ``options.shard_adapters``. A base on the meta device is
    filled from disk, each rank with its own slices. A model that is sharded already is left as it is. Called on all
    ranks; gathers a few bytes per tensor, and broadcasts what is small or differs.

    Args:
        mesh: one dimension, or two (replicas, shards).
        mixed: dtype that base weights are gathered in, or ``None`` for their own.

    Raises:
        ValueError: a name in ``shard_modules`` is unknown, the base has no weights, or it is sharded in another way.
    """
    reshard(module)
    roots = injected_roots(module)
    refuse_other_sizes(module, device)
    for path, root in roots.items():
        _check_served(root)
        check_bitsandbytes(root)
        if not any(isinstance(part, FSDPModule) for part in root.modules()):
            store_as_bytes(root)
            make_equal(root, device)
            units = find_units(
                root,
                options.shard_modules,
                options.min_shard_numel,
                shard_trained=options.shard_adapters,
                shared=_shared_with_others(module, path),
            )
            _shard_root(root, units, mesh, options, mixed)
            if not any(is_sharded(parameter) for parameter in root.parameters()):
                rank_zero_warn(
                    f"nothing of {class_name(root)} is in shards, every rank holds all of it: no repeated blocks were "
                    "found. Name its large modules with shard_modules=[...], or lower min_shard_numel"
                )
        materialize(root, options.base_weights, torch.device("cpu") if options.cpu_offload else device)
        _keep_parts_of_originals(root)
    move_to(module, device)
    move_scales(module, device)
    broadcast_replicated(module, device)
    broadcast_together(scales_of(module), device)
    for root in roots.values():
        if isinstance(root, FSDPModule):
            make_fsdp_root(root)
            _gather_once(root)
        remember_fingerprint(root)
    guard_parts(module)


def _gather_once(root: nn.Module) -> None:
    """Gather and drop every unit, one at a time.

    FSDP2 makes the tensors that it gathers into at the first gather and keeps them; made under ``inference_mode``, as
    by a ``generate`` in the user's code, they could not train afterwards.
    """
    with torch.inference_mode(False):
        for part in root.modules():
            if isinstance(part, FSDPModule):
                part.unshard()
                part.reshard()


def shards_summary(module: nn.Module) -> str:
    """Return what is in shards, in one line: the units and this rank's share of the base."""
    lines = []
    for root in injected_roots(module).values():
        units = Counter(class_name(part) for part in root.modules() if sharded_parameters(part))
        base = [parameter for parameter in root.parameters() if not parameter.requires_grad]
        held, total = sum(local_part(p).nbytes for p in base), sum(p.nbytes for p in base)
        names = ", ".join(f"{name} x{number}" if number > 1 else name for name, number in units.items()) or "nothing"
        lines.append(
            f"{class_name(root)} in shards: {names}; this rank holds {100 * held / max(total, 1):.0f} % of the base"
        )
    return "\n".join(lines)


def _shard_root(root: nn.Module, units: Units, mesh: DeviceMesh, options: ShardingOptions, mixed: Any) -> None:
    backend = "inductor" if options.compile is True else options.compile or None
    wrap_blocks(units.blocks, activation_checkpointing=options.activation_checkpointing, backend=backend)
    settings = {**_settings(mesh, options, mixed), "ignored_params": units.kept_whole}
    # what trains is never kept beyond a forward: a step may come before the next one
    trained = {p for p in root.parameters() if p.requires_grad and p not in units.kept_whole}
    for block in units.blocks:
        # backward starts at the last block: it would be gathered again at once
        again = block is units.blocks[-1] and trained.isdisjoint(block.parameters())
        fully_shard(block, reshard_after_forward=options.reshard_after_forward and not again, **settings)
    for unit in units.outside:
        trains = any(not trained.isdisjoint(part.parameters()) for part in unit)
        keeps = not trains and (not any(isinstance(part, nn.Embedding) for part in unit) or len(unit) > 1)
        sharded: Any = fully_shard(unit if len(unit) > 1 else unit[0], reshard_after_forward=not keeps, **settings)
        if not keeps and not trains and not any(p.requires_grad for p in unit[0].parameters()):
            sharded.set_unshard_in_backward(False)  # a frozen table has no part in backward
    trained -= {p for unit in units.members for part in unit for p in part.parameters()}
    fully_shard(root, reshard_after_forward=bool(trained), **settings)
    count_unused_as_zero(root)


def _settings(mesh: DeviceMesh, options: ShardingOptions, mixed: Any) -> dict[str, Any]:
    """Return the arguments of ``fully_shard`` that all units have in common."""
    shard_size = mesh.size(mesh.ndim - 1)
    return {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=mixed, reduce_dtype=torch.float32, cast_forward_inputs=False)
        if mixed is not None
        else MixedPrecisionPolicy(),
        "offload_policy": CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
        if options.cpu_offload
        else OffloadPolicy(),
        "shard_placement_fn": lambda parameter: _placement(parameter, shard_size),
    }


def _placement(parameter: nn.Parameter, shard_size: int) -> Shard | None:
    """Return along which dimension to split: an adapter's A has few rows, and some ranks would get none.

    Packed weights are split between blocks, which are their rows.
    """
    is_packed = parameter.dtype == torch.uint8
    if (
        not is_packed
        and parameter.ndim > 1
        and parameter.shape[0] < shard_size
        and parameter.shape[1] % shard_size == 0
    ):
        return Shard(1)
    return None


def _shared_with_others(module: nn.Module, path: str) -> set[nn.Parameter]:
    """Return the parameters of the root at ``path`` that a module outside of it holds too, such as a tied head."""
    inside, outside = set[nn.Parameter](), set[nn.Parameter]()
    for name, part in module.named_modules(remove_duplicate=False):
        side = inside if is_inside(clean_name(name), path) else outside
        side.update(parameter for parameter in part._parameters.values() if parameter is not None)
    return inside & outside


def _check_served(root: nn.Module) -> None:
    """Raise ``ValueError`` for parameters that are spread over ranks by anything but FSDP2."""
    managed = {id(record.sharded_param) for part in root.modules() for record in sharded_parameters(part)}
    for name, parameter in root.named_parameters():
        if is_sharded(parameter) and id(parameter) not in managed:
            raise ValueError(
                f"{clean_name(name)!r} is spread over ranks by tensor parallelism, which this strategy does not serve: "
                "leave the sharding to it (build the plain model in configure_model), or shard with fully_shard alone"
            )


def _keep_parts_of_originals(root: nn.Module) -> None:
    """Keep of the first values of what trains whole only this rank's parts, where it is sharded."""
    injection = require_injection(root)
    for name, parameter in named_trained_whole(root).items():
        original = injection.originals.get(name)
        if original is None:
            injection.originals[name] = local_part(parameter.detach()).clone()
        elif is_sharded(parameter) and original.shape != local_part(parameter).shape:
            injection.originals[name] = local_part(spread_like(original, parameter)).clone()
