"""Choose what trains of the base itself: new heads, whole modules, biases, and single rows of embeddings."""

import re
from collections.abc import Collection, Iterable, Mapping

from torch import nn

from lightning_lora.compat.transformers import was_made
from lightning_lora.config import LoRAConfig
from lightning_lora.model.families import family_of, is_pretrained
from lightning_lora.model.names import clean_name, named_modules, nearest_names, outermost
from lightning_lora.ops.quantized import check_plain


def select_token_rows(model: nn.Module, config: LoRAConfig) -> dict[str, tuple[nn.Module, list[nn.Module], list[int]]]:
    """Return the tables with rows that train: ``{name: (embedding or output head, modules tied to it, token ids)}``.

    Raises:
        ValueError: no table is meant, one is meant twice, or a module of another kind is tied to it.
    """
    wanted = config.trainable_token_indices
    if wanted is None:
        return {}
    modules = named_modules(model)
    if not isinstance(wanted, Mapping):
        wanted = {_input_embedding(model, modules): wanted}
    selected: dict[str, tuple[nn.Module, list[nn.Module], list[int]]] = {}
    for entry, token_ids in wanted.items():
        names = [n for n, m in modules.items() if (n == entry or n.endswith(f".{entry}")) and _is_table(m)]
        if len(names) != 1:
            raise ValueError(
                f"trainable_token_indices: {entry!r} names {len(names)} embeddings or output heads of "
                f"{type(model).__name__}, expected one{nearest_names([entry], modules)}"
            )
        weight = modules[names[0]]._parameters.get("weight")
        check_plain(f"trainable_token_indices: the weight of {names[0]!r}", weight)
        tied = {n: m for n, m in modules.items() if m._parameters.get("weight") is weight}
        if not all(_is_table(module) for module in tied.values()):
            raise ValueError(
                f"trainable_token_indices: the weight of {names[0]!r} is tied to more than embeddings and linear heads"
            )
        first, *_ = tied  # a checkpoint has the rows under this name
        _, _, rows = selected.setdefault(first, (tied.pop(first), list(tied.values()), list(token_ids)))
        if rows != list(token_ids):
            raise ValueError(
                f"trainable_token_indices lists other rows for {entry!r} than for {first!r}, which is the same tensor"
            )
    return selected


def _is_table(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) or type(module) is nn.Linear


def _input_embedding(model: nn.Module, modules: Mapping[str, nn.Module]) -> str:
    get_input_embeddings = getattr(model, "get_input_embeddings", None)
    embedding = get_input_embeddings() if callable(get_input_embeddings) else None
    return next((name for name, module in modules.items() if module is embedding), "embed_tokens")


def select_trained_whole(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the full names of the modules that ``modules_to_save`` means.

    These are the module of that very name, or else all whose names end in the entry.
    """
    modules = named_modules(model)
    found: set[str] = set()
    for entry in names:
        hits = {entry} if entry in modules else {name for name in modules if name.endswith(entry)}
        if not hits:
            nearest = nearest_names([entry], modules)
            raise ValueError(f"modules_to_save entry {entry!r} matches no module of {type(model).__name__}{nearest}")
        found |= hits
    ordered = [name for name in modules if name in found]
    for name in ordered:
        for local, parameter in modules[name].named_parameters():
            check_plain(f"modules_to_save: {name}.{local}", parameter)
    return outermost(ordered)


def base_that_trains(
    model: nn.Module, trained_whole: Collection[str], adapted: Iterable[nn.Module], bias: str
) -> dict[str, int]:
    """Return the base parameters that train by design, by clean name with their sizes; tied ones by their first.

    Args:
        trained_whole: names of modules, and of parameters that modules hold themselves, that train whole.
        adapted: layers whose biases train with ``bias="lora_only"``.
    """
    modules = named_modules(model)
    wanted = {id(p) for name in trained_whole if name in modules for p in modules[name].parameters()}
    if bias == "lora_only":
        wanted |= {id(own) for layer in adapted if (own := layer._parameters.get("bias")) is not None}
    found = {}
    for full_name, parameter in model.named_parameters():
        name = clean_name(full_name)
        is_bias = bias == "all" and name.rpartition(".")[2] == "bias"
        if id(parameter) in wanted or name in trained_whole or is_bias:
            found[name] = parameter.numel()
    return found


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
        return outermost(
            [
                name
                for name, module in named_modules(root).items()
                if _has_matrix(module) and not any(was_made(part) for part in module.modules())
            ]
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
