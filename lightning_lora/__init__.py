"""LoRA for PyTorch Lightning and Fabric, from a laptop to Megatron tensor parallelism."""

from lightning_lora.checkpoint import adapter_checkpoint, adapter_state_dict, load_adapter_state_dict
from lightning_lora.config import LoRAConfig
from lightning_lora.inject import inject, named_adapter_parameters, remove
from lightning_lora.merge import disabled, merge, merged, unmerge

__version__ = "0.1.0"
__all__ = [
    "LoRAConfig",
    "adapter_checkpoint",
    "adapter_state_dict",
    "disabled",
    "inject",
    "load_adapter_state_dict",
    "merge",
    "merged",
    "named_adapter_parameters",
    "remove",
    "unmerge",
]
