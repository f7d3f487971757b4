"""Private names of transformers, read from the models and configs that are given; it is not imported."""

from typing import Any

from torch import nn

from lightning_lora.compat.lookup import private


def draw_weights(model: Any, module: nn.Module) -> None:
    """Let a model draw the weights of a module inside it. Relies on its method; without it raises."""
    private("transformers", model, "_init_weights")(module)


def was_made(module: nn.Module) -> bool:
    """Whether transformers gave a module its values. Relies on its mark; without it no new head is found."""
    return hasattr(module, "_is_hf_initialized")


def block_classes(module: nn.Module) -> list[str]:
    """Return the names of the blocks that a model lists as indivisible. Relies on its list; without it none."""
    return list(getattr(module, "_no_split_modules", None) or ())


def tensor_parallel_plan(model: nn.Module) -> dict[str, str]:
    """Return what a model's class adds to its base's plan, as for its head. Relies on it; without it nothing."""
    return dict(getattr(type(model), "_tp_plan", None) or {})


def revision(config: Any) -> str | None:
    """Return the commit of the Hub that a model came from. Relies on its config's note; without it ``None``."""
    commit: str | None = getattr(config, "_commit_hash", None)
    return commit


def checkpoint_function(module: nn.Module) -> Any:
    """Return what a block calls to checkpoint its activations. Relies on its attribute; without it ``None``."""
    return getattr(module, "_gradient_checkpointing_func", None)


def experts_implementation(config: Any) -> str:
    """Return how a model computes its experts. Relies on its config's note; without it "eager", the written form."""
    return getattr(config, "_experts_implementation", None) or "eager"


def experts_gate(module: Any) -> Any:
    """Return the function of gate and up that experts apply. Relies on their method; without it raises."""
    return private("transformers", module, "_apply_gate")


def experts_have_gate(module: Any) -> bool:
    """Return True if experts multiply by a gate. Relies on their record; without it (transformers 5.0) all do."""
    return bool(getattr(module, "has_gate", True))


def is_expert_parallel(module: nn.Module) -> bool:
    """Whether transformers spread experts over ranks. Relies on its mark; without it none are."""
    return bool(vars(module).get("_is_expert_parallel", False))
