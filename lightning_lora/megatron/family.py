"""Register Megatron-core: its models as a family, and its layers as a kind; PEFT sees Hugging Face's names for both.

Nothing outside this folder imports it but the strategy; all questions go through what is registered here.
"""

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from lightning_lora.config import LoRAConfig
from lightning_lora.layers import adapt
from lightning_lora.layers.linear import LoRALinear
from lightning_lora.layers.registry import register
from lightning_lora.megatron.core import LAYERS, is_parallel_linear
from lightning_lora.megatron.layers import LoRAMegatronLinear
from lightning_lora.megatron.names import hugging_face_name, megatron_parts
from lightning_lora.megatron.quantized import check_rows, packing_parts
from lightning_lora.megatron.weights import load_hf_weights
from lightning_lora.model.families import Family, name_or_path, register_family
from lightning_lora.model.layer_plan import Plan
from lightning_lora.model.names import clean_name, is_inside
from lightning_lora.model.state import Injection, named_lora_layers, named_trained_whole, require_injection


class Skeleton(nn.Module):
    """The linear layers of Hugging Face's model under their names, without values; of the rest nothing."""

    config: Any = None


class Megatron(Family):
    """``GPTModel``s."""

    class_name = "megatron.core.models.gpt.gpt_model.GPTModel"
    own_loss = "a GPTModel computes this loss by itself: call it with labels=, shifted by one"

    @override
    def output_head(self, model: Any) -> nn.Module | None:
        return getattr(model, "output_layer", None)

    @override
    def has_no_task_heads(self) -> bool:
        return True

    @override
    def check(self, model: nn.Module, config: LoRAConfig, adapted: Collection[str]) -> None:
        if not adapted:
            _check_layer_spec(model)
        if config.bias == "all":
            _check_biases(model, adapted)

    @override
    def check_quantization(self, kind: str, layers: Mapping[str, nn.Module]) -> None:
        check_rows(kind, layers)

    @override
    def quantizing(self, model: nn.Module) -> AbstractContextManager[None]:
        return packing_parts(model)

    @override
    def load_base(self, model: nn.Module, path: str) -> bool:
        load_hf_weights(model, path)
        return True

    @override
    def skeleton(self, model: nn.Module) -> Skeleton:
        """Return the linear layers, part by part, as ``nn.Linear`` on meta under Hugging Face's names."""
        root = Skeleton()
        for parts in megatron_parts(model).values():
            for part in parts:
                assert part.features is not None
                _put(root, part.name, nn.Linear(*part.features, bias=False, device="meta"))
        return root

    @override
    def adapted_view(self, model: nn.Module) -> tuple[Skeleton, dict[str, tuple[str, str]]]:
        """Return a skeleton that is adapted as ``model`` is, and how each of its tensors is made from the model's.

        Returns:
            The skeleton, whose adapters hold zeros; and ``{name in it: (layout, name in the model)}``, for
            :func:`~lightning_lora.peft.layout.laid_out`.

        Raises:
            ValueError: what trains has no name in Hugging Face's model.
        """
        injection = require_injection(model)
        whole = list(named_trained_whole(model))
        if whole:
            raise ValueError(
                f"{whole[0]!r} of {type(model).__name__} trains whole, which has no place in a PEFT directory of a "
                "Megatron-core model: leave it out of modules_to_save, or keep the adapter in checkpoints"
            )
        view, sources = self.skeleton(model), dict[str, tuple[str, str]]()
        dtype = None if injection.config.adapter_dtype == "auto" else getattr(torch, injection.config.adapter_dtype)
        known = megatron_parts(model)
        for name, layer in named_lora_layers(model).items():
            assert isinstance(layer, LoRAMegatronLinear)
            pairs = layer.pairs()
            for part in known[name]:
                pair = pairs.get(part.local) or pairs.get("")
                if pair is None:
                    continue
                if is_inside(part.name, name):
                    raise ValueError(f"{name!r} has no name in a Hugging Face model: keep the adapter in checkpoints")
                linear = view.get_submodule(part.name)
                adapt(linear, LoRALinear, r=pair.r, scaling=pair.scaling, dropout=layer.lora_dropout, dtype=dtype)
                local = f"_{part.local}" if part.local in pairs and part.local else ""
                sources[f"{part.name}.lora_A"] = ("plain", f"{name}.lora_A{local}")
                stack = layer.lora_stack
                rows = "plain" if local or stack is None else "rows_" + "_".join(map(str, stack.place(part.local)))
                sources[f"{part.name}.lora_B"] = (rows, f"{name}.lora_B{local}")
        view.lora_injection = Injection(Plan(injection.config))  # type: ignore[assignment]  # a plain attribute
        view.config = type("Config", (), {"name_or_path": name_or_path(model)})()
        return view, sources

    @override
    def peft_name(self, parameter: str) -> str | None:
        return hugging_face_name(parameter)


def _check_layer_spec(model: nn.Module) -> None:
    """Raise ``ValueError`` for a model none of whose layers can be adapted, as they are Transformer Engine's."""
    for module in model.modules():
        if type(module).__module__.endswith(".transformer_engine"):
            raise ValueError(
                f"the layers of {type(model).__name__} are Transformer Engine's ({type(module).__name__}), which "
                "communicate inside and have no local product for an adapter: build it with gpt_model(path), or with "
                "Megatron-core's local layer spec, in which norms and attention may be Transformer Engine's"
            )


def _check_biases(model: nn.Module, adapted: Collection[str]) -> None:
    """Raise ``ValueError`` for a bias that would not train: beside a frozen weight Megatron-core gives none."""
    for name, module in model.named_modules():
        bias = module._parameters.get("bias")
        if is_parallel_linear(module) and clean_name(name) not in adapted and bias is not None:
            raise ValueError(
                f"bias='all' would not train the bias of {clean_name(name)!r}, a layer of Megatron-core that is not "
                "adapted: adapt it too, or give bias='lora_only'"
            )


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)


register(f"{LAYERS}.ColumnParallelLinear", LoRAMegatronLinear)
register(f"{LAYERS}.RowParallelLinear", LoRAMegatronLinear)
register_family(Megatron())
