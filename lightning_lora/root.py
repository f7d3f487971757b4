"""The root: the pretrained model inside a user's module, where freezing, injection and export stay."""

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

# transformers names the classes that put a new, untrained head on a pretrained body after their task
_NEW_HEAD_TASKS = (
    "SequenceClassification",
    "TokenClassification",
    "QuestionAnswering",
    "MultipleChoice",
    "ImageClassification",
    "VideoClassification",
    "AudioClassification",
    "AudioFrameClassification",
    "XVector",
    "NextSentencePrediction",
    "SemanticSegmentation",
)


def find_root(module: nn.Module, path: str | None = None) -> tuple[str, nn.Module]:
    """Return ``(path, root)``: the module named ``path``, else the one pretrained model inside, else ``module``.

    Pretrained models are transformers' and Megatron-core's.

    Raises:
        ValueError: nothing has that name, or there are several pretrained models to choose from.
    """
    if path is not None:
        try:
            root = module.get_submodule(path)
            return path, root._modules.get("_orig_mod") or root  # what torch.compile wrapped
        except AttributeError:
            children = ", ".join(name for name, _ in module.named_children()) or "none"
            raise ValueError(
                f"module={path!r} names nothing in {type(module).__name__}; its children are: {children}"
            ) from None
    found: dict[str, nn.Module] = {}
    for name, child in module.named_modules():
        is_model = is_pretrained(child) or is_megatron(child)
        if is_model and not any(name.startswith(f"{outer}.") or not outer for outer in found):
            found[name] = child
    if len(found) > 1:
        names = ", ".join(f"{name} ({type(child).__name__})" for name, child in found.items())
        raise ValueError(f'{type(module).__name__} holds several pretrained models: {names}. Choose with module="name"')
    return next(iter((clean_name(n), child) for n, child in found.items())) if found else ("", module)


def clean_name(name: str) -> str:
    """Return a parameter's or module's name without the parts that ``torch.compile`` puts in."""
    if "_orig_mod" not in name:
        return name
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def is_inside(name: str, path: str) -> bool:
    """Whether a clean name is ``path`` or lies below it; everything lies below ``""``."""
    return not path or name == path or name.startswith(f"{path}.")


def is_pretrained(module: nn.Module) -> bool:
    """Whether this is a transformers model. transformers itself is not imported: no model without it."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(module, modeling.PreTrainedModel)


def is_megatron(module: nn.Module) -> bool:
    """Whether this is Megatron-core's ``GPTModel``. Megatron-core itself is not imported: no model without it."""
    gpt = sys.modules.get("megatron.core.models.gpt.gpt_model")
    return gpt is not None and isinstance(module, gpt.GPTModel)


def new_heads(root: nn.Module) -> list[str]:
    """Return the names of the children that transformers added new for a task, such as ``score`` or ``classifier``."""
    if not is_pretrained(root) or not any(f"For{task}" in type(root).__name__ for task in _NEW_HEAD_TASKS):
        return []
    body = getattr(root, "base_model", None)
    return [
        name for name, child in root.named_children() if child is not body and any(True for _ in child.parameters())
    ]


def resize_advice(module: nn.Module, name: str, theirs: Sequence[int], ours: Sequence[int]) -> str:
    """Return what to do where a file's tensor differs from ``module``'s in the number of a vocabulary's tokens alone.

    Empty unless ``name`` is of the input embedding or the output head of a transformers model, adapters included.
    """
    table: Any = {clean_name(n): part for n, part in module.named_modules()}.get(name.rpartition(".")[0])
    tokens = getattr(table, "num_embeddings", None) or getattr(table, "out_features", None)
    other = [sizes for sizes in zip(theirs, ours, strict=False) if sizes[0] != sizes[1]]
    if len(theirs) != len(ours) or len(other) != 1 or other[0][1] != tokens:
        return ""
    if not any(is_pretrained(model) and _is_token_table(model, table) for model in module.modules()):
        return ""
    return f": call model.resize_token_embeddings({other[0][0]}) before the model is adapted"


def _is_token_table(model: Any, module: nn.Module) -> bool:
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        with contextlib.suppress(NotImplementedError, AttributeError):  # a model of sounds or images
            if get() is module:
                return True
    return False


def name_or_path(root: nn.Module) -> str | None:
    """Return where a transformers model says that its weights came from."""
    config: Any = getattr(root, "config", None)
    return getattr(config, "_name_or_path", None) or None
