"""Parse the keys of a PEFT file."""

import re
from typing import NamedTuple

from lightning_lora.model.names import clean_name

PREFIX = "base_model.model."
_KEY = re.compile(
    r"(?P<layer>.+?)\.(?:lora_(?P<embedding>embedding_)?(?P<factor>[AB])|(?P<magnitude>lora_magnitude_vector)"
    r"|(?P<rows>token_adapter\.trainable_tokens_delta))(?P<adapter>\.(?!weight$|bias$)[^.]+)?(?P<end>\.weight|\.bias)?"
)


class Key(NamedTuple):
    """What a tensor is, by its key alone.

    Attributes:
        kind: ``"A"``, ``"B"``, ``"magnitude"`` or ``"bias"`` of an adapted layer, ``"rows"`` of an embedding that
            train, a ``"base"`` tensor that did not train, a base tensor that is ``"trained"``, or ``"variant"``: of
            another method.
        name: of the layer, or of the base tensor, without PEFT's prefix.
        plain: the key without the adapter's name, which some tools leave in it.
    """

    kind: str
    name: str
    plain: str


def parse_key(key: str) -> Key:
    """Return what the tensor of this key in a PEFT file is."""
    name = clean_name(key.removeprefix(PREFIX))  # PEFT keeps the name that torch.compile puts in
    match = _KEY.fullmatch(name)
    if match is not None:
        kind = "variant"
        if match["factor"] and match["end"] == (None if match["embedding"] else ".weight"):
            kind = match["factor"]
        elif match["factor"] == "B" and match["end"] == ".bias":
            kind = "bias"
        elif match["magnitude"] or match["rows"]:
            kind = "magnitude" if match["magnitude"] else "rows"
        end = match["end"] or ""
        return Key(kind, match["layer"], key.removesuffix((match["adapter"] or "") + end) + end)
    if ".lora_" in name or ".token_adapter." in name:
        return Key("variant", name, key)
    is_copy = ".base_layer." in name and not name.endswith(".bias")
    return Key("base" if is_copy else "trained", name.replace(".base_layer.", "."), key)
