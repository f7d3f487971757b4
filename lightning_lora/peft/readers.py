"""What vLLM, SGLang and llama.cpp make of a PEFT directory: a table of what they reject or misread.

Sources: vLLM at commit e745baff (files of ``vllm/lora``), SGLang 0.5.23 (``python/sglang/srt/lora``), llama.cpp. What
depends on the base model, such as which of its layers a server can adapt, is not judged.
"""

import os
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from lightning_lora.checkpoint.storage import location
from lightning_lora.peft.config import VARIANTS, divisor, kind_of
from lightning_lora.peft.directory import read_files
from lightning_lora.peft.evidence import MERGE, Evidence, gather

READERS = ("vllm", "sglang", "llama.cpp")
_ALL = " ".join(READERS)
_BLOCK, _NORM = r"layers\.\d+\.", r"(_layernorm|\bnorm).*\.weight$"
_BASE = "base_model_name_or_path"
_GGUF = "convert_lora_to_gguf.py"
_BESIDE = ("rows", "bias", "base bias", "whole", "variant")  # kinds of tensors that are no factors, see Evidence
_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # the values of --max-lora-rank (vllm/config/lora.py)
_STACKED = {"q_proj": "v_proj", "v_proj": "q_proj", "k_proj": "q_proj", "up_proj": "gate_proj"}
_IGNORED = ("use_rslora", "alpha_pattern")  # by SGLang and llama.cpp
_MERGE = f" {MERGE}"
_PORTABLE = " Use save_peft(model, directory, portable=True), which pads to one rank and folds the scales in."
_AS_LORA = (
    " Write it as plain LoRA: load_peft(model, directory), and save_peft(model, other, as_lora=True, portable=True)."
)
_AGAIN = " Load it with load_peft and save it with save_peft, which names the tensors without the adapter's name."
_LACKS = ": {reader} needs it and fails at load. Add it to the file."
_REJECTS = ": vLLM takes lora_A and lora_B only and rejects the adapter with a "
_EXITS = f": llama.cpp takes lora_A and lora_B only, {_GGUF} exits."
_PLAIN = (
    ": {reader} silently ignores it and computes plain LoRA on every token, from the base model as it is. Train "
    "without it, or serve the adapter with PEFT."
)


class Fact(NamedTuple):
    """One thing that readers reject or misread: who, the file that shows it, how to find it, what follows."""

    readers: str
    source: str
    found: Callable[[Evidence], Iterable[str]]
    follows: str


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
    if reader not in READERS:
        raise ValueError(f"reader={reader!r} is not known; there are: {', '.join(READERS)}")
    files = read_files(location(directory))
    kind = files.config.get("peft_type", "LORA")
    if str(kind).upper() != "LORA":
        way_out = _AS_LORA if kind_of(files.config) == "ADALORA" else _MERGE
        return [f"peft_type={kind!r}: {reader} serves LoRA only, and rejects or misreads other tensors.{way_out}"]
    evidence = gather(files, directory, max_lora_rank)
    return [
        f"{subject}{fact.follows.format(reader=reader)}"
        for fact in FACTS
        if reader in fact.readers.split()
        for subject in fact.found(evidence)
    ]


# fmt: off
FACTS = (
    # no reader looks at values or at fields that it does not know, and the buffers of all are matrices
    Fact(_ALL, "-", lambda e: [repr(e.nonfinite)] if e.nonfinite else [], " holds NaN or infinity: {reader} serves it "
         "in silence, and every answer is wrong. Has the run diverged? Go back to an earlier checkpoint."),
    Fact(_ALL, "-", lambda e: e.fields(*VARIANTS), _PLAIN),
    Fact(_ALL, "-", Evidence.changed_base, " changed the base weights in training: {reader} silently adds the adapter "
         "to the unchanged ones. Save from PEFT with path_initial_model_for_weight_conversion."),
    Fact(_ALL, "-", lambda e: e.adapted(lambda layer: layer.num_dims != 2, " has factors of {0.num_dims} dimensions"),
         " (a convolution): {reader} adapts matrices only and rejects the adapter at load." + _MERGE),
    # llama.cpp waits for the invocation tokens of aLoRA; the others adapt every token
    Fact("vllm sglang", "llama-adapter.cpp", lambda e: e.fields("alora_invocation_tokens"), _PLAIN),

    Fact("vllm", "peft_helper.py", lambda e: e.lacks("r", "lora_alpha", "target_modules"), _LACKS),
    Fact("vllm", "peft_helper.py: validate_legal", lambda e: e.above_max_rank(max(e.r, *(x.rank for x in e.layers)), 16,
         _VLLM_RANKS, "vLLM"), ""),
    Fact("vllm", "peft_helper.py: validate_legal", lambda e: e.beside("magnitude", or_asked=True), _REJECTS
         + "NotImplementedError." + _MERGE),
    Fact("vllm", "peft_helper.py: validate_legal", lambda e: e.beside("whole", "base bias", or_asked=True), _REJECTS
         + "ValueError." + _MERGE),
    # copies of the two embeddings are skipped by name (utils.py: is_base_embedding_weights)
    Fact("vllm", "lora_model.py", lambda e: e.beside("rows", "bias", "base", "variant", where=r"^(?!.*\b(embed_tokens|"
         r"lm_head)\.base_layer\.weight$)"), _REJECTS + "ValueError." + _MERGE),
    Fact("vllm", "utils.py", lambda e: e.beside("renamed"), _REJECTS + "ValueError." + _AGAIN),
    Fact("vllm", "peft_helper.py", lambda e: e.misread("vLLM", ("rank_pattern", "alpha_pattern"), lambda _: e.alpha
         / divisor(e.config, e.r)), _PORTABLE),

    Fact("sglang", "lora_config.py", lambda e: e.lacks("peft_type", "r", "lora_alpha", "target_modules"), _LACKS),
    Fact("sglang", "lora_manager.py", lambda e: [f"target_modules={targets!r}" for targets in [e.config.get(
         "target_modules", [])] if not isinstance(targets, list) and targets not in ("all", "all-linear")],
         ": SGLang takes a list of names or 'all-linear', no expression, and rejects the adapter with a ValueError. "
         "Write the names of the adapted layers as a list."),
    Fact("sglang", "lora_manager.py", lambda e: e.above_max_rank(e.r, e.r, (e.r,), "SGLang"), ""),
    Fact("sglang", "lora_manager.py", lambda e: e.beside("magnitude", or_asked=True),
         ": SGLang rejects DoRA with a ValueError." + _MERGE),
    Fact("sglang", "mem_pool.py", lambda e: e.beside(*_BESIDE, where=_BLOCK), ": SGLang has no place for it and drops "
         "it, or fails with a ValueError or an AssertionError when the adapter is first used." + _MERGE),
    Fact("sglang", "lora.py: _process_weight", lambda e: e.beside(*(kind for kind in _BESIDE if not [*e.beside(kind,
         where=_BLOCK)])), ": SGLang silently ignores it and serves the base model's value." + _MERGE),
    Fact("sglang", "mem_pool.py", lambda e: e.adapted(lambda layer: layer.is_fused), " is a fused parameter of "
         "experts: SGLang fails with a ValueError." + _MERGE),
    Fact("sglang", "mem_pool.py", lambda e: e.adapted(lambda layer: not layer.is_fused and layer.rank != e.r,
         f" has rank {{0.rank}} and r={e.r}"), " (rank_pattern): SGLang copies into buffers of rank r and fails with "
         "an AssertionError when the adapter is first used." + _PORTABLE),
    Fact("sglang", "lora.py: _process_weight", lambda e: e.adapted(lambda layer: not layer.is_fused and not re.search(
         _BLOCK + "|embed_tokens|lm_head", layer.name)), " lies in no block named layers.N and is no embed_tokens or "
         "lm_head: SGLang silently ignores it." + _MERGE),
    Fact("sglang", "lora.py: normalize_qkv_proj", lambda e: e.without_partner(_STACKED), ": SGLang stacks the two and "
         "fails with a KeyError or a ValueError." + _MERGE + " Or train both."),
    Fact("sglang", "lora.py", lambda e: e.misread("SGLang", _IGNORED, lambda layer: None if layer.is_fused
         or layer.rank != e.r else e.alpha / e.r), _PORTABLE),

    Fact("llama.cpp", _GGUF, lambda e: e.lacks("lora_alpha"), _LACKS),
    Fact("llama.cpp", _GGUF, lambda e: [] if e.config.get(_BASE) else [_BASE], f" is not given: {_GGUF} finds no "
         "config of the base model and exits. Start it with --base DIRECTORY."),
    # the conversion skips base copies, and keeps norms, which the loader then skips ("_norm.weight")
    Fact("llama.cpp", _GGUF, lambda e: e.beside("magnitude", *_BESIDE, where=rf"^(?!.*{_NORM})"), _EXITS + _MERGE),
    Fact("llama.cpp", _GGUF, lambda e: e.beside("renamed"), _EXITS + _AGAIN),
    Fact("llama.cpp", "llama-adapter.cpp", lambda e: e.beside("magnitude", *_BESIDE, where=_NORM), ": llama.cpp "
         "silently ignores norms at load." + _MERGE),
    Fact("llama.cpp", _GGUF, lambda e: e.adapted(lambda layer: layer.is_fused), " is a fused parameter of experts: "
         f"{_GGUF} cannot map it and fails with a ValueError." + _MERGE),
    Fact("llama.cpp", _GGUF, lambda e: e.adapted(lambda layer: e.config.get("fan_in_fan_out") and re.search(
         r"\.c_(attn|proj|fc)$", layer.name)), f" is a Conv1D (fan_in_fan_out=True): {_GGUF} transposes the factors as "
         "if they were stored like its weight, which they are not: llama.cpp rejects them at load, or where the layer "
         "is square silently adds the transpose." + _MERGE),
    # alpha 0 is read as "no alpha given"
    Fact("llama.cpp", "llama-adapter.h: get_scale", lambda e: e.misread("llama.cpp", _IGNORED, lambda layer: None if
         layer.is_fused else e.alpha / layer.rank if e.alpha else 1.0), _PORTABLE),
)
# fmt: on
