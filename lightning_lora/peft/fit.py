"""Give an adapter's tensors our names and layout, after checking that they fit the model."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lora.layers import LoRALayer, mixin_for, with_options
from lightning_lora.layers.convolution import LoRAConv
from lightning_lora.layers.parameters import sizes_of_parameter
from lightning_lora.model.families import resize_advice
from lightning_lora.peft.directory import Adapter
from lightning_lora.peft.layout import times_added, unstacked


def named_by_layer(adapter: Adapter, modules: Mapping[str, nn.Module], model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of all pairs under our names; changes ``adapter.factors`` to ours, by layer or parameter.

    Raises:
        ValueError: a pair does not fit the model, or the config does not tell of it.
    """
    variant = next((key for key, what in adapter.keys.items() if what.kind == "variant"), None)
    if variant is not None:
        raise ValueError(f"{adapter.source}: tensor {variant!r} is of a kind that is not supported")
    tensors: dict[str, Tensor] = {}
    pairs: dict[str, dict[str, Tensor]] = {}
    for path, pair in adapter.factors.items():
        _check_parts(path, pair, adapter)
        layer = ".".join(part for part in path.split(".") if part != "base_layer")
        name, owner, part = _owner(layer, path.split(".").count("base_layer"), adapter.config, modules)
        if part is not None:
            pair = _parameter_pair(pair, modules[owner], part, f"{adapter.source} adapts {part!r} of {layer!r} with")
            tensors |= {f"{owner}.lora_{x}_{part}": value for x, value in pair.items()}
        else:
            _check_layer(layer, pair, modules, model, adapter.source)
            _check_more(layer, pair, modules[layer], adapter.source)
            if is_projection(layer, modules) and layer.rpartition(".")[0] in adapter.factors:
                pair = {**pair, "B": pair["B"] * times_added(adapter.config)}
            tensors |= {f"{layer}.lora_{x}": value for x, value in pair.items()}
        if name in pairs:  # PEFT saves both where an attention and its out_proj are targets
            raise ValueError(f"{adapter.source} has two adapters for {name!r}, under {path!r} and another name of it")
        pairs[name] = pair
    adapter.factors = pairs
    return tensors | {f"{name}.lora_rows": rows for name, rows in adapter.rows.items()}


def is_projection(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a layer is the output projection of an ``nn.MultiheadAttention``, which is adapted with the attention."""
    return isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)


def _owner(
    layer: str, depth: int, peft_config: Mapping[str, Any], modules: Mapping[str, nn.Module]
) -> tuple[str, str, str | None]:
    """Return ``(name of the pair, module, parameter)`` for PEFT's path; the parameter is ``None`` for a layer.

    PEFT wraps a module once for every adapted parameter: the module's first parameter is the innermost.
    """
    module = modules.get(layer)
    wanted = peft_config.get("target_parameters") or []
    if module is None or mixin_for(module) is not None:
        return layer, layer, None
    parts = [
        local
        for local in module._parameters
        if any(f"{layer}.{local}" == entry or f"{layer}.{local}".endswith(f".{entry}") for entry in wanted)
    ]
    if depth >= len(parts):
        return layer, layer, None
    part = parts[len(parts) - 1 - depth]
    return f"{layer}.{part}", layer, part


def _parameter_pair(pair: dict[str, Tensor], module: nn.Module, part: str, adapts: str) -> dict[str, Tensor]:
    """Return the pair of a module's parameter in our layout."""
    if set(pair) != {"A", "B"}:
        raise ValueError(f"{adapts} {sorted(pair)}; expected A and B alone")
    experts, in_features, out_features = sizes_of_parameter(module, part)
    A, B = pair["A"], pair["B"]
    if A.ndim != 2 or A.shape[1] != in_features or B.shape[0] != out_features or A.shape[0] % experts:
        raise ValueError(
            f"{adapts} A {tuple(A.shape)} and B {tuple(B.shape)}, the model has {experts} x {in_features} -> "
            f"{out_features}: another base model?"
        )
    if module.get_parameter(part).ndim == 2:
        return pair
    return dict(zip("AB", unstacked(A, B, A.shape[0] // experts), strict=True))


def _check_layer(
    layer: str, pair: Mapping[str, Tensor], modules: Mapping[str, nn.Module], model: nn.Module, source: Any
) -> None:
    mixin = mixin_for(modules[layer]) if layer in modules else None
    if mixin is None:
        kind = type(modules[layer]).__name__ if layer in modules else "missing"
        raise ValueError(f"{source} adapts {layer!r}, which is {kind} in {type(model).__name__}: another base model?")
    module: Any = modules[layer]
    if issubclass(mixin, LoRAConv) and (module.padding_mode != "zeros" or set(module.dilation) != {1}):
        raise ValueError(
            f"{source} adapts {layer!r}, a convolution with dilation={tuple(module.dilation)} and "
            f"padding_mode={module.padding_mode!r}, both of which PEFT leaves out of lora_A: its adapter means another "
            "function here"
        )
    given = (tuple(pair["A"].shape), tuple(pair["B"].shape))
    expected = _shapes(mixin, module, given[0][0])
    if given != expected:
        sizes, theirs = mixin.features(module), _sizes(pair)
        advice = resize_advice(model, f"{layer}.weight", theirs, sizes)
        raise ValueError(
            f"{source} adapts {layer!r} as {theirs[0]} -> {theirs[1]}, the model has {sizes[0]} -> {sizes[1]}"
            + (advice or ": another base model?")
        )


def _check_parts(path: str, pair: Mapping[str, Tensor], adapter: Adapter) -> None:
    """Raise ``ValueError`` where a magnitude or a bias lacks that the config tells of, or is there untold."""
    fields = {"magnitude": ("use_dora", "lora_magnitude_vector"), "bias": ("lora_bias", "lora_B.bias")}
    for part, (field, key) in fields.items():
        is_asked = bool(adapter.config.get(field))
        if is_asked != (part in pair):
            there = f"no {key}" if is_asked else f"a {key}"
            raise ValueError(
                f"{adapter.source}: its config says {field}={is_asked}, and {path!r} has {there}. Is a file damaged?"
            )


def _check_more(layer: str, pair: Mapping[str, Tensor], module: nn.Module, source: Any) -> None:
    """Check the shapes of a magnitude or a bias, and that the layer can have one."""
    given = {f"lora_{part}": tuple(value.shape) for part, value in pair.items() if part not in "AB"}
    mixin = mixin_for(module)
    assert mixin is not None
    try:
        mixin = with_options(mixin, module, use_dora="lora_magnitude" in given, lora_bias="lora_bias" in given)
    except ValueError as error:
        raise ValueError(f"{source} adapts {layer!r} with {', '.join(given)}: {error}") from None
    expected = mixin.more_shapes(module)
    if given != expected:
        raise ValueError(f"{source} adapts {layer!r} with {given}, the model has {expected}: another base model?")


def _sizes(pair: Mapping[str, Tensor]) -> tuple[int, int]:
    return pair["A"][0].numel(), pair["B"].shape[0]


def _shapes(mixin: type[LoRALayer], module: nn.Module, r: int) -> Any:
    try:
        return mixin.shapes(module, r)
    except ValueError:
        return None
