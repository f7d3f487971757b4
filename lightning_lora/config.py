"""What to adapt and how: :class:`LoRAConfig`, a frozen record that checks itself."""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, ParamSpec, TypeVar

PEFT_FIELD_NAMES = {
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "init_lora_weights": "init",
    "autocast_adapter_dtype": "adapter_dtype",
}
ADAPTER_DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")

P = ParamSpec("P")
T = TypeVar("T")


def answers_peft_names(init: Callable[P, T]) -> Callable[P, T]:
    """Let a constructor answer PEFT's field names with ours instead of "unexpected keyword"."""

    @functools.wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        for theirs, ours in PEFT_FIELD_NAMES.items():
            if theirs in kwargs:
                value = kwargs[theirs]
                if isinstance(value, bool):  # PEFT's switches are words here
                    value = "auto" if ours == "adapter_dtype" and not value else getattr(LoRAConfig, ours)
                raise TypeError(f"{theirs!r} is PEFT's name; here it is {ours!r}: write {ours}={value!r}")
        return init(*args, **kwargs)

    return checked


@dataclass(frozen=True)
class LoRAConfig:
    """Settings of one adapter: ``y = x W^T + b + scaling * dropout(x) A^T B^T`` (Hu et al. 2021, sec. 4.1).

    Attributes:
        r: rank, the number of rows of A and of columns of B.
        alpha: numerator of the scale, ``scaling = alpha / r``. ``None`` is twice each layer's own rank (scaling 2).
        dropout: probability in ``[0, 1)`` of zeroing an entry of the adapter's input while training.
        target_modules: which layers to adapt. A list names modules exactly or by a dotted suffix; a string is a regular
            expression that must match the whole name; ``"all-linear"`` is every linear layer but the output head.
        exclude_modules: layers to leave out, by the same rules; looked at first.
        modules_to_save: modules that train whole and are saved with the adapter. ``None`` trains the task heads that
            transformers adds new (``score``, ``classifier``, ``qa_outputs``, ...); an empty list trains none.
        bias: which biases of the base train: ``"none"``, ``"all"``, or ``"lora_only"`` (those of adapted layers).
        rank_pattern: own ranks, ``{pattern: r}``; a pattern is a regular expression for the end of a module's name, and
            the first that matches counts.
        alpha_pattern: own alphas, ``{pattern: alpha}``, in the same way.
        use_rslora: scale by ``alpha / sqrt(r)`` (Kalajdzievski 2023) instead of ``alpha / r``.
        layers_to_transform: indices of the blocks to adapt; applies to targets that match by suffix.
        layers_pattern: names of the block lists that those indices count in.
        init: starting values; ``"kaiming"`` draws A from U(-1/sqrt(in), 1/sqrt(in)) and sets B to zero.
        init_rng: ``"name"`` seeds each adapter's own generator from its name, so that values do not depend on the order
            of layers or the number of processes; ``"peft"`` draws from the default generator exactly as PEFT does.
        init_seed: mixed into the seed of ``init_rng="name"``; ``None`` takes the seed of ``seed_everything``, else 0.
        adapter_dtype: dtype that adapters are created in and never fall below: ``"float32"``, ``"bfloat16"``,
            ``"float16"``, ``"float64"``, or ``"auto"`` for the dtype of each base weight.

    Raises:
        ValueError, TypeError: a value is out of range or of the wrong type; the message says what was expected.
    """

    r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None
    bias: Literal["none", "all", "lora_only"] = "none"
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None
    use_rslora: bool = False
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    init: Literal["kaiming"] = "kaiming"
    init_rng: Literal["name", "peft"] = "name"
    init_seed: int | None = None
    adapter_dtype: str = "float32"

    def __post_init__(self) -> None:
        _check_rank("r", self.r)
        if self.alpha is not None:
            _check_alpha("alpha", self.alpha)
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} must be a probability in [0, 1)")
        _check_choice("bias", self.bias, ("none", "all", "lora_only"))
        _check_choice("init", self.init, ("kaiming",))
        _check_choice("init_rng", self.init_rng, ("name", "peft"))
        _check_choice("adapter_dtype", self.adapter_dtype, ADAPTER_DTYPES)
        if not isinstance(self.use_rslora, bool):
            raise TypeError(f"use_rslora={self.use_rslora!r} must be True or False")
        if self.init_seed is not None and (not isinstance(self.init_seed, int) or isinstance(self.init_seed, bool)):
            raise TypeError(f"init_seed={self.init_seed!r} must be an integer or None")
        for name in ("rank_pattern", "alpha_pattern"):
            _check_patterns(name, getattr(self, name))
        for key, rank in (self.rank_pattern or {}).items():
            _check_rank(f"rank_pattern[{key!r}]", rank)
        for key, alpha in (self.alpha_pattern or {}).items():
            _check_alpha(f"alpha_pattern[{key!r}]", alpha)
        if not self.target_modules:
            raise ValueError(
                f"target_modules={self.target_modules!r} adapts nothing; give a list of names, a regular expression, "
                'or "all-linear"'
            )
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"modules_to_save={self.modules_to_save!r} must be a list: [{self.modules_to_save!r}]")
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"):
            value = getattr(self, name)
            if value is not None and not _is_single(name, value):
                object.__setattr__(self, name, _as_list(name, value))
        if isinstance(self.target_modules, str) and (self.layers_to_transform is not None or self.layers_pattern):
            raise ValueError(
                "layers_to_transform and layers_pattern narrow a list of target_modules; with the string "
                f"{self.target_modules!r}, write the layers into it as a regular expression"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern={self.layers_pattern!r} says where layers_to_transform counts: give both")
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, dict(getattr(self, name) or {}))

    def scaling(self, r: int, alpha: float | None) -> float:
        """Return the factor of ``B A`` for a layer of rank ``r``; ``alpha=None`` is twice ``r``."""
        alpha = 2 * r if alpha is None else alpha
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values that JSON, YAML and a safe ``torch.load`` can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LoRAConfig":
        """Build a config from :meth:`to_dict`; a field of a newer version is an error that names it."""
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(
                f"unknown LoRAConfig fields {unknown}: written by a newer lightning_lora? Upgrade to read it"
            )
        return cls(**values)


LoRAConfig.__init__ = answers_peft_names(LoRAConfig.__init__)  # type: ignore[method-assign]  # dataclass made it


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_rank(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be an integer, the rank; got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}={value!r} must be at least 1")


def _check_alpha(name: str, value: object) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r} must be a number; got {type(value).__name__}")
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name}={value!r} must be a finite number above 0")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")


def _check_patterns(name: str, value: object) -> None:
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{name}={value!r} must be a mapping from a pattern to its value")
    for key in value or {}:
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"{name} key {key!r} is not a regular expression: {error}") from None


def _is_single(name: str, value: object) -> bool:
    """Whether a value stands for itself in a field that may also hold a list."""
    return (
        isinstance(value, int) and not isinstance(value, bool)
        if name == "layers_to_transform"
        else isinstance(value, str)
    )


def _as_list(name: str, value: Any) -> list[Any]:
    if isinstance(value, str) or not isinstance(value, (Sequence, Set)):
        raise TypeError(f"{name}={value!r} must be a list; got {type(value).__name__}")
    items = sorted(value) if isinstance(value, Set) else list(value)
    wanted = int if name == "layers_to_transform" else str
    for item in items:
        if not isinstance(item, wanted) or item == "":
            raise TypeError(f"{name} holds {item!r}; every entry must be a non-empty {wanted.__name__}")
    return items
