"""One rank of Fabric runs under ``megatron_lora``, on the same global batches that one process would see."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision as TrainerMixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lora import LoRAConfig, adapter_state_dict, inject, named_adapter_parameters
from lightning_lora.fabric import FSDPLoRAStrategy, MegatronLoRAStrategy
from lightning_lora.megatron.core import parallel_state
from lightning_lora.ops.sharded import is_sharded, local_part, split_over, whole
from tests import models, runs
from tests.distributed import split
from tests.distributed.counting import counted_collectives
from tests.distributed.launch import report
from tests.distributed.split import four_heads, whole_factors
from tests.distributed.training import BATCH, PROMPTS

INIT_SCALE = 256.0
SOURCES = ("one process", "tp2", "fsdp", "trainer")


def start(strategy: Any = None, plugins: Any = None, **options: Any) -> Fabric:
    """Launch Fabric on all ranks; on one process without a strategy."""
    num_ranks = int(os.environ.get("WORLD_SIZE", 1))
    if strategy is None:
        strategy = MegatronLoRAStrategy(**options) if num_ranks > 1 else "auto"
    fabric = Fabric(accelerator="cpu", devices=num_ranks, strategy=strategy, plugins=plugins)
    fabric.launch()
    return fabric


def make(build: Callable[[], nn.Module] = four_heads, **optimizer: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = inject(build().train(), LoRAConfig(r=4))
    models.fill_adapters(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-2, eps=1e-4, **optimizer)


def batches(fabric: Fabric) -> Any:
    """Return what Fabric deals out of batches that are ``BATCH`` rows over all ranks."""
    kwargs = getattr(fabric.strategy, "distributed_sampler_kwargs", None) or {"num_replicas": 1}
    rows = models.token_ids(runs.ROWS, 8, seed=1)
    return fabric.setup_dataloaders(DataLoader(rows, batch_size=BATCH // kwargs["num_replicas"]))


def loss_of(model: Any, batch: Tensor) -> Tensor:
    return model(input_ids=batch, labels=batch).loss


def gradients(model: Any) -> dict[str, Tensor | None]:
    """Return every adapter's gradient as anyone reads it, parts put together."""
    found: dict[str, Tensor | None] = {}
    for name, parameter in named_adapter_parameters(model.module):
        gradient = None if parameter.grad is None else parameter.grad.clone()
        if gradient is not None and hasattr(parameter, "lora_split"):
            split_over(gradient, *parameter.lora_split)
        found[name] = None if gradient is None else whole(gradient).clone()
    return found


def adapters(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in adapter_state_dict(model.module).items()}


def step(fabric: Fabric, model: Any, optimizer: Any, batch: Tensor) -> Tensor:
    loss = loss_of(model, batch)
    fabric.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return fabric.all_reduce(loss.detach())


def three_steps(fabric: Fabric, path: Path) -> dict[str, Any]:
    """Train, save, and train one step more, also from the file."""
    model, optimizer = fabric.setup(*make())
    data = list(batches(fabric))
    fabric.backward(loss_of(model, data[0]))
    found: dict[str, Any] = {"data": torch.stack(data), "gradients": gradients(model)}
    optimizer.zero_grad()
    found["losses"] = [step(fabric, model, optimizer, batch) for batch in data[:3]]
    found |= {"adapters": adapters(model), "raw": whole_factors(model.module)}
    fabric.save(path, {"model": model, "optimizer": optimizer, "step": 3})
    twin, twin_optimizer = fabric.setup(*make())
    state = {"model": twin, "optimizer": twin_optimizer, "step": 0}
    fabric.load(path, state)
    step(fabric, model, optimizer, data[3])
    step(fabric, twin, twin_optimizer, data[3])
    found |= {"going_on": adapters(model), "resumed": adapters(twin), "step": state["step"]}
    found["text"] = model.eval().generate(PROMPTS[:1], max_new_tokens=4, do_sample=False)
    return found


def accumulated(fabric: Fabric, **clipping: Any) -> dict[str, Any]:
    """Two steps of two backwards each, clipped."""
    model, optimizer = fabric.setup(*make())
    data, found = list(batches(fabric)), {}
    for index, batch in enumerate(data):
        is_last = index % 2 == 1
        loss = loss_of(model, batch) / 2
        with fabric.no_backward_sync(model, enabled=not is_last), counted_collectives() as traffic:
            fabric.backward(loss)
        if index < 2:
            found["last" if is_last else "first"] = traffic["all_reduce"]
        if is_last:
            found["accumulated"] = gradients(model)
            found["norm"] = fabric.clip_gradients(model, optimizer, **clipping)
            found["clipped"] = gradients(model)
            optimizer.step()
            optimizer.zero_grad()
    return {**found, "adapters": adapters(model)}


def training(directory: Path, num_ranks: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for size in sorted({2, num_ranks}):
        fabrics = [start(tensor_parallel_size=size) for _ in range(3)]
        found[f"tp{size}"] = {
            **three_steps(fabrics[0], directory / f"tp{size}.ckpt"),
            "by norm": accumulated(fabrics[1], max_norm=0.05),
        }
        if size == 2:
            found[f"tp{size}"]["by value"] = accumulated(fabrics[2], clip_val=0.001)
    return found


def twice_before_a_step(fabric: Fabric) -> dict[str, Any]:
    """Two backwards, the gradients read after each."""
    model, _ = fabric.setup(*make())
    data, found = list(batches(fabric)), []
    for batch in data[:2]:
        fabric.backward(loss_of(model, batch))
        found.append(gradients(model))
    return {"reads": found}


def orders(directory: Path, num_ranks: int) -> dict[str, Any]:
    """Model and optimizer set up one after the other; a base on meta; two models; a size of its own choice."""
    fabric = start("megatron_lora")
    found: dict[str, Any] = {"twice": twice_before_a_step(fabric), "ranks": fabric.strategy.device_mesh.size()}
    model, early = make()
    model = fabric.setup_module(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2, eps=1e-4)
    optimizer = fabric.setup_optimizers(optimizer)
    data = list(batches(fabric))
    for batch in data[:3]:
        step(fabric, model, optimizer, batch)
    found["apart"] = adapters(model)
    found["early"] = refused(lambda: fabric.setup_optimizers(early))
    other, other_optimizer = fabric.setup(*make(models.qwen3))
    fabric.backward(loss_of(other, data[0]))
    found["company"] = gradients(model)  # zero_grad left none
    other_optimizer.step()

    fabric = start(tensor_parallel_size=2, base_weights=str(directory / "saved"))
    with fabric.init_module(empty_init=True):
        base = four_heads()
    found["was_meta"] = base.model.layers[0].mlp.up_proj.weight.is_meta
    model, _ = fabric.setup(*make(lambda: base))
    fabric.backward(loss_of(model, next(iter(batches(fabric)))))
    found["meta"] = gradients(model)
    return found


def files(directory: Path, num_ranks: int) -> None:
    """Read the files of all strategies and write them again, and this one's under FSDP."""
    fabric = start(FSDPLoRAStrategy())
    model, optimizer = fabric.setup(*make())
    for batch in list(batches(fabric))[:3]:
        step(fabric, model, optimizer, batch)
    fabric.save(directory / "fsdp.ckpt", {"model": model, "optimizer": optimizer})
    fabric.load(directory / "tp2.ckpt", {"model": model, "optimizer": optimizer})
    fabric.save(directory / "tp2 by fsdp.ckpt", {"model": model, "optimizer": optimizer})
    fabric = start(tensor_parallel_size=num_ranks)
    for source in SOURCES:
        model, optimizer = fabric.setup(*make())
        fabric.load(directory / f"{source}.ckpt", {"model": model, "optimizer": optimizer})
        fabric.save(directory / f"{source} again.ckpt", {"model": model, "optimizer": optimizer})


class Headed(nn.Module):
    """A head outside the pretrained model, which stays whole beside adapters in shards."""

    def __init__(self) -> None:
        super().__init__()
        self.model = four_heads()
        self.head = nn.Linear(models.VOCAB, models.VOCAB)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        output = self.model(input_ids=input_ids)
        output.loss = nn.functional.cross_entropy(self.head(output.logits).flatten(0, 1).float(), labels.flatten())
        return output


def headed() -> nn.Module:
    model = models._seeded(Headed)
    inject(model.model, LoRAConfig(r=4))
    return model


def overflow(fabric: Fabric, made: Any, *, clips: bool = False) -> dict[str, Any]:
    """Three steps, in the second of which the last rank finds an infinite entry in its part of a factor."""
    model, optimizer = fabric.setup(*made)
    scaler, trained = fabric.strategy.precision.scaler, [p for p in model.parameters() if p.requires_grad]
    found: dict[str, Any] = {"moved": [], "scales": []}
    for index, batch in enumerate(list(batches(fabric))[:3]):
        fabric.backward(loss_of(model, batch))
        if index == 0:
            found["gradients"] = gradients(model) if clips else None
        if index == 1:
            spoil(trained, fabric.global_rank)
        if clips:
            fabric.clip_gradients(model, optimizer, max_norm=1e3, error_if_nonfinite=False)
        before = [local_part(p.detach()).clone() for p in trained]
        optimizer.step()
        optimizer.zero_grad()
        moved = [not torch.equal(old, local_part(p.detach())) for old, p in zip(before, trained, strict=True)]
        found["moved"].append((any(moved), all(moved)))
        found["scales"].append(scaler.get_scale())
    found["raw"] = whole_factors(model.module)
    return found


def spoil(trained: list[nn.Parameter], rank: int) -> None:
    if rank == torch.distributed.get_world_size() - 1:
        part = next(p for p in trained if is_sharded(p) and local_part(p.grad).numel() > 0)
        local_part(part.grad).view(-1)[0] = float("inf")


def half_precision() -> MixedPrecision:
    # Lightning makes 16-mixed into bf16-mixed on CPU, unless it is given the plugin
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=INIT_SCALE))


def overflows(directory: Path, num_ranks: int) -> dict[str, Any]:
    cases = {
        "plain": (2, make(), {}),
        "clipped": (num_ranks, make(), {"clips": True}),
        "fused": (2, make(fused=True), {}),
    }
    if num_ranks == 4:  # replicas, and parts of a quarter
        del cases["fused"]
    found: dict[str, Any] = {}
    for name, (size, made, how) in cases.items():
        found[name] = overflow(start(tensor_parallel_size=size, plugins=half_precision()), made, **how)
    if num_ranks == 4:
        return found
    fabric = start(FSDPLoRAStrategy(shard_adapters=True, min_shard_numel=0), plugins=half_precision())
    model = headed()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    found["fsdp, adapters in shards"] = overflow(fabric, (model, optimizer))
    found["trainer"] = trainer_overflow(directory)
    return found


class Spoiling(Callback):
    """Puts an infinite entry into the last rank's part of a factor after the second backward, and looks at each step."""

    def __init__(self) -> None:
        self.before: list[Tensor] = []
        self.found: dict[str, Any] = {"moved": [], "scales": []}

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before = [p.detach().clone() for p in pl_module.parameters() if p.requires_grad]

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_step == 1 and not self.found["scales"][1:]:
            spoil([p for p in pl_module.parameters() if p.requires_grad], trainer.global_rank)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trained = [p.detach() for p in pl_module.parameters() if p.requires_grad]
        moved = [not torch.equal(old, new) for old, new in zip(self.before, trained, strict=True)]
        self.found["moved"].append((any(moved), all(moved)))
        self.found["scales"].append(trainer.precision_plugin.scaler.get_scale())


def trainer_overflow(directory: Path) -> dict[str, Any]:
    plugin = TrainerMixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=INIT_SCALE))
    module, spoiling = split.Module(), Spoiling()
    split.run(
        directory / "trainer", 2, module, plugins=plugin, callbacks=(LateFilled(), spoiling), limit_train_batches=3,
        validates=False, gradient_clip_val=1e3,
    )  # fmt: skip
    return {**spoiling.found, "raw": whole_factors(module), "is_undone": "_unscale_grads_" not in vars(plugin.scaler)}


class LateFilled(Callback):
    """Gives the adapters values, so that all of them have gradients from the first step."""

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        with torch.no_grad():
            for name, parameter in named_adapter_parameters(pl_module):
                if name.endswith("lora_B"):
                    parameter.fill_(0.01)


def refused(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def refusals(directory: Path, num_ranks: int) -> dict[str, str]:
    found: dict[str, str] = {}
    fabric = start(tensor_parallel_size=num_ranks)
    found["groups"] = str(parallel_state().get_tensor_model_parallel_world_size())
    found["later model"] = refused(lambda: fabric.setup(family(6)))
    found["bare"] = refused(lambda: fabric.setup(four_heads()))
    model = fabric.setup(make()[0])
    found["batches"] = refused(lambda: loss_of(model, models.token_ids(2, 8, seed=fabric.global_rank)))
    automatic = start(tensor_parallel_size="auto")
    found["auto before a model"] = refused(lambda: batches(automatic))
    start(tensor_parallel_size=1)
    found["other groups"] = refused(lambda: fabric.setup(make()[0]))
    found["data of other groups"] = refused(lambda: batches(fabric))
    return found


def family(heads: int) -> nn.Module:
    """An adapted Llama with a number of heads that four ranks do not divide, nor two its key-value heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=heads // 2, vocab_size=models.VOCAB,
    )  # fmt: skip
    return inject(LlamaForCausalLM(config), LoRAConfig(r=2))


PARTS = {part.__name__: part for part in (training, orders, files, overflows, refusals)}


if __name__ == "__main__":
    report(Path(sys.argv[1]), PARTS[sys.argv[2]](Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])))
