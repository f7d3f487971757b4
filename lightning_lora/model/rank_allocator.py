"""AdaLoRA's pruning: score every rank of every layer after a step, and set the entries of E of the lowest to zero.

The steps of a run and what each of them does; :mod:`~lightning_lora.model.rank_scores` has the formulas.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.adalora import AdaLoRA
from lightning_lora.layers.adalora import AdaLoRALinear
from lightning_lora.model.names import clean_name
from lightning_lora.model.rank_scores import FACTORS, AlikeLayers

_MAX_NOTED = 500  # steps in the history: more would make checkpoints of long runs large


class RankAllocator:
    """Prunes the ranks of an adapted model's layers over a run of ``total_step`` optimizer steps.

    ``LoRACallback`` makes one and calls it. In a loop of your own, call :meth:`add_regularizer` before the optimizer's
    step, and before gradients are clipped, and :meth:`after_step` after it, while the gradients are still there. All
    processes of a data-parallel run have the same factors and gradients, and compute the same: nothing is communicated.

    Args:
        root: a model that was adapted with ``LoRAConfig(adalora=...)``.
        settings: how to prune.
        total_step: number of optimizer steps of the whole run.

    Raises:
        ValueError: the run is too short to prune, the model has no such layers, or was adapted with another ``init_r``.

    Example::

        allocator = RankAllocator(model, AdaLoRA(target_r=4, init_r=6), total_step=1000)
        loss.backward()
        allocator.add_regularizer()
        optimizer.step()
        allocator.after_step()
        optimizer.zero_grad()
    """

    def __init__(self, root: nn.Module, settings: AdaLoRA, total_step: int) -> None:
        self.settings, self.total_step = settings, total_step
        self.last = settings.last_pruning(total_step)
        self.layers = {clean_name(name): m for name, m in root.named_modules() if isinstance(m, AdaLoRALinear)}
        if not self.layers:
            raise ValueError(f"{type(root).__name__} has no layers of AdaLoRA: adapt it with LoRAConfig(adalora=...)")
        for name, layer in self.layers.items():
            expected = (settings.init_r, min(settings.init_r, layer.lora_A.shape[1], layer.lora_B.shape[0]))
            if layer.r not in expected:
                raise ValueError(
                    f"{name!r} has {layer.r} ranks, and AdaLoRA(init_r={settings.init_r}) says that it started at "
                    f"{expected[-1]}: give the settings that the model was adapted with, LoRAConfig(adalora=...)"
                )
        self.step = 0
        self.is_regularized = False  # since the last step
        self._alike = [AlikeLayers({name: self.layers[name] for name in names}) for names in _by_shape(self.layers)]
        self._history: list[tuple[int, Tensor]] = []

    def is_of(self, root: nn.Module) -> bool:
        """Whether the layers are those of a model."""
        return self.layers.items() <= {clean_name(name): module for name, module in root.named_modules()}.items()

    @property
    def num_ranks(self) -> tuple[int, int]:
        """Numbers of ranks of all layers together, at the start and at the end."""
        ranks = [layer.r for layer in self.layers.values()]
        return sum(ranks), sum(min(r, self.settings.target_r) for r in ranks)

    @property
    def is_finished(self) -> bool:
        """Whether the ranks have reached their last number."""
        return self.step >= self.last

    @property
    def trains(self) -> bool:
        """Whether any layer trains."""
        return any(layer.lora_A.requires_grad for layer in self.layers.values())

    @property
    def has_gradient(self) -> bool:
        """Whether any factor has a gradient."""
        return any(getattr(m, name).grad is not None for m in self.layers.values() for name in FACTORS)

    @property
    def mean_rank(self) -> Tensor:
        """The number of ranks that a layer keeps on average."""
        return torch.cat([alike.ranks() for alike in self._alike]).float().mean()

    @torch.no_grad()
    def add_regularizer(self, scale: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Add the gradient of the orthogonality term to those of A and B, and return the term's value.

        The term is ``orth_reg_weight`` times the average of ``||A A^T - I||`` and ``||B^T B - I||`` over all layers, in
        the Frobenius norm. A factor without a gradient gets the term's.

        Args:
            scale: multiplies a tensor as the loss was multiplied before backward, as ``GradScaler.scale`` does.
        """
        weight = self.settings.orth_reg_weight / (2 * len(self.layers))
        self.is_regularized = True
        return torch.stack([alike.add_regularizer(weight, scale) for alike in self._alike]).sum()

    @torch.no_grad()
    def after_step(self, scale: Tensor | None = None) -> None:
        """Count an optimizer step, take in its gradients, and prune as the schedule says.

        Args:
            scale: what the gradients are still multiplied by, if anything.
        """
        self.step, self.is_regularized = self.step + 1, False
        if self.step < max(self.last, 2):
            for alike in self._alike:
                alike.take_in(self.settings, scale)
        first, final = self.num_ranks
        budget = self.settings.budget(self.step, self.total_step, first=first, final=final)
        if budget is not None and budget < first:
            scores = [alike.scores() for alike in self._alike]
            threshold = torch.cat([score.flatten() for score in scores]).kthvalue(first - budget).values
            for alike, score in zip(self._alike, scores, strict=True):
                alike.kept = score > threshold
        for alike in self._alike:
            if budget is not None or self.step > self.last:
                alike.prune()
            if self.step == self.last:
                alike.averages = {}  # of no use after the last pruning
        if self.step % math.ceil(self.total_step / _MAX_NOTED) == 0 or self.step == self.last:
            self._history.append((self.step, torch.cat([alike.ranks() for alike in self._alike])))

    def scores(self) -> dict[str, Tensor]:
        """Return the scores of each layer's ranks, ``[r]``, by the layer's name."""
        return {name: score for alike in self._alike for name, score in zip(alike.layers, alike.scores(), strict=True)}

    def history(self) -> tuple[list[int], dict[str, list[int]]]:
        """Return the steps at which ranks were noted, and how many ranks each layer had at those, by its name.

        A run of more than 500 steps notes some of them, and the last pruning.
        """
        rows = [ranks.tolist() for _, ranks in self._history]
        columns = {name: [row[place] for row in rows] for place, name in enumerate(self._names)}
        return [step for step, _ in self._history], {name: columns[name] for name in self.layers}

    @property
    def _names(self) -> list[str]:
        return [name for alike in self._alike for name in alike.layers]

    def state_dict(self) -> dict[str, Any]:
        """Return all that a resumed run needs to go on exactly: step, averages, pruned ranks; and the history."""
        steps, ranks = self.history()
        layers = {name: state for alike in self._alike for name, state in alike.state().items()}
        return {
            "step": self.step,
            "total_step": self.total_step,
            "layers": layers,
            "history": {"steps": steps, "ranks": {name: torch.tensor(values) for name, values in ranks.items()}},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`.

        Raises:
            ValueError: it is of other layers, sizes or steps. Nothing is changed then.
        """
        differing = self.layers.keys() ^ state["layers"].keys()
        if differing:
            raise ValueError(f"the state of AdaLoRA is of other layers: only one of both has {min(differing)!r}")
        if state["total_step"] != self.total_step:
            raise ValueError(f"the state of AdaLoRA is of total_step={state['total_step']}, not {self.total_step}")
        for name, layer in self.layers.items():
            for key, value in state["layers"][name].items():
                expected = (layer.r,) if key == "kept" else tuple(getattr(layer, key.partition(" ")[2]).shape)
                if tuple(value.shape) != expected:
                    raise ValueError(
                        f"the state of AdaLoRA has {tuple(value.shape)} for {key!r} of {name!r}, the layer {expected}"
                    )
        for alike in self._alike:
            alike.load([state["layers"][name] for name in alike.layers])
        self.step, self.is_regularized = state["step"], False
        rows = torch.stack([state["history"]["ranks"][name] for name in self._names], dim=1)
        self._history = list(zip(state["history"]["steps"], rows, strict=True))


def _by_shape(layers: Mapping[str, AdaLoRALinear]) -> list[list[str]]:
    groups: dict[Any, list[str]] = {}
    for name, layer in layers.items():
        key = (layer.lora_A.shape, layer.lora_B.shape, layer.lora_A.dtype, layer.lora_A.device)
        groups.setdefault(key, []).append(name)
    return list(groups.values())
