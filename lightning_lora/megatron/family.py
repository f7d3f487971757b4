"""Register what the rest of the package needs to know of Megatron-core: its models as a family, its layers as a kind.

Nothing outside this folder imports it but the strategy; all questions go through what is registered here.
"""

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from typing_extensions import override

from lightning_lora.config import LoRAConfig
from lightning_lora.layers.registry import register
from lightning_lora.megatron.core import LAYERS, is_parallel_linear
from lightning_lora.megatron.layers import LoRAMegatronLinear
from lightning_lora.megatron.names import hugging_face_name
from lightning_lora.megatron.view import adapted_view, skeleton
from lightning_lora.megatron.weights import load_hf_weights
from lightning_lora.model.families import Family, register_family
from lightning_lora.model.names import clean_name


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
    def load_base(self, model: nn.Module, path: str) -> bool:
        load_hf_weights(model, path)
        return True

    @override
    def skeleton(self, model: nn.Module) -> nn.Module | None:
        return skeleton(model)

    @override
    def adapted_view(self, model: nn.Module) -> tuple[nn.Module, Mapping[str, tuple[str, str]]]:
        return adapted_view(model)

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


register(f"{LAYERS}.ColumnParallelLinear", LoRAMegatronLinear)
register(f"{LAYERS}.RowParallelLinear", LoRAMegatronLinear)
register_family(Megatron())
