"""Adapters as diffusers keeps them: ``pytorch_lora_weights.safetensors``, one file for several models."""

import json
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_lora.checkpoint.storage import Location
from lightning_lora.peft.config import anchored
from lightning_lora.peft.directory import Files, load_safetensors
from lightning_lora.peft.layout import PREFIX, parse_key

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"  # JSON of PEFT's configs, each field behind its component's name
# what the two factors were called over time: by PEFT, by diffusers, in its attention processors, in text encoders
_FACTORS = re.compile(
    r"(?P<layer>.+?)(?P<processor>\.processor)?"
    r"(?:\.lora_(?P<peft>[AB])|\.lora\.(?P<plain>down|up)|\.(?P<part>to_\w+?)_lora\.(?P<old>down|up)"
    r"|\.lora_linear_layer\.(?P<text>down|up))\.weight"
)


def read_diffusers(directory: Location, component: str | None) -> Files:
    """Return the config and the tensors of one component, as a PEFT directory would have them.

    Args:
        component: ``"unet"``, ``"transformer"``, ``"text_encoder"``, ...; ``None`` takes the only one that there is.

    Raises:
        ValueError: the file is damaged, of kohya's layout, or holds several components and none was chosen.
    """
    path = directory / DIFFUSERS_NAME
    try:
        tensors, strings = load_safetensors(path)
        metadata = json.loads(strings.get(_METADATA, "{}"))
    except Exception as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"{path} is damaged: its {_METADATA} is no JSON object")
    kohya = [key for key in tensors if key.startswith(("lora_unet_", "lora_te"))]
    if kohya:
        raise ValueError(f"{path} is of kohya's layout ({kohya[0]!r}); load it with diffusers and save it from there")
    components = sorted({key.split(".")[0] for key in tensors})
    if component is None and len(components) == 1:
        component = components[0]
    if component not in components:
        raise ValueError(f'{path} holds {components}; choose the one for this model with component="name"')
    own = {key[len(component) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{component}.")}
    wrong = [key for key, value in own.items() if key.endswith(".alpha") and value.numel() != 1]
    if wrong:
        raise ValueError(f"{path}: {wrong[0]!r} is {tuple(own[wrong[0]].shape)}, expected one number")
    pairs = {_peft_key(key, path): value for key, value in own.items() if not key.endswith(".alpha")}
    alphas = {_layer(key.removesuffix(".alpha")): float(value) for key, value in own.items() if key.endswith(".alpha")}
    recorded = {k[len(component) + 1 :]: v for k, v in metadata.items() if k.startswith(f"{component}.")}
    return Files(_config(pairs, alphas, recorded), pairs, {})


def _peft_key(key: str, path: Location) -> str:
    if key.endswith((".lora_magnitude_vector", ".lora_magnitude_vector.weight")):
        return f"{PREFIX}{key.removesuffix('.weight')}"
    if key.endswith(".lora_B.bias"):
        return f"{PREFIX}{key}"
    match = _FACTORS.fullmatch(key)
    if match is None:
        raise ValueError(f"{path}: tensor {key!r} is of a kind that is not supported")
    word = match["peft"] or match["plain"] or match["old"] or match["text"]
    factor = {"down": "A", "up": "B"}.get(word, word)
    layer = _layer(f"{match['layer']}.{match['part']}" if match["part"] else match["layer"])
    return f"{PREFIX}{layer}.lora_{factor}.weight"


def _layer(name: str) -> str:
    """Return the layer's name; attention processors kept ``to_out.0`` as ``to_out_lora`` beside the layers."""
    name = re.sub(r"\.processor\.(to_\w+?)_lora$", r".\1", name.replace(".lora_linear_layer", ""))
    name = name.removesuffix(".lora")
    return f"{name}.0" if name.endswith(".to_out") else name


def _config(pairs: Mapping[str, Tensor], alphas: Mapping[str, float], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Return PEFT's config: the one that diffusers recorded, or ranks from the tensors with alphas equal to them."""
    ranks = {
        parse_key(key).name: value.shape[0]
        for key, value in pairs.items()
        if key.endswith(".lora_A.weight") and value.ndim > 0
    }
    targets = sorted({parse_key(key).name for key in pairs})
    if recorded:
        return {"peft_type": "LORA", **recorded, "target_modules": targets}
    options = {"use_dora": ".lora_magnitude_vector", "lora_bias": ".lora_B.bias"}
    r, rank_pattern = anchored(ranks, 1)
    alpha, alpha_pattern = anchored({name: alphas.get(name, rank) for name, rank in ranks.items()}, 1)
    return {
        "peft_type": "LORA",
        "r": r,
        "lora_alpha": alpha,
        "target_modules": targets,
        **{option: True for option, ending in options.items() if any(key.endswith(ending) for key in pairs)},
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
