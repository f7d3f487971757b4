"""Answer names that PEFT, bitsandbytes and LoRA+ give a setting with what to write here."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lightning_lora.config import LoRAConfig, brief
from lightning_lora.peft.config import VARIANTS

# PEFT's names of fields of LoRAConfig
RENAMED = {
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "init_lora_weights": "init",
    "autocast_adapter_dtype": "adapter_dtype",
}
# other libraries' names of fields of LoRAConfig
_NEAR = {"rank": "r", "lora_r": "r", "target_module": "target_modules"}
_RATIO = (
    "write AdamW(parameter_groups(self, lr, lora_plus_ratio={value})) in configure_optimizers, or "
    "LoRACallback(lora_plus_ratio={value}) for the optimizer that LightningCLI builds"
)
_START = (
    "leave it out: this start is not built in. Take init='pissa' or 'olora', or let PEFT make the start, save the "
    "adapter there for the original base, and begin with LoRACallback(init_from=directory)"
)
_PLACE = "in LoRACallback, inject(model, config, ...) or load_peft(model, directory, ...)"
_ADALORA = "write LoRACallback(adalora=AdaLoRA({name}={value}, ...))"
_PEFT = {
    "task_type": "leave it out: a new task head trains by itself, and modules_to_save names others",
    "peft_type": "leave it out: a LoRAConfig always describes LoRA",
    "auto_mapping": "leave it out: models are recognised by their type",
    "peft_version": "leave it out: it says nothing about training",
    "base_model_name_or_path": "leave it out: save_peft writes what the base's own config says",
    "revision": "leave it out: save_peft writes what the base's own config says",
    "inference_mode": "leave it out: call requires_grad_(False) on a model that must not train",
    "fan_in_fan_out": "leave it out: the type of a layer says how it stores its weight",
    "megatron_config": "leave it out: Trainer(strategy='megatron_lora') splits layers over ranks",
    "megatron_core": "leave it out: Trainer(strategy='megatron_lora') splits layers over ranks",
    "runtime_config": "leave it out: an adapter starts on the device of its base weight",
    "ephemeral_gpu_offload": "leave it out: an adapter starts on the device of its base weight",
    "ensure_weight_tying": (
        "leave it out: tied weights that train whole, and their rows, stay tied; tied layers that are both adapted "
        "have an adapter each"
    ),
    "adapter_name": "write add_adapter(model, {value}, config), or load_peft(model, directory, adapter={value})",
    "is_trainable": "leave it out: an adapter that is read trains; call requires_grad_(False) to freeze it",
    "low_cpu_mem_usage": "leave it out: the base may be on the meta device, with FSDPLoRAStrategy(base_weights=...)",
    **dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config"), _START),
    **dict.fromkeys(
        (*VARIANTS, "qalora_group_size", "alora_invocation_tokens", "velora_config"),
        "leave it out: this kind of adapter is not supported here; train it with PEFT",
    ),
    **dict.fromkeys(("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight"), _ADALORA),
    "total_step": "leave it out: AdaLoRA takes the number of steps from the Trainer",
    "loraplus_lr_ratio": _RATIO,
    "loraplus_lr_embedding": "write parameter_groups(self, lr, embedding_lr={value}) in configure_optimizers",
    "loraplus_weight_decay": "write parameter_groups(self, lr, weight_decay={value}) in configure_optimizers",
}
_BITSANDBYTES = {
    "load_in_4bit": f"write quantize='nf4' {_PLACE}",
    "load_in_8bit": f"write quantize='int8' {_PLACE}",
    "bnb_4bit_quant_type": f"write quantize='nf4' {_PLACE}; 'fp4' is not built in",
    "bnb_4bit_use_double_quant": f"write quantize='nf4-dq' {_PLACE}",
    "bnb_4bit_compute_dtype": "leave it out: the Trainer's precision says the dtype of products",
    "bnb_4bit_quant_storage": "leave it out: packed weights are uint8, which fsdp_lora shards as they are",
    "llm_int8_skip_modules": f"write quantize_exclude={{value}} {_PLACE}",
    "quantization_config": f"give it to from_pretrained, or write quantize='nf4' {_PLACE}",
}
_OF_THE_BASE = {
    name: f"write {name}={{value}} {_PLACE}: it says how the base is stored"
    for name in ("quantize", "quantize_exclude")
}
_EXCLUDE = (
    "write quantize_exclude={value} for what is not quantised, LoRAConfig(exclude_modules={value}) for what is not "
    "adapted"
)
# answers of one function alone
_OWN = {
    ("inject", "exclude"): _EXCLUDE,
    ("load_peft", "exclude"): "write quantize_exclude={value} for what is not quantised",
    ("quantize", "quantize_exclude"): "write exclude={value}",
    ("load_peft", "adapter_name"): "write adapter={value}",
    ("inject", "adapter_name"): "write add_adapter(model, {value}, config)",
}
_OTHERS = dict.fromkeys(("lora_plus_lr_ratio", "lorap_lr_ratio"), _RATIO)
_BITS = {"bits": f"write quantize='nf4', of 4 bits, or quantize='int8' {_PLACE}"}
_SOURCES: Mapping[str, Mapping[str, str]] = {
    "PEFT's name": _PEFT, "bitsandbytes' name": _BITSANDBYTES, "a name of LoRA+ elsewhere": _OTHERS,
    "no field of LoRAConfig": {"lora_plus_ratio": _RATIO} | _OF_THE_BASE | _BITS,
}  # fmt: skip


def answer(name: str, value: Any, asked: str) -> str | None:
    """Return what to write instead of ``name=value`` in a call of ``asked``; ``None`` for an unknown name."""
    if (asked, name) in _OWN:
        return f"{asked} has no {name!r}: {_OWN[asked, name].format(value=_shown(value))}"
    if name in RENAMED | _NEAR:
        ours = (RENAMED | _NEAR)[name]
        if isinstance(value, bool):  # PEFT's switches are words here
            value = "auto" if ours == "adapter_dtype" and not value else getattr(LoRAConfig, ours)
        whose = " is PEFT's name" if name in RENAMED else " is no field of LoRAConfig"
        setting = f"{ours}={value!r}"
        return f"{name!r}{whose}; here it is {ours!r}: write {_in_config(setting, asked)}"
    for source, answers in _SOURCES.items():
        if name in answers:
            remedy = answers[name].format(name=name, value=_shown(value))
            if name in _BITSANDBYTES and value is False:
                remedy = "leave it out: nothing is quantised without quantize="
            return f"{name!r} is {source}: {remedy}"
    if name in {field.name for field in fields(LoRAConfig)} and asked in ("inject", "AdaLoRA"):
        return f"{name!r} is a field of LoRAConfig: write {_in_config(f'{name}={value!r}', asked)}"
    return None


def _in_config(setting: str, asked: str) -> str:
    """Return how a field of LoRAConfig is given, in a call of ``asked``."""
    if asked == "LoRAConfig":
        return setting
    return f"LoRAConfig(adalora=AdaLoRA(...), {setting})" if asked == "AdaLoRA" else f"LoRAConfig({setting})"


def _shown(value: Any) -> str:
    """Return a value as it is repeated in an answer: a switch is none of the settings that it is answered with."""
    return "..." if isinstance(value, bool) else brief(value)
