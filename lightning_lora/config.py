"""What to adapt and how: :class:`LoRAConfig`, a frozen record that checks itself."""

import functools
import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, fields
from reprlib import Repr
from typing import Any, Literal, ParamSpec, TypeVar

from lightning_lora.adalora import AdaLoRA

P = ParamSpec("P")
T = TypeVar("T")
Quantization = Literal["nf4", "nf4-dq", "int8"]  # the words of quantize=
# the values of init, where N stands for a number, and whether they start from the base: model/init.py registers them
INITS: dict[str, bool] = {}
# fields that hold lists, and the type of one entry, which four of them take in the place of a list
_LISTS: dict[str, tuple[type, bool]] = {
    "target_modules": (str, True),
    "target_parameters": (str, False),
    "exclude_modules": (str, True),
    "modules_to_save": (str, False),
    "layers_to_transform": (int, True),
    "layers_pattern": (str, True),
}


def answering_other_names(function: Callable[P, T], asked: str = "") -> Callable[P, T]:
    """Make a function answer other libraries' names of a setting with ours instead of "unexpected keyword".

    Args:
        asked: what the answers call the function; its own name by default.
    """
    known = inspect.signature(function).parameters

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        if kwargs.keys() - known:
            from lightning_lora.peft.words import answer  # the folder of PEFT's format imports this file

            for name in kwargs:
                if name not in known and (message := answer(name, kwargs[name], asked or function.__name__)):
                    raise TypeError(message)
        return function(*args, **kwargs)

    return checked


def _checking_rank(init: Callable[P, None]) -> Callable[P, None]:
    """Make LoRAConfig refuse a rank beside AdaLoRA that was given, also one that equals the default."""

    @functools.wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        init(*args, **kwargs)
        config: Any = args[0]
        given = args[1] if len(args) > 1 else kwargs.get("r", config.r)
        is_one_of_all = len(kwargs) == len(fields(LoRAConfig))  # as dataclasses.replace and LightningCLI give them
        if config.adalora is not None and given != config.r and not is_one_of_all:
            raise ValueError(config.adalora.refusal_of_rank(given))

    return checked


@dataclass(frozen=True)
class LoRAConfig:
    """Settings of one adapter: ``y = x W^T + b + scaling * dropout(x) A^T B^T`` (Hu et al. 2021, sec. 4.1).

    Attributes:
        r: rank, the number of rows of A and of columns of B. A layer that is smaller is an error by name; under
            ``"all-linear"`` its rank is its size, at the scale of the rank that was asked for, and a line names it.
        alpha: numerator of the scale, ``scaling = alpha / r``. ``None`` is twice each layer's own rank (scaling 2).
        dropout: probability in ``[0, 1)`` of zeroing an entry of the adapter's input while training.
        target_modules: which layers to adapt. A list names modules exactly or by a dotted suffix; a string is a regular
            expression that must match the whole name; ``"all-linear"`` is every linear layer but the output head.
        exclude_modules: layers to leave out, by the same rules; looked at first.
        modules_to_save: modules that train whole and are saved with the adapter: each entry is the full name of one, or
            the end of the names of several. ``None`` trains the task heads that transformers adds new (``score``,
            ``classifier``, ``qa_outputs``, ...), whatever ``target_modules`` hits in them; an empty list trains none.
        bias: which biases of the base train: ``"none"``, ``"all"``, or ``"lora_only"`` (those of adapted layers).
        rank_pattern: own ranks, ``{pattern: r}``; a pattern is a regular expression for the end of a module's name, and
            the first that matches counts.
        alpha_pattern: own alphas, ``{pattern: alpha}``, in the same way.
        use_rslora: scale by ``alpha / sqrt(r)`` (Kalajdzievski 2023) instead of ``alpha / r``.
        use_dora: train the length of every row of ``W + scaling * B A`` apart from its direction (Liu et al. 2024).
        lora_bias: give every adapter a bias, ``y = base(x) + scaling * (B A x + c)``.
        layers_to_transform: indices of the blocks to adapt; applies to targets that match by suffix.
        layers_pattern: names of the block lists that those indices count in.
        target_parameters: names, or dotted suffixes, of parameters to adapt that their module reads itself: the 3-D
            tensors of fused experts (``"mlp.experts.gate_up_proj"``) or a router's matrix. The factors are kept apart.
        trainable_token_indices: rows of the input embedding that train whole, ``[32000, 32001]``; or
            ``{"embed_tokens": [...], "lm_head": [...]}`` to name embeddings and output heads. What is tied follows.
        fused_pairs: give Megatron-core's ``linear_qkv`` and ``linear_fc1`` one pair each, instead of one for each of
            q, k, v, gate and up, which they stack. A PEFT directory then holds copies of A.
        init: starting values. ``"kaiming"`` draws A from U(-1/sqrt(in), 1/sqrt(in)) and sets B to zero; ``"gaussian"``
            draws A from N(0, 1/r^2); ``"orthogonal"`` draws both so that B A = 0 (even ranks). ``"pissa"`` starts from
            the largest singular values of W (Meng et al. 2024), ``"pissa_niter_4"`` from their fast estimate with so
            many power iterations, ``"olora"`` from its QR decomposition (Buyukakyuz 2024); their start is subtracted in
            the product and the base stays as it is.
        init_rng: ``"name"`` seeds each adapter's own generator from its name, so that values do not depend on the order
            of layers or the number of processes; ``"peft"`` draws from the default generator exactly as PEFT does.
        init_seed: mixed into the seed of ``init_rng="name"``; ``None`` takes the seed of ``seed_everything``, else 0.
        adapter_dtype: dtype that adapters are created in, and that whatever trains (heads and biases of the base too)
            never falls below: ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"float64"``, or ``"auto"`` for the dtype
            of each base weight. Heads and biases are cast to the base's dtype where they are read.
        adalora: start every layer at ``init_r`` and prune the least important ranks while training: see
            :class:`~lightning_lora.AdaLoRA`. ``r`` is then ``init_r``, and A and B start from N(0, 0.02^2), E at zero.
        fuse: compute layers that read one input, gated MLPs, RMS norms and experts by functions that save less for
            backward, where they are recognised. It changes no result beyond rounding and nothing in a file: ``False``
            runs every module's own code, as to find out whether fusing causes a difference.

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
    use_dora: bool = False
    lora_bias: bool = False
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    target_parameters: Sequence[str] | None = None
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    fused_pairs: bool = False
    init: str = "kaiming"
    init_rng: Literal["name", "peft"] = "name"
    init_seed: int | None = None
    adapter_dtype: str = "float32"
    adalora: AdaLoRA | None = None
    fuse: bool = True

    def __post_init__(self) -> None:
        _check_rank("r", self.r)
        if self.alpha is not None:
            _check_alpha("alpha", self.alpha)
        object.__setattr__(self, "adalora", AdaLoRA.of(self.adalora))
        for name, (is_right, error, expected) in _RULES.items():
            if not is_right(getattr(self, name)):
                raise error(f"{name}={getattr(self, name)!r} must be {expected}")
        if _registered_init(self.init) is None:
            *words, last = map(repr, INITS)
            raise ValueError(f"init={self.init!r} must be one of {', '.join(words)} or {last}")
        object.__setattr__(self, "rank_pattern", _patterns("rank_pattern", self.rank_pattern, _check_rank))
        object.__setattr__(self, "alpha_pattern", _patterns("alpha_pattern", self.alpha_pattern, _check_alpha))
        object.__setattr__(self, "trainable_token_indices", _token_indices(self.trainable_token_indices))
        if not self.target_modules and not self.target_parameters:
            raise ValueError(
                f"target_modules={self.target_modules!r} adapts nothing; give a list of names, a regular expression, "
                '"all-linear", or target_parameters'
            )
        for name in _LISTS:
            object.__setattr__(self, name, _as_list(name, getattr(self, name)))
        for is_given, message in _exclusions(self):
            if is_given:
                raise ValueError(message)
        if self.adalora is not None:
            object.__setattr__(self, "r", self.adalora.init_r)

    @property
    def starts_from_base(self) -> bool:
        """Whether the adapters start at a part of the base weight, which is then subtracted in the product."""
        return INITS[_registered_init(self.init) or ""]

    def scaling(self, r: int, alpha: float | None) -> float:
        """Return the factor of ``B A`` for a layer of rank ``r``; ``alpha=None`` is twice ``r``."""
        alpha = 2 * r if alpha is None else alpha
        if self.adalora is not None:
            return alpha / (r + 1e-5)  # as PEFT divides
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

    @classmethod
    def from_peft(cls, config: Any) -> "LoRAConfig":
        """Return the settings of a ``peft.LoraConfig``, of its ``to_dict()``, or of a PEFT directory.

        Fields that say nothing about training (``task_type``, ``fan_in_fan_out``, ...) are left out.

        Raises:
            ValueError: it is no LoRA config, leaves the targets to PEFT's table, or uses what is not supported here.
        """
        from lightning_lora.peft.config import from_peft  # the folder of PEFT's format imports this file

        return from_peft(config)

    def to_peft(self) -> dict[str, Any]:
        """Return keyword arguments for ``peft.LoraConfig`` that mean the same adapter."""
        from lightning_lora.peft.config import to_peft

        return to_peft(self)


# dataclass made both
LoRAConfig.__init__ = answering_other_names(_checking_rank(LoRAConfig.__init__), "LoRAConfig")  # type: ignore[method-assign]
AdaLoRA.__init__ = answering_other_names(AdaLoRA.__init__, "AdaLoRA")  # type: ignore[method-assign]


def _exclusions(config: LoRAConfig) -> Iterator[tuple[Any, str]]:
    """Yield the pairs of options that exclude one another, most of them in PEFT too: (are both given, message)."""
    targets, blocks, lists = config.target_modules, config.layers_to_transform, config.layers_pattern
    for name in ("use_dora", "lora_bias"):
        given, message = getattr(config, name), f"{name}=True cannot be had with "
        yield given and config.target_parameters, f"{message}target_parameters={config.target_parameters}"
        message += f"init={config.init!r}, which starts from a part of the base: give init='kaiming', 'gaussian' or "
        yield given and config.starts_from_base, f"{message}'orthogonal'"
    if config.adalora is not None:
        yield from config.adalora.exclusions(config)
    message = "use_dora=True and lora_bias=True exclude one another, as in PEFT: give one of them"
    yield config.use_dora and config.lora_bias, message
    message = (
        f"dropout={config.dropout} cannot be had with target_parameters: the model multiplies by those weights "
        "itself, so there is no input of the adapter to drop entries of (PEFT reads no such adapter either). "
        "Give dropout=0"
    )
    yield config.target_parameters and config.dropout, message
    message = (
        "layers_to_transform and layers_pattern narrow a list of target_modules; with the string "
        f"{targets!r}, write the layers into it as a regular expression"
    )
    yield isinstance(targets, str) and (blocks is not None or lists), message
    message = f"layers_pattern={lists!r} says where layers_to_transform counts: give both"
    yield lists and blocks is None, message


def _registered_init(init: object) -> str | None:
    """Return the word of :data:`INITS` that ``init`` is."""
    matches = (word for word in INITS if isinstance(init, str) and re.fullmatch(word.replace("N", r"\d+"), init))
    return next(matches, None)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _one_of(*words: str) -> tuple[Callable[[Any], object], type[Exception], str]:
    return words.__contains__, ValueError, f"one of {', '.join(map(repr, words))}"


_SWITCHES = ("use_rslora", "use_dora", "lora_bias", "fused_pairs", "fuse")
# what the value of a field must be: (test, error, words)
_RULES: dict[str, tuple[Callable[[Any], object], type[Exception], str]] = {
    "dropout": (lambda value: _is_number(value) and 0 <= value < 1, ValueError, "a probability in [0, 1)"),
    "bias": _one_of("none", "all", "lora_only"),
    "init_rng": _one_of("name", "peft"),
    "adapter_dtype": _one_of("float32", "bfloat16", "float16", "float64", "auto"),
    "init_seed": (lambda value: value is None or _is_integer(value), TypeError, "an integer or None"),
    **dict.fromkeys(_SWITCHES, (lambda value: isinstance(value, bool), TypeError, "True or False")),
}


def _check_rank(name: str, value: Any) -> None:
    if not _is_integer(value):
        raise TypeError(f"{name}={value!r} must be an integer, the rank; got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}={value!r} must be at least 1")


def _check_alpha(name: str, value: Any) -> None:
    if not _is_number(value):
        raise TypeError(f"{name}={value!r} must be a number; got {type(value).__name__}")
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name}={value!r} must be a finite number above 0")


def _patterns(name: str, value: Any, check: Callable[[str, Any], None]) -> dict[str, Any]:
    """Return ``rank_pattern`` or ``alpha_pattern`` as a plain dict."""
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{name}={brief(value)} must be a mapping from a pattern to its value")
    for key, item in (value or {}).items():
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"{name} key {key!r} is not a regular expression: {error}") from None
        check(f"{name}[{key!r}]", item)
    return dict(value or {})


def _token_indices(value: Any) -> Any:
    """Return plain lists of integers, or ``None``."""
    if value is None:
        return None
    lists: dict[str, list[int]] = {}
    for name, ids in (value if isinstance(value, Mapping) else {"": value}).items():
        if isinstance(ids, str) or not isinstance(ids, Sequence) or not ids:
            raise TypeError(
                f"trainable_token_indices={brief(value)} must be a list of token ids, or such lists by embedding"
            )
        for index in ids:
            if not _is_integer(index) or index < 0:
                raise TypeError(f"trainable_token_indices holds {brief(index)}; every entry must be an integer from 0")
        lists[name] = list(ids)
    return lists if isinstance(value, Mapping) else lists[""]


def _as_list(name: str, value: Any) -> Any:
    """Return a plain list, or what stands for itself in the field: ``None``, or one entry where that is allowed."""
    entry, may_be_single = _LISTS[name]
    if value is None or (may_be_single and isinstance(value, entry) and not isinstance(value, bool)):
        return value
    if isinstance(value, str) and not may_be_single:
        raise TypeError(f"{name}={value!r} must be a list: [{value!r}]")
    if isinstance(value, str) or not isinstance(value, (Sequence, Set)):
        raise TypeError(f"{name}={brief(value)} must be a list; got {type(value).__name__}")
    items = sorted(value) if isinstance(value, Set) else list(value)
    for item in items:
        if not isinstance(item, entry) or item == "":
            raise TypeError(f"{name} holds {brief(item)}; every entry must be a non-empty {entry.__name__}")
    return items


_BRIEF = Repr()
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxset = _BRIEF.maxdict = 6
_BRIEF.maxstring = _BRIEF.maxother = 120


def brief(value: object) -> str:
    """Return ``repr(value)``, of a long list or text its beginning."""
    return _BRIEF.repr(value)
