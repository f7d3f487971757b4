"""What to adapt and how: :class:`LoRAConfig`, a frozen record that checks itself."""

import functools
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, fields
from reprlib import Repr
from typing import Any, Literal, ParamSpec, TypeVar

from lightning_lora.checkpoint.storage import location

PEFT_FIELD_NAMES = {
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "init_lora_weights": "init",
    "autocast_adapter_dtype": "adapter_dtype",
}
# fields of PEFT's config that change what an adapter computes and have no counterpart here
PEFT_UNSUPPORTED = (
    "alora_invocation_tokens",
    "layer_replication",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "megatron_config",
    "velora_config",
    "kasa_config",
    "monteclora_config",
)
_PEFT_SAME_NAMES = (
    "r",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "bias",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "lora_bias",
    "layers_to_transform",
    "layers_pattern",
    "target_parameters",
    "trainable_token_indices",
)
# the values of init, where N stands for a number, and whether they start from the base: model/init.py registers them
INITS: dict[str, bool] = {}
ADAPTER_DTYPES = ("float32", "bfloat16", "float16", "float64", "auto")

_LISTS = (
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
)

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
    fuse: bool = True

    def __post_init__(self) -> None:
        _check_rank("r", self.r)
        if self.alpha is not None:
            _check_alpha("alpha", self.alpha)
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout!r} must be a probability in [0, 1)")
        _check_choice("bias", self.bias, ("none", "all", "lora_only"))
        _check_init(self.init)
        _check_choice("init_rng", self.init_rng, ("name", "peft"))
        _check_choice("adapter_dtype", self.adapter_dtype, ADAPTER_DTYPES)
        for name in ("use_rslora", "use_dora", "lora_bias", "fused_pairs", "fuse"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r} must be True or False")
        _check_combination(self)
        if self.init_seed is not None and (not isinstance(self.init_seed, int) or isinstance(self.init_seed, bool)):
            raise TypeError(f"init_seed={self.init_seed!r} must be an integer or None")
        for name in ("rank_pattern", "alpha_pattern"):
            _check_patterns(name, getattr(self, name))
        for key, rank in (self.rank_pattern or {}).items():
            _check_rank(f"rank_pattern[{key!r}]", rank)
        for key, alpha in (self.alpha_pattern or {}).items():
            _check_alpha(f"alpha_pattern[{key!r}]", alpha)
        if not self.target_modules and not self.target_parameters:
            raise ValueError(
                f"target_modules={self.target_modules!r} adapts nothing; give a list of names, a regular expression, "
                '"all-linear", or target_parameters'
            )
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"modules_to_save={self.modules_to_save!r} must be a list: [{self.modules_to_save!r}]")
        if isinstance(self.target_parameters, str):
            raise TypeError(
                f"target_parameters={self.target_parameters!r} must be a list: [{self.target_parameters!r}]"
            )
        if self.target_parameters and self.dropout:
            raise ValueError(
                f"dropout={self.dropout} cannot be had with target_parameters: the model multiplies by those weights "
                "itself, so there is no input of the adapter to drop entries of (PEFT reads no such adapter either). "
                "Give dropout=0"
            )
        object.__setattr__(self, "trainable_token_indices", _token_indices(self.trainable_token_indices))
        for name in _LISTS:
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

    @property
    def starts_from_base(self) -> bool:
        """Whether the adapters start at a part of the base weight, which is then subtracted in the product."""
        return INITS[_registered_init(self.init) or ""]

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

    @classmethod
    def from_peft(cls, config: Any) -> "LoRAConfig":
        """Return the settings of a ``peft.LoraConfig``, of its ``to_dict()``, or of a PEFT directory.

        Fields that say nothing about training (``task_type``, ``fan_in_fan_out``, ...) are left out.

        Raises:
            ValueError: it is no LoRA config, leaves the targets to PEFT's table, or uses what is not supported here.
        """
        values = _peft_values(config)
        kind = getattr(values.get("peft_type", "LORA"), "value", values.get("peft_type", "LORA"))
        if kind != "LORA":
            raise ValueError(f"{_described(config)} describes a {brief(kind)} adapter; only 'LORA' is read")
        used = [name for name in PEFT_UNSUPPORTED if values.get(name)]
        if used:
            raise ValueError(f"PEFT's {used[0]}={brief(values[used[0]])} is not supported")
        init = values.get("init_lora_weights", True)
        if init is False or (isinstance(init, str) and init in ("eva", "corda", "loftq", "lora_ga", "mica")):
            raise ValueError(f"PEFT's init_lora_weights={init!r} is not supported")
        if values.get("target_modules") is None and not values.get("target_parameters"):
            raise ValueError("target_modules=None leaves the targets to PEFT's table of models: name them")
        same = {name: values[name] for name in _PEFT_SAME_NAMES if values.get(name) is not None}
        if values.get("target_modules") is None:
            same["target_modules"] = []
        return cls(
            **same,
            alpha=values.get("lora_alpha", 8),
            dropout=values.get("lora_dropout", 0.0),
            init="kaiming" if init is True else init,
            init_rng="peft",
        )

    def to_peft(self) -> dict[str, Any]:
        """Return keyword arguments for ``peft.LoraConfig`` that mean the same adapter."""
        alphas: dict[str, float] = dict(self.alpha_pattern or {})
        if self.alpha is None:  # an alpha of the user's own counts, and comes first
            alphas |= {key: 2 * r for key, r in (self.rank_pattern or {}).items() if key not in alphas}
        same = {name: getattr(self, name) for name in _PEFT_SAME_NAMES}
        return {
            **same,
            "lora_alpha": 2 * self.r if self.alpha is None else self.alpha,
            "lora_dropout": self.dropout,
            "alpha_pattern": alphas,
            "init_lora_weights": True if self.init == "kaiming" else self.init,
        }


def _peft_values(config: Any) -> dict[str, Any]:
    if isinstance(config, (str, os.PathLike)):
        path = location(config)
        path = path / "adapter_config.json" if path.is_dir() else path
        values = json.loads(path.read_text())
    else:
        values = config.to_dict() if callable(getattr(config, "to_dict", None)) else config
    if not isinstance(values, Mapping):
        raise TypeError(f"{brief(config)} must be a mapping, a peft.LoraConfig or the path of a PEFT directory")
    return dict(values)


def _described(config: Any) -> str:
    """Return what a PEFT config was given as: its path, or its class."""
    return str(config) if isinstance(config, (str, os.PathLike)) else f"the {type(config).__name__}"


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


def _check_combination(config: LoRAConfig) -> None:
    """Raise ``ValueError`` for options that exclude one another, most of them in PEFT too."""
    if config.use_dora and config.lora_bias:
        raise ValueError("use_dora=True and lora_bias=True exclude one another, as in PEFT: give one of them")
    for name in ("use_dora", "lora_bias"):
        if getattr(config, name) and config.target_parameters:
            raise ValueError(f"{name}=True cannot be had with target_parameters={list(config.target_parameters)}")
        if getattr(config, name) and config.starts_from_base:
            raise ValueError(
                f"{name}=True cannot be had with init={config.init!r}, which starts from a part of the base: give "
                "init='kaiming', 'gaussian' or 'orthogonal'"
            )


def _check_init(init: object) -> None:
    if _registered_init(init) is None:
        words = [repr(word) for word in INITS]
        raise ValueError(f"init={init!r} must be one of {', '.join(words[:-1])} or {words[-1]}")


def _registered_init(init: object) -> str | None:
    """Return the word of :data:`INITS` that ``init`` is."""
    matches = (word for word in INITS if isinstance(init, str) and re.fullmatch(word.replace("N", r"\d+"), init))
    return next(matches, None)


def _token_indices(value: Any) -> Any:
    """Return plain lists of integers, or ``None``."""
    if value is None:
        return None
    named = value if isinstance(value, Mapping) else {"": value}
    lists: dict[str, list[int]] = {}
    for name, ids in named.items():
        if isinstance(ids, str) or not isinstance(ids, Sequence) or not ids:
            raise TypeError(
                f"trainable_token_indices={brief(value)} must be a list of token ids, or such lists by embedding"
            )
        for index in ids:
            if not isinstance(index, int) or isinstance(index, bool) or index < 0:
                raise TypeError(f"trainable_token_indices holds {brief(index)}; every entry must be an integer from 0")
        lists[name] = list(ids)
    return lists if isinstance(value, Mapping) else lists[""]


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}")


def _check_patterns(name: str, value: object) -> None:
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{name}={brief(value)} must be a mapping from a pattern to its value")
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
        raise TypeError(f"{name}={brief(value)} must be a list; got {type(value).__name__}")
    items = sorted(value) if isinstance(value, Set) else list(value)
    wanted = int if name == "layers_to_transform" else str
    for item in items:
        if not isinstance(item, wanted) or item == "":
            raise TypeError(f"{name} holds {brief(item)}; every entry must be a non-empty {wanted.__name__}")
    return items


_BRIEF = Repr()
_BRIEF.maxlist = _BRIEF.maxtuple = _BRIEF.maxset = _BRIEF.maxdict = 6
_BRIEF.maxstring = _BRIEF.maxother = 120


def brief(value: object) -> str:
    """Return ``repr(value)``, of a long list or text its beginning."""
    return _BRIEF.repr(value)
