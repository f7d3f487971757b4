"""Write PEFT directories: ``save_peft`` from an adapted model, ``convert`` from a checkpoint without the model."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_lora.checkpoint.all_ranks import fail_together, meet
from lightning_lora.checkpoint.fingerprint import known_fingerprint
from lightning_lora.checkpoint.reading import name_of, read_checkpoint, section_of
from lightning_lora.checkpoint.storage import Location
from lightning_lora.model.names import without_adapter
from lightning_lora.model.one_adapter import chosen_adapter, each_adapter
from lightning_lora.model.state import OnNonfinite, check_not_disabled, injected_roots, require_root
from lightning_lora.model.summary import outside_names, say_left_out, trained_outside
from lightning_lora.ops.sharded import is_sharded, whole
from lightning_lora.peft.contents import described_tensors
from lightning_lora.peft.describe import describe_for_peft
from lightning_lora.peft.writing import Described, folder_of, write_described, write_tokenizer


def save_peft(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    portable: bool = False,
    as_lora: bool = False,
    tokenizer: Any = None,
    on_nonfinite: OnNonfinite = "error",
) -> None:
    """Write the adapter as a directory that PEFT reads. Never writes base weights, never asks the network.

    Of a model with named adapters each gets a folder of its own, ``directory/<name>``, or one of them the directory.

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
        adapter: the name of the one to write into ``directory`` itself; ``None`` writes all that there are.
        portable: for readers that know one rank and one scale, such as vLLM, SGLang and llama.cpp: pad every layer with
            zeros to the largest rank, fold its scale in, and write ``r = lora_alpha``. A ``README.md``, if there is
            none, says which base it is for, and in which form that was quantised when the adapter was trained.
        as_lora: write an AdaLoRA adapter as plain LoRA without its pruned ranks; others are plain as they are.
        tokenizer: saved beside the adapter with its ``save_pretrained``; ``None`` takes ``model.tokenizer`` if there is
            one.
        on_nonfinite: what to do about an adapter that holds NaN or infinity.

    Raises:
        ValueError: there is no such adapter; it has what the format, or with ``portable`` those readers, cannot
            express, or holds NaN or infinity; or only some of the ranks called it that all must.
            Nothing is written then.
    """
    root = require_root(model)
    check_not_disabled(root)
    seen = each_adapter(root) if adapter is None else {"": chosen_adapter(root, adapter)}
    base = known_fingerprint(root)
    described = {name: describe_for_peft(one, base) for name, one in seen.items()}
    tensors = {name: described_tensors(one, described[name]) for name, one in seen.items()}
    spread = any(is_sharded(tensor) for named in tensors.values() for tensor in named.values())
    if spread:
        meet("save_peft")
    contents_of = {
        folder_of(directory, name): (described[name], {n: whole(tensor).detach() for n, tensor in named.items()})
        for name, named in tensors.items()
    }
    failure: Exception | None = None
    if not spread or torch.distributed.get_rank() == 0:
        try:
            write_described(contents_of, portable=portable, as_lora=as_lora, on_nonfinite=on_nonfinite)
            for folder in contents_of:
                write_tokenizer(getattr(model, "tokenizer", None) if tokenizer is None else tokenizer, folder)
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

    Adapters with names get a folder each, ``directory/<name>``.

    What trained outside the adapted model is left out, and named in one line.

    Args:
        checkpoint: a file of Trainer, Fabric or ``torch.save(adapter_checkpoint(model), path)``. It and the directory
            may be URLs.
        portable, as_lora: as in :func:`save_peft`.
        on_nonfinite: what to do about an adapter that holds NaN or infinity.

    Raises:
        ValueError: the file is damaged, holds no adapter or those of several models, what PEFT's format cannot
            express, or NaN or infinity.
    """
    content = read_checkpoint(checkpoint)
    entries = section_of(content, checkpoint)["adapters"]
    first = entries[0]
    if any((entry["root"], entry["state_key"]) != (first["root"], first["state_key"]) for entry in entries):
        raise ValueError(
            f"{checkpoint} holds the adapters of several models, at {sorted({e['root'] for e in entries})}; expected "
            "one. Load them into their models and call save_peft on each"
        )
    write_entries(
        content, entries, directory, checkpoint, portable=portable, as_lora=as_lora, on_nonfinite=on_nonfinite
    )
    outside = outside_names(content[first["state_key"]], first["root"])
    say_left_out(directory, outside, f"It is in {checkpoint}, under {first['state_key']!r}")


def write_entries(
    checkpoint: Mapping[str, Any],
    entries: Sequence[Mapping[str, Any]],
    directory: str | os.PathLike[str],
    source: Any,
    **how: Any,
) -> list[Location]:
    """Write the adapters of one model in a checkpoint's content as PEFT directories, and return these.

    Args:
        entries: of the adapters, in the checkpoint's section.
        source: where the content is from, for messages.
        how: ``portable``, ``as_lora`` and ``on_nonfinite``.
    """
    described: dict[Location, Described] = {}
    for entry in entries:
        description, name = entry.get("peft"), name_of(entry)
        if description is None or "refused" in description:
            why = (description or {}).get("refused", "it was written before checkpoints held what a conversion needs")
            raise ValueError(f"{source} cannot be converted: {why}. Load it into its model and call save_peft or merge")
        prefix = f"{entry['root']}." if entry["root"] else ""
        state = checkpoint[entry["state_key"]]
        named = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if name:
            parts = {key: without_adapter(key) for key in named}
            named = {parts[key][0]: value for key, value in named.items() if parts[key][1] == name}
        described[folder_of(directory, name)] = description, named
    write_described(described, **how)
    return list(described)
