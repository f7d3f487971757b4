"""Compare the fingerprint of a base with the one that a file recorded, and say in words what differs."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from lightning_lora.checkpoint.fingerprint import fingerprint
from lightning_lora.checkpoint.packed import packed_in
from lightning_lora.model.names import clean_name
from lightning_lora.model.state import OtherForm
from lightning_lora.ops.sharded import logical


class Comparison(NamedTuple):
    """How a base differs from the recorded one.

    Attributes:
        values: what first tells them apart, in words; ``None`` where all that is compared has the same values.
        form: which form each is stored in, where one of them is quantised and the other is not so.
    """

    values: str | None
    form: OtherForm | None


def compare_base(root: nn.Module, recorded: Mapping[str, Any]) -> Comparison:
    """Compare the base of ``root`` with the recorded one. Called on all ranks where it is sharded."""
    own = fingerprint(root)
    return Comparison(_first_difference(root, own, recorded), other_form(own, recorded))


def _first_difference(root: nn.Module, own: Mapping[str, Any], recorded: Mapping[str, Any]) -> str | None:
    """Return what first tells ``root`` from the recorded base, in words, or ``None`` if nothing does.

    Tensors without a fingerprint on either side, and float16 against another dtype (which rounds twice), are not
    compared.
    """
    named = {clean_name(name): tensor for name, tensor in [*root.named_parameters(), *root.named_buffers()]}
    there = named.keys() | set(own["names"]) | own["packed"].keys()
    lacking = next((name for name in [*recorded["names"], *packed_in(recorded)] if name not in there), None)
    if lacking is not None:
        return f"its base has a tensor {lacking!r}, which this model lacks"
    # a resize changes what has a row for each of an embedding's, as a head has. Only where all else is the same was the
    # base resized; another base has other embeddings too
    rows = {number for number, *_ in own["embeddings"].values()}
    resizable = {name for name, tensor in named.items() if tensor.ndim > 0 and logical(tensor).shape[0] in rows}
    difference = first_other_value(own, recorded, skipped=resizable)
    tables = recorded.get("embeddings", {})
    is_resized = any(tables[name][0] != number for name, (number, *_) in own["embeddings"].items() if name in tables)
    others, num_compared = _other_names(own, recorded)
    if difference is None and (is_resized or 2 * len(others) <= num_compared):
        difference = _resized(own["embeddings"], tables)
    return first_other_value(own, recorded) if difference is None else difference


def first_other_value(own: Mapping[str, Any], recorded: Mapping[str, Any], skipped: Collection[str] = ()) -> str | None:
    """Return which tensor of two fingerprints is the first of other values, in words; those of one alone are passed.

    Where most differ, the words say so.
    """
    others, num_compared = _other_names(own, recorded)
    first = next((name for name in others if name not in skipped), None)
    if first is None:
        return None
    words = f"the base tensor {first!r} holds other values"
    if len(others) > 1 and 2 * len(others) > num_compared:
        words += f", and so do {len(others) - 1} of the {num_compared - 1} others that were compared"
    return words


def first_other_name(own: Mapping[str, Any], recorded: Mapping[str, Any]) -> str | None:
    """Return the name of the first tensor whose values differ in two fingerprints."""
    return next(iter(_other_names(own, recorded)[0]), None)


def _other_names(own: Mapping[str, Any], recorded: Mapping[str, Any]) -> tuple[list[str], int]:
    """Return the names of the tensors whose values differ in two fingerprints, and how many were compared."""
    ours, theirs = _hashes(own), _hashes(recorded)
    compared = {name: _differ(theirs[name], ours[name]) for name in theirs if name in ours}
    ours_packed, theirs_packed = packed_in(own), packed_in(recorded)
    for name, (form, value) in theirs_packed.items():
        own_form, own_value = ours_packed.get(name, (None, None))
        if name not in compared and own_form is not None and _code(form) == _code(own_form):
            compared[name] = value != own_value
    return [name for name, differs in compared.items() if differs], len(compared)


def other_form(own: Mapping[str, Any], recorded: Mapping[str, Any]) -> OtherForm | None:
    """Return how a base is stored in another form than the recorded one, where either is quantised."""
    ours, theirs = ({name: form for name, (form, _) in packed_in(one).items()} for one in (own, recorded))
    if ours == theirs:
        return None
    one, other = _form_words(recorded, theirs), _form_words(own, ours)
    if one == other:
        one, other = f"{one} ({len(theirs)} weights)", f"{other} ({len(ours)} weights)"
    return OtherForm(f"trained over {one}, loaded over {other}", theirs)


def _hashes(fingerprint: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    pairs = zip(fingerprint["hashes"].tolist(), fingerprint["dtypes"], strict=True)
    return dict(zip(fingerprint["names"], pairs, strict=True))


def _code(form: str) -> str:
    """Return what decides the codes of a form: double quantisation rounds the scales alone."""
    return form.removesuffix("-dq")


def _differ(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two pairs of a hash and a dtype are of other values."""
    (value, dtype), (other_value, other_dtype) = one, other
    return bool(value != other_value and (dtype == other_dtype or "float16" not in (dtype, other_dtype)))


def _form_words(fingerprint: Mapping[str, Any], forms: Mapping[str, str]) -> str:
    """Return the forms of a base's packed weights, or else the dtype of most of its tensors."""
    if forms:
        return " and ".join(sorted(set(forms.values())))
    return Counter(fingerprint["dtypes"]).most_common(1)[0][0] if fingerprint["dtypes"] else "no values"


def _resized(own: dict[str, list[Any]], recorded: dict[str, list[Any]]) -> str | None:
    """Return what tells embeddings apart that were resized, in words, or ``None``."""
    for name in recorded.keys() & own.keys():
        (rows, *last), (own_rows, *own_last) = recorded[name], own[name]
        if rows != own_rows:
            return (
                f"its {name!r} has {rows} rows, this model's {own_rows}: call "
                f"model.resize_token_embeddings({rows}) before the model is adapted"
            )
        if _differ(last, own_last):
            return (
                f"{name!r} holds other values in its last row. Rows that resize_token_embeddings adds are random: seed "
                "before it, or train them (trainable_token_indices, modules_to_save), so that they are in the file"
            )
    return None
