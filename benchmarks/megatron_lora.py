"""Collectives of tensor-parallel LoRA on Megatron-core's layers: ``python benchmarks/megatron_lora.py``.

Writes ``megatron.json``: what one rank exchanges per layer in forward, backward and once per optimizer step, and how
many bytes that is at the size of a 7B model. Counted are collectives as PyTorch dispatches them, of real runs on CPU
processes; each layout's output and gradients are compared with dense math in float64 first. With two or more GPUs the
counts are taken there, and steps are timed.
"""

import argparse
import json
import os
import socket
import subprocess
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timing
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from environment import environment
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron_layouts import CONTENDERS, Shape, build, dense, part, whole_tensors
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from traffic_tables import show_traffic

from lightning_lora.distributed.gradients import GradientReducer
from lightning_lora.megatron import cpu as megatron_cpu
from lightning_lora.megatron.core import parallel_state

RESULTS = Path(__file__).with_name("megatron.json")
KINDS = {"allreduce_": "all_reduce", "_allgather_base_": "all_gather", "_reduce_scatter_base_": "reduce_scatter"}
# what a rank of a ring of n sends, in (n - 1) / n of the whole message
RING = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
PHASES = ("forward", "backward", "step")
SMALL = Shape(hidden=64, ffn=128, heads=8, sequence=16, batch=2, r=8)
LARGE = Shape(hidden=4096, ffn=14336, heads=32, sequence=4096, batch=1, r=16)
LARGE_RANKS = 8
TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}  # float64, other order of sums
ROUNDS, BLOCKS_TIMED = 21, 4


class Messages(TorchDispatchMode):
    """Note kind, elements and bytes per element of every whole message that is exchanged inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            largest = max(tensors, key=lambda tensor: tensor.numel())
            self.found.append((KINDS[func._schema.name.removeprefix("c10d::")], largest.numel(), largest.itemsize))
        return func(*args, **(kwargs or {}))


class Run:
    """One contender, its input on this rank, and the sum of what ranks hold addends of, once per step."""

    def __init__(self, name: str, shape: Shape, sequence_parallel: bool, tensors: dict[str, Tensor], blocks: int = 1):
        self.model = build(name, shape, sequence_parallel, tensors, blocks)
        self.x = part(tensors["x"], 0 if sequence_parallel else None).clone().requires_grad_()
        self.factors = [factor for block in self.model for factor in block.factors]
        addends = [factor.parameter for factor in self.factors if factor.is_addend]
        group = parallel_state().get_tensor_model_parallel_group()
        self.reducer = GradientReducer(addends, group, ranks_of=lambda _: 1)

    def messages(self) -> dict[str, list[tuple[str, int, int]]]:
        with Messages() as forward:
            self.y = self.model(self.x)
        with Messages() as backward:
            (self.y.square().sum() / 2).backward()
        with Messages() as step:
            self.reducer.reduce()
        return dict(zip(PHASES, (forward.found, backward.found, step.found), strict=True))

    def seconds(self) -> float:
        """Return the seconds of forward, backward and reduction on this rank's GPU."""
        self.model.zero_grad()
        self.x.grad = None
        dist.barrier()
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.model(self.x).square().sum().backward()
        self.reducer.reduce()
        torch.cuda.synchronize()
        return time.perf_counter() - start


def error(run: Run, sequence_parallel: bool, expected: tuple[Tensor, dict[str, Tensor]]) -> float:
    """Return the largest difference from dense math, of all tensors in parts of their largest entry.

    Raises:
        AssertionError: some tensor is not what it should be.
    """
    run.messages()
    y, gradients = expected
    dim = 0 if sequence_parallel else None
    pairs = [(run.y, part(y, dim)), (run.x.grad, part(gradients["x"], dim))]
    pairs += [(f.parameter.grad, part(gradients[f.key], f.dim, f.stripes)) for f in run.factors]
    for found, wanted in pairs:
        torch.testing.assert_close(found.detach(), wanted, **TOLERANCE)
    return max(((found - wanted).abs().max() / wanted.abs().max()).item() for found, wanted in pairs)


def measure(device: str) -> dict[str, Any]:
    """Return messages of every contender without and with sequence parallelism, and errors. Called on all ranks."""
    exact, rounded = (whole_tensors(SMALL, dtype, device) for dtype in (torch.float64, torch.bfloat16))
    expected = dense(SMALL, exact)
    found: dict[str, Any] = {"messages": {}, "error": {}}
    for sequence_parallel in (False, True):
        case = f"sequence_parallel={sequence_parallel}"
        runs = {name: Run(name, SMALL, sequence_parallel, rounded) for name in CONTENDERS}
        found["messages"][case] = {name: run.messages() for name, run in runs.items()}
        found["error"][case] = {
            name: error(Run(name, SMALL, sequence_parallel, exact), sequence_parallel, expected)
            for name in CONTENDERS
            if name not in ("base", "ours, a pair per projection")  # no adapter; factors of its own
        }
    return found


def timings(device: str) -> dict[str, Any]:
    """Return seconds of a step, contenders in turns in the same order on all ranks. Called on all ranks."""
    tensors = whole_tensors(LARGE, torch.bfloat16, device)
    results = {}
    for sequence_parallel in (False, True):
        runs = {name: Run(name, LARGE, sequence_parallel, tensors, BLOCKS_TIMED) for name in CONTENDERS}
        seconds = timing.interleave({name: run.seconds for name, run in runs.items()}, ROUNDS)
        results[f"sequence_parallel={sequence_parallel}"] = timing.summary(seconds)
    return results


def worker(rank: int, size: int, port: int, device: str, is_timed: bool, queue: Any) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"  # Megatron-core counts on it to overlap
    warnings.simplefilter("ignore")  # Megatron-core calls collectives by names that torch deprecates
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cpu":
        megatron_cpu.install()
    parallel_state().initialize_model_parallel(size, create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(0)
    found = measure(device) | ({"timings": timings(device)} if is_timed else {})
    if rank == 0:
        queue.put(found)
    dist.barrier()
    dist.destroy_process_group()


def launch(size: int, device: str, is_timed: bool) -> dict[str, Any]:
    """Return what the first of ``size`` new processes found."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(worker, (size, port, device, is_timed, queue), nprocs=size)
    return queue.get()


def sent_bytes(messages: list[tuple[str, int, int]], size: int) -> int:
    return round(sum(RING[kind] * (size - 1) / size * count * itemsize for kind, count, itemsize in messages))


def summary(messages: dict[str, list[tuple[str, int, int]]], size: int) -> dict[str, Any]:
    """Return collectives by kind, and bytes that a rank sends, of each phase."""
    counts = {phase: dict(Counter(kind for kind, *_ in found)) for phase, found in messages.items()}
    return {"collectives": counts, "sent_bytes": {p: sent_bytes(found, size) for p, found in messages.items()}}


def enlarged(messages: dict[str, list[tuple[str, int, int]]]) -> dict[str, list[tuple[str, int, int]]]:
    """Return the same messages at the sizes of ``LARGE``: of activations by their width, of gradients by factors."""

    def grown(phase: str, count: int) -> int:
        if phase == "step":  # whole factors, then a flag for each
            factors, flags = divmod(count, SMALL.r * SMALL.hidden)
            return factors * LARGE.r * LARGE.hidden + flags
        width, rest = divmod(count, SMALL.tokens)
        if width == SMALL.hidden:
            width = LARGE.hidden
        else:
            pairs, rest_of_width = divmod(width, SMALL.r)
            rest, width = rest + rest_of_width, pairs * LARGE.r
        assert rest == 0, f"{count} elements are neither of hidden width nor of some ranks"
        return width * LARGE.tokens

    return {phase: [(k, grown(phase, n), item) for k, n, item in found] for phase, found in messages.items()}


def table(large_messages: dict[str, Any]) -> dict[str, Any]:
    """Return counts and bytes per layer at the sizes of ``LARGE``, and forward and backward over the base's."""
    result = every(lambda messages: summary(messages, LARGE_RANKS), large_messages)
    for rows in result.values():
        base = sum(rows["base"]["sent_bytes"][phase] for phase in PHASES[:2])
        for row in rows.values():
            extra = sum(row["sent_bytes"][phase] for phase in PHASES[:2]) - base
            row |= {"extra_bytes": extra, "extra_percent": round(100 * extra / base, 2)}
    return result


def main() -> None:
    gpus = torch.cuda.device_count()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if gpus > 1 else "cpu")
    parser.add_argument(
        "--ranks", type=int, nargs="+", help="tensor-parallel sizes; by default 2, 4, 8; on GPUs no more than there are"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the stand-in for Megatron-core's CUDA is refused beside a real one
        sizes, device = args.ranks or [2, 4, LARGE_RANKS], "CPU, gloo"
    else:
        sizes = args.ranks or [size for size in (2, 4, LARGE_RANKS) if size <= gpus]
        device = torch.cuda.get_device_name()
    found = {size: launch(size, args.device, args.device == "cuda" and size == max(sizes)) for size in sizes}
    first, *others = (every(enlarged, one["messages"]) for one in found.values())
    assert all(other == first for other in others), "what is exchanged depends on the number of ranks by more than size"
    record = {
        **described(),
        "device": device,
        "counted": {"shape": asdict(SMALL), "dtype": "bfloat16", "tolerance_float64": TOLERANCE},
        "ranks": {
            size: every(lambda messages, size=size: summary(messages, size), one["messages"])
            | {"largest_error": one["error"]}
            for size, one in found.items()
        },
        "table": {"shape": asdict(LARGE), "ranks": LARGE_RANKS, "dtype": "bfloat16", "results": table(first)},
        "timed_blocks": BLOCKS_TIMED,
        "timings": found[max(sizes)].get("timings", "not measured"),
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    show_traffic(record)


def every(change: Callable[[Any], Any], messages: dict[str, Any]) -> dict[str, Any]:
    """Return what ``change`` makes of the messages of each contender."""
    return {case: {name: change(found) for name, found in contenders.items()} for case, contenders in messages.items()}


def described() -> dict[str, Any]:
    found = environment()
    del found["protocol"]  # of CPU time
    found["versions"]["megatron-core"] = version("megatron-core")
    git = ["git", "-C", str(RESULTS.parent), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {"environment": found, "commit": commit}


if __name__ == "__main__":
    main()
