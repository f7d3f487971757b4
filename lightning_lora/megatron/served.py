"""What adapters of Megatron-core's layers cannot do, said before anything is changed."""

from torch import nn

from lightning_lora.config import LoRAConfig
from lightning_lora.megatron.layers import is_parallel_linear
from lightning_lora.model.names import clean_name


def check_options(name: str, config: LoRAConfig) -> None:
    """Raise ``ValueError`` for an option that layers of Megatron-core do not serve."""
    if config.use_dora or config.lora_bias or config.starts_from_base or config.init_rng == "peft":
        raise ValueError(
            f"{name!r} is a layer of Megatron-core, for which use_dora, lora_bias, PiSSA, OLoRA and init_rng='peft' "
            "are not served: leave the option out"
        )


def check_biases(model: nn.Module, adapted: set[str]) -> None:
    """Raise ``ValueError`` for a bias that would not train: beside a frozen weight Megatron-core gives none."""
    for name, module in model.named_modules():
        bias = module._parameters.get("bias")
        if is_parallel_linear(module) and clean_name(name) not in adapted and bias is not None:
            raise ValueError(
                f"bias='all' would not train the bias of {clean_name(name)!r}, a layer of Megatron-core that is not "
                "adapted: adapt it too, or give bias='lora_only'"
            )
