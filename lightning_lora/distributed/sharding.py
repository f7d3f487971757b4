"""Shard the frozen base of an adapted model with FSDP2, one unit per block; what trains stays whole."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from lightning.pytorch import LightningModule
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from lightning_lora.checkpoint.fingerprint import remember_fingerprint
from lightning_lora.compat.distributed import make_fsdp_root
from lightning_lora.distributed.base_weights import materialize
from lightning_lora.distributed.blocks import find_blocks, wrap_blocks
from lightning_lora.distributed.gradients import count_unused_as_zero
from lightning_lora.distributed.replication import broadcast_replicated, make_equal, move_to, refuse_other_sizes
from lightning_lora.layers.read_weight import is_read_by
from lightning_lora.model.families import is_pretrained
from lightning_lora.model.names import clean_name, is_inside
from lightning_lora.model.spread import class_name, guard_parts, reshard, sharded_parameters
from lightning_lora.model.state import injected_roots, named_adapter_parameters, named_trained_whole, require_injection
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
        for name in ("replicate_size", "min_shard_numel"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < (1 if name == "replicate_size" else 0):
                raise ValueError(
                    f"{name}={value!r} must be a positive integer" + (", or 0" if name == "min_shard_numel" else "")
                )
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
        if not any(isinstance(part, FSDPModule) for part in root.modules()):
            make_equal(root, device)
            _shard_root(root, mesh, options, mixed, _shared_with_others(module, path))
            if not any(is_sharded(parameter) for parameter in root.parameters()):
                rank_zero_warn(
                    f"nothing of {class_name(root)} is in shards, every rank holds all of it: no repeated blocks were "
                    "found. Name its large modules with shard_modules=[...], or lower min_shard_numel"
                )
        materialize(root, options.base_weights, torch.device("cpu") if options.cpu_offload else device)
        _keep_parts_of_originals(root)
    move_to(module, device)
    broadcast_replicated(module, device)
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
        units: dict[str, int] = {}
        for part in root.modules():
            if sharded_parameters(part):
                units[class_name(part)] = units.get(class_name(part), 0) + 1
        base = [parameter for parameter in root.parameters() if not parameter.requires_grad]
        held, total = sum(local_part(p).numel() for p in base), sum(p.numel() for p in base)
        names = ", ".join(f"{name} x{number}" if number > 1 else name for name, number in units.items()) or "nothing"
        lines.append(
            f"{class_name(root)} in shards: {names}; this rank holds {100 * held / max(total, 1):.0f} % of the base"
        )
    return "\n".join(lines)


def sharded_trainables(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that train in shards, whose gradients FSDP2 reduces."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad and is_sharded(parameter)]


def set_gradient_sync(module: nn.Module, enabled: bool) -> None:
    """Let FSDP2 reduce the gradients of what trains in shards, or leave them on each rank."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_requires_gradient_sync(enabled, recurse=False)


def _shard_root(
    root: nn.Module, mesh: DeviceMesh, options: ShardingOptions, mixed: Any, shared: set[nn.Parameter]
) -> None:
    blocks = find_blocks(root, options.shard_modules)
    backend = "inductor" if options.compile is True else options.compile or None
    wrap_blocks(list(blocks.values()), activation_checkpointing=options.activation_checkpointing, backend=backend)
    kept_whole = set() if options.shard_adapters else _trained(root)
    inside = {id(p) for block in blocks.values() for p in block.parameters()}
    units = _units_outside(root, inside, options.min_shard_numel, kept_whole)
    taken = inside | {id(p) for unit in units for part in unit for p in part.parameters()}
    kept_whole |= {p for p in root.parameters() if id(p) not in taken and p.numel() < options.min_shard_numel}
    if isinstance(root, LightningModule):  # its forward is not what the loop calls
        kept_whole |= {p for p in root.parameters() if id(p) not in taken}
    members = [[block] for block in blocks.values()] + units
    kept_whole |= shared | _tied_across_units(root, members)
    kept_whole |= {p for p in root.parameters() if p.ndim == 0}  # FSDP2 refuses scalars
    kept_whole |= _of_other_dtypes(root, members, kept_whole)
    settings = {**_settings(mesh, options, mixed), "ignored_params": kept_whole}
    last = next(reversed(blocks.values()), None)
    # what trains is never kept beyond a forward: a step may come before the next one
    trained = {p for p in root.parameters() if p.requires_grad and p not in kept_whole}
    for block in blocks.values():
        # backward starts at the last block: it would be gathered again at once
        again = block is last and trained.isdisjoint(block.parameters())
        fully_shard(block, reshard_after_forward=options.reshard_after_forward and not again, **settings)
    for unit in sorted(units, key=lambda unit: max(sum(1 for _ in part.modules()) for part in unit)):  # children first
        trains = any(not trained.isdisjoint(part.parameters()) for part in unit)
        keeps = not trains and (not any(isinstance(part, nn.Embedding) for part in unit) or len(unit) > 1)
        sharded: Any = fully_shard(unit if len(unit) > 1 else unit[0], reshard_after_forward=not keeps, **settings)
        if not keeps and not trains and not any(p.requires_grad for p in unit[0].parameters()):
            sharded.set_unshard_in_backward(False)  # a frozen table has no part in backward
    trained -= {p for unit in members for part in unit for p in part.parameters()}
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
    """Return along which dimension to split: an adapter's A has few rows, and some ranks would get none."""
    if parameter.ndim > 1 and parameter.shape[0] < shard_size and parameter.shape[1] % shard_size == 0:
        return Shard(1)
    return None


def _trained(root: nn.Module) -> set[nn.Parameter]:
    """Return the adapters' tensors, those that never train too, and whatever else trains."""
    trained = {parameter for parameter in root.parameters() if parameter.requires_grad}
    trained |= {parameter for _, parameter in named_adapter_parameters(root)}
    trained |= set(named_trained_whole(root).values())
    for layer in root.modules():
        trained |= {layer._parameters[name] for name in getattr(layer, "frozen_names", ())}  # type: ignore[misc]
    return trained


def _units_outside(
    root: nn.Module, inside: set[int], min_numel: int, kept_whole: set[nn.Parameter]
) -> list[list[nn.Module]]:
    """Return the modules with large tensors outside the blocks, those that share a tensor together.

    They are sharded by themselves where the loop may call parts of the root: in transformers' models and
    LightningModules. Elsewhere the root's own forward gathers them, which may read a weight without calling its module.
    """
    if not is_pretrained(root) and not isinstance(root, LightningModule):
        return []
    parents = {child: (parent, name) for parent in root.modules() for name, child in parent.named_children()}
    tables = set(_token_tables(root))
    owners: dict[nn.Parameter, list[nn.Module]] = {}
    for module in root.modules():
        for parameter in module._parameters.values():
            if parameter is None or id(parameter) in inside or parameter in kept_whole or parameter.numel() < min_numel:
                continue
            reader, (parent, name) = module, parents.get(module, (None, ""))
            if isinstance(parent, nn.MultiheadAttention) or (parent is not None and is_read_by(parent, name)):
                reader = parent
            while isinstance(module, nn.Embedding) and module not in tables and is_pretrained(root):
                reader, _ = parents[reader]  # such as a table of relative positions
                if type(reader).forward is not nn.Module.forward:
                    break
            if reader is not root:
                owners.setdefault(parameter, []).append(reader)
    units: list[list[nn.Module]] = []
    for readers in owners.values():
        tied = [unit for unit in units if any(reader in unit for reader in readers)]
        merged = list(dict.fromkeys([module for unit in tied for module in unit] + readers))
        units = [unit for unit in units if unit not in tied] + [merged]
    return units


def _token_tables(root: nn.Module) -> Iterator[nn.Module]:
    """Yield the embeddings of tokens, which transformers' models call and never read."""
    for part in root.modules():
        if is_pretrained(part):
            with contextlib.suppress(NotImplementedError):  # a model of sounds or images
                yield part.get_input_embeddings()  # type: ignore[operator]


def _tied_across_units(root: nn.Module, units: Sequence[Sequence[nn.Module]]) -> set[nn.Parameter]:
    """Return the parameters that belong to modules of more than one unit: no unit can gather them for another."""
    unit_of: dict[nn.Module, int] = {}
    for index, unit in enumerate(units):
        for part in unit:
            for module in part.modules():
                unit_of.setdefault(module, index)
    owners: dict[nn.Parameter, set[int]] = {}
    for module in root.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(parameter, set()).add(unit_of.get(module, -1))
    return {parameter for parameter, indices in owners.items() if len(indices) > 1}


def _of_other_dtypes(
    root: nn.Module, units: Sequence[Sequence[nn.Module]], kept_whole: set[nn.Parameter]
) -> set[nn.Parameter]:
    """Return what trains in another dtype than most that trains in its unit: FSDP2 reduces one dtype per unit."""
    rest = dict.fromkeys(root.parameters())
    found: set[nn.Parameter] = set()
    for unit in [*units, None]:
        members = rest if unit is None else dict.fromkeys(p for part in unit for p in part.parameters())
        trained = [p for p in members if p.requires_grad and p not in kept_whole]
        sizes: dict[torch.dtype, int] = {}
        for parameter in trained:
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
        found |= {p for p in trained if sizes[p.dtype] < max(sizes.values())}
        rest = dict.fromkeys(p for p in rest if p not in members)
    return found


def _shared_with_others(module: nn.Module, path: str) -> set[nn.Parameter]:
    """Return the parameters of the root at ``path`` that a module outside of it holds too, such as a tied head."""
    outside, inside = set(), set()
    for name, part in module.named_modules(remove_duplicate=False):
        own = {parameter for parameter in part._parameters.values() if parameter is not None}
        if is_inside(clean_name(name), path):
            inside |= own
        else:
            outside |= own
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
