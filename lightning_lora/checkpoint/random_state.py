"""Save and restore the random generators of a process, in values that a safe ``torch.load`` can read."""

import random
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_lora.model.state import injected_roots, require_injection
from lightning_lora.ops.dropout import Seeds


def collect(*modules: nn.Module) -> dict[str, Any]:
    """Return the states of torch (CPU and every CUDA device), numpy, ``random``, and Megatron-core's streams.

    Args:
        modules: whose named adapters' seeds of dropout are kept, too.
    """
    numpy_state: Any = np.random.get_state(legacy=True)  # a tuple; the annotation also allows a dict
    kind, keys, position, has_gauss, gauss = numpy_state
    version, internal, gauss_next = random.getstate()
    seeds = [{name: int(one.next) for name, one in own.items()} for own in _dropout_seeds(modules)]
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (str(kind), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)),
        "python": (version, list(internal), gauss_next),
        "megatron": _megatron_states(),
        **({"dropout": seeds} if any(seeds) else {}),
    }


def gather(state: dict[str, Any], num_ranks: int) -> list[dict[str, Any]]:
    """Return the states of all ranks in their order. Called on all ranks; moves a few kilobytes."""
    gathered: list[Any] = [state] * num_ranks
    if num_ranks > 1:
        torch.distributed.all_gather_object(gathered, state)
    return gathered


def fitting_states(states: list[dict[str, Any]] | None, num_ranks: int, source: Any) -> list[dict[str, Any]] | None:
    """Return a file's states if there is one for each rank of this run; else log a line and return ``None``."""
    if states is None or len(states) == num_ranks:
        return states
    rank_zero_info(
        f"{source} was written by {len(states)} processes, this run has {num_ranks}: random states are not restored, "
        "so shuffling and dropout differ from an uninterrupted run"
    )
    return None


def collect_loaders(loaders: Iterable[Any]) -> list[list[torch.Tensor]]:
    """Return the states of the generators that dataloaders and their samplers hold, loader by loader."""
    return [[generator.get_state() for generator in _generators(loader)] for loader in loaders]


def restore_loader(loader: Any, states: list[torch.Tensor]) -> None:
    """Put a dataloader's generators back; with another number of them than was saved do nothing."""
    generators = _generators(loader)
    if len(generators) == len(states):
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state.cpu())


def _generators(loader: Any) -> list[torch.Generator]:
    held = (getattr(loader, "generator", None), getattr(getattr(loader, "sampler", None), "generator", None))
    return [generator for generator in dict.fromkeys(held) if isinstance(generator, torch.Generator)]


def restore(state: dict[str, Any]) -> None:
    """Put the generators back into a state of :func:`collect`."""
    torch.set_rng_state(state["torch"].cpu())
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([tensor.cpu() for tensor in state["cuda"]])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    own = _megatron_states()
    if own and state.get("megatron", {}).keys() == own.keys():
        _megatron_tracker().set_states({name: tensor.cpu() for name, tensor in state["megatron"].items()})


def restore_dropout(
    states: Iterable[Mapping[str, Any]] | None, own: Mapping[str, Any] | None, *modules: nn.Module
) -> None:
    """Let the dropout of named adapters go on with the seeds that come next.

    Args:
        states: what all ranks collected of as many modules.
        own: of these this rank's; ``None`` where the file has other ranks than the run, and the furthest counts.
    """
    saved = [state["dropout"] for state in ([own] if own is not None else states or ()) if "dropout" in state]
    for index, seeds in enumerate(_dropout_seeds(modules)):
        for name, one in seeds.items():
            if positions := [roots[index][name] for roots in saved if name in roots[index]]:
                one.next.fill_(max(positions))


def _dropout_seeds(modules: Iterable[nn.Module]) -> list[dict[str, Seeds]]:
    """Return the seeds of the named adapters of each adapted model, by name."""
    roots = [root for module in modules for root in injected_roots(module).values()]
    return [{name: one.seeds for name, one in require_injection(root).named.items()} for root in roots]


def _megatron_tracker() -> Any:
    """Return Megatron-core's record of its own random streams, where it was set up."""
    streams = sys.modules.get("megatron.core.tensor_parallel.random")
    return None if streams is None else streams.get_cuda_rng_tracker()


def _megatron_states() -> dict[str, torch.Tensor]:
    tracker = _megatron_tracker()
    states = {} if tracker is None else tracker.get_states()
    # graph-safe ones are generators, which a checkpoint cannot hold
    return {name: tensor for name, tensor in states.items() if isinstance(tensor, torch.Tensor)}
