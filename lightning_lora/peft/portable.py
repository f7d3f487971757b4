"""PEFT adapters in the one shape that every reader scales alike: one rank, ``lora_alpha`` equal to it, no patterns.

vLLM, SGLang, llama.cpp and PEFT agree on no more than ``lora_alpha / r`` with the config's own r. Rows of zeros bring
every layer to that r, and the layer's scale moves into ``lora_B``, so that the quotient is 1.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_lora.model.matching import pattern_value

_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?(embedding)|\.weight)")
# fields that ask for more than factors, or for other arithmetic with them
_BEYOND_FACTORS = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# initialisations that PEFT repeats at load, from the config's r, and takes out of the base weight
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_MERGE = "Use merge(model, remove=True) and save the merged model."


@dataclass(frozen=True)
class Factors:
    """The adapter of one layer. With ``num_blocks`` of 1 the tensors are the file's but for A's first dimension.

    Attributes:
        keys: the names of A and B in the file.
        A: [num_blocks, rank of a block, in, ...]; the blocks are experts, or groups of a convolution.
        B: [out, rank of a block], and [out, rank, num_experts] for experts, [out, rank of a group, 1, ...] for
            convolutions.
        scaling: what B A is multiplied by.
        parameters: the names of the module's fused parameters, one of which this adapts; () for a layer.
    """

    keys: tuple[str, str]
    A: Tensor
    B: Tensor
    scaling: float
    parameters: tuple[str, ...] = ()

    @property
    def num_groups(self) -> int:
        return 1 if self.parameters else self.A.shape[0]

    @property
    def rank(self) -> int:
        return self.A.shape[1] * self.num_groups

    @property
    def module(self) -> str:
        """The name of the adapted module in the base model."""
        return _module(self.keys[0].removeprefix(_PREFIX).partition(".lora_")[0])


def make_portable(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], parameters: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the adapter with every layer at the largest rank R and the scales in B: ``r = lora_alpha = R``.

    Added rows and columns are zeros. B is scaled in float32 at least and keeps its dtype where that loses nothing,
    else becomes float32. Copies of base weights (``*.base_layer.weight``) are dropped. The arguments stay as they are.

    Args:
        config: the content of ``adapter_config.json``.
        tensors: the content of ``adapter_model.safetensors``, by PEFT's names.
        parameters: full names of the fused parameters, by the names of their layers in the file, where they are known.

    Raises:
        ValueError: the adapter is more than LoRA's factors (DoRA, trained modules, tokens or biases), a grouped
            convolution cannot have rank R, the tensors are damaged, or fused parameters cannot be told apart.
    """
    layers = read_factors(config, tensors, parameters)
    return write_factors(config, layers, max(factors.rank for factors in layers.values()))


def read_factors(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], parameters: Mapping[str, str] | None = None
) -> dict[str, Factors]:
    """Return the adapter's layers by their names in the file.

    Raises:
        ValueError: as ``make_portable``.
    """
    _check_config(config)
    pairs: dict[str, dict[str, tuple[str, Tensor]]] = {}
    for key, value in tensors.items():
        match = _FACTOR.fullmatch(key)
        if match is not None:
            pairs.setdefault(match["layer"], {})[match["factor"]] = (key, value)
        elif not key.endswith(".base_layer.weight"):
            raise ValueError(
                f"tensor {key!r} is no lora_A or lora_B, and a portable adapter holds nothing else. {_MERGE}"
            )
    if not pairs:
        raise ValueError(f"the adapter has no lora_A and lora_B among its {len(tensors)} tensors: is it LoRA's?")
    tied = [key for key in tensors if key.endswith(".lora_embedding_A")] if config.get("ensure_weight_tying") else []
    if tied:
        raise ValueError(
            f"ensure_weight_tying=True: a scale in B would differ between {tied[0]!r} and its twin. {_MERGE}"
        )
    known = parameters or {}
    return {layer: _factors(config, layer, pair, known.get(layer)) for layer, pair in pairs.items()}


def write_factors(
    config: Mapping[str, Any], layers: Mapping[str, Factors], r: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and the tensors of ``layers`` at rank r, scales folded in.

    Raises:
        ValueError: a convolution's number of groups does not divide r.
    """
    tensors: dict[str, Tensor] = {}
    for layer, factors in layers.items():
        if r % factors.num_groups:
            raise ValueError(
                f"{layer!r} is a convolution in {factors.num_groups} groups: rank {factors.rank} cannot be padded to "
                f"the largest rank {r}, which {factors.num_groups} does not divide. {_MERGE}"
            )
        A = _pad(factors.A, r // factors.num_groups)
        B = _pad(folded(factors), r // factors.num_groups)
        key_A, key_B = factors.keys
        tensors[key_A] = A.flatten(0, 1).contiguous()
        tensors[key_B] = (B.flatten(1) if factors.parameters else B).contiguous()
    uniform = {"r": r, "lora_alpha": r, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    return {**config, **uniform}, tensors


def folded(factors: Factors) -> Tensor:
    """Return ``scaling * B``, in B's dtype where that is exact, else in float32."""
    if factors.scaling == 1:
        return factors.B
    B = factors.B.to(torch.promote_types(factors.B.dtype, torch.float32)) * factors.scaling
    narrow = B.to(factors.B.dtype)
    return narrow if torch.equal(narrow.to(B.dtype), B) else B


def _pad(factor: Tensor, rank: int) -> Tensor:
    """Append zeros along dimension 1, where both factors have the rank of a block."""
    missing = rank - factor.shape[1]
    zeros = factor.new_zeros(factor.shape[0], missing, *factor.shape[2:])
    return torch.cat([factor, zeros], dim=1) if missing else factor


def _check_config(config: Mapping[str, Any]) -> None:
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        raise ValueError(f"peft_type={config['peft_type']!r}: expected a LoRA adapter. {_MERGE}")
    asked = {field: config[field] for field in _BEYOND_FACTORS if config.get(field)}
    if config.get("bias", "none") not in ("none", None):
        asked["bias"] = config["bias"]
    if asked:
        field, value = next(iter(asked.items()))
        raise ValueError(f"{field}={value!r}: a portable adapter holds the factors of LoRA alone. {_MERGE}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        raise ValueError(
            f"init_lora_weights={init!r}: PEFT changes the base weights at load, from r and lora_alpha, so these "
            f"cannot change. Save from PEFT with path_initial_model_for_weight_conversion first. Or: {_MERGE}"
        )


def _factors(
    config: Mapping[str, Any], layer: str, pair: Mapping[str, tuple[str, Tensor]], parameter: str | None
) -> Factors:
    """Split the pair into blocks and find its scale."""
    shapes = {factor: tuple(tensor.shape) for factor, (_, tensor) in pair.items()}
    if set(pair) != {"A", "B"} or not _fit(shapes["A"], shapes["B"]):
        raise ValueError(f"the factors of {layer!r} do not fit: {shapes}, expected A [r, in, ...] and B [out, r, ...]")
    (key_A, A), (key_B, B) = pair["A"], pair["B"]
    name = layer.removeprefix(_PREFIX)
    parameters = _fused_parameters(config, name) if parameter is None else (parameter,)
    num_groups = A.shape[0] // B.shape[1]
    factors = Factors((key_A, key_B), A.unflatten(0, (num_groups, -1)), B, 1.0)
    if not parameters:
        # PEFT's wrapper of nn.MultiheadAttention gives its own rank and alpha to the out_proj inside
        return replace(factors, scaling=_scaling(config, _module(name), factors.rank))
    ranks = {pattern_value(config.get("rank_pattern"), name, config.get("r", 8)) for name in parameters}
    scalings = {_scaling(config, parameter, rank) for parameter in parameters for rank in ranks}
    if len(ranks) > 1 or len(scalings) > 1:
        raise ValueError(
            f"{layer!r} stands for one of {list(parameters)}, which have different ranks or alphas; the file does not "
            f"tell for which, so that its scale is unknown. {_MERGE}"
        )
    (rank,) = ranks
    if A.shape[0] % rank:
        raise ValueError(f"{layer!r} has {A.shape[0]} rows in lora_A, expected a multiple of its rank {rank} (config)")
    # rows of A go expert by expert, columns of B rank by rank (PEFT: ParamWrapper.get_delta_weight)
    A, B = A.unflatten(0, (-1, rank)), B.unflatten(1, (rank, -1))
    return Factors((key_A, key_B), A, B, scalings.pop(), parameters)


def _fit(A: tuple[int, ...], B: tuple[int, ...]) -> bool:
    if len(A) < 2 or len(A) != len(B) or 0 in A or 0 in B:
        return False
    return A[0] == B[1] or (len(A) > 2 and A[0] % B[1] == 0)


def _scaling(config: Mapping[str, Any], name: str, rank: int) -> float:
    alpha = float(pattern_value(config.get("alpha_pattern"), name, config.get("lora_alpha", 8)))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _module(name: str) -> str:
    return name.partition(".base_layer")[0]


def _fused_parameters(config: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """Return the full names of the parameters of this module that ``target_parameters`` names."""
    module = _module(name)
    found = set()
    for target in config.get("target_parameters") or ():
        owner, _, parameter = target.rpartition(".")
        # a bare name means any module; which have such a parameter only the model knows
        is_owner = f".{module}".endswith(f".{owner}") if owner else module.endswith("experts")
        if is_owner:
            found.add(f"{module}.{parameter}")
    return tuple(sorted(found))
