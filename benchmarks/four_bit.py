"""A step over a base in 4 bits: ours over NF4 beside ours over float32, and PEFT on bitsandbytes' layers."""

import copy
import importlib.util
import warnings
from typing import Any

import peft
import torch
from blocks import ALPHA, RANK, TARGETS, sharing_copy
from timing import timed
from torch import Tensor, nn
from whole_step import base_of, model_config

from lightning_lora import LoRAConfig, inject
from lightning_lora.model.quantize import quantize

TOKENS = 256


def measure(rounds: int, quick: bool = False) -> dict[str, Any]:
    if importlib.util.find_spec("bitsandbytes") is None:
        return {"not_measured": "bitsandbytes is not installed"}
    config = model_config(quick)
    if quick:  # rows of whole blocks: bitsandbytes' CPU kernel takes other scales where a row ends inside a block
        config.hidden_size, config.intermediate_size = 64, 128
    models = contenders(base_of(config))
    ids = torch.randint(3, config.vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    losses = {name: step(model, ids) for name, model in models.items()}
    over_nf4 = [loss for name, loss in losses.items() if name != "ours, float32"]
    assert max(over_nf4) - min(over_nf4) < 1e-4, losses
    return {
        "model": f"{'tiny' if quick else 'SmolLM2-135M'} shape, NF4 in blocks of 64",
        "tokens": TOKENS,
        "saved_bytes": {name: saved_bytes(model, ids) for name, model in models.items()},
        "base_bytes": {name: base_bytes(model) for name, model in models.items()},
        **timed({name: lambda model=model: step(model, ids) for name, model in models.items()}, rounds, warm_up=1),
    }


def contenders(base: nn.Module) -> dict[str, nn.Module]:
    """Return the adapted models on the tensors of ``base``, in training mode; the head stays whole in all of them."""
    config = LoRAConfig(r=RANK, alpha=ALPHA, target_modules=TARGETS)
    ours = copy.deepcopy(base)
    quantize(ours, "nf4")
    return {
        "ours, float32": inject(sharing_copy(base), config).train(),
        "ours": inject(ours, config).train(),
        "ours on bitsandbytes": inject(on_bitsandbytes(base), config).train(),
        "PEFT": with_peft(on_bitsandbytes(base)).train(),
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


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The model's own loss, logits of all positions, for every contender."""
    loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
    return loss


def step(model: nn.Module, ids: Tensor) -> float:
    """Run forward and backward; gradients are dropped first. Returns the loss."""
    for parameter in model.parameters():
        parameter.grad = None
    loss = loss_of(model, ids)
    loss.backward()
    return float(loss.detach())


def saved_bytes(model: nn.Module, ids: Tensor) -> int:
    """Return the bytes that autograd keeps between forward and backward, each storage once, the model's left out."""
    kept: list[Tensor] = []  # alive until counted, so that no address is used twice
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        loss = loss_of(model, ids)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    del loss
    return sum(size for address, size in storages.items() if address not in own)


def base_bytes(model: nn.Module) -> int:
    """Return the bytes of what does not train, scales of bitsandbytes' layers included."""
    frozen = [tensor for tensor in (*model.parameters(), *model.buffers()) if not tensor.requires_grad]
    states = [getattr(tensor, "quant_state", None) for tensor in frozen]
    frozen += [state.absmax for state in states if state is not None]
    return sum({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in frozen}.values())
