"""Sharded training beside PEFT under stock FSDP2: ``python benchmarks/sharded.py`` writes ``sharded.json``.

One optimizer step, of four accumulated batches, on 2 CPU processes or on all GPUs that there are: collectives, and the
bytes that each process puts into them. On GPUs also tokens per second and peak memory of a Qwen3-4B-shaped base; on CPU
seconds are left out, since gloo on one machine says nothing about a network.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from environment import environment
from lightning.fabric import Fabric
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import Qwen3Config, Qwen3ForCausalLM

from lightning_lora import LoRAConfig, inject
from lightning_lora.fabric import FSDPLoRAStrategy

RESULTS = Path(__file__).with_name("sharded.json")
SMALL = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 8, "vocab_size": 8192}
QWEN3_4B = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "vocab_size": 151936}
HEADS = {
    "small": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32},
    "qwen3-4b": {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
}
ACCUMULATED = 4
KINDS = ("all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "reduce_scatter_tensor", "all_reduce")
NAMES = {"all_gather": "all_gather", "reduce_scatter": "reduce_scatter", "all_reduce": "all_reduce"}


class Counted:
    """Count the collectives inside the block, and the bytes that each process puts in."""

    def __enter__(self) -> "Counted":
        self.counts: dict[str, int] = {}
        self.bytes: dict[str, int] = {}
        self._originals = {name: getattr(dist, name) for name in KINDS if hasattr(dist, name)}
        for name, original in self._originals.items():
            setattr(dist, name, self._counting(name, original))
        return self

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)

    def _counting(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        kind = next(kind for kind in NAMES if name.startswith(kind))

        def counted(*args: Any, **kwargs: Any) -> Any:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            pick = max if kind == "reduce_scatter" else min
            sent = pick(tensor.nbytes for tensor in tensors)
            self.counts[kind] = self.counts.get(kind, 0) + 1
            self.bytes[kind] = self.bytes.get(kind, 0) + sent
            return original(*args, **kwargs)

        return counted


def base(shape: str, dtype: torch.dtype) -> nn.Module:
    sizes = SMALL if shape == "small" else QWEN3_4B
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **HEADS[shape], tie_word_embeddings=True)).to(dtype)


def stock(model: nn.Module, device: str) -> tuple[nn.Module, Any, Callable[[bool], None]]:
    """PEFT, then ``fully_shard`` on each block and the root, as accelerate does; at its best, with no sync between."""
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for block in model.base_model.model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)

    def sync(enabled: bool) -> None:
        for part in model.modules():
            if isinstance(part, FSDPModule):
                part.set_requires_gradient_sync(enabled, recurse=False)

    return model, lambda loss: loss.backward(), sync


def ours(model: nn.Module, device: str, **options: Any) -> tuple[nn.Module, Any, Callable[[bool], None]]:
    strategy = FSDPLoRAStrategy(**options)
    fabric = Fabric(accelerator=device, devices=dist.get_world_size(), strategy=strategy)
    fabric.launch()
    wrapped = fabric.setup(inject(model, LoRAConfig(r=8)))
    contexts: list[Any] = []

    def sync(enabled: bool) -> None:
        if enabled and contexts:
            contexts.pop().__exit__(None, None, None)
        elif not enabled and not contexts:
            contexts.append(fabric.no_backward_sync(wrapped, enabled=True))
            contexts[-1].__enter__()

    return wrapped, fabric.backward, sync


CONTENDERS: dict[str, Callable[..., Any]] = {
    "PEFT, stock FSDP2": stock,
    "fsdp_lora": ours,
    "fsdp_lora, adapters in shards": lambda model, device: ours(model, device, shard_adapters=True),
}


def step(model: nn.Module, backward: Any, sync: Callable[[bool], None], ids: torch.Tensor, optimizer: Any) -> None:
    for micro in range(ACCUMULATED):
        sync(micro == ACCUMULATED - 1)
        backward(model(input_ids=ids, labels=ids, use_cache=False).loss / ACCUMULATED)
    optimizer.step()
    optimizer.zero_grad()


def measure(name: str, shape: str, device: str, tokens: int) -> dict[str, Any]:
    on_gpu = device == "cuda"
    where = torch.device(device, torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    model = base(shape, torch.bfloat16 if on_gpu else torch.float32)
    model, backward, sync = CONTENDERS[name](model, device)
    ids = torch.randint(0, 8192, (1, tokens), device=where)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    step(model, backward, sync, ids, optimizer)
    with Counted() as counted:
        step(model, backward, sync, ids, optimizer)
    found: dict[str, Any] = {"collectives": counted.counts, "bytes": counted.bytes}
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(7):
            start = time.perf_counter()
            step(model, backward, sync, ids, optimizer)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        found["tokens_per_s"] = tokens * ACCUMULATED * dist.get_world_size() / sorted(seconds)[len(seconds) // 2]
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def worker(rank: int, world_size: int, port: int, args: argparse.Namespace, queue: Any) -> None:
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "GROUP_RANK": 0,
    }
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="benchmark")
    torch.set_num_threads(1)
    if args.device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    results = {name: measure(name, args.shape, args.device, args.tokens) for name in CONTENDERS}
    if rank == 0:
        queue.put(results)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--shape", choices=HEADS, default="qwen3-4b" if on_gpu else "small")
    parser.add_argument("--tokens", type=int, default=2048 if on_gpu else 64)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    world_size = torch.cuda.device_count() if args.device == "cuda" else 2
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    mp.spawn(worker, (world_size, 29517, args, queue), nprocs=world_size)
    results = queue.get()
    record = {
        "environment": environment(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "CPU, gloo",
        "processes": world_size,
        "shape": args.shape,
        "tokens": args.tokens,
        "accumulated": ACCUMULATED,
        "results": results,
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    for name, found in results.items():
        sent = {kind: f"{found['collectives'][kind]} ({found['bytes'][kind] / 1e6:.2f} MB)" for kind in found["bytes"]}
        print(
            f"{name:32}", sent, *(f"{key}={found[key]:.4g}" for key in ("tokens_per_s", "peak_bytes") if key in found)
        )


if __name__ == "__main__":
    main()
