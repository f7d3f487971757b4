"""Find the task heads of a pretrained model that are new and untrained."""

import contextlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lightning_lora.compat.transformers import was_made
from lightning_lora.model.families import family_of, is_pretrained
from lightning_lora.model.names import clean_name, is_inside

# transformers names the classes that put a new, untrained head on a pretrained body after their task; the heads of
# other tasks come with the checkpoint, as a language model's does
_NEW_HEAD = re.compile(
    r"For\w*(Classification|QuestionAnswering|MultipleChoice|CTC|XVector|NextSentencePrediction|ObjectDetection"
    r"|(Semantic|Instance|Universal)Segmentation|(Depth|Pose|Normal|Pointmap)Estimation|DensePrediction"
    r"|ImageMatting|Regression|VisualReasoning|RegionToPhraseAlignment|ImageAndTextRetrieval|VideoGrounding)"
    r"|(DetrForSegmentation|PatchTSTForPrediction|PatchTSMixerForPrediction)"
)


# the layers of detectors that have a row for every label, wherever they lie
_LABEL_LAYERS = ("class_embed", "enc_out_class_embed", "enc_score_head", "denoising_class_embed")


def new_heads(root: nn.Module) -> list[str]:
    """Return the clean names of the new heads that transformers put on the models in ``root``, such as ``score``.

    These are modules, and parameters that a model holds itself. A head that lies under several names has its first.
    """
    heads: dict[int, None] = {}
    for model in root.modules():
        if is_pretrained(model) and is_new_head_task(type(model).__name__):
            heads |= dict.fromkeys(map(id, _heads_of(model)))
    if not heads:
        return []
    names = {id(module): name for name, module in root.named_modules()}
    names |= {id(parameter): name for name, parameter in root.named_parameters()}
    return [clean_name(names[key]) for key in heads if key in names]


def is_new_head_task(class_name: str) -> bool:
    """Whether a transformers class of that name puts a new head on a body."""
    return _NEW_HEAD.search(class_name) is not None


def _heads_of(model: nn.Module) -> list[nn.Module | nn.Parameter]:
    """Return the parts of a transformers model beside its body, but for those that are tied to the body.

    The body is what ``base_model`` names. Of a model that names none (T5's for answers, Whisper's for classes), it ends
    with the last child that is a transformers model, or else before the last child.
    """
    children = [child for child in model.children() if next(child.parameters(), None) is not None]
    body = getattr(model, "base_model", model)
    if body is model:
        ends = [index + 1 for index, child in enumerate(children) if is_pretrained(child)]
        heads = children[ends[-1] if ends else -1 :]
    else:
        heads = [child for child in children if child is not body]
    if type(body).__name__ == "PerceiverModel":  # it is built around the decoder of its task
        heads.append(body.get_submodule("decoder"))
    own = {module for head in heads for module in head.modules()}
    elsewhere = {p for module in model.modules() if module not in own for p in module._parameters.values()}
    free = [head for head in heads if elsewhere.isdisjoint(head.parameters())]
    labels = [module for name, module in model.named_modules() if name.rpartition(".")[2] in _LABEL_LAYERS]
    direct = [] if body is model else [*model.parameters(recurse=False)]
    return [*free, *(one for one in labels if one not in own and next(one.parameters(), None) is not None), *direct]


def perhaps_new_heads(root: nn.Module) -> list[str]:
    """Return the clean names of modules that may be a new head of the user's; no class name tells for certain.

    In a transformers model they are the modules that transformers did not make; elsewhere they are what follows the
    last large child.
    """
    family = family_of(root)
    if family is not None and family.has_no_task_heads():
        return []
    if is_pretrained(root):
        if not was_made(root):  # it marks what it gave values; on the meta device nothing
            return []
        return _outermost(
            clean_name(name)
            for name, module in root.named_modules()
            if _has_matrix(module) and not any(was_made(part) for part in module.modules())
        )
    prefix, children = "", [*root.named_children()]
    while len(children) == 1 and [*children[0][1].children()]:
        prefix += f"{children[0][0]}."
        children = [*children[0][1].named_children()]
    children = [(name, child) for name, child in children if _has_matrix(child)]
    sizes = [sum(1 for _ in child.modules()) for _, child in children]
    last_large = max((index for index, size in enumerate(sizes) if 2 * size >= max(sizes)), default=0)
    return [clean_name(prefix + name) for name, _ in children[last_large + 1 :] or children[-1:]]


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters())


def _outermost(names: Iterable[str]) -> list[str]:
    kept: list[str] = []
    for name in names:  # parents come first
        if not any(is_inside(name, other) for other in kept):
            kept.append(name)
    return kept


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
