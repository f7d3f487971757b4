"""What ``"all-linear"`` means in a model: linear layers, but the output head and towers beside the language model."""

from torch import nn

from lightning_lora.layers import is_linear
from lightning_lora.model.families import is_pretrained, output_head
from lightning_lora.model.names import clean_name, is_inside_any

_MAMBA_TYPES = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")  # whose out_proj PEFT refuses to adapt
# beside the language model, in transformers models that do not name it
_TOWER_NAMES = (
    "vision_model",
    "image_encoder",
    "visual_projection",
    "perceiver_resampler",
    "embed_tokens_extend",
    "codec_model",
    "protein_encoder",
)


def all_linear(model: nn.Module) -> dict[str, nn.Module]:
    """Return what ``"all-linear"`` means: every linear layer but the output head and what PEFT refuses to adapt.

    In a model of several modalities it means the language model; see :func:`left_out_towers`.
    """
    modules = _named_modules(model)
    head = output_head(model)
    inert = ("out_proj",) if getattr(getattr(model, "config", None), "model_type", None) in _MAMBA_TYPES else ()
    towers = left_out_towers(model)
    return {
        name: module
        for name, module in modules.items()
        if is_linear(module)
        and module is not head
        and name.rpartition(".")[2] not in inert
        and not is_inside_any(name, list(towers))
    }


def left_out_towers(model: nn.Module) -> dict[str, int]:
    """Return the parts beside the language model of a multimodal one, each with its number of linear layers.

    These are vision and audio towers and projectors. A model has them when its config describes a text model and
    another one (transformers' ``sub_configs``) and it holds a ``language_model``, or a ``text_model`` that it generates
    with; CLIP's, beside which there is no output head, is one of two equals. In models that generate and do not name
    their language model (BLIP, GIT, Idefics, Phi-4 multimodal, Moshi's speech codec) they are known by their own names.
    """
    config = getattr(model, "config", None)
    modules = _named_modules(model)
    names = ("language_model", "thinker", *(["text_model"] if output_head(model) is not None else []))
    language = [name for name in modules if name.rpartition(".")[2] in names]
    if not is_pretrained(model) or "text_config" not in getattr(config, "sub_configs", {}) or not language:
        can_generate = is_pretrained(model) and model.can_generate()  # type: ignore[operator]  # a PreTrainedModel
        towers = [name for name in modules if name.rpartition(".")[2] in _TOWER_NAMES] if can_generate else []
        outer = [name for name in towers if not is_inside_any(name.rpartition(".")[0], towers)]
        return {name: sum(is_linear(m) for m in modules[name].modules()) for name in outer}
    outermost = min(language, key=len)
    parent = outermost.rpartition(".")[0]
    siblings = [
        name
        for name in modules
        if name.rpartition(".")[0] == parent and name != outermost and modules[name] is not output_head(model)
    ]
    counts = {n: sum(is_linear(m) for m in modules[n].modules()) for n in siblings}
    return {name: count for name, count in counts.items() if count}


def _named_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {clean_name(name): module for name, module in model.named_modules() if clean_name(name)}
