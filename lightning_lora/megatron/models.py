"""``gpt_model``: the Megatron-core ``GPTModel`` that computes what a Hugging Face checkpoint's model does."""

import dataclasses
import difflib
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_lora.megatron.config import layer_settings, model_options, read_config, refuse_undivided, refuse_unserved
from lightning_lora.megatron.core import parallel_state, rank_and_size
from lightning_lora.megatron.cpu import name_te_general_gemm
from lightning_lora.megatron.table import HF_TABLE, Row
from lightning_lora.megatron.weights import load_hf_weights

__all__ = ["HF_TABLE", "Row", "gpt_model", "load_hf_weights"]


def gpt_model(path: str | Path | Any, **overrides: Any) -> Any:
    """Build the ``GPTModel`` of a Llama, Mistral, Qwen2, Qwen3 or Qwen3-MoE, with weights drawn at random.

    Called on all ranks, without a collective; each builds its part, in torch's default dtype. Linear layers are
    Megatron-core's own, in whose local product an adapter has its place; norms and attention are Transformer Engine's
    where it is installed and there is a CUDA device. Dropout and the auxiliary
    loss of experts are off. Called with ``labels=`` it returns the loss of each token; logits are this rank's part of
    the vocabulary unless ``parallel_output=False``. Where Megatron-core's random states have no seed yet, they are
    given one; torch's own stay as they are.

    Args:
        path: a directory with ``config.json``, or a transformers config.
        overrides: fields of ``TransformerConfig`` (``sequence_parallel=True``, for which ranks must divide the number
            of tokens, and which does nothing on one rank; ``recompute_granularity="full"``, ...)
            and arguments of ``GPTModel`` (``parallel_output=False``, ...).

    Raises:
        ValueError: Megatron-core has no process groups yet, the model is of a kind that is not served, or the
            tensor-parallel ranks do not divide it.
        TypeError: an override is no such field or argument.

    Example::

        def configure_model(self):
            self.model = gpt_model("Qwen3-8B", sequence_parallel=True)
            load_hf_weights(self.model, "Qwen3-8B")
    """
    _, size = rank_and_size()
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

    hf = read_config(path)
    refuse_unserved(hf)
    refuse_undivided(hf, size)
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    arguments = set(inspect.signature(GPTModel.__init__).parameters) - {"self", "config"}
    _check_names(overrides, fields, arguments)
    use_te = has_transformer_engine() and torch.cuda.is_available()
    dtype = overrides.get("params_dtype", torch.get_default_dtype())
    settings = _sizes(size, dtype) | layer_settings(hf)
    settings |= {name: value for name, value in overrides.items() if name in fields}
    settings["sequence_parallel"] = settings.get("sequence_parallel", False) and size > 1  # one rank has it all
    if settings.get("recompute_granularity") == "full":
        settings = {"recompute_method": "uniform", "recompute_num_layers": 1} | settings
    if settings["sequence_parallel"] and torch.cuda.is_available() and not use_te:
        raise ValueError("sequence_parallel=True on CUDA devices needs Transformer Engine's norms: install it")
    config = TransformerConfig(**settings)
    # where transformers' models say it, so that a PEFT directory can name its base
    source = str(path) if isinstance(path, str | Path) else getattr(path, "name_or_path", "")
    config.__dict__["name_or_path"] = source
    if not has_transformer_engine():
        name_te_general_gemm()
    _seed_random_states()
    options = model_options(hf) | {name: value for name, value in overrides.items() if name in arguments}
    if "transformer_layer_spec" not in options:
        options["transformer_layer_spec"] = block_spec(config, transformer_engine_layers() if use_te else {})
    return GPTModel(config=config, **options)


def has_transformer_engine() -> bool:
    """Whether Megatron-core found Transformer Engine."""
    from megatron.core.models.gpt import gpt_layer_specs

    return bool(gpt_layer_specs.HAVE_TE)


def block_spec(config: Any, layers: Mapping[Any, Any]) -> Any:
    """Return the spec of all blocks: Megatron-core's own layers, but for those that ``layers`` has another for."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization="RMSNorm")
    _exchange(spec, layers, set())
    return spec


def transformer_engine_layers() -> dict[Any, Any]:
    """Return Transformer Engine's norm and attention by the layers of Megatron-core that they take the place of."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm
    from megatron.core.models.gpt.gpt_layer_specs import LNImpl
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    return {WrappedTorchNorm: TENorm, LNImpl: TENorm, DotProductAttention: TEDotProductAttention}


def _exchange(spec: Any, layers: Mapping[Any, Any], seen: set[int]) -> None:
    """Exchange layers in a spec, in place: a dataclass of layers, of specs with submodules, or of lists of those."""
    if id(spec) in seen:  # equal layers share a spec
        return
    seen.add(id(spec))
    for field in dataclasses.fields(spec):
        value = getattr(spec, field.name)
        if isinstance(value, type) and value in layers:
            setattr(spec, field.name, layers[value])
        for one in value if isinstance(value, list) else [value]:
            if dataclasses.is_dataclass(one) and not isinstance(one, type):
                _exchange(one, layers, seen)


def _check_names(overrides: Mapping[str, Any], fields: set[str], arguments: set[str]) -> None:
    of_the_groups = {f"{kind}_model_parallel_size" for kind in ("tensor", "pipeline", "context", "expert")}
    of_the_groups |= {"context_parallel_size"}
    for name in overrides:
        if name in of_the_groups:
            raise TypeError(
                f"{name} is that of Megatron-core's process groups: set them up with another, not gpt_model()"
            )
        if name not in fields | arguments:
            near = difflib.get_close_matches(name, sorted(fields | arguments), n=3, cutoff=0.5)
            advice = f"; nearest: {', '.join(near)}" if near else ""
            raise TypeError(f"neither TransformerConfig nor GPTModel has {name!r}{advice}")


def _sizes(size: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": size,
        "context_parallel_size": parallel_state().get_context_parallel_world_size(),
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
    }


def _seed_random_states() -> None:
    """Seed the states that layers draw from by name, from ``seed_everything``'s seed, if nobody has."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    if not get_cuda_rng_tracker().is_initialized():
        with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
            model_parallel_cuda_manual_seed(int(os.environ.get("PL_GLOBAL_SEED", "1234")))
