"""The record that an injection leaves on a model, and the names and tensors of what trains in it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

from lightning_lora.compat.torch import compiled_module
from lightning_lora.config import LoRAConfig
from lightning_lora.layers import LoRALayer, Pair
from lightning_lora.layers.acting import Choice
from lightning_lora.layers.adalora import AdaLoRALinear
from lightning_lora.layers.residual import ResidualLinear
from lightning_lora.layers.token_rows import TokenRows
from lightning_lora.model.layer_plan import Plan
from lightning_lora.model.names import clean_name, joined
from lightning_lora.model.spread import gathered
from lightning_lora.model.wrapping import run_at_injection
from lightning_lora.ops.dropout import Seeds


@dataclass
class NamedAdapter:
    """One of several adapters.

    Attributes:
        plan: what was decided for it.
        seeds: of its dropout.
        rates: what takes the place of the numbers that ``parameter_groups`` is given.
    """

    plan: Plan
    seeds: Seeds
    rates: dict[str, float] = field(default_factory=dict)


class OtherForm(NamedTuple):
    """How the base differs in form from the one that the adapter of a file was trained over.

    Attributes:
        words: both forms, in words.
        forms: the forms of the weights that were quantised there, by their names.
    """

    words: str
    forms: Mapping[str, str]


@dataclass
class Injection:
    """What was done to a model, kept on the model itself as ``lora_injection``.

    Attributes:
        plan: what was decided; of a model with named adapters what is common to them.
        originals: frozen copies of the base tensors that train, by name; those on meta have none.
        requires_grad: what every base parameter's flag was before.
        undo: attributes that were changed, as ``(module, name, former value)``.
        source: the file that the adapters started from, if any.
        trained_over: the form of the base that a loaded adapter was trained over, where this base has another; by the
            adapter's name.
        base_weights: where the base was read from after it was built without values, if it was.
        fingerprint: of the base, from when it was spread over ranks, if it is.
        merged: what :func:`~lightning_lora.unmerge` gives back, while the adapters are merged.
        receipt: of the last merge, if there was one.
        total_step: number of optimizer steps of the run, once AdaLoRA prunes in one.
        named: the adapters with names; empty for one without.
        choice: which of them act.
    """

    plan: Plan
    originals: dict[str, Tensor] = field(default_factory=dict)
    requires_grad: dict[str, bool] = field(default_factory=dict)
    undo: list[tuple[nn.Module, str, Any]] = field(default_factory=list)
    source: str | None = None
    trained_over: dict[str, OtherForm | None] = field(default_factory=dict)
    base_weights: str | None = None
    fingerprint: dict[str, Any] | None = None
    merged: Any = None  # merged_model.MergedModel
    receipt: Any = None  # merge_receipt.MergeReceipt
    total_step: int | None = None
    named: dict[str, NamedAdapter] = field(default_factory=dict)
    choice: Choice = field(default_factory=Choice)

    @property
    def config(self) -> LoRAConfig:
        """The settings that the model was adapted with; an adapter with a name has settings of its own."""
        assert not self.named
        return self.plan.config

    @property
    def plans(self) -> dict[str, Plan]:
        """What was decided for every adapter, by its name; one without a name is called ``""``."""
        return {name: one.plan for name, one in self.named.items()} or {"": self.plan}

    @property
    def configs(self) -> dict[str, LoRAConfig]:
        """The settings of every adapter, by its name; one without a name is called ``""``."""
        return {name: plan.config for name, plan in self.plans.items()}

    @property
    def only_name(self) -> str:
        """The name of the first adapter, which is meant where none is named; ``""`` for one without a name."""
        return next(iter(self.named), "")

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        run_at_injection()  # the adapted model came from another process

    @property
    def trained_whole(self) -> tuple[str, ...]:
        """Names of the modules, and of parameters of models, that train whole."""
        return self.plan.trained_whole


def injection_of(model: nn.Module) -> Injection | None:
    """Return the record that :func:`inject` left on this very module, or ``None``."""
    return uncompiled(model).__dict__.get("lora_injection")


def require_injection(root: nn.Module) -> Injection:
    """Return :func:`injection_of` of a model that is known to be adapted."""
    injection = injection_of(root)
    assert injection is not None
    return injection


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` wrapped, or ``model`` itself."""
    return compiled_module(model) or model


def injected_roots(model: nn.Module) -> dict[str, nn.Module]:
    """Return the adapted models inside ``model`` (itself, or inside a wrapper) by their clean names."""
    return {clean_name(name): m for name, m in model.named_modules() if injection_of(m) is not None}


def require_roots(model: nn.Module) -> dict[str, nn.Module]:
    """Return :func:`injected_roots`; none is a ``ValueError``."""
    roots = injected_roots(model)
    if not roots:
        raise ValueError(f"{type(model).__name__} holds no adapters; call inject(model, LoRAConfig(...)) first")
    return roots


def require_root(model: nn.Module) -> nn.Module:
    """Return the one adapted model inside ``model``; none or several is a ``ValueError``."""
    roots = require_roots(model)
    if len(roots) > 1:
        raise ValueError(f"{type(model).__name__} holds several adapted models, {list(roots)}: pass one of them")
    return next(iter(roots.values()))


def named_lora_layers(model: nn.Module) -> dict[str, LoRALayer]:
    """Return the adapted layers by name; a layer that is reached under several names comes once."""
    return {clean_name(name): m for name, m in model.named_modules() if isinstance(m, LoRALayer)}


def named_adapter_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every adapter parameter with its name relative to the adapted model, such as ``layers.0.q_proj.lora_A``."""
    seen: set[int] = set()
    for root in require_roots(model).values():
        for name, layer in named_lora_layers(root).items():
            for local_name in layer.adapter_names:
                parameter = getattr(layer, local_name)
                if id(parameter) not in seen:  # a tied head shares the rows of its embedding
                    seen.add(id(parameter))
                    yield joined(name, local_name), parameter


def named_pairs(root: nn.Module) -> dict[str, Pair]:
    """Return every low-rank pair by the name of the layer, or of the parameter, that it adapts."""
    return {
        ".".join(part for part in (name, local) if part): pair
        for name, layer in named_lora_layers(root).items()
        for local, pair in layer.pairs().items()
    }


def named_token_rows(root: nn.Module) -> dict[str, list[int]]:
    """Return the indices of the rows that train, by the name of the table; tied twins are left out."""
    return {
        name: layer.lora_token_ids
        for name, layer in named_lora_layers(root).items()
        if isinstance(layer, TokenRows) and not layer.lora_is_twin
    }


def has_trained(root: nn.Module) -> bool:
    """Whether any pair differs from its start, at which B A is zero."""
    for layer in named_lora_layers(root).values():
        with gathered(layer):
            if isinstance(layer, ResidualLinear):
                if not (torch.equal(layer.lora_A, layer.lora_A0) and torch.equal(layer.lora_B, layer.lora_B0)):
                    return True
            elif isinstance(layer, AdaLoRALinear):
                if bool(layer.lora_E.any()):
                    return True
            elif any(bool(pair.B.any()) and bool(pair.A.any()) for pair in layer.pairs().values()):
                return True
    return False


def is_merged(model: nn.Module) -> bool:
    """Whether any adapter is merged into its base weight."""
    return any(isinstance(m, LoRALayer) and m.lora_original is not None for m in model.modules())


def check_not_disabled(root: nn.Module) -> None:
    """Raise ``ValueError`` inside ``disabled(model)``, where first values stand in for those that trained."""
    if any(isinstance(m, LoRALayer) and not m.lora_active and m.lora_original is None for m in root.modules()):
        raise ValueError(
            f"the adapters of {type(root).__name__} are disabled: leave the block of disabled(model) first"
        )


def named_trained_whole(root: nn.Module) -> dict[str, nn.Parameter]:
    """Return the base parameters that train by design, heads and biases, by clean name."""
    wanted = require_injection(root).plan.trained
    if not wanted:
        return {}
    return {clean_name(name): p for name, p in root.named_parameters() if clean_name(name) in wanted}


OnNonfinite = Literal["error", "warn"]


def check_finite(tensors: Mapping[str, Any], where: Any, on_nonfinite: OnNonfinite) -> None:
    """Look for the first tensor that holds NaN or infinity, and raise ``ValueError`` or warn with its name.

    Args:
        where: the file or directory that is written or read.
    """
    if on_nonfinite not in ("error", "warn"):
        raise ValueError(f"on_nonfinite={on_nonfinite!r} is not known; expected 'error' or 'warn'")
    name = first_nonfinite(tensors)
    if name is None:
        return
    message = (
        f"{where}: {name!r} holds NaN or infinity, and so would every output of the model. Has the run diverged? Go "
        "back to an earlier checkpoint"
    )
    if on_nonfinite == "error":
        raise ValueError(
            f"{message}, or take it as it is: on_nonfinite='warn' is an option of LoRACallback, save_peft, load_peft, "
            "adapter_tensors, hot_swap, load_adapter_state_dict, convert and combine"
        )
    rank_zero_warn(message)


def first_nonfinite(tensors: Mapping[str, Any]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity; tensors on the meta device hold nothing."""
    for name, value in tensors.items():
        holds_floats = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
        if holds_floats and not value.is_meta and not bool(torch.isfinite(value).all()):
            return name
    return None
