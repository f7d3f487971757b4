"""The loss of a causal language model with a frozen head: bytes that exist at once, and CPU time.

    python benchmarks/loss.py

Contenders take the same hidden states and labels, all of them learned: ``linear_cross_entropy``; ``F.cross_entropy`` of
``F.linear``; and transformers' loss of the model's logits, which it makes float32 first.
"""

import argparse
import functools
import json
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timing import cpu_seconds, interleave, summary
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_lora import linear_cross_entropy


class Shape(NamedTuple):
    tokens: int
    vocabulary: int
    hidden_size: int
    dtype: torch.dtype

    def described(self) -> dict[str, Any]:
        return self._asdict() | {"dtype": str(self.dtype).removeprefix("torch.")}


LARGE = Shape(2048, 151_936, 1024, torch.float32)  # Qwen3-0.6B's head
# a minute and more a step otherwise; logits are most of what is there anyway
PEERS_HIDDEN_SIZE = 64
TIMED = (
    Shape(1024, 151_936, 256, torch.float32),
    Shape(200, 49_152, 576, torch.float32),
    Shape(512, 49_152, 256, torch.bfloat16),
)
QUICK = Shape(64, 1000, 16, torch.float32)


def measure(rounds: int, quick: bool = False) -> dict[str, Any]:
    """Return the most bytes that exist at once, by dtype, and seconds of forward and backward, by shape.

    The bytes of ours are counted at the hidden size of the head, those of the others at a smaller one.

    Args:
        quick: of tiny sizes, to see that it runs; the figures mean nothing.
    """
    counted, timed = (QUICK, (QUICK,)) if quick else (LARGE, TIMED)
    return {
        "memory": [_memory(counted._replace(dtype=dtype)) for dtype in (torch.float32, torch.bfloat16)],
        "time": [_time(shape, rounds) for shape in timed],
    }


def _memory(shape: Shape) -> dict[str, Any]:
    full = shape.tokens * shape.vocabulary * shape.dtype.itemsize
    narrower = shape._replace(hidden_size=min(shape.hidden_size, PEERS_HIDDEN_SIZE))
    works = contenders(narrower) | {"ours": contenders(shape)["ours"]}
    peaks = {name: peak_bytes(work) for name, work in works.items()}
    return {
        **shape.described(),
        "full_logits_bytes": full,
        "peers_hidden_size": narrower.hidden_size,
        "peak_bytes": peaks,
        "of_full_logits": {name: peak / full for name, peak in peaks.items()},
    }


def _time(shape: Shape, rounds: int) -> dict[str, Any]:
    works = {name: functools.partial(cpu_seconds, work) for name, work in contenders(shape).items()}
    return {**shape.described(), **summary(interleave(works, rounds))}


def contenders(shape: Shape) -> dict[str, Callable[[], None]]:
    """Return one step, forward and backward to the hidden states, of each."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.loss.loss_utils import ForCausalLMLoss

    tokens, vocabulary, hidden_size, dtype = shape
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(hidden_size, vocabulary, bias=False).to(dtype).requires_grad_(False)
    head.weight.normal_(std=0.02, generator=generator)
    hidden = torch.randn(1, tokens + 1, hidden_size, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (1, tokens + 1), generator=generator)
    with torch.device("meta"):  # of the model nothing but its head is used
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1))
    model.set_output_embeddings(head)
    losses: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: linear_cross_entropy(model, hidden, labels),
        "cross_entropy": lambda: F.cross_entropy(head(hidden[0, :-1]), labels[0, 1:]),
        "transformers": lambda: ForCausalLMLoss(head(hidden), labels, vocabulary),
    }

    def step(loss: Callable[[], Tensor]) -> None:
        hidden.grad = None
        loss().backward()

    return {name: functools.partial(step, loss) for name, loss in losses.items()}


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the most bytes that exist at once of all that ``work`` makes, each storage counted once."""
    with _Live() as live:
        work()
    return live.peak


class _Live(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self.bytes: dict[int, int] = {}  # of storages, by address of their C++ object

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {one.untyped_storage()._cdata for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):  # a view, and what was changed in place, are in a storage that was given
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self.bytes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.bytes.pop, storage._cdata, None)
                self.peak = max(self.peak, sum(self.bytes.values()))
        return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="rounds of the timing")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(measure(options.rounds, options.quick), indent=1))


if __name__ == "__main__":
    main()
