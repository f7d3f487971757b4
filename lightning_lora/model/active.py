"""Choose which named adapters act: one for all rows, or one for each row of the batch."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_lora.compat.torch import batch_norm_class
from lightning_lora.fuse import unfused_forward
from lightning_lora.layers import LoRALayer
from lightning_lora.layers.acting import Acting, Choice, Mixture, Undecided
from lightning_lora.layers.by_rows import has_rows, run_by_rows
from lightning_lora.layers.host import Host
from lightning_lora.model.names import BASE
from lightning_lora.model.state import is_merged, require_injection, require_roots
from lightning_lora.model.wrapping import keep_state_of_forward, switch_off, switch_on, switched

Which = str | Sequence[str | None] | Tensor | None


@contextmanager
def active(
    model: nn.Module,
    which: Which,
    *,
    lengths: Sequence[int] | Tensor | None = None,
    repeats: int = 1,
    exact: bool = False,
) -> Iterator[nn.Module]:
    """Let the named adapters ``which`` act inside the ``with`` block, in training as in inference.

    What activation checkpointing recomputes has the adapters that acted in forward, also after the block.

    Args:
        which: the name of an adapter, for all rows; a name for each row of the batch, ``None`` or PEFT's
            ``"__base__"`` for the base alone; or an integer tensor with the place of each row's adapter in
            ``adapters(model)``, -1 for the base. ``None`` is the base for all rows.
        lengths: of packed segments, in tokens, in the order in which they lie in the batch: ``which`` has one entry for
            each.
        repeats: how many copies of each row the model makes, side by side, as ``generate`` does with ``num_beams`` or
            ``num_return_sequences``.
        exact: run the base's products for each adapter apart, too, and fuse nothing, so that every number is bit for
            bit that of a run of this adapter alone with ``fuse=False``. It is slower.

    Raises:
        ValueError: a name is unknown, or names and lengths do not fit one another. Names that do not fit the batch are
            an error of the first adapted layer.

    Example::

        with active(model, ["law", "medicine", None, "law"]):
            loss = model(**batch).loss
    """
    roots = {path: root for path, root in require_roots(model).items() if require_injection(root).named}
    if not roots:
        raise ValueError(f"{type(model).__name__} has one adapter without a name, which acts unless it is disabled")
    keep_state_of_forward()
    with ExitStack() as stack:
        for root in roots.values():
            if is_merged(root):
                raise ValueError("an adapter is merged into the base weights: call unmerge(model) first")
            choice = require_injection(root).choice
            acting = _acting(choice.names, which, lengths, repeats, exact, _device_of(root))
            if isinstance(acting, Mixture):
                _check_rows_apart(root)
            stack.enter_context(_switched(root, choice, acting))
        yield model


class _Chosen:
    """The switch of :func:`active`."""

    def __init__(self, choice: Choice, acting: Acting) -> None:
        self.choice, self.acting = choice, acting
        self.former: Acting | Undecided

    def enter(self) -> None:
        """Let the chosen ones act."""
        self.former, self.choice.chosen = self.choice.chosen, self.acting

    def leave(self) -> None:
        """Let those act that did before."""
        self.choice.chosen = self.former

    def check_in_backward(self) -> None:
        """Do nothing: no tensor is written."""


class _ChosenExactly(_Chosen):
    """The same with nothing fused, and the products of all other modules run for each adapter apart."""

    def __init__(self, root: nn.Module, choice: Choice, acting: Acting) -> None:
        super().__init__(choice, acting)
        self.former_attributes: dict[nn.Module, dict[str, Any]] = {}
        self.attributes: dict[nn.Module, dict[str, Any]] = {}
        for module in root.modules():
            if "lora_siblings" in module.__dict__:
                self.attributes[module] = {"lora_siblings": None}
            elif (forward := unfused_forward(module)) is not None:
                self.attributes[module] = {"forward": forward}
            elif _multiplies(module) and "forward" not in module.__dict__:
                self.attributes[module] = {"forward": partial(_run_apart, choice, module.forward)}

    @override
    def enter(self) -> None:
        super().enter()
        for module, own in self.attributes.items():
            self.former_attributes[module] = {name: vars(module)[name] for name in own if name in vars(module)}
            vars(module).update(own)

    @override
    def leave(self) -> None:
        super().leave()
        for module, own in self.attributes.items():
            for name in own:
                del vars(module)[name]
            vars(module).update(self.former_attributes[module])


def _multiplies(module: nn.Module) -> bool:
    """Return True for a module without adapters that has a weight of its own: a product of one row may round otherwise
    with other rows beside it.
    """
    has_weight = any(parameter is not None and parameter.ndim > 1 for parameter in module._parameters.values())
    return has_weight and not any(isinstance(part, (Host, LoRALayer)) for part in module.modules())


def _run_apart(choice: Choice, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    acting = choice.acting
    if isinstance(acting, Mixture) and has_rows(acting, args, kwargs):
        return run_by_rows(choice, acting, forward, args, kwargs)
    return forward(*args, **kwargs)


@contextmanager
def _switched(root: nn.Module, choice: Choice, acting: Acting) -> Iterator[None]:
    key = "adapters", id(choice)
    outer = switched.get(key)
    if outer is not None:
        switch_off(key)
    is_exact = isinstance(acting, Mixture) and acting.exact
    switch_on(key, _ChosenExactly(root, choice, acting) if is_exact else _Chosen(choice, acting))
    try:
        yield
    finally:
        switch_off(key)
        if outer is not None:
            switch_on(key, outer)


def _acting(
    known: Sequence[str],
    which: Which,
    lengths: Sequence[int] | Tensor | None,
    repeats: int,
    exact: bool,
    device: torch.device,
) -> Acting:
    which = None if isinstance(which, str) and which == BASE else which
    if which is None or isinstance(which, str):
        if lengths is not None or repeats != 1:
            raise ValueError(
                f"active(model, {which!r}) is for all rows: lengths= and repeats= belong to a list of names"
            )
        _check_known([which], known)
        return which
    are_names = isinstance(which, Sequence) and not any(isinstance(one, int) for one in which)
    if not (are_names or isinstance(which, Tensor)):
        raise TypeError(
            f"active(model, {which!r}) expects a name, a list of names, or an integer tensor of places in "
            "adapters(model)"
        )
    names = _names_at(which, known) if isinstance(which, Tensor) else [None if n == BASE else n for n in which]
    _check_known(names, known)
    sizes = lengths.tolist() if isinstance(lengths, Tensor) else lengths
    if sizes is not None and (len(sizes) != len(names) or min(sizes, default=1) < 0 or repeats != 1):
        raise ValueError(
            f"active(...) was given {len(names)} names and {len(sizes)} lengths with repeats={repeats}: expected is a "
            "length from 0 for each name, and no repeats"
        )
    if not names:
        raise ValueError("active(...) was given no names: expected is one for each row of the batch")
    return Mixture(names, lengths=sizes, repeats=repeats, exact=exact, known=known, device=device)


def _device_of(root: nn.Module) -> torch.device:
    """Return the device that a model runs on: that of an adapter, which is never on meta."""
    return next(p.device for layer in root.modules() if isinstance(layer, LoRALayer) for p in layer.parameters())


def _check_rows_apart(root: nn.Module) -> None:
    """Raise ``ValueError`` for a batch normalisation that would mix the rows of several adapters."""
    for name, module in root.named_modules():
        if isinstance(module, batch_norm_class()) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{name!r} is a {type(module).__name__} that takes its statistics from the batch, and so mixes the "
                "rows of all adapters: call eval() on it, or run one adapter at a time"
            )


def _names_at(places: Tensor, known: Sequence[str]) -> list[str | None]:
    if places.ndim != 1 or places.is_floating_point():
        raise ValueError(f"a tensor of adapters must be a vector of integers, got {places.dtype} {list(places.shape)}")
    wrong = [place for place in places.tolist() if not -1 <= place < len(known)]
    if wrong:
        raise ValueError(
            f"there is no adapter {wrong[0]}: the model has {len(known)}, {', '.join(known)}; -1 is the base"
        )
    return [None if place < 0 else known[place] for place in places.tolist()]


def _check_known(names: Sequence[str | None], known: Sequence[str]) -> None:
    for name in names:
        if name is not None and name not in known:
            raise ValueError(f"there is no adapter {name!r}: the model has {', '.join(map(repr, known))}")
