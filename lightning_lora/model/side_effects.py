"""What an injection changes beside the adapted layers: heads, batch normalisation, fused paths, ``load_state_dict``."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.compat.torch import batch_norm_class
from lightning_lora.layers import LoRALayer
from lightning_lora.layers.class_swap import SwappedModule, restore_class, swap_class
from lightning_lora.layers.dora import DoRA
from lightning_lora.layers.quantized import QuantizedModule
from lightning_lora.model.names import clean_name, is_inside_any, joined
from lightning_lora.model.state import Injection, injection_of, is_merged, named_trained_whole, require_injection
from lightning_lora.ops.weights import row_norms

# the attributes in which nn.Module keeps children, tensors and hooks
_CONTAINERS = tuple(name for name, value in nn.Module().__dict__.items() if isinstance(value, (dict, set)))


@contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Give every module its class, attributes, parameters and hooks back if the block raises.

    Parameters may be replaced, frozen and converted inside the block, not written to: no tensor is copied. The default
    random generator gets its state back too.
    """
    modules = [(module, type(module), dict(module.__dict__)) for module in model.modules()]
    containers = [module.__dict__[name] for module, *_ in modules for name in _CONTAINERS if name in module.__dict__]
    contents = [(container, container.copy()) for container in containers]
    parameters = [(parameter, parameter.requires_grad, parameter.data) for parameter in model.parameters()]
    generator = torch.get_rng_state()
    try:
        yield
    except BaseException:
        for module, cls, attributes in modules:
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for container, former in contents:
            container.clear()
            container.update(former)
        for parameter, requires_grad, data in parameters:
            if parameter.dtype != data.dtype:
                parameter.data = data
            parameter.requires_grad_(requires_grad)
        torch.set_rng_state(generator)
        raise


def trained_with_originals(root: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """Return the base parameters that train by design, each with its first value."""
    originals = require_injection(root).originals
    trained = named_trained_whole(root)
    for name in trained:
        if name not in originals:
            raise ValueError(
                f"the first value of {name!r} is unknown: it was on the meta device when the model was adapted, and no "
                "base checkpoint was loaded since by load_state_dict"
            )
    return [(parameter, originals[name]) for name, parameter in trained.items()]


class FrozenStatistics(SwappedModule):
    """Mixin for a batch normalisation that stays in eval mode: it uses its running statistics and never updates them.

    The network then trains as it is evaluated, and the base is what it was when the adapters are loaded elsewhere.
    """

    class_prefix: ClassVar[str] = "Frozen"
    lora_was_training: bool

    @override
    def train(self, mode: bool = True) -> Self:
        self.lora_was_training = mode  # the mode that it is given when it thaws
        return super().train(False)


def freeze_statistics(model: nn.Module, trained_whole: Sequence[str]) -> None:
    """Freeze the statistics of every batch normalisation in ``model`` but those inside modules that train whole."""
    for name, module in model.named_modules():
        if isinstance(module, FrozenStatistics) or is_inside_any(clean_name(name), trained_whole):
            continue
        if isinstance(module, batch_norm_class()) and module.running_mean is not None:
            swap_class(module, FrozenStatistics)
            module.train(module.training)


def unfreeze_statistics(model: nn.Module) -> None:
    """Undo :func:`freeze_statistics`."""
    for module in model.modules():
        if isinstance(module, FrozenStatistics):
            was_training = module.lora_was_training
            restore_class(module, "lora_was_training")
            module.train(was_training)


_FUSED_PATHS: dict[type[nn.Module], tuple[str, Any]] = {
    nn.TransformerEncoderLayer: ("activation_relu_or_gelu", 0),
    nn.TransformerEncoder: ("use_nested_tensor", False),
}


def keep_off_fused_paths(model: nn.Module, injection: Injection) -> None:
    """Keep ``nn.TransformerEncoderLayer`` from its fused path in eval, which reads weights past the adapters."""

    for module in model.modules():
        for cls, (name, value) in _FUSED_PATHS.items():
            is_adapted = isinstance(module, cls) and any(isinstance(part, LoRALayer) for part in module.modules())
            if is_adapted and getattr(module, name) != value:
                injection.undo.append((module, name, getattr(module, name)))
                setattr(module, name, value)


def complete_state_dict(root: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let ``load_state_dict`` of ``root`` take a base checkpoint without adapters, or an adapter checkpoint alone.

    A hook of ``root``, which torch calls first. The missing half is filled in with the tensors that are there, only
    when all of it is missing: one absent adapter among others stays an error.
    """
    injection = injection_of(root)
    if injection is None:
        return
    if is_merged(root):
        raise ValueError("the adapters are merged into the weights: call unmerge(model) before loading a state into it")
    own = {f"{prefix}{name}": tensor for name, tensor in root.state_dict(keep_vars=True).items()}
    adapters = {
        prefix + joined(name, local)
        for name, layer in root.named_modules(remove_duplicate=False)
        if isinstance(layer, LoRALayer)
        for local in layer.tensor_names
    }
    whole = named_trained_whole(root)
    trained = {f"{prefix}{name}" for name, _ in root.named_parameters() if clean_name(name) in whole}
    base = own.keys() - adapters - trained
    first: dict[int, str] = {}  # of the names of one tensor; a file has the others or not
    for key, tensor in own.items():
        first.setdefault(id(tensor), key)
    if not any(key in state_dict for key in adapters):
        state_dict.update({key: own[key] for key in adapters})
        _restart_magnitudes(root, state_dict, prefix)
        for name in whole:
            value = state_dict.get(f"{prefix}{name}")
            if isinstance(value, Tensor):
                injection.originals[name] = value.detach().clone()
    elif all(first[id(own[key])] in state_dict for key in adapters) and not any(key in state_dict for key in base):
        for key in (base | adapters) - state_dict.keys():
            state_dict[key] = state_dict.get(first[id(own[key])], own[key])


@torch.no_grad()
def _restart_magnitudes(root: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
    """Let magnitudes that have not trained start at the norms of the base that a state dict brings."""
    for name, layer in root.named_modules():
        weight = state_dict.get(f"{prefix}{joined(name, 'weight')}")
        if not isinstance(layer, DoRA) or not isinstance(weight, Tensor) or not layer.is_at_start():
            continue
        if isinstance(layer, QuantizedModule):
            weight = layer.dense_in(state_dict, f"{prefix}{name}." if name else prefix, "weight")
        matrix = layer.as_matrix(weight.to(layer.base_weight))
        norms = row_norms(matrix, *layer.factors(), layer.lora_scaling)
        state_dict[f"{prefix}{joined(name, 'lora_magnitude')}"] = norms.view_as(layer.lora_magnitude)
