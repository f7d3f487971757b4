"""Adapter-only ``fabric.save`` and ``fabric.load`` for Fabric's own strategies, which are adopted in place."""

from collections.abc import Callable
from typing import Any

from lightning.fabric.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_lora.checkpoint import random_state
from lightning_lora.checkpoint.changed import changed_adapters, joined_changes
from lightning_lora.checkpoint.file import SECTION, adapters_in, trained_tensors
from lightning_lora.checkpoint.fitting import copy_tensors, fitting_tensors, load_adapter_state_dict
from lightning_lora.checkpoint.frozen import (
    count_as_moved,
    look_for_moved,
    moved_tensors,
)
from lightning_lora.checkpoint.optimizer_matching import match_by_name, names_of, parameter_names
from lightning_lora.checkpoint.optimizer_state import spread_state
from lightning_lora.checkpoint.reading import renaming, section_of
from lightning_lora.distributed.gradient_norm import clip_apart
from lightning_lora.distributed.overflow import check_scalable
from lightning_lora.model.own_parameters import owners
from lightning_lora.model.state import injected_roots
from lightning_lora.strategies.shared.adapter_only import AdapterCheckpoints, adopt_class
from lightning_lora.strategies.shared.refusals import check_whole


class FabricAdapterOnly(AdapterCheckpoints, Strategy):
    """Mixin for a Fabric strategy whose checkpoints hold the adapters alone."""

    @override
    def setup_module(self, module: nn.Module) -> nn.Module:
        check_whole(module, type(self).__name__)
        wrapped = super().setup_module(module)
        if injected_roots(module):
            self._reductions += self._reduce_in_order(wrapped)
            look_for_moved(module)
        return wrapped

    @override
    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        check_scalable(self.scaler, [optimizer])
        return super().setup_optimizer(optimizer)

    @override
    def backward(self, tensor: Tensor, module: nn.Module | None, *args: Any, **kwargs: Any) -> None:
        """Run backward; under DDP, what this rank did not use counts as zero."""
        with self._filled():
            super().backward(tensor, module, *args, **kwargs)

    @override
    def clip_gradients_norm(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        max_norm: float,
        norm_type: float = 2.0,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Clip by the norm of all gradients, or those of each named adapter by their own."""
        named = owners(module)
        if not named:
            return super().clip_gradients_norm(module, optimizer, max_norm, norm_type, *args, **kwargs)
        self.precision.unscale_gradients(optimizer)
        return clip_apart(self.precision.main_params(optimizer), named, max_norm, norm_type, *args, **kwargs)

    @override
    def save_checkpoint(
        self,
        path: Any,
        state: dict[str, Any],
        storage_options: Any | None = None,
        filter: dict[str, Callable[[str, Any], bool]] | None = None,
    ) -> None:
        """Write one file on rank 0, in which adapted modules are their trained tensors. Called on all ranks.

        Beside an optimizer, the file keeps the random states of all ranks, which :meth:`load_checkpoint` restores.
        """
        path = self.broadcast(path)
        modules = adapted_modules(state)
        if modules:
            random = random_state.collect(*modules.values())  # before anything can draw
            for module in modules.values():
                look_for_moved(module)
            section = self._describe(modules)
            optimizers = {key: value for key, value in state.items() if isinstance(value, Optimizer)}
            names = _parameter_names(state)
            section["optimizers"] = {key: parameter_names(value, names) for key, value in optimizers.items()}
            if optimizers:
                section["random_states"] = random_state.gather(random, self._num_ranks())
            whole = {
                key: self._whole(trained_tensors(module, also=moved_tensors(module))) for key, module in modules.items()
            }
            for key, module in modules.items():
                self._check_finite(adapters_in(whole[key], module), path, "warn")
            states = {key: self.get_optimizer_state(value) for key, value in optimizers.items()}
            state = {**state, **whole, **states, SECTION: section}
        super().save_checkpoint(path, state, storage_options, filter)

    @override
    def get_optimizer_state(self, optimizer: Optimizer) -> dict[str, Tensor]:
        """Return an optimizer's state, whole on rank 0. Called on all ranks."""
        return self._whole_state(super().get_optimizer_state(optimizer), optimizer)

    @override
    def load_checkpoint(
        self, path: Any, state: Any = None, strict: bool = True, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a file of Fabric, of the Trainer or of plain torch; check all of it, then copy. Called on all ranks.

        A state with an optimizer in it asks for a resume: last of all, each rank's random generators (of torch, CUDA,
        numpy and ``random``) are put where they were at the save. Whatever draws between the load and the loop moves
        them; to go on with others, seed after the load.
        """
        path = self.broadcast(path)
        if isinstance(state, nn.Module) and injected_roots(state):
            load_adapter_state_dict(state, self._read(path))
            return {}
        if not isinstance(state, dict) or not adapted_modules(state):
            return super().load_checkpoint(path, state, strict, weights_only)
        checkpoint = self._read(path)
        section = section_of(checkpoint, path)
        modules = adapted_modules(state)
        sources = {key: _state_key(section, key, modules, path) for key in modules}
        tensors = {key: fitting_tensors(checkpoint, module, path, sources[key]) for key, module in modules.items()}
        optimizer_states = self._optimizer_states(checkpoint, state, sources, path, strict)
        others = [key for key in state if key not in modules and key not in optimizer_states]
        absent = [key for key in others if key not in checkpoint]
        if strict and absent:
            raise KeyError(
                f"{path} has no {absent[0]!r}, which the state asks for; to go on without it, pass strict=False"
            )

        if optimizer_states:
            self._check_left_out(checkpoint, {sources[key]: module for key, module in modules.items()}, path)

        for key, module in modules.items():
            copy_tensors(tensors[key], module)
            count_as_moved(module, tensors[key])
        for key, optimizer_state in optimizer_states.items():
            state[key].load_state_dict(optimizer_state)
        for key in others:
            if key in checkpoint:
                if hasattr(state[key], "load_state_dict"):
                    state[key].load_state_dict(checkpoint[key])
                else:
                    state[key] = checkpoint[key]
        saved = section.get("random_states") if optimizer_states else None
        states = random_state.fitting_states(saved, self._num_ranks(), path)
        own = None if states is None else self.random_state_of_this_rank(states)
        if own is not None:
            random_state.restore(own)
        random_state.restore_dropout(saved, own, *modules.values())
        used = {SECTION, *others, *optimizer_states, *sources.values()}
        return {key: value for key, value in checkpoint.items() if key not in used}

    def _optimizer_states(
        self, checkpoint: dict[str, Any], state: dict[str, Any], sources: dict[str, str], path: Any, strict: bool
    ) -> dict[str, dict[str, Any]]:
        """Return every optimizer's state from the file, matched to its parameters by name.

        Args:
            sources: the key in the file of every adapted module in the state.
        """
        optimizers = {key: value for key, value in state.items() if isinstance(value, Optimizer)}
        if not optimizers:
            return {}
        modules = adapted_modules(state)
        renamings = {key: renaming(checkpoint, modules[key], path, source) for key, source in sources.items()}
        saved_names = checkpoint[SECTION].get("optimizers") or {}
        if isinstance(saved_names, list):  # the Trainer's file: a list of states beside a list of names
            if len(saved_names) != len(optimizers):
                raise ValueError(f"{path} holds {len(saved_names)} optimizers, the state has {len(optimizers)}")
            saved = dict(zip(optimizers, zip(checkpoint["optimizer_states"], saved_names, strict=True), strict=True))
            key = next(iter(sources))
            rename = _prefixed(f"{key}.", renamings[key])
        else:
            saved = {key: (checkpoint[key], names) for key, names in saved_names.items()}
            rename = _by_key({source: (key, renamings[key]) for key, source in sources.items()})
        absent = [key for key in optimizers if key not in saved]
        if absent and strict:
            raise KeyError(f"{path} has no optimizer {absent[0]!r}; it has {sorted(saved)}")
        names = _parameter_names(state)
        changed = joined_changes(
            changed_adapters(checkpoint, modules[key], path, source).below(key) for key, source in sources.items()
        )
        return {
            key: spread_state(match_by_name(*saved[key], optimizer, names, rename, path, changed), optimizer)
            for key, optimizer in optimizers.items()
            if key not in absent
        }


def adapted_modules(state: Any) -> dict[str, nn.Module]:
    """Return the entries of a Fabric state that are modules with adapters, as the user made them."""
    if not isinstance(state, dict):
        return {}
    modules = {key: _unwrapped(value) for key, value in state.items() if isinstance(value, nn.Module)}
    return {key: module for key, module in modules.items() if injected_roots(module)}


def _unwrapped(module: nn.Module) -> nn.Module:
    """Return the user's module: names in files are its own under every strategy."""
    return module.module if isinstance(module, DistributedDataParallel) else module


def adopt_fabric(strategy: Strategy) -> None:
    """Make a Fabric strategy write and read adapter-only checkpoints, in place. Adopting twice does nothing.

    Raises:
        ValueError: the strategy shards the model in a way that is not served; the message says what to use.
    """
    adopt_class(strategy, FabricAdapterOnly, SingleDeviceStrategy, DDPStrategy)


def _state_key(section: dict[str, Any], key: str, modules: dict[str, nn.Module], path: Any) -> str:
    """Return the file's key for the state's ``key``: the same one, or the only one of a single model."""
    keys = {adapter["state_key"] for adapter in section["adapters"]}
    if key in keys:
        return key
    if len(keys) == 1 == len(modules):
        return str(next(iter(keys)))
    raise KeyError(f"{path} has no adapted model {key!r}; it has {sorted(keys)}")


def _parameter_names(state: dict[str, Any]) -> dict[int, str]:
    """Return the names of the parameters of all modules in a state, each behind its module's key."""
    names: dict[int, str] = {}
    for key, value in state.items():
        if isinstance(value, nn.Module):
            names = names_of(_unwrapped(value), f"{key}.") | names
    return names


def _prefixed(prefix: str, rename: Callable[[str], str]) -> Callable[[str], str]:
    return lambda name: prefix + rename(name)


def _by_key(renamings: dict[str, tuple[str, Callable[[str], str]]]) -> Callable[[str], str]:
    """Return the function that renames ``"<key in the file>.<name>"`` to what it is in the state."""

    def renamed(full_name: str) -> str:
        key, _, name = full_name.partition(".")
        if key not in renamings:
            return full_name
        own_key, rename = renamings[key]
        return f"{own_key}.{rename(name)}"

    return renamed
