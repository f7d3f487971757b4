"""Compute what a merge writes into one layer, and what it does to the layer's update."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lightning_lora.config import Quantization
from lightning_lora.layers import LoRALayer
from lightning_lora.layers.plain_weight import (
    dense_weight,
    is_bitsandbytes,
    reading,
    stored_kind,
    stored_names,
    turned,
    weight_dtype,
)
from lightning_lora.model.merge_receipt import LayerReceipt
from lightning_lora.model.names import joined
from lightning_lora.model.original_base import OriginalBase
from lightning_lora.model.spread import gathered
from lightning_lora.model.state import OtherForm, named_lora_layers, require_injection
from lightning_lora.ops.packed import FORMS, PackedWeight

CHUNK = 2**26  # elements of which the norms are taken at once: a stack of experts is large


@dataclass(frozen=True)
class Into:
    """What adapters are merged into.

    Attributes:
        base: ``"trained"``: the weights that the adapter was trained over, made dense; or the path of the original
            ones.
        dtype: of the merged weights; ``None`` is the one that each weight had.
        adapter: the name of the adapter, of a model whose adapters have names.
        others: dtype of the model's frozen parameters beside bitsandbytes' layers.
        trained_over: the form of the base that the adapter was trained over, where the model's has another.
        requantize: the form in which weights that were quantised are stored again; ``None`` is a plain parameter.
    """

    base: str | os.PathLike[str] = "trained"
    dtype: torch.dtype | None = None
    requantize: Quantization | None = None
    adapter: str | None = None
    others: torch.dtype | None = None
    trained_over: OtherForm | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.base, str | os.PathLike):
            raise TypeError(
                f"base must be 'trained', or the path of the original weights, a safetensors file or a directory; got "
                f"{type(self.base).__name__}. Leave base out to merge into what the model has, or save the original: "
                "original.save_pretrained(directory), and base=directory"
            )
        if isinstance(self.dtype, str):
            named = getattr(torch, self.dtype.removeprefix("torch."), None)
            example = named if isinstance(named, torch.dtype) else torch.bfloat16
            raise TypeError(f"dtype={self.dtype!r} must be a dtype of torch: write dtype={example}")

    def of(self, root: nn.Module) -> "Into":
        """Return the same for one model, with the dtype of its frozen parameters and what its adapter trained over."""
        left = {id(p) for layer in named_lora_layers(root).values() for _, p in layer.named_adapter_tensors()}
        left |= {id(p) for module in root.modules() if is_bitsandbytes(module) for p in module.parameters()}
        frozen = [p for p in root.parameters() if p.is_floating_point() and not p.requires_grad]
        others = next((p.dtype for p in frozen if id(p) not in left), None)
        injection = require_injection(root)
        over = injection.trained_over.get(self.adapter or injection.only_name)
        return replace(self, others=others, trained_over=over)

    def form(self, module: nn.Module, name: str) -> tuple[Quantization | None, torch.dtype]:
        """Return how a merged weight is stored: packed or not, and its dtype."""
        is_stored = stored_kind(module, name) is not None
        return self.requantize if is_stored else None, self.dtype or weight_dtype(module, name, self.others)


Merged = Tensor | PackedWeight


@torch.no_grad()
def merge_values(
    name: str, layer: LoRALayer, into: Into, original: OriginalBase | None
) -> tuple[dict[str, Merged], LayerReceipt]:
    """Return what a merge writes into the layer called ``name``, by local name, and its receipt.

    A sharded layer is gathered: call on all ranks.
    """
    values: dict[str, Merged] = {}
    norms = _Norms()
    with gathered(layer):
        present = {local: dense_weight(layer, local) for local in layer.base_tensors()}
        base = present if original is None else _read(name, present, original)
        trained = _trained(name, layer, present, base, into.trained_over)
        with reading(layer, base):
            sums = layer.merged_tensors()
        for local, exact in sums.items():
            kind, dtype = into.form(layer, local)
            values[local], after = as_stored(layer, exact, kind, dtype)
            before = base[local] if after is exact else as_stored(layer, base[local], kind, dtype)[1]
            norms.add(trained[local], base[local], exact, before, after)
    first, dtype = into.form(layer, next(iter(sums)))
    return values, norms.receipt(name, first or str(dtype).removeprefix("torch."))


def as_stored(module: nn.Module, values: Tensor, kind: str | None, dtype: torch.dtype) -> tuple[Merged, Tensor]:
    """Return values of a weight of ``module`` as they are stored in a form, and the plain numbers that this holds."""
    if kind is None:
        plain = values.to(dtype)
        return plain, plain
    rows = turned(module, values)
    packed = FORMS[kind](FORMS[kind].pack(rows), rows.shape, dtype)
    return packed, turned(module, packed.dense(values.dtype))


def other_stored(root: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield the modules and names of weights that are stored in another form and have no adapter."""
    for module in list(root.modules()):
        if isinstance(module, LoRALayer) and module.lora_host is not None:
            continue  # its weight is its host's
        adapted = module.base_tensors() if isinstance(module, LoRALayer) else {}
        for name in reversed(stored_names(module)):  # each is put before those that the module has
            if name not in adapted:
                yield module, name


def _read(name: str, trained: Mapping[str, Tensor], original: OriginalBase) -> dict[str, Tensor]:
    return {local: original.read(joined(name, local)).to(like) for local, like in trained.items()}


def _trained(
    name: str, layer: LoRALayer, present: Mapping[str, Tensor], base: Mapping[str, Tensor], over: OtherForm | None
) -> Mapping[str, Tensor]:
    """Return the weights that the adapter was trained over; where these are not known, those that are merged into."""
    if over is None:
        return present
    trained = {}
    for local, weight in base.items():
        form, kind = over.forms.get(joined(name, local)), stored_kind(layer, local)
        is_plain = kind is None or weight is not present[local]
        if form == kind:
            trained[local] = present[local]
        elif is_plain and form in FORMS:
            trained[local] = as_stored(layer, weight, form, weight.dtype)[1]
        else:
            trained[local] = weight
    return trained


class _Norms:
    """Sums the squares of a layer's tensors."""

    def __init__(self) -> None:
        self.moved = False
        self.squares = dict.fromkeys(("weight", "update", "base", "rounding"), 0.0)
        self.kept = 0.0

    def add(self, trained: Tensor, base: Tensor, exact: Tensor, before: Tensor, after: Tensor) -> None:
        """Add one weight: as it was trained over, as it is merged into, the exact sum, and both of these as stored."""
        self.moved |= trained is not base
        tensors = (trained, base, exact, before, after)
        parts = -(-exact.numel() // CHUNK)
        for w, b, e, old, new in zip(*(tensor.chunk(parts) for tensor in tensors), strict=True):
            update = e - b
            self._square("weight", w)
            self._square("update", update)
            if self.moved:
                self._square("base", b - w)
            if new.dtype != e.dtype or old is not b:
                self._square("rounding", new - e)
            self.kept += float((new.to(e.dtype) - old).flatten().dot(update.flatten()))

    def receipt(self, name: str, form: str) -> LayerReceipt:
        norms = {key: square**0.5 for key, square in self.squares.items()}
        base = norms["base"] if self.moved else None
        return LayerReceipt(name, form, norms["weight"], norms["update"], base, norms["rounding"], self.kept)

    def _square(self, key: str, values: Tensor) -> None:
        self.squares[key] += float(torch.linalg.vector_norm(values)) ** 2
