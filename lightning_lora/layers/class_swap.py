"""Give an object the class ``LoRA<Base>(mixin, Base)``, made at run time, and its old class back.

The object stays the same one, with its attributes, tensors and hooks, and is an instance of its former class, too.
"""

import copyreg
from typing import Any, ClassVar, TypeVar

from torch import nn
from typing_extensions import override


class SwappedModule(nn.Module):
    """Mixin of modules whose class is swapped in place; a copy or a pickle of one is of the same class."""

    class_prefix: ClassVar[str] = "LoRA"
    base_attribute: ClassVar[str] = "lora_base_class"  # where the made class keeps the class that it was made from

    lora_base_class: ClassVar[type[nn.Module]]
    lora_base_forward: ClassVar[Any]  # the base class's when the class was made: somebody may patch it later

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        # a made class has no importable name: pickle and deepcopy make it again from its two parents
        reduced: Any = super().__reduce_ex__(max(protocol, 2))
        function, arguments, *state = reduced
        assert function is copyreg.__newobj__, function  # type: ignore[attr-defined]  # missing in the stubs
        return (_new_object, (recipe(type(self)), *arguments[1:]), *state)


M = TypeVar("M")
_MADE_CLASSES: dict[tuple[type, type], Any] = {}


def lora_class(mixin: type[M], base: type) -> type[M]:
    """Return the class ``LoRA<Base>(mixin, Base)``, or with the mixin's own prefix; the same object on every call."""
    if (mixin, base) not in _MADE_CLASSES:
        prefix, base_attribute = (getattr(mixin, name, getattr(SwappedModule, name)) for name in _NAMES)
        namespace: dict[str, Any] = {"__module__": base.__module__, "__doc__": base.__doc__, base_attribute: base}
        namespace["lora_base_forward"] = getattr(base, "forward", None)
        _MADE_CLASSES[mixin, base] = type(f"{prefix}{base.__name__}", (mixin, base), namespace)
    made: type[M] = _MADE_CLASSES[mixin, base]
    return made


_NAMES = ("class_prefix", "base_attribute")


def swap_class(instance: object, mixin: type, base: type | None = None) -> None:
    """Give an object the made class of ``mixin`` and its own class, or of ``mixin`` and ``base``."""
    instance.__class__ = lora_class(mixin, base or type(instance))


def restore_class(module: SwappedModule, *attributes: str) -> None:
    """Give a module the class back that :func:`swap_class` took, and delete ``attributes`` of the mixin's."""
    for name in attributes:
        del module.__dict__[name]
    # the first that was made: FSDP2 may have put a class of its own before it
    made = next(cls for cls in type(module).__mro__ if cls in _MADE_CLASSES.values())
    module.__class__ = made.__bases__[1]


def recipe(cls: type) -> Any:
    """Return what pickle can write of a class: the class itself, or the two parents that it was made from."""
    made = _MADE_CLASSES.get(cls.__bases__) if len(cls.__bases__) == 2 else None
    return (cls.__bases__[0], recipe(cls.__bases__[1])) if made is cls else cls


def class_of(parents: Any) -> type:
    """Return the class of which :func:`recipe` returned the parents."""
    return lora_class(parents[0], class_of(parents[1])) if isinstance(parents, tuple) else parents


def _new_object(parents: Any, *arguments: Any) -> Any:
    cls = class_of(parents)
    return cls.__new__(cls, *arguments)
