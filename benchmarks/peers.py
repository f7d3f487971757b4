"""LitGPT's, torchtune's and NeMo Automodel's own LoRA layers inside the same block, where they can be imported.

What cannot is named with the reason: a figure of a peer is of its own code, or it is not there.
"""

import functools
import importlib
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import Tensor, nn

MODULES = {
    "LitGPT": ("litgpt", "litgpt.lora"),
    "torchtune": ("torchtune", "torchtune.modules.peft"),
    "NeMo Automodel": ("nemo-automodel", "nemo_automodel.components._peft.lora"),
}
NOT_MEASURED = {
    "Unsloth": "not measured: importing it changes transformers, PEFT and torch, and with them every other contender",
    "torchtitan": "not measured: needs triton, with which NeMo Automodel does not import; same formula as torchtune",
    "Liger Kernel": "not measured: no LoRA layers, and its loss needs triton and a GPU",
}


@functools.cache
def status() -> dict[str, str]:
    """Return the version of every peer, or why it is not here."""
    found = {"PEFT": version("peft"), **NOT_MEASURED}
    for name, (package, module) in MODULES.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of their own imports
                importlib.import_module(module)
            found[name] = version(package)
        except PackageNotFoundError:
            found[name] = "not installed"
        except Exception as error:
            found[name] = f"not installable here: {_reason(package, error)}"
    return found


def _reason(package: str, error: Exception) -> str:
    try:
        return f"{package} {version(package)}: {error}"
    except PackageNotFoundError:
        return f"{error}"


def installed_peers() -> dict[str, Callable[[nn.Module, Any], nn.Module]]:
    """Return the builders of blocks, in the form of ``blocks.CONTENDERS``, of the peers that can be imported."""
    return {name: build for name, build in BUILDERS.items() if not status()[name].startswith("not ")}


def with_litgpt(block: nn.Module, adapter: Any) -> nn.Module:
    """Put in ``LoRALinear``, and for q, k and v one ``LoRAQKVLinear``, as LitGPT's own blocks have."""
    from litgpt.lora import LoRALinear, LoRAQKVLinear

    options = {"r": adapter.r, "lora_alpha": adapter.alpha, "lora_dropout": adapter.dropout, "bias": False}
    block.requires_grad_(False)

    def adapted(layer: nn.Linear) -> nn.Module:
        made = LoRALinear(layer.in_features, layer.out_features, **options)
        made.linear.weight = layer.weight
        return made

    attention: Any = block.self_attn
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    sizes = [layer.out_features for layer in layers]
    heads = {"n_head": sizes[0] // attention.head_dim, "n_query_groups": sizes[1] // attention.head_dim}
    joint = LoRAQKVLinear(
        layers[0].in_features, sum(sizes), head_size=attention.head_dim, **heads, enable_lora=True, **options
    )
    weights = [layer.weight.data for layer in layers]
    joint.linear.weight = nn.Parameter(weights[0].new_empty(sum(sizes), joint.linear.in_features), requires_grad=False)
    for part, weight in zip(joint.linear.weight.data.split(sizes), weights, strict=True):
        part.copy_(weight)
    attention.joint = joint
    split = _Split(joint, sizes)
    attention.q_proj, attention.k_proj, attention.v_proj = (_Part(split) for _ in sizes)
    attention.o_proj = adapted(attention.o_proj)
    for name in ("gate_proj", "up_proj", "down_proj"):
        setattr(block.mlp, name, adapted(getattr(block.mlp, name)))
    return block.to(weights[0].device, weights[0].dtype)


class _Split:
    """The output of one layer, handed out in parts to callers that ask one after the other."""

    def __init__(self, layer: nn.Module, sizes: list[int]) -> None:
        self.layer, self.sizes = layer, sizes
        self.parts: list[Tensor] = []

    def part(self, x: Tensor) -> Tensor:
        if not self.parts:
            self.parts = list(self.layer(x).split(self.sizes, dim=-1))
        return self.parts.pop(0)


class _Part(nn.Module):
    def __init__(self, split: _Split) -> None:
        super().__init__()
        self.split = split

    def forward(self, x: Tensor) -> Tensor:
        return self.split.part(x)


def with_torchtune(block: nn.Module, adapter: Any) -> nn.Module:
    from torchtune.modules.peft import LoRALinear

    block.requires_grad_(False)
    for parent in (block.self_attn, block.mlp):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, nn.Linear):
                sizes = layer.in_features, layer.out_features
                made = LoRALinear(*sizes, rank=adapter.r, alpha=adapter.alpha, dropout=adapter.dropout)
                made.to(layer.weight.device, layer.weight.dtype).weight = layer.weight
                setattr(parent, name, made)
    return block


def with_automodel(block: nn.Module, adapter: Any) -> nn.Module:
    """Patch the block with Automodel's defaults; Triton only where there is a GPU."""
    from nemo_automodel.components._peft.lora import PeftConfig, apply_lora_to_linear_modules

    on_gpu = next(block.parameters()).is_cuda
    options = {"dim": adapter.r, "alpha": adapter.alpha, "dropout": adapter.dropout, "dropout_position": "pre"}
    config = PeftConfig(target_modules=["*_proj"], use_triton=on_gpu, **options)
    apply_lora_to_linear_modules(block, config)
    return block


BUILDERS: dict[str, Callable[[nn.Module, Any], nn.Module]] = {
    "LitGPT": with_litgpt,
    "torchtune": with_torchtune,
    "NeMo Automodel": with_automodel,
}
