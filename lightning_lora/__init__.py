"""LoRA for PyTorch Lightning and Fabric, from a laptop to Megatron tensor parallelism.

Importing this package registers the strategies ``"fsdp_lora"`` and ``"megatron_lora"`` with Trainer and Fabric, and
wraps what reads a file: ``LightningModule.load_from_checkpoint`` adapts the new module if the file holds adapters, and
Fabric's ``load`` and ``load_raw`` and the Trainer's restoring refuse such a file for a model without adapters, where
Lightning may drop them. The first model that is adapted wraps Fabric's ``setup`` and ``save``, ``save_pretrained`` and
activation checkpoints; the first :class:`LoRACallback` wraps how LightningCLI builds an optimizer. Either lets the
errors by which Lightning refuses ``BitsandbytesPrecision`` say what to write instead. Without adapters all of these
behave as ever, and :func:`lightning_lora.model.wrapping.unwrap_all` puts them back.
"""

from lightning.fabric.strategies import STRATEGY_REGISTRY
from lightning.pytorch.strategies import StrategyRegistry

from lightning_lora import fabric
from lightning_lora.adalora import AdaLoRA
from lightning_lora.callback import LoRACallback
from lightning_lora.checkpoint.file import adapter_checkpoint, adapter_state_dict
from lightning_lora.checkpoint.fitting import load_adapter_state_dict
from lightning_lora.config import LoRAConfig
from lightning_lora.fuse.gated_mlp import register_gated_mlp
from lightning_lora.layers.stored import register_stored_weight
from lightning_lora.megatron.models import gpt_model
from lightning_lora.megatron.weights import load_hf_weights
from lightning_lora.model.active import active
from lightning_lora.model.adapter_losses import losses_by_adapter
from lightning_lora.model.adapter_schedules import AdapterSchedules
from lightning_lora.model.adapters import adapters, add_adapter
from lightning_lora.model.apply import apply
from lightning_lora.model.base_form import QuantizationPlan
from lightning_lora.model.disabled import disabled
from lightning_lora.model.inject import inject, remove
from lightning_lora.model.layer_plan import LayerPlan, Plan
from lightning_lora.model.loss import linear_cross_entropy
from lightning_lora.model.merge import merge, merge_receipt, merged, unmerge
from lightning_lora.model.merge_receipt import LayerReceipt, MergeReceipt
from lightning_lora.model.own_parameters import freeze
from lightning_lora.model.parameter_groups import parameter_groups
from lightning_lora.model.plan import plan
from lightning_lora.model.quantize import quantize
from lightning_lora.model.rank_allocator import RankAllocator
from lightning_lora.model.state import named_adapter_parameters
from lightning_lora.peft.adapter_tensors import adapter_tensors
from lightning_lora.peft.combine import combine
from lightning_lora.peft.hot_swap import hot_swap
from lightning_lora.peft.load import load_peft
from lightning_lora.peft.readers import check_portable
from lightning_lora.peft.save import convert, save_peft
from lightning_lora.strategies.fabric.methods import wrap_loading
from lightning_lora.strategies.trainer.adapter_steps import AdapterEarlyStopping
from lightning_lora.strategies.trainer.fsdp import FSDPLoRAStrategy
from lightning_lora.strategies.trainer.megatron import MegatronLoRAStrategy
from lightning_lora.strategies.trainer.without_callback import wrap_load_from_checkpoint, wrap_restore_model
from lightning_lora.sweep import Sweep

__version__ = "0.1.0"
__all__ = [
    "AdaLoRA",
    "AdapterEarlyStopping",
    "AdapterSchedules",
    "FSDPLoRAStrategy",
    "LayerPlan",
    "LayerReceipt",
    "LoRACallback",
    "LoRAConfig",
    "MegatronLoRAStrategy",
    "MergeReceipt",
    "Plan",
    "QuantizationPlan",
    "RankAllocator",
    "Sweep",
    "active",
    "adapter_checkpoint",
    "adapter_state_dict",
    "adapter_tensors",
    "adapters",
    "add_adapter",
    "apply",
    "check_portable",
    "combine",
    "convert",
    "disabled",
    "freeze",
    "gpt_model",
    "hot_swap",
    "inject",
    "linear_cross_entropy",
    "load_adapter_state_dict",
    "load_hf_weights",
    "load_peft",
    "losses_by_adapter",
    "merge",
    "merge_receipt",
    "merged",
    "named_adapter_parameters",
    "parameter_groups",
    "plan",
    "quantize",
    "register_gated_mlp",
    "register_stored_weight",
    "remove",
    "save_peft",
    "unmerge",
]

_FSDP = "the frozen base sharded with FSDP2, adapters whole, adapter-only checkpoints"
_MEGATRON = "the base split over tensor-parallel ranks by its plan, adapter-only checkpoints"
StrategyRegistry.register("fsdp_lora", FSDPLoRAStrategy, _FSDP, override=True)
StrategyRegistry.register("megatron_lora", MegatronLoRAStrategy, _MEGATRON, override=True)
STRATEGY_REGISTRY.register("fsdp_lora", fabric.FSDPLoRAStrategy, _FSDP, override=True)
STRATEGY_REGISTRY.register("megatron_lora", fabric.MegatronLoRAStrategy, _MEGATRON, override=True)
wrap_load_from_checkpoint()
wrap_restore_model()
wrap_loading()
