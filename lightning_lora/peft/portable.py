"""Rewrite PEFT adapters so that every reader scales them alike: one rank, ``lora_alpha`` equal to it, no patterns.

vLLM, SGLang, llama.cpp and PEFT agree on no more than ``lora_alpha / r`` with the config's own r. Rows of zeros bring
every layer to that r, and the layer's scale moves into ``lora_B``, so that the quotient is 1.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lightning_lora.peft.config import CHANGES_BASE, VARIANTS, kind_of, rank_of, scaling_of
from lightning_lora.peft.directory import Adapter, Files, sorted_tensors
from lightning_lora.peft.factors import MERGE, Factors, module_of, write_factors
from lightning_lora.peft.layout import unstacked

# fields that ask for more than factors, or for other arithmetic with them; layers may be replicated all the same
_BEYOND_FACTORS = ("use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "bias", *VARIANTS[:-1])


def make_portable(
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    parameters: Mapping[str, str] | None = None,
    r: int | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the adapter with every layer at the largest rank R and the scales in B: ``r = lora_alpha = R``.

    Added rows and columns are zeros. B is scaled in float32 at least and keeps its dtype where that loses nothing,
    else becomes float32. Copies of base weights (``*.base_layer.weight``) are dropped. The arguments stay as they are.

    Args:
        config: the content of ``adapter_config.json``.
        tensors: the content of ``adapter_model.safetensors``, by PEFT's names.
        parameters: full names of the fused parameters by the layers' names in the file, where they are known.
        r: the rank R, where ``tensors`` are those of some of the layers; ``None`` for the largest of theirs.

    Raises:
        ValueError: the adapter is more than LoRA's factors (DoRA, trained modules, tokens or biases), a grouped
            convolution cannot have rank R, the tensors are damaged, or fused parameters cannot be told apart.
    """
    layers = read_factors(Files(dict(config), dict(tensors), {}), "the adapter", parameters)
    return write_factors(config, layers, r or max(factors.rank for factors in layers.values()))


def read_factors(files: Files, source: Any, parameters: Mapping[str, str] | None = None) -> dict[str, Factors]:
    """Return the adapter's layers by their names in the file.

    Raises:
        ValueError: as ``make_portable``.
    """
    _check_config(files.config)
    adapter = sorted_tensors(files, source)
    other = next((key for key, what in adapter.keys.items() if what.kind not in ("A", "B", "base")), None)
    if other is not None:
        raise ValueError(f"tensor {other!r} is no lora_A or lora_B, and a portable adapter holds nothing else. {MERGE}")
    tied = [key for key in adapter.keys if key.endswith(".lora_embedding_A")]
    if tied and files.config.get("ensure_weight_tying"):
        raise ValueError(
            f"ensure_weight_tying=True: a scale in B would differ between {tied[0]!r} and its twin. {MERGE}"
        )
    key_of = {(what.kind, what.name): what.plain for what in adapter.keys.values()}
    keys = {layer: (key_of["A", layer], key_of["B", layer]) for layer in adapter.factors}
    return {layer: _factors(adapter, layer, keys[layer], (parameters or {}).get(layer)) for layer in adapter.factors}


def _check_config(config: Mapping[str, Any]) -> None:
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        is_adalora = kind_of(config) == "ADALORA"
        written = "Load it, and write it with save_peft(model, directory, as_lora=True). Or: " if is_adalora else ""
        raise ValueError(f"peft_type={config['peft_type']!r}: expected a LoRA adapter. {written}{MERGE}")
    for field in _BEYOND_FACTORS:
        if config.get(field, "none") not in ("none", None, False, [], {}, ""):
            raise ValueError(f"{field}={config[field]!r}: a portable adapter holds the factors of LoRA alone. {MERGE}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(CHANGES_BASE):
        raise ValueError(
            f"init_lora_weights={init!r}: PEFT changes the base weights at load, from r and lora_alpha, so these "
            f"cannot change. Save from PEFT with path_initial_model_for_weight_conversion first. Or: {MERGE}"
        )


def _factors(adapter: Adapter, layer: str, keys: tuple[str, str], parameter: str | None) -> Factors:
    """Split the pair into blocks and find its scale."""
    config, A, B = adapter.config, adapter.factors[layer]["A"], adapter.factors[layer]["B"]
    parameters = _fused_parameters(config, layer) if parameter is None else (parameter,)
    if not parameters:
        factors = Factors(keys, A.unflatten(0, (A.shape[0] // B.shape[1], -1)), B, 1.0)
        # PEFT's wrapper of nn.MultiheadAttention gives its own rank and alpha to the out_proj inside
        return replace(factors, scaling=scaling_of(config, factors.module, factors.rank))
    ranks = {rank_of(config, name) for name in parameters}
    scalings = {scaling_of(config, name, rank) for name in parameters for rank in ranks}
    if len(ranks) > 1 or len(scalings) > 1:
        raise ValueError(
            f"{layer!r} stands for one of {list(parameters)}, which have different ranks or alphas; the file does not "
            f"tell for which, so that its scale is unknown. {MERGE}"
        )
    (rank,) = ranks
    if A.shape[0] % rank:
        raise ValueError(f"{layer!r} has {A.shape[0]} rows in lora_A, expected a multiple of its rank {rank} (config)")
    return Factors(keys, *unstacked(A, B, rank), scalings.pop(), parameters)


def _fused_parameters(config: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return the full names of the parameters of this module that ``target_parameters`` names."""
    module = module_of(name)
    found = set()
    for target in config.get("target_parameters") or ():
        owner, _, parameter = target.rpartition(".")
        # a bare name means any module; which have such a parameter only the model knows
        is_owner = f".{module}".endswith(f".{owner}") if owner else module.endswith("experts")
        if is_owner:
            found.add(f"{module}.{parameter}")
    return tuple(sorted(found))
