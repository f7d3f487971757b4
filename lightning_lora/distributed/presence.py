"""Which gradients a rank has, in a reduction: those of a named adapter are averaged over the ranks with rows of it."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_lora.compat.torch import foreach_mul_


class Presence:
    """The flags that one rank gives to a sum over ranks: one for each tensor, and one for each named adapter.

    An adapter's gradient is the mean over its own rows on each rank. A rank without such rows has nothing to say about
    it: as a zero it would shrink the gradient. A tensor that the rank's rows of an adapter did not reach, such as an
    expert's, is a zero.

    Args:
        parameters: in the order of the reduction.
        present: whether this rank has the gradient of each.
        owners: the named adapter of each parameter, by identity; others have none.
    """

    def __init__(self, parameters: Sequence[Tensor], present: Sequence[bool], owners: Mapping[int, str]) -> None:
        self.members: dict[str, list[int]] = {}  # places of each adapter's tensors
        for place, parameter in enumerate(parameters):
            if (owner := owners.get(id(parameter))) is not None:
                self.members.setdefault(owner, []).append(place)
        self.flags = [*present, *(any(present[place] for place in own) for own in self.members.values())]

    def average_over_ranks_with_rows(self, pieces: Sequence[Tensor | None], flags: Tensor, num_ranks: int) -> None:
        """Turn averages over ``num_ranks`` into those over the ranks that had an adapter's rows, in place.

        Args:
            pieces: the gradients, in the order of the parameters; ``None`` for one that is not there.
            flags: their sum over the ranks.
        """
        if not self.members:
            return
        factors = num_ranks / flags[-len(self.members) :].clamp(min=1)
        for factor, places in zip(factors.unbind(), self.members.values(), strict=True):
            foreach_mul_([piece for place in places if (piece := pieces[place]) is not None], factor)
