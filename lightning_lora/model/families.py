"""Find the pretrained models in a module, and answer for each family (transformers, Megatron-core) what differs.

A family is known by the full name of its base class, so that its package need not be installed. :func:`register_family`
is how another one is added.
"""

import contextlib
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from lightning_lora.compat.torch import compiled_module
from lightning_lora.compat.transformers import checkpoint_function
from lightning_lora.config import LoRAConfig
from lightning_lora.model.names import clean_name, named_modules, outermost


class Family:
    """What holds for all models of one family. The defaults are those of a model that needs nothing special."""

    class_name: ClassVar[str]  # "package.module.Class"
    own_loss: ClassVar[str | None] = None  # how to get the loss from the model, where linear_cross_entropy cannot

    def output_head(self, model: Any) -> nn.Module | None:
        """Return the layer that makes logits, if the model can name it, as transformers' models can."""
        get_output_embeddings = getattr(model, "get_output_embeddings", None)
        return get_output_embeddings() if callable(get_output_embeddings) else None

    def has_no_task_heads(self) -> bool:
        """Return True where no model of the family has a new, untrained head."""
        return False

    def check(self, model: nn.Module, config: LoRAConfig, adapted: Collection[str]) -> None:
        """Raise ``ValueError`` for settings that models of this family cannot be adapted with.

        Args:
            model: the root, which is of this family or holds a model that is.
            adapted: names of the layers to adapt, possibly none.
        """

    def check_quantization(self, kind: str, layers: Mapping[str, nn.Module]) -> None:
        """Raise ``ValueError`` for layers of a model of this family that cannot be quantised in a form.

        Args:
            layers: that are to be quantised, by name; some may be of another family's model.
        """

    def quantizing(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Return what layers of a model of this family, or one that holds such a model, are packed inside of."""
        return contextlib.nullcontext()

    def load_base(self, model: nn.Module, path: str) -> bool:
        """Copy a checkpoint's values into a model that is not adapted, if that is how the family is filled."""
        return False

    def skeleton(self, model: nn.Module) -> nn.Module | None:
        """Return the model's linear layers, without values, under the names that a PEFT directory has them by.

        ``None`` where these are the model's own names.
        """
        return None

    def adapted_view(self, model: nn.Module) -> tuple[nn.Module, Mapping[str, tuple[str, str]]]:
        """Return :meth:`skeleton`, adapted as ``model`` is, and ``{name in it: (layout, name in the model)}``."""
        raise NotImplementedError(f"{type(self).__name__} has no names of its own")

    def peft_name(self, parameter: str) -> str | None:
        """Return the name that a parameter has for PEFT; ``None`` where it has none."""
        return parameter


class Transformers(Family):
    """Models of transformers."""

    class_name = "transformers.modeling_utils.PreTrainedModel"


_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Let models whose class, or one that it is derived from, is called ``family.class_name`` be of this family."""
    _FAMILIES[family.class_name] = family


def family_of(model: nn.Module) -> Family | None:
    """Return the family that a pretrained model is of; ``None`` for any other module."""
    for cls in type(model).__mro__:
        family = _FAMILIES.get(f"{cls.__module__}.{cls.__qualname__}")
        if family is not None:
            return family
    return None


def families_in(model: nn.Module) -> list[Family]:
    """Return the families of the pretrained models in ``model``, itself included, each once."""
    found = {id(family): family for module in model.modules() if (family := family_of(module)) is not None}
    return list(found.values())


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the layer that makes a model's logits, if the model is of a family that has one, or can name it itself."""
    return (family_of(model) or Family()).output_head(model)


def is_pretrained(module: nn.Module) -> bool:
    """Whether this is a transformers model. transformers itself is not imported: no model without it."""
    return isinstance(family_of(module), Transformers)


register_family(Transformers())


def find_root(module: nn.Module, path: str | None = None) -> tuple[str, nn.Module]:
    """Return ``(path, root)``: the module named ``path``, else the one pretrained model inside, else ``module``.

    Pretrained models are those of the registered families: transformers' and Megatron-core's.

    Raises:
        ValueError: nothing has that name, or there are several pretrained models to choose from.
    """
    if path is not None:
        try:
            root = module.get_submodule(path)
            return path, compiled_module(root) or root
        except AttributeError:
            children = ", ".join(name for name, _ in module.named_children()) or "none"
            raise ValueError(
                f"module={path!r} names nothing in {type(module).__name__}; its children are: {children}"
            ) from None
    pretrained = {name: child for name, child in module.named_modules() if family_of(child) is not None}
    found = outermost(pretrained)
    if len(found) > 1:
        names = ", ".join(f"{name} ({type(pretrained[name]).__name__})" for name in found)
        raise ValueError(f'{type(module).__name__} holds several pretrained models: {names}. Choose with module="name"')
    return (clean_name(found[0]), pretrained[found[0]]) if found else ("", module)


def name_or_path(root: nn.Module) -> str | None:
    """Return where a transformers model says that its weights came from."""
    config: Any = getattr(root, "config", None)
    return getattr(config, "name_or_path", None) or None


def resize_advice(module: nn.Module, name: str, theirs: Sequence[int], ours: Sequence[int]) -> str:
    """Return what to do where a file's tensor differs from ``module``'s in the number of a vocabulary's tokens alone.

    Empty unless ``name`` is of the input embedding or the output head of a transformers model, adapters included.
    """
    table: Any = named_modules(module).get(name.rpartition(".")[0])
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


def let_gradients_through_checkpointed_blocks(root: nn.Module) -> None:
    """Make the output of frozen embeddings require grad where transformers checkpoints its blocks reentrantly.

    A reentrant checkpoint whose input needs no gradient gives its parameters none.
    """
    functions = [checkpoint_function(module) for module in root.modules()]
    reentrant = any(isinstance(f, functools.partial) and f.keywords.get("use_reentrant") for f in functions)
    if reentrant and callable(enable := getattr(root, "enable_input_require_grads", None)):
        enable()
