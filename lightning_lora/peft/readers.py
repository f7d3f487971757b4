"""What vLLM, SGLang and llama.cpp make of a PEFT directory: the parts that they reject or misread.

The rules are those of vLLM (``vllm/lora``: peft_helper.py, lora_model.py, utils.py), SGLang 0.5.23
(``python/sglang/srt/lora``) and llama.cpp (``convert_lora_to_gguf.py``, ``src/llama-adapter.cpp``). What depends on the
base model, such as which of its layers a server can adapt, is not judged.
"""

import json
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_lora.checkpoint.storage import Location, location
from lightning_lora.model.finite import first_nonfinite
from lightning_lora.model.matching import pattern_value
from lightning_lora.peft.directory import CONFIG_NAME, PREFIX, read_tensors

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values of --max-lora-rank (vLLM: vllm/config/lora.py)

_MERGE = "Use merge(model, remove=True) and serve the merged model."
_PORTABLE = "Use save_peft(model, directory, portable=True), which pads to one rank and folds the scales in."
_FACTOR = re.compile(
    r"(?P<layer>.+)\.lora_(?P<embedding>embedding_)?(?P<factor>[AB])(?P<adapter>\.(?!weight$|bias$)[^.]+)?"
    r"(?(embedding)|\.weight)"
)
_BLOCK = re.compile(r"layers\.\d+\.")
_KINDS = {  # what a tensor that is no factor can be: the field of the config that asks for it
    "magnitude": "use_dora",
    "tokens": "trainable_token_indices",
    "factor bias": "lora_bias",
    "bias": "bias",
    "whole": "modules_to_save",
}
_VARIANTS = ("use_qalora", "use_bdlora", "kasa_config", "layer_replication", "arrow_config", "alora_invocation_tokens")
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class _Layer:
    """An adapted layer as PEFT means it; ``is_fused``: parameters of experts, whose tensors hold r rows per expert."""

    name: str
    rank: int
    alpha: float
    num_dims: int
    is_fused: bool


@dataclass(frozen=True)
class _Adapter:
    """What a directory holds.

    Attributes:
        others: the names of the tensors that are no plain factors, by kind.
        nonfinite: the first tensor that holds NaN or infinity.
    """

    config: Mapping[str, Any]
    r: int
    alpha: float
    layers: Sequence[_Layer]
    others: Mapping[str, Sequence[str]]
    nonfinite: str | None

    def scaling(self, layer: _Layer) -> float:
        return layer.alpha / (math.sqrt(layer.rank) if self.config.get("use_rslora") else layer.rank)


def check_portable(directory: str | os.PathLike[str], reader: str, *, max_lora_rank: int | None = None) -> list[str]:
    """Return a sentence for each thing in a PEFT directory that ``reader`` would reject or misread.

    An empty list means that the reader serves the adapter as PEFT means it, on a base model whose layers it can adapt.

    Args:
        reader: "vllm", "sglang" or "llama.cpp".
        max_lora_rank: the server's ``--max-lora-rank``; None for its default: 16 in vLLM, the adapters' own in SGLang.

    Raises:
        FileNotFoundError: the directory, its config or its tensors are missing.
        ValueError: the reader is unknown, or a file is damaged.
    """
    if reader not in _READERS:
        raise ValueError(f"reader={reader!r} is not known; there are: {', '.join(_READERS)}")
    adapter = _read(location(directory))
    kind = adapter.config.get("peft_type", "LORA")
    if str(kind).upper() != "LORA":
        return [f"peft_type={kind!r}: {reader} serves LoRA only, and rejects or misreads other tensors. {_MERGE}"]
    return [*_of_all(adapter, reader), *_READERS[reader](adapter, max_lora_rank)]


def _of_all(adapter: _Adapter, reader: str) -> Iterator[str]:
    """Yield what no reader serves right: NaN, other layers than LoRA's, a changed base, convolutions."""
    if adapter.nonfinite is not None:
        yield (
            f"{adapter.nonfinite!r} holds NaN or infinity: {reader} serves it in silence, and every answer is wrong. "
            "Has the run diverged? Go back to an earlier checkpoint."
        )
    for field in _VARIANTS:
        # llama.cpp waits for the invocation tokens of aLoRA; the others adapt every token
        if adapter.config.get(field) and (field, reader) != ("alora_invocation_tokens", "llama.cpp"):
            yield (
                f"{field}={reprlib.repr(adapter.config[field])}: {reader} silently ignores it and computes plain LoRA "
                "on every token, from the base model as it is. Train without it, or serve the adapter with PEFT."
            )
    init = adapter.config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        yield (
            f"init_lora_weights={init!r} changed the base weights in training: {reader} silently adds the adapter to "
            "the unchanged ones. Save from PEFT with path_initial_model_for_weight_conversion."
        )
    convolutions = [layer.name for layer in adapter.layers if layer.num_dims != 2]
    if convolutions:
        dims = next(layer.num_dims for layer in adapter.layers if layer.num_dims != 2)
        yield (
            f"{_several(convolutions, 'layer')} has factors of {dims} dimensions (a convolution): {reader} adapts "
            f"matrices only and rejects the adapter at load. {_MERGE}"
        )


def _vllm(adapter: _Adapter, max_lora_rank: int | None) -> Iterator[str]:
    """Yield what vLLM rejects (PEFTHelper.validate_legal, LoRAModel) or misreads: one scale, from lora_alpha and r."""
    yield from _missing(adapter, "vLLM", ("r", "lora_alpha", "target_modules"))
    limit = 16 if max_lora_rank is None else max_lora_rank
    rank = max([adapter.r, *(layer.rank for layer in adapter.layers)])
    if rank > limit:
        option = next((f"Start it with --max-lora-rank {n}." for n in _VLLM_RANKS if n >= rank), _MERGE)
        error = "ValueError" if adapter.r > limit else "RuntimeError when it copies the tensors"
        yield f"rank {rank} is above max_lora_rank={limit}: vLLM rejects the adapter with a {error}. {option}"
    others = dict(adapter.others)
    # base copies of the two embeddings are skipped by name (vllm/lora/utils.py: is_base_embedding_weights)
    embeddings = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
    others["base"] = [name for name in others.get("base", ()) if not f".{name}".endswith(embeddings)]
    for kind in [*_KINDS, "base", "variant", "renamed"]:
        # modules_to_save, use_dora and bias are rejected for the config alone
        if others.get(kind) or (kind in ("whole", "magnitude", "bias") and _asks_for(adapter, kind)):
            error = "NotImplementedError" if kind == "magnitude" else "ValueError"
            what = _evidence(adapter, kind, others.get(kind, ()))
            yield f"{what}: vLLM takes lora_A and lora_B only and rejects the adapter with a {error}. {_remedy(kind)}"
    served = adapter.alpha / (math.sqrt(adapter.r) if adapter.config.get("use_rslora") else adapter.r)
    yield from _scale(adapter, adapter.layers, "vLLM", ("rank_pattern", "alpha_pattern"), lambda layer: served)


def _sglang(adapter: _Adapter, max_lora_rank: int | None) -> Iterator[str]:
    """Yield what SGLang rejects (lora_manager.py, mem_pool.py) or misreads: one scale, lora_alpha / r (lora.py)."""
    yield from _missing(adapter, "SGLang", ("peft_type", "r", "lora_alpha", "target_modules"))
    targets = adapter.config.get("target_modules", [])
    if not isinstance(targets, list) and targets not in ("all", "all-linear"):
        yield (
            f"target_modules={targets!r}: SGLang takes a list of names or 'all-linear', no expression, and rejects "
            "the adapter with a ValueError. Write the names of the adapted layers as a list."
        )
    if max_lora_rank is not None and adapter.r > max_lora_rank:
        yield (
            f"r={adapter.r} is above max_lora_rank={max_lora_rank}: SGLang rejects the adapter with a ValueError. "
            f"Start it with --max-lora-rank {adapter.r}."
        )
    yield from _sglang_others(adapter)
    yield from _sglang_layers(adapter)
    plain = [layer for layer in adapter.layers if not layer.is_fused and layer.rank == adapter.r]
    ignored = ("use_rslora", "alpha_pattern")
    yield from _scale(adapter, plain, "SGLang", ignored, lambda layer: adapter.alpha / adapter.r)


def _sglang_others(adapter: _Adapter) -> Iterator[str]:
    """Yield SGLang's treatment of tensors that are no factors: lost outside the blocks, in the way inside."""
    for kind in [*_KINDS, "variant"]:
        names = adapter.others.get(kind, ())
        inside = [name for name in names if _BLOCK.search(name)]
        what = _evidence(adapter, kind, inside or names)
        if kind == "magnitude" and (names or _asks_for(adapter, kind)):
            yield f"{what}: SGLang rejects DoRA with a ValueError. {_MERGE}"
        elif inside:
            yield (
                f"{what}: SGLang has no place for it and drops it, or fails with a ValueError or an AssertionError "
                f"when the adapter is first used. {_MERGE}"
            )
        elif names:
            yield f"{what}: SGLang silently ignores it and serves the base model's value. {_MERGE}"


def _sglang_layers(adapter: _Adapter) -> Iterator[str]:
    """Yield the layers that SGLang has no buffer for (lora.py: _process_weight, normalize_qkv_proj; mem_pool.py)."""
    fused = [layer.name for layer in adapter.layers if layer.is_fused]
    if fused:
        yield f"{_several(fused, 'layer')} is a fused parameter of experts: SGLang fails with a ValueError. {_MERGE}"
    ranks = {layer.name: layer.rank for layer in adapter.layers if not layer.is_fused}
    wrong = [name for name, rank in ranks.items() if rank != adapter.r]
    if wrong:
        yield (
            f"{_several(wrong, 'layer')} has rank {ranks[wrong[0]]} and r={adapter.r} (rank_pattern): SGLang copies "
            f"into buffers of rank r and fails with an AssertionError when the adapter is first used. {_PORTABLE}"
        )
    lost = [n for n in ranks if not _BLOCK.search(n) and not re.search("embed_tokens|lm_head", n)]
    if lost:
        yield (
            f"{_several(lost, 'layer')} lies in no block named layers.N and is no embed_tokens or lm_head: SGLang "
            f"silently ignores it. {_MERGE}"
        )
    partners = {"q_proj": "v_proj", "v_proj": "q_proj", "k_proj": "q_proj", "up_proj": "gate_proj"}
    for last, partner in partners.items():
        alone = [n for n in ranks if re.search(rf"layers\.\d+\..*\b{last}$", n)]
        alone = [name for name in alone if name.removesuffix(last) + partner not in ranks]
        if alone:
            yield (
                f"{_several(alone, 'layer')} is adapted without its {partner}: SGLang stacks the two and fails with a "
                f"KeyError or a ValueError. {_MERGE} Or train both."
            )


def _llama_cpp(adapter: _Adapter, max_lora_rank: int | None) -> Iterator[str]:
    """Yield what the conversion rejects or llama.cpp misreads: it scales by lora_alpha / the tensor's own rank."""
    yield from _missing(adapter, "llama.cpp", ("lora_alpha",))
    if not adapter.config.get("base_model_name_or_path"):
        yield (
            "base_model_name_or_path is not given: convert_lora_to_gguf.py finds no config of the base model and "
            "exits. Start it with --base DIRECTORY."
        )
    # the conversion skips base copies, and keeps norms, which the loader then skips ("_norm.weight")
    for kind in [*_KINDS, "variant", "renamed"]:
        names = adapter.others.get(kind, ())
        norms = [name for name in names if re.search(r"(_layernorm|\.norm).*\.weight$", f".{name}")]
        rejected = [name for name in names if name not in norms]
        if rejected:
            what = _evidence(adapter, kind, rejected)
            yield f"{what}: llama.cpp takes lora_A and lora_B only, convert_lora_to_gguf.py exits. {_remedy(kind)}"
        if norms:
            yield f"{_evidence(adapter, kind, norms)}: llama.cpp silently ignores norms at load. {_MERGE}"
    fused = [layer.name for layer in adapter.layers if layer.is_fused]
    if fused:
        yield (
            f"{_several(fused, 'layer')} is a fused parameter of experts: convert_lora_to_gguf.py cannot map it and "
            f"fails with a ValueError. {_MERGE}"
        )
    transposed = [layer.name for layer in adapter.layers if re.search(r"\.c_(attn|proj|fc)$", layer.name)]
    if adapter.config.get("fan_in_fan_out") and transposed:
        yield (
            f"fan_in_fan_out=True: the conversion transposes the factors of {_several(transposed, 'layer')} as if they "
            "were stored like Conv1D's weight, which they are not: llama.cpp rejects them at load, or where the layer "
            f"is square silently adds the transpose. {_MERGE}"
        )
    plain = [layer for layer in adapter.layers if not layer.is_fused]
    ignored = ("use_rslora", "alpha_pattern")
    # alpha 0 is read as "no alpha given" (llama-adapter.h: get_scale)
    yield from _scale(
        adapter, plain, "llama.cpp", ignored, lambda layer: adapter.alpha / layer.rank if adapter.alpha else 1.0
    )


_READERS: dict[str, Callable[[_Adapter, int | None], Iterator[str]]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "llama.cpp": _llama_cpp,
}


def _scale(
    adapter: _Adapter,
    layers: Sequence[_Layer],
    reader: str,
    ignored: Sequence[str],
    served: Callable[[_Layer], float],
) -> Iterator[str]:
    """Yield a sentence where ``served``, the reader's scale, is not PEFT's; fields that change nothing go unnamed."""
    wrong = [layer for layer in layers if not math.isclose(adapter.scaling(layer), served(layer), rel_tol=1e-6)]
    if not wrong:
        return
    changes = {
        "use_rslora": any(layer.rank != 1 for layer in wrong) and adapter.config.get("use_rslora"),
        "rank_pattern": any(layer.rank != adapter.r for layer in wrong),
        "alpha_pattern": any(layer.alpha != adapter.alpha for layer in wrong),
    }
    fields = " and ".join(field for field in ignored if changes[field]) or f"lora_alpha={adapter.alpha:g}"
    first = wrong[0]
    yield (
        f"{fields}: PEFT scales {_several([layer.name for layer in wrong], 'layer')} by "
        f"{adapter.scaling(first):.4g} (lora_alpha={first.alpha:g}, r={first.rank}, "
        f"use_rslora={bool(adapter.config.get('use_rslora'))}), {reader} silently by {served(first):.4g}. {_PORTABLE}"
    )


def _missing(adapter: _Adapter, reader: str, fields: Sequence[str]) -> Iterator[str]:
    missing = [field for field in fields if field not in adapter.config]
    if missing:
        yield f"{CONFIG_NAME} lacks {', '.join(missing)}: {reader} needs it and fails at load. Add it to the file."


def _asks_for(adapter: _Adapter, kind: str) -> bool:
    value = adapter.config.get(_KINDS[kind])
    return bool(value) and value != "none"


def _evidence(adapter: _Adapter, kind: str, names: Sequence[str]) -> str:
    field = _KINDS.get(kind, "")
    there = [f"{field}={reprlib.repr(adapter.config[field])}"] if field and _asks_for(adapter, kind) else []
    return " with ".join(there + ([_several(names, "tensor")] if names else []))


def _remedy(kind: str) -> str:
    again = "Load it with load_peft and save it with save_peft, which names the tensors without the adapter's name."
    return again if kind == "renamed" else _MERGE


def _several(names: Sequence[str], noun: str) -> str:
    names = list(dict.fromkeys(names))  # a fused pair stands for several parameters
    more = f" and {len(names) - 1} more {noun}{'s' * (len(names) > 2)}" if len(names) > 1 else ""
    return f"{noun} {names[0]!r}{more}"


def _read(directory: Location) -> _Adapter:
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is not an adapter directory: it has no {CONFIG_NAME}")
    try:
        config = json.loads(path.read_text())
        # PEFT's own defaults
        r, alpha = int(config.get("r", 8)), float(config.get("lora_alpha", 8))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no adapter's config: {error}") from error
    if r < 1:
        raise ValueError(f"{path} has r={r}, which is no rank")
    factors: dict[str, dict[str, tuple[int, ...]]] = {}
    others: dict[str, list[str]] = {}
    tensors, _ = read_tensors(directory)
    for key, value in sorted(tensors.items()):
        if not isinstance(value, Tensor):
            raise ValueError(f"{directory} is damaged or holds more than tensors: {key!r} is {type(value).__name__}")
        name = key.removeprefix(PREFIX)
        match = _FACTOR.fullmatch(name)
        if match is not None:
            factors.setdefault(match["layer"], {})[match["factor"]] = tuple(value.shape)
        if match is None or match["adapter"]:
            others.setdefault(_kind(name, config) if match is None else "renamed", []).append(name)
    layers = [layer for name, pair in factors.items() for layer in _layers(name, pair, config, r, alpha, path)]
    return _Adapter(config, r, alpha, layers, others, first_nonfinite(tensors))


def _kind(name: str, config: Mapping[str, Any]) -> str:
    """Return what a tensor that is no factor is: a key of ``_KINDS``, "base" (a copy) or "variant" (of LoRA)."""
    if any(f".{module}." in f".{name}" for module in config.get("modules_to_save") or ()):
        return "whole"
    patterns = {
        r"\.lora_magnitude_vector": "magnitude",
        r"\.token_adapter\.": "tokens",
        r"\.lora_[AB]\.(.+\.)?bias$": "factor bias",
        r"\.lora_": "variant",
        r"\.base_layer\.weight$": "base",
        r"\.bias$": "bias",
    }
    return next((kind for pattern, kind in patterns.items() if re.search(pattern, name)), "whole")


def _layers(
    name: str, pair: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], r: int, alpha: float, path: Location
) -> Iterator[_Layer]:
    """Yield the layer of a pair of factors, or the parameters that a fused pair can stand for."""
    if set(pair) != {"A", "B"} or len(pair["A"]) < 2 or len(pair["A"]) != len(pair["B"]):
        raise ValueError(f"{path.parent} is damaged: the factors of {name!r} are {dict(pair)}")
    module = name.removesuffix(".base_layer")
    is_fused = module != name or module.endswith(".experts")
    parameters = [p.rpartition(".")[2] for p in config.get("target_parameters") or ()] if is_fused else []
    for full in [f"{module}.{parameter}" for parameter in parameters] or [module]:
        # the tensors know the rank; of a fused pair they know only its product with the number of experts
        rank = pattern_value(config.get("rank_pattern"), full, r) if is_fused else pair["A"][0]
        layer_alpha = pattern_value(config.get("alpha_pattern"), full, alpha)
        yield _Layer(name, rank, float(layer_alpha), len(pair["A"]), is_fused)
