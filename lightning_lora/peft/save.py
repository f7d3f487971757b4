"""Write PEFT directories: ``save_peft`` from an adapted model, ``convert`` from a checkpoint without the model."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.checkpoint.all_ranks import fail_together, meet
from lightning_lora.checkpoint.fingerprint import known_fingerprint
from lightning_lora.checkpoint.reading import read_checkpoint, section_of
from lightning_lora.checkpoint.storage import local_directory, location
from lightning_lora.model.state import OnNonfinite, check_finite, check_not_disabled, injected_roots, require_root
from lightning_lora.model.summary import outside_names, say_left_out, trained_outside
from lightning_lora.ops.sharded import is_sharded, whole
from lightning_lora.peft.card import write_card
from lightning_lora.peft.config import kind_of
from lightning_lora.peft.contents import contents, described_tensors
from lightning_lora.peft.describe import describe_for_peft
from lightning_lora.peft.directory import Files, write_directory


def save_peft(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    portable: bool = False,
    as_lora: bool = False,
    tokenizer: Any = None,
    on_nonfinite: OnNonfinite = "error",
) -> None:
    """Write the adapter as a directory that PEFT reads. Never writes base weights, never asks the network.

    Rank and alpha that differ from most layers' are written as anchored patterns of full names, so that no order of
    patterns can change their meaning. A tied tensor that trains is written under each of its modules. PiSSA and OLoRA
    adapters are written as their difference from the original base, at twice the rank. Heads and biases are written in
    the dtype that they train in, and PEFT rounds them to its model's.

    Of a module around the adapted model, what else trains is left out, and named in one line.

    Where adapters are whole on every rank (DDP, ``fsdp_lora``), any rank may call it, alone or with others, and writes.
    Where they are spread over ranks (``megatron_lora``, ``shard_adapters=True``), all must call it: rank 0 writes, and
    all return when the files are there. The fingerprint of a base in shards is that from when it was sharded.

    Args:
        directory: a local one or a URL that fsspec knows, such as ``"s3://bucket/adapter"``.
        portable: for readers that know one rank and one scale, such as vLLM, SGLang and llama.cpp: pad every layer with
            zeros to the largest rank, fold its scale in, and write ``r = lora_alpha``. A ``README.md``, if there is
            none, says which base it is for, and in which form that was quantised when the adapter was trained.
        as_lora: write an AdaLoRA adapter as plain LoRA without its pruned ranks; others are plain as they are.
        tokenizer: saved beside the adapter with its ``save_pretrained``; ``None`` takes ``model.tokenizer`` if there is
            one.
        on_nonfinite: what to do about an adapter that holds NaN or infinity.

    Raises:
        ValueError: the adapter has what the format, or with ``portable`` those readers, cannot express, or holds NaN or
            infinity; or only some of the ranks called it that all must. Nothing is written then.
    """
    root = require_root(model)
    check_not_disabled(root)
    description = describe_for_peft(root, known_fingerprint(root))
    tensors = described_tensors(root, description)
    spread = any(map(is_sharded, tensors.values()))
    if spread:
        meet("save_peft")
    named = {name: whole(tensor).detach() for name, tensor in tensors.items()}
    failure: Exception | None = None
    if not spread or torch.distributed.get_rank() == 0:
        try:
            write_described(
                description, named, directory, portable=portable, as_lora=as_lora, on_nonfinite=on_nonfinite
            )
            write_tokenizer(getattr(model, "tokenizer", None) if tokenizer is None else tokenizer, directory)
        except Exception as error:
            if not spread:
                raise
            failure = error
    if spread:
        fail_together(failure)
    ((path, _),) = injected_roots(model).items()
    say_left_out(directory, trained_outside(model, path, root), "Save the state_dict() of those beside it")


def convert(
    checkpoint: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    portable: bool = False,
    as_lora: bool = False,
    on_nonfinite: OnNonfinite = "error",
) -> None:
    """Turn an adapter checkpoint into a PEFT directory, with neither the base nor the model's code at hand.

    What trained outside the adapted model is left out, and named in one line.

    Args:
        checkpoint: a file of Trainer, Fabric or ``torch.save(adapter_checkpoint(model), path)``. It and the directory
            may be URLs.
        portable, as_lora: as in :func:`save_peft`.
        on_nonfinite: what to do about an adapter that holds NaN or infinity.

    Raises:
        ValueError: the file is damaged, holds no adapter or several, what PEFT's format cannot express, or NaN or
            infinity.
    """
    content = read_checkpoint(checkpoint)
    adapters = section_of(content, checkpoint)["adapters"]
    if len(adapters) != 1:
        raise ValueError(
            f"{checkpoint} holds {len(adapters)} adapters, at {[a['root'] for a in adapters]}; expected one. Load them "
            "into their models and call save_peft on each"
        )
    adapter = adapters[0]
    write_adapter(
        content, adapter, directory, checkpoint, portable=portable, as_lora=as_lora, on_nonfinite=on_nonfinite
    )
    outside = outside_names(content[adapter["state_key"]], adapter["root"])
    say_left_out(directory, outside, f"It is in {checkpoint}, under {adapter['state_key']!r}")


def write_adapter(
    checkpoint: Mapping[str, Any],
    adapter: Mapping[str, Any],
    directory: str | os.PathLike[str],
    source: Any,
    *,
    portable: bool = False,
    as_lora: bool = False,
    on_nonfinite: OnNonfinite = "error",
) -> None:
    """Write one adapter of a checkpoint's content as a PEFT directory.

    Args:
        adapter: its entry in the checkpoint's section.
        source: where the content is from, for messages.
    """
    description = adapter.get("peft")
    if description is None or "refused" in description:
        why = (description or {}).get("refused", "it was written before checkpoints held what a conversion needs")
        raise ValueError(f"{source} cannot be converted: {why}. Load it into its model and call save_peft or merge")
    prefix = f"{adapter['root']}." if adapter["root"] else ""
    state = checkpoint[adapter["state_key"]]
    named = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    write_described(description, named, directory, portable=portable, as_lora=as_lora, on_nonfinite=on_nonfinite)


def write_described(
    description: Mapping[str, Any],
    named: Mapping[str, Tensor],
    directory: str | os.PathLike[str],
    *,
    portable: bool,
    as_lora: bool,
    on_nonfinite: OnNonfinite,
) -> None:
    """Write a directory from what :func:`describe_for_peft` returned and the model's tensors by name.

    Raises:
        ValueError: PEFT would read the adapters of experts as something else; ``portable=True`` is then the way.
    """
    config, made = contents(description, named, portable=portable, as_lora=as_lora)
    if kind_of(description["config"]) == "ADALORA" and (portable or as_lora):
        check_finite(named, directory, on_nonfinite)  # pruned ranks, which are not written, are part of every output
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for key, value in made:
        shared = value.data_ptr() in seen  # a tied tensor under its second name: safetensors wants memory of its own
        tensors[key] = value.clone() if shared else value
        seen.add(value.data_ptr())
    write_directory(directory, Files(config, tensors, description["metadata"]), on_nonfinite=on_nonfinite)
    if portable:
        write_card(directory, config, description["metadata"])


def write_tokenizer(tokenizer: Any, directory: str | os.PathLike[str]) -> None:
    """Save a tokenizer beside an adapter, if it is one."""
    if callable(save := getattr(tokenizer, "save_pretrained", None)):
        with local_directory(location(directory)) as folder:
            save(folder)
