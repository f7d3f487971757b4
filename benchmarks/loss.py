"""The loss of a causal language model with a frozen head, vocabulary 151,936: logits that exist at once, and CPU time.

    python benchmarks/loss.py

Contenders take the same hidden states and labels, all of them learned: ``linear_cross_entropy``; ``F.cross_entropy`` of
``F.linear``; and transformers' loss of the model's logits, which it makes float32 first.
"""

import argparse
import functools
import json
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from timing import cpu_seconds, interleave, summary
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_lora import linear_cross_entropy

VOCABULARY, TOKENS, HIDDEN_SIZE = 151_936, 2048, 256


def measure(rounds: int, hidden_size: int = HIDDEN_SIZE) -> dict[str, Any]:
    """Return bytes of logits by dtype and contender, and seconds of forward and backward in float32."""
    sizes = {"vocabulary": VOCABULARY, "tokens": TOKENS, "hidden_size": hidden_size}
    return {
        **sizes,
        "memory": [_memory(dtype) for dtype in (torch.float32, torch.bfloat16)],
        "time": _time(rounds, hidden_size),
    }


def _memory(dtype: torch.dtype) -> dict[str, Any]:
    full = TOKENS * VOCABULARY * dtype.itemsize
    peaks = {name: peak_bytes(work, VOCABULARY) for name, work in contenders(dtype, hidden_size=16).items()}
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "full_logits_bytes": full,
        "peak_bytes": peaks,
        "of_full_logits": {name: peak / full for name, peak in peaks.items()},
    }


def _time(rounds: int, hidden_size: int) -> dict[str, Any]:
    works = contenders(torch.float32, hidden_size)
    return summary(interleave({name: functools.partial(cpu_seconds, work) for name, work in works.items()}, rounds))


def contenders(dtype: torch.dtype, hidden_size: int) -> dict[str, Callable[[], None]]:
    """Return one step, forward and backward to the hidden states, of each."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(hidden_size, VOCABULARY, bias=False).to(dtype).requires_grad_(False)
    head.weight.normal_(std=0.02, generator=generator)
    hidden = torch.randn(1, TOKENS + 1, hidden_size, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (1, TOKENS + 1), generator=generator)
    config = SimpleNamespace(is_encoder_decoder=False)
    config.get_text_config = lambda: config
    model = SimpleNamespace(get_output_embeddings=lambda: head, config=config)
    losses: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: linear_cross_entropy(model, hidden, labels),
        "cross_entropy": lambda: F.cross_entropy(head(hidden[0, :-1]), labels[0, 1:]),
        "transformers": lambda: ForCausalLMLoss(head(hidden), labels, VOCABULARY),
    }

    def step(loss: Callable[[], Tensor]) -> None:
        hidden.grad = None
        loss().backward()

    return {name: functools.partial(step, loss) for name, loss in losses.items()}


def peak_bytes(work: Callable[[], object], size: int) -> int:
    """Return the most bytes that exist at once of tensors with ``size`` columns, each storage counted once."""
    with _Live(size) as live:
        work()
    return live.peak


class _Live(TorchDispatchMode):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.peak = size, 0
        self.bytes: dict[int, int] = {}  # of storages, by address of their C++ object

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for tensor in [] if func.is_view else tree_leaves(results):  # a view of the weight has as many columns
            if isinstance(tensor, Tensor) and tensor.ndim >= 2 and tensor.shape[-1] == self.size:
                storage = tensor.untyped_storage()
                if storage._cdata not in self.bytes:
                    self.bytes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.bytes.pop, storage._cdata)
                self.peak = max(self.peak, sum(self.bytes.values()))
        return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="rounds of the timing")
    parser.add_argument(
        "--hidden-size", type=int, default=HIDDEN_SIZE, help="of the timing; memory does not depend on it"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(measure(options.rounds, options.hidden_size), indent=1))


if __name__ == "__main__":
    main()
