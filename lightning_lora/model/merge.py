"""Merge adapters into the base weights, or into the original ones of a quantised base, and take them out again."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_lora.config import Quantization
from lightning_lora.model.inject import take_out
from lightning_lora.model.merge_layer import Into
from lightning_lora.model.merge_receipt import LayerReceipt, MergeReceipt
from lightning_lora.model.mergeable import check_merge
from lightning_lora.model.merged_model import MergedModel, merge_layers, unmerge_layers, unmerged_layers
from lightning_lora.model.names import joined
from lightning_lora.model.spread import reshard
from lightning_lora.model.state import injected_roots, is_merged, require_injection, require_roots

# of models whose adapters were taken out; those of others are on the adapted models
_RECEIPTS: "WeakKeyDictionary[nn.Module, MergeReceipt]" = WeakKeyDictionary()


def merge(
    model: nn.Module,
    remove: bool = False,
    *,
    base: str | os.PathLike[str] = "trained",
    dtype: torch.dtype | None = None,
    requantize: Quantization | None = None,
    adapter: str | None = None,
) -> nn.Module:
    """Add every adapter to its base weight in place: ``W += scaling * B A`` (Hu et al. 2021, sec. 4.1).

    The sum is taken in float32 or wider and rounded once to the weight's dtype. The weights as they were are kept, one
    copy of every adapted weight, on CPU where they were plain, so that :func:`unmerge` gives them back bit for bit. A
    merged model is the base class's own code, at its speed. Merging what is merged
    does nothing; with other arguments it is an error. The first line of the
    receipt is logged; :func:`merge_receipt` returns it.

    Weights in 4 or 8 bits are made dense: all such layers of the model, adapted or not, become plain ones.

    A sharded base is gathered one layer at a time, and each rank merges and keeps its own part: call on all ranks. The
    model stays in shards then, and cannot be saved as one: to write a merged model, ``save_peft``, and in one process
    ``merge(load_peft(base, directory), remove=True)``.

    Args:
        model: the adapted model, or a module around it.
        remove: take the adapters out for good and keep no copies: a plain model with the merged weights remains, in
            shards if it was. Heads and biases that trained keep their trained values, rounded once to the base's dtype;
            those that are in shards themselves stay in ``adapter_dtype``, and are cast where they are read.
        base: ``"trained"`` merges into the model's own weights, of a quantised base the dequantised ones: exactly the
            function that the adapted model computes. It is the trained one, unless the adapter was loaded over its base
            in another form, which the receipt says. A path, of a safetensors file or a directory, merges into
            the weights there, such as the 16-bit ones that the base was quantised from. The adapter never saw the
            difference, and the receipt says how large it is beside the update.
        dtype: of all frozen parameters of the merged model; by default those that they had before they were quantised,
            and of bitsandbytes' layers that of the model's other parameters.
        requantize: store weights that were quantised in this form again: ``"nf4"``, ``"nf4-dq"`` or ``"int8"``.
        adapter: which one, of a model with several adapters. The others cannot act until :func:`unmerge`, and
            ``remove=True`` takes them out, too.

    Raises:
        ValueError: a weight is tied to another layer, which would change too; a layer's own forward is such that a
            changed weight does not add the adapter's term; an adapter holds NaN or infinity; less than half of the
            update would survive ``requantize``; the files of ``base`` lack a weight; the model
            is merged already with other arguments. Nothing is changed then.
    """
    receipt = _merge(model, Into(base, dtype, requantize, adapter), remove=remove)
    if receipt is not None and len(receipt):
        rank_zero_info(receipt.summary())
    return model


def merge_receipt(model: nn.Module) -> MergeReceipt:
    """Return what the last merge of ``model`` did to each layer's update; it prints as a table.

    A copy of the model has it too, as long as the adapters are not taken out.

    Raises:
        ValueError: the model was never merged.
    """
    kept = _kept_receipt(model)
    if kept is None and (kept := _RECEIPTS.get(model)) is None:
        raise ValueError(f"{type(model).__name__} was not merged: call merge(model) first")
    return kept


def unmerge(model: nn.Module) -> nn.Module:
    """Give the base weights back, bit for bit, and make the adapters active. On an unmerged model it does nothing."""
    reshard(model)
    for root in require_roots(model).values():
        state = require_injection(root).merged
        if state is not None:
            unmerge_layers(root, state)
            require_injection(root).merged = None
    return model


@contextmanager
def merged(
    model: nn.Module,
    *,
    base: str | os.PathLike[str] = "trained",
    dtype: torch.dtype | None = None,
    requantize: Quantization | None = None,
    adapter: str | None = None,
) -> Iterator[nn.Module]:
    """Merge inside the ``with`` block, and leave the model after it as it was before. Arguments as in :func:`merge`."""
    unmerged = [root for root in require_roots(model).values() if not is_merged(root)]
    _merge(model, Into(base, dtype, requantize, adapter))
    try:
        yield model
    finally:
        for root in unmerged:
            unmerge(root)


def _check_same(root: nn.Module, into: Into) -> None:
    """Raise ``ValueError`` where a root is merged into something else than is asked for."""
    state = require_injection(root).merged
    asked = {name: value for name, value in vars(into).items() if value != vars(Into())[name]}
    there = {} if state is None else vars(state.into)
    other = ", ".join(
        f"{name}={value} (there: {there[name]})" for name, value in asked.items() if str(value) != str(there.get(name))
    )
    if other:
        raise ValueError(f"{type(root).__name__} is merged with other settings, {other}: call unmerge(model) first")


def merge_again(root: nn.Module, state: MergedModel) -> None:
    """Merge a root as it was merged before :func:`unmerge`."""
    _merge(root, state.into)


def _merge(model: nn.Module, into: Into, *, remove: bool = False) -> MergeReceipt | None:
    """Merge, and return the receipt, or ``None`` if all is merged already."""
    roots = require_roots(model)
    reshard(model)
    unmerged = {path: root for path, root in roots.items() if unmerged_layers(root, into.adapter)}
    for path in roots.keys() - unmerged:
        _check_same(roots[path], into)
    for root in unmerged.values():
        check_merge(model, root, into.of(root))
    receipts: dict[str, MergeReceipt] = {}
    for path, root in unmerged.items():
        own = into.of(root)
        over = None if own.trained_over is None else own.trained_over.words
        receipts[path] = MergeReceipt(str(into.base), tuple(merge_layers(root, own)), over)
        require_injection(root).receipt = receipts[path]
    reshard(model)
    if remove:
        for owner in (model, *roots.values()):
            if (kept := _kept_receipt(owner)) is not None:
                _RECEIPTS[owner] = kept
        for root in roots.values():
            take_out(root)
    return _joined(receipts) if receipts else None


def _kept_receipt(model: nn.Module) -> MergeReceipt | None:
    """Return the receipt that the adapted models inside ``model`` hold."""
    kept = {path: require_injection(root).receipt for path, root in injected_roots(model).items()}
    receipts = {path: receipt for path, receipt in kept.items() if receipt is not None}
    return _joined(receipts) if receipts else None


def _joined(receipts: dict[str, MergeReceipt]) -> MergeReceipt:
    """Return the receipts of several adapted models as one, with the layers' names in the model around them."""
    layers = [
        LayerReceipt(**{**vars(one), "name": joined(path, one.name)})
        for path, receipt in receipts.items()
        for one in receipt.layers
    ]
    over = [one.trained_over for one in receipts.values() if one.trained_over is not None]
    return MergeReceipt(next(iter(receipts.values())).base, tuple(layers), over[0] if over else None)
