"""Read a tensor-parallel plan: which layers of a model are split, how, and over how many ranks they can be."""

import re
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import nn

from lightning_lora.compat.transformers import tensor_parallel_plan
from lightning_lora.model.families import is_pretrained
from lightning_lora.model.names import clean_name

# transformers' words, of this and of earlier versions: (kind, whether the other side is whole)
_WORDS = {
    "colwise": ("column", False),
    "colwise_gather_output": ("column", True),
    "colwise_rep": ("column", True),
    "rowwise": ("row", False),
    "rowwise_split_input": ("row", True),
    "rowwise_rep": ("row", True),
    "replicated_with_grad_allreduce": ("summed", False),
}
# what is inside fused experts stays whole on every rank
_EXPERT_WORDS = ("packed_colwise", "packed_rowwise", "moe_tp_experts", "grouped_gemm", "ep_router", "local_colwise")

_BERT = {
    "encoder.layer.*.attention.self.query": "colwise",
    "encoder.layer.*.attention.self.key": "colwise",
    "encoder.layer.*.attention.self.value": "colwise",
    "encoder.layer.*.attention.output.dense": "rowwise",
    "encoder.layer.*.intermediate.dense": "colwise",
    "encoder.layer.*.output.dense": "rowwise",
}
# for families that transformers gives no plan
_PLANS = dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT)


def plan_of(root: nn.Module, plan: Mapping[str, str] | None) -> dict[str, str]:
    """Return the plan of a model: the user's, else transformers' ``base_model_tp_plan``, else one of ours.

    A plan maps names of modules, in which ``*`` stands for a number, to words such as ``"colwise"``.

    Raises:
        ValueError: there is none.
    """
    if plan is not None:
        return dict(plan)
    found: dict[str, str] = {}
    for name, module in root.named_modules():
        config: Any = getattr(module, "config", None)
        own = is_pretrained(module) and getattr(module, "base_model", None) is module
        if own:
            words = getattr(config, "base_model_tp_plan", None) or _PLANS.get(getattr(config, "model_type", ""), {})
            prefix = f"{clean_name(name)}." if name else ""
            found |= {f"{prefix}{pattern}": word for pattern, word in words.items()}
    if found and is_pretrained(root):
        found |= tensor_parallel_plan(root)
    # a family's plan also names what this model has none of, such as dense layers of a mixture of experts
    names = [clean_name(name) for name, _ in root.named_modules()]
    found = {pattern: word for pattern, word in found.items() if any(_matches(pattern, name) for name in names)}
    if not found:
        raise ValueError(
            f"{type(root).__name__} has no tensor-parallel plan (transformers' base_model_tp_plan): give the strategy "
            'plan={"layers.*.attention.query": "colwise", "layers.*.attention.output": "rowwise", ...}, or use '
            "strategy='fsdp_lora'"
        )
    return found


def chosen_layers(modules: Mapping[str, nn.Module], plan: Mapping[str, str]) -> dict[str, tuple[str, bool]]:
    """Return how the plan splits each layer that it names: ``(kind, whether the other side is whole)``."""
    chosen: dict[str, tuple[str, bool]] = {}
    for pattern, word in plan.items():
        if word in _EXPERT_WORDS or ".experts" in pattern:
            continue
        if word not in _WORDS:
            raise ValueError(
                f"the plan's word {word!r} for {pattern!r} is not served; served are {', '.join(map(repr, _WORDS))}. "
                "Give the strategy plan={...} without it, which leaves those layers whole"
            )
        hits = [name for name in modules if _matches(pattern, name)]
        if not hits:
            raise ValueError(f"the plan's {pattern!r} names no module; there are {', '.join(list(modules)[1:6])}, ...")
        chosen |= dict.fromkeys(hits, _WORDS[word])
    return chosen


def _matches(pattern: str, name: str) -> bool:
    expression = re.escape(pattern).replace(r"\*", r"\d+")
    return re.fullmatch(rf"(.*\.)?{expression}", name) is not None


def stays_whole(name: str, layer: Any, how: tuple[str, bool], ranks: int) -> bool:
    """Whether a layer's parts would be put together again, as an output head's, and ranks do not divide its size."""
    if how != ("column", True) or not isinstance(layer, nn.Linear) or layer.out_features % ranks == 0:
        return False
    rank_zero_info(f"{name!r} stays whole on every rank: {ranks} does not divide its out_features={layer.out_features}")
    return True


def heads_of(module: nn.Module) -> list[int]:
    """Return the numbers of attention heads and of key-value heads of the transformers models inside ``module``."""
    return [heads for _, heads in _named_heads(module)]


def _named_heads(module: nn.Module) -> list[tuple[str, int]]:
    found: dict[tuple[str, int], None] = {}
    for part in module.modules():
        if is_pretrained(part):
            config: Any = part.config
            config = config.get_text_config() if hasattr(config, "get_text_config") else config
            for field in ("num_attention_heads", "num_key_value_heads"):
                if isinstance(getattr(config, field, None), int):
                    found[field, getattr(config, field)] = None
    return list(found)


def check_heads(root: nn.Module, ranks: int) -> None:
    """Raise ``ValueError`` where ``ranks`` do not divide a number of heads."""
    for field, heads in _named_heads(root):
        if heads % ranks:
            fits = [size for size in range(1, heads + 1) if heads % size == 0]
            raise ValueError(
                f"{field}={heads} of {type(root).__name__} is not divisible by tensor_parallel_size={ranks}; sizes "
                f"that divide it: {', '.join(map(str, fits))}"
            )
