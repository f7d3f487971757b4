"""A step over a base in 4 bits: ours over NF4 beside ours over float32, and PEFT on bitsandbytes' layers."""

import copy
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ours
import peft
import torch
from blocks import ALPHA, RANK, TARGETS, sharing_copy
from timing import timed
from torch import Tensor, nn
from whole_step import Batch, base_of, hidden_loss, model_config, own_loss

from lightning_lora import LoRAConfig, inject
from lightning_lora.model.quantize import quantize

TOKENS = 256


def measure(rounds: int, quick: bool = False) -> dict[str, Any]:
    if importlib.util.find_spec("bitsandbytes") is None:
        return {"not_measured": "bitsandbytes is not installed"}
    config = model_config(quick)
    if quick:  # rows of whole blocks: bitsandbytes' CPU kernel takes other scales where a row ends inside a block
        config.hidden_size, config.intermediate_size = 64, 128
    works = contenders(base_of(config))
    ids = torch.randint(3, config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    losses = {name: work.step(batch) for name, work in works.items()}
    over_nf4 = [loss for name, loss in losses.items() if not name.endswith("float32")]
    assert max(over_nf4) - min(over_nf4) < 1e-3, losses
    return {
        "model": f"{'tiny' if quick else 'SmolLM2-135M'} shape, NF4 in blocks of 64",
        "tokens": TOKENS,
        "saved_bytes": {name: work.saved_bytes(batch) for name, work in works.items()},
        "base_bytes": {name: work.base_bytes() for name, work in works.items()},
        **timed({name: lambda work=work: work.step(batch) for name, work in works.items()}, rounds, warm_up=1),
    }


@dataclass
class Work:
    """A model, adapted or frozen, with its loss, and whether oneDNN may be used."""

    model: nn.Module
    loss: Callable[[nn.Module, Batch], Tensor]
    with_onednn: bool = True

    def step(self, batch: Batch) -> float:
        """Run forward and backward; gradients are dropped first. Returns the loss."""
        for parameter in self.model.parameters():
            parameter.grad = None
        with warnings.catch_warnings(action="ignore"), torch.backends.mkldnn.flags(enabled=self.with_onednn):
            loss = self.loss(self.model, batch)  # torch warns of a flag for Intel's GPUs
            loss.backward()
        return float(loss.detach())

    def saved_bytes(self, batch: Batch) -> int:
        """Return the bytes that autograd keeps between forward and backward, each storage once, without the model's."""
        kept: list[Tensor] = []  # alive until counted, so that no address is used twice
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            loss = self.loss(self.model, batch)
        own = {tensor.untyped_storage().data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers())}
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
        del loss
        return sum(size for address, size in storages.items() if address not in own)

    def base_bytes(self) -> int:
        """Return the bytes of what does not train, scales of bitsandbytes' layers included."""
        frozen = [one for one in (*self.model.parameters(), *self.model.buffers()) if not one.requires_grad]
        states = [getattr(tensor, "quant_state", None) for tensor in frozen]
        frozen += [state.absmax for state in states if state is not None]
        return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in frozen}.values())


def contenders(base: nn.Module) -> dict[str, Work]:
    """Return the adapted models on the tensors of ``base``, in training mode; the head stays whole in all of them.

    Ours and the frozen bases have the loss of ``ours.py``, PEFT's has the model's own; one of ours has that, too. The
    frozen base on bitsandbytes is what any LoRA over its layers pays.
    """
    config, loss = LoRAConfig(r=RANK, alpha=ALPHA, target_modules=TARGETS), hidden_loss(ours.loss_of)
    in_nf4 = copy.deepcopy(base)
    quantize(in_nf4, "nf4")
    model = inject(in_nf4, config).train()
    return {
        "ours, float32": Work(inject(sharing_copy(base), config).train(), loss),
        "ours": Work(model, loss),
        "ours, torch's own products": Work(model, loss, with_onednn=False),
        "ours, the model's own loss": Work(model, own_loss),
        "ours on bitsandbytes": Work(inject(on_bitsandbytes(base), config).train(), loss),
        "frozen on bitsandbytes": Work(on_bitsandbytes(base).requires_grad_(False).train(), loss),
        "frozen, float32": Work(sharing_copy(base).requires_grad_(False).train(), loss),
        "PEFT": Work(with_peft(on_bitsandbytes(base)).train(), own_loss),
    }


def on_bitsandbytes(base: nn.Module) -> nn.Module:
    """Return a copy of ``base`` with bitsandbytes' NF4 layers in the place of the adapted ones."""
    from bitsandbytes.nn import Linear4bit

    model = copy.deepcopy(base)
    for name, layer in list(model.named_modules()):
        parent, _, local = name.rpartition(".")
        if local in TARGETS:
            options: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": False}
            made = Linear4bit(layer.in_features, layer.out_features, bias=layer.bias is not None, **options)
            made.load_state_dict(layer.state_dict())
            setattr(model.get_submodule(parent), local, made.to("cpu"))
    return model


def with_peft(model: nn.Module) -> nn.Module:
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)
