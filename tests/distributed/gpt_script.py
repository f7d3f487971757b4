"""One rank of Trainer runs of a Megatron-core model under ``megatron_lora``, on the batches that one process would see."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from lightning.fabric import Fabric
from torch import Tensor

from lightning_lora import (
    LoRACallback,
    LoRAConfig,
    MegatronLoRAStrategy,
    disabled,
    inject,
    load_peft,
    merge,
    merged,
    remove,
    save_peft,
    unmerge,
)
from lightning_lora.fabric import MegatronLoRAStrategy as FabricStrategy
from lightning_lora.megatron.models import gpt_model, load_hf_weights
from lightning_lora.megatron.split import mesh_of
from lightning_lora.model.state import named_adapter_parameters
from lightning_lora.ops.sharded import is_sharded, split_over, whole
from tests import models
from tests.distributed.counting import counted_collectives
from tests.distributed.gpt import Bare, Module, adapters, logits_of, run
from tests.distributed.launch import report
from tests.distributed.split import AfterTheSearch, AtMidway, whole_factors
from tests.distributed.training import rank_loader

RECOMPUTE = {"recompute_granularity": "full"}


def training(directory: Path, num_ranks: int) -> dict[str, Any]:
    """Layouts: tensor-parallel ranks, sequence parallelism, recomputation."""
    found: dict[str, Any] = {}
    source = directory / "hf"
    for size, sequence_parallel, recomputes in layouts(num_ranks):
        name = layout_name(size, sequence_parallel, recomputes)
        module = Module(source, sequence_parallel=sequence_parallel, **(RECOMPUTE if recomputes else {}))
        options = {"sequence_parallel": sequence_parallel}
        trainer, _ = run(directory / name, size, module, max_epochs=2, options=options)
        with counted_collectives() as reducing:
            for reducer in trainer.strategy._reducers:
                reducer.reduce()
        found[name] = {
            "reducing": dict(reducing), "replicas": num_ranks // size,
            "losses": module.losses, "gradients": module.gradients, "adapters": adapters(module),
            "raw": whole_factors(module),
        }  # fmt: skip
    return found


def clipping(directory: Path, num_ranks: int) -> dict[str, Tensor]:
    """Clipping and accumulation: one norm over parts and whole factors, and over replicas."""
    module = Module(directory / "hf")
    run(None, 2, module, gradient_clip_val=0.05, accumulate_grad_batches=2)
    return adapters(module)


def layouts(num_ranks: int) -> list[tuple[int, bool, bool]]:
    """Return ``(tensor-parallel ranks, sequence parallelism, recomputation)`` of the runs on so many ranks."""
    if num_ranks == 2:
        return [(2, sequence, recomputes) for sequence in (False, True) for recomputes in (False, True)]
    return [(4, True, False), (2, False, False)]  # parts of a quarter; replicas


def layout_name(size: int, sequence_parallel: bool, recomputes: bool) -> str:
    return f"tp{size}" + ("-sp" if sequence_parallel else "") + ("-recompute" if recomputes else "")


def variants(directory: Path, num_ranks: int) -> dict[str, Any]:
    """Dropout, fused pairs, parts of layers."""
    found: dict[str, Any] = {}
    source = directory / "hf"
    for sequence_parallel in (False, True):
        dropped = Module(source, sequence_parallel=sequence_parallel)
        run(None, num_ranks, dropped, lora={"dropout": 0.3})
        found[f"dropped {sequence_parallel}"] = (dropped.losses, whole_factors(dropped))
    found["layer dropout"] = {sp: dropped_column(sp) for sp in (False, True)}
    trainer, fused = run(directory / "fused", num_ranks, Module(source), lora={"fused_pairs": True})
    found["fused"] = (fused.losses, whole_factors(fused), [n for n, _ in named_adapter_parameters(fused)])
    save_peft(fused.model, directory / "fused-peft")
    found["fused logits"] = logits_of(fused)
    _, resumed = run(
        None, 1, Module(source), lora={"fused_pairs": True}, ckpt_path=directory / "fused" / "epoch=0.ckpt",
        max_epochs=2,
    )  # fmt: skip
    found["fused resumed"] = resumed.losses
    targets = {"target_modules": ["q_proj", "v_proj", "linear_fc2"], "rank_pattern": {"v_proj": 2, "linear_fc2": 6}}
    _, parts = run(None, num_ranks, Module(source), lora=targets)
    found["parts"] = {"gradients": parts.gradients, "adapters": adapters(parts)}
    return found


def column(sequence_parallel: bool, **lora: Any) -> Any:
    """Return a frozen column-parallel layer 32 -> 64 in a container, adapted if ``lora`` says how."""
    from megatron.core.tensor_parallel import ColumnParallelLinear

    return contained(ColumnParallelLinear, (32, 64), sequence_parallel, lora, gather_output=False)


def row(sequence_parallel: bool, **lora: Any) -> Any:
    """Return a frozen row-parallel layer 64 -> 32 in the same way."""
    from megatron.core.tensor_parallel import RowParallelLinear

    return contained(RowParallelLinear, (64, 32), sequence_parallel, lora, input_is_parallel=True)


def contained(kind: Any, sizes: tuple[int, int], sequence_parallel: bool, lora: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(3)
    options |= {"config": layer_config(sequence_parallel), "init_method": torch.nn.init.xavier_normal_}
    layer = torch.nn.Sequential(kind(*sizes, bias=False, skip_bias_add=True, **options))
    layer[0].weight.requires_grad_(False)
    return inject(layer, LoRAConfig(r=4, target_modules=["0"], **lora)) if lora else layer


def layer_config(sequence_parallel: bool) -> Any:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, use_cpu_initialization=True, add_bias_linear=False,
        tensor_model_parallel_size=int(os.environ["WORLD_SIZE"]), sequence_parallel=sequence_parallel,
    )  # fmt: skip


def dropped_column(sequence_parallel: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, A's whole gradient and the input's of a layer with dropout, for one seed."""
    layer = column(sequence_parallel, dropout=0.4)
    torch.manual_seed(4)
    x = torch.randn(8, 2, 32)
    layer[0].lora_B.data.copy_(torch.randn(64, 4).chunk(int(os.environ["WORLD_SIZE"]))[int(os.environ["RANK"])])
    if sequence_parallel:
        x = x.chunk(int(os.environ["WORLD_SIZE"]))[int(os.environ["RANK"])]
    x.requires_grad_()
    with mock.patch.object(type(layer[0]), "dropout_seed", return_value=torch.tensor(123)):
        y = layer[0](x)[0]
    y.square().sum().backward()
    grad_A, grad_x = layer[0].lora_A.grad.clone(), x.grad
    torch.distributed.all_reduce(grad_A)
    if sequence_parallel:
        parts = [torch.empty_like(grad_x) for _ in range(int(os.environ["WORLD_SIZE"]))]
        torch.distributed.all_gather(parts, grad_x)
        grad_x = torch.cat(parts)
    return y.detach(), grad_A, grad_x


def files(directory: Path, num_ranks: int) -> dict[str, Any]:
    """One layout's checkpoint under another."""
    found: dict[str, Any] = {}
    source = directory / "hf"
    run(directory / "tp1", 1, Module(source), max_epochs=1)
    for written in ("tp1", "tp2", "tp2-sp"):
        found[written] = resumed(directory / written, source, 2)
    one = Module(source)
    run(None, 1, one, ckpt_path=directory / "tp2" / "epoch=0.ckpt", max_epochs=2)
    found["to tp1"] = adapters(one)
    return found


def quarters(directory: Path, num_ranks: int) -> dict[str, Any]:
    """Files of two parts in four, and of four in two and replicas of them."""
    source = directory / "hf"
    return {"tp2": resumed(directory / "tp2", source, 4), "tp4-sp": resumed(directory / "tp4-sp", source, 2)}


def resumed(written: Path, source: Path, size: int) -> dict[str, Any]:
    """Go on from the first epoch's file."""
    module, midway = Module(source), AtMidway()
    run(None, size, module, ckpt_path=written / "epoch=0.ckpt", max_epochs=2, callbacks=(midway,))
    return {"losses": module.losses, "adapters": adapters(module), "moments": moments(module, midway.moments)}


def directories(directory: Path, num_ranks: int) -> dict[str, Any]:
    """PEFT directories in and out, and what the model computes with, without and in its weights."""
    found: dict[str, Any] = {}
    source = directory / "hf"
    trained = Module(source)
    run(None, num_ranks, trained)
    save_peft(trained.model, directory / "peft")
    found["exported"] = logits_of(trained)
    with torch.no_grad(), merged(trained):
        found["merged"] = logits_of(trained)
    with disabled(trained):
        found["disabled"] = logits_of(trained)
    merge(trained)
    unmerge(trained)
    found["unmerged"] = logits_of(trained)
    bare = gpt_model(str(source))
    load_hf_weights(bare, source)
    load_peft(bare, directory / "hf-peft")
    trained.model = bare
    found["imported"] = logits_of(trained)
    remove(bare)
    found["removed"] = logits_of(trained)
    return found


def moments(module: Module, states: Any) -> dict[str, Any]:
    """Return Adam's moments, whole, by parameter."""
    names = {id(p): (n, p) for n, p in module.named_parameters()}
    optimizer = module.trainer.optimizers[0]
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    found: dict[str, Any] = {}
    for (name, parameter), own in zip(order, states, strict=True):
        for key, value in own.items():
            if hasattr(parameter, "lora_split") and value.shape == parameter.shape:
                value = value.clone()
                split_over(value, *parameter.lora_split)
            found[f"{name}.{key}"] = whole(value)
    return found


@contextmanager
def counted() -> Any:
    """Count Megatron-core's collectives too, which it looked up when it was imported."""
    from megatron.core.tensor_parallel import layers, mappings, utils

    with counted_collectives() as sizes:
        gather = {"dist_all_gather_func": torch.distributed.all_gather_into_tensor}
        scatter = {"dist_reduce_scatter_func": torch.distributed.reduce_scatter_tensor}
        with (
            mock.patch.multiple(layers, **gather, **scatter),
            mock.patch.multiple(mappings, **gather, **scatter),
            mock.patch.multiple(utils, **gather),
        ):
            yield sizes


def traffic(directory: Path, num_ranks: int) -> dict[str, Any]:
    """What one layer, and one whole model, exchange in forward and backward, with and without adapters."""
    fabric_without_sequences(num_ranks)  # Megatron-core's groups
    found: dict[str, Any] = {}
    for sequence_parallel in (False, True):
        for build in (column, row):
            for adapted in (False, True):
                layer = build(sequence_parallel, **({"dropout": 0.1} if adapted else {}))
                tokens = 8 // num_ranks if sequence_parallel and build is column else 8
                x = torch.randn(tokens, 2, 32 if build is column else 64 // num_ranks, requires_grad=True)
                with counted() as forward:
                    y = layer[0](x)[0]
                with counted() as backward:
                    y.sum().backward()
                found[f"{build.__name__} {sequence_parallel} {adapted}"] = (dict(forward), dict(backward))
    for sequence_parallel in (False, True):
        for adapted in (False, True):
            module = Module(directory / "hf", sequence_parallel=sequence_parallel)
            module.configure_model()
            module.model.requires_grad_(False)
            module.model.embedding.register_forward_hook(lambda *args: args[2].requires_grad_(True))
            if adapted:
                inject(module.model, LoRAConfig(r=4))
            with counted() as forward:
                loss = module.training_step(models.token_ids(2, 8, seed=1), 0)
            with counted() as backward:
                loss.backward()
            found[f"model {sequence_parallel} {adapted}"] = (dict(forward), dict(backward))
    return found


def company(directory: Path, num_ranks: int) -> dict[str, Any]:
    """Tools around a run, and a second one."""
    found: dict[str, Any] = {}
    module, search = Bare(directory / "hf"), AfterTheSearch(num_training_steps=3, early_stop_threshold=None)
    options = {"base_weights": str(directory / "hf")}
    started = Bare(directory / "hf")
    start = directory / "tp2" / "epoch=0.ckpt"
    run(None, 2, started, lora={"init_from": start}, max_epochs=0, options=options)
    found["started"] = adapters(started)
    trainer, _ = run(directory / "searched", 2, module, callbacks=(search,), options=options)
    found["after_search"] = search.adapters
    batch = models.token_ids(4, 8, seed=2)
    predicting = pl.Trainer(
        accelerator="cpu", devices=num_ranks, strategy=MegatronLoRAStrategy(tensor_parallel_size=2), logger=False,
        callbacks=[LoRACallback(r=4)], use_distributed_sampler=False, enable_model_summary=False,
        enable_progress_bar=False,
    )  # fmt: skip
    with disabled(module):
        found["base"] = logits_of(module)
    found["predicted"] = (
        predicting.predict(module, torch.utils.data.DataLoader(batch, batch_size=4))[0],
        logits_of(module),
    )
    found["searched"] = len(module.losses) - trainer.global_step
    trainer.fit_loop.max_epochs = 2
    trainer.callbacks.remove(search)
    trainer.fit(module, rank_loader(int(os.environ["RANK"]) // 2, num_ranks // 2))
    found["steps"] = len(module.losses)
    return found


def experts(directory: Path, num_ranks: int) -> dict[str, Any]:
    """A mixture of experts, adapters on every expert: whole on each rank, and spread over all."""
    found: dict[str, Any] = {}
    for size in (1, num_ranks):
        module = Module(directory / "moe", sequence_parallel=size > 1)
        run(directory / f"experts{size}", size, module)
        found[f"tp{size}"] = {
            "gradients": module.gradients, "adapters": adapters(module), "raw": whole_factors(module),
        }  # fmt: skip
    found["logits"] = logits_of(module)
    save_peft(module.model, directory / "moe-peft")
    for name, settings in (("scaled", {"use_rslora": True}), ("partial", {"target_modules": ["gate_proj"]})):
        module.model = gpt_model(directory / "moe", sequence_parallel=True)
        load_hf_weights(module.model, directory / "moe")
        inject(module.model, LoRAConfig(r=4, **settings))
        torch.manual_seed(5)
        for parameter_name, parameter in module.model.named_parameters():
            if "lora_A" in parameter_name and not is_sharded(parameter):
                torch.nn.init.normal_(parameter)
        try:
            save_peft(module.model, directory / "not")
        except ValueError as error:
            found[name] = str(error)
    return found


class Taught(Module):
    """Beside the adapted model holds a teacher of the same weights, and a parallel head of the user's own that trains."""

    def configure_model(self) -> None:
        from megatron.core.tensor_parallel import ColumnParallelLinear

        if self.model is None:
            super().configure_model()
            self.teacher = gpt_model(self.source)
            load_hf_weights(self.teacher, self.source)
            self.teacher.requires_grad_(False)
            torch.manual_seed(4)
            self.head = ColumnParallelLinear(
                models.VOCAB, 4, config=self.model.config, init_method=torch.nn.init.xavier_normal_, bias=False,
                gather_output=True,
            )  # fmt: skip
            self.first = whole(self.tagged()).clone()

    def tagged(self) -> Tensor:
        weight = self.head.weight.detach().clone()
        split_over(weight, mesh_of(self.head.tp_group, "cpu"), 0)
        return weight

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.head(self.logits(batch))[0].square().mean()


def outside(directory: Path, num_ranks: int) -> dict[str, Any]:
    """Parallel layers outside the adapted model keep their parts."""
    module = Taught(directory / "hf")
    run(directory / "taught", 2, module, lora={"module": "model"})
    adapted, module.model = module.model, module.teacher
    teacher = logits_of(module)
    module.model = adapted
    saved = torch.load(directory / "taught" / "epoch=0.ckpt", weights_only=True)["state_dict"]["head.weight"]
    return {"teacher": teacher, "head": whole(module.tagged()), "first": module.first, "saved": saved}


class Late(Module):
    """Adapts its own model, and begins to train some split factors in its second epoch."""

    def configure_model(self) -> None:
        if self.model is None:
            super().configure_model()
            inject(self.model, LoRAConfig(r=4))
            self.late = [p for n, p in self.model.named_parameters() if "layers.0" in n and "lora_B" in n]
            for parameter in self.late:
                parameter.requires_grad_(False)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            for parameter in self.late:
                parameter.requires_grad_(True)
            self.optimizers().add_param_group({"params": self.late})


def unfreezing(directory: Path, num_ranks: int) -> dict[str, Any]:
    module = Late(directory / "hf")
    run(directory / "late", 2, module, max_epochs=2)
    return {name: p.detach().clone() for name, p in module.model.named_parameters() if "lora_B" in name}


def fabric(directory: Path, num_ranks: int) -> dict[str, Any]:
    """The same run in Fabric."""
    fabric = Fabric(
        accelerator="cpu", devices=num_ranks, strategy=FabricStrategy(tensor_parallel_size=2, sequence_parallel=True)
    )
    fabric.launch()
    module = Module(directory / "hf", sequence_parallel=True)
    module.configure_model()
    inject(module.model, LoRAConfig(r=4))
    model, optimizer = fabric.setup(module.model, module.configure_optimizers())
    norms = []
    for batch in rank_loader(int(os.environ["RANK"]) // 2, num_ranks // 2):
        loss = module.training_step(batch, 0)
        fabric.backward(loss)
        norms.append(fabric.clip_gradients(model, optimizer, max_norm=0.05, error_if_nonfinite=True))
        optimizer.step()
        optimizer.zero_grad()
    found = {"losses": module.losses, "adapters": adapters(module), "norms": norms}
    fabric.save(directory / "fabric.ckpt", {"model": model, "optimizer": optimizer})
    again = Module(directory / "hf")
    again.configure_model()
    inject(again.model, LoRAConfig(r=4))
    other, other_optimizer = fabric_without_sequences(num_ranks).setup(again.model, again.configure_optimizers())
    fabric.load(directory / "fabric.ckpt", {"model": other, "optimizer": other_optimizer})
    return {**found, "loaded": adapters(again)}


def fabric_without_sequences(num_ranks: int) -> Fabric:
    fabric = Fabric(accelerator="cpu", devices=num_ranks, strategy=FabricStrategy(tensor_parallel_size=2))
    fabric.launch()
    return fabric


def precisions(directory: Path, num_ranks: int) -> dict[str, Any]:
    """bf16, of the whole base and by autocast."""
    found: dict[str, Any] = {}
    for precision in ("bf16-true", "bf16-mixed"):
        for sequence_parallel in (False, True):
            module = Module(directory / "hf", sequence_parallel=sequence_parallel)
            try:
                run(directory / "bf16", num_ranks, module, precision=precision)
                found[f"{precision} {sequence_parallel}"] = (
                    module.losses,
                    str(next(p.dtype for p in module.parameters())),
                )
            except (ValueError, RuntimeError) as error:
                found[f"{precision} {sequence_parallel}"] = str(error)
    return found


def whole_modules(directory: Path, num_ranks: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    lora = {"target_modules": ["q_proj"], "modules_to_save": ["q_layernorm", "final_layernorm", "output_layer"]}
    for sequence_parallel in (False, True):
        biased = Module(directory / "biased", sequence_parallel=sequence_parallel)
        run(None, num_ranks, biased, lora={"bias": "lora_only"})
        biases = {n: whole(p).detach().clone() for n, p in biased.model.named_parameters() if n.endswith("bias")}
        found[f"biases {sequence_parallel}"] = biases
        module = Module(directory / "hf", sequence_parallel=sequence_parallel)
        run(directory / "whole", num_ranks, module, lora=lora)
        names = ("q_layernorm", "final_layernorm", "output_layer")
        found[str(sequence_parallel)] = {
            n: whole(p).detach().clone() for n, p in module.model.named_parameters() if any(m in n for m in names)
        }
    return found


def refusals(directory: Path, num_ranks: int) -> dict[str, str]:
    source = directory / "hf"
    cases: dict[str, Any] = {
        "sequence": lambda: run(None, 2, Module(source), options={"sequence_parallel": True}),
        "dora": lambda: run(None, 2, Module(source), lora={"use_dora": True}),
        "typo": lambda: run(None, 2, Module(source), lora={"target_modules": ["q_prj"]}),
        "head": lambda: run(None, 2, Module(source), lora={"target_modules": ["output_layer"]}),
        "fused part": lambda: run(
            None, 2, Module(source), lora={"target_modules": ["q_proj"], "fused_pairs": True}
        ),
        "recompute": lambda: run(None, 2, Module(source, **RECOMPUTE), precision="bf16-mixed"),
        "bias": lambda: run(
            None, 2, Module(directory / "biased"), lora={"target_modules": ["o_proj"], "bias": "all"}
        ),
        "other base": lambda: load_peft(gpt_model(source), directory / "hf-peft"),
        "rank": lambda: run(None, 2, Module(source), ckpt_path=directory / "tp2" / "epoch=0.ckpt", lora={"r": 2}),
        "built early": lambda: run(None, num_ranks, early_built(source)),
    }  # fmt: skip
    found: dict[str, str] = {}
    for name, case in cases.items():
        try:
            case()
        except ValueError as error:
            found[name] = str(error)
    return found


def early_built(source: Path) -> Module:
    """A module whose model was built while Megatron-core had other groups."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(1, create_gloo_process_groups=False)
    module = Module(source)
    module.configure_model()
    return module


PARTS = {
    part.__name__: part
    for part in (
        training, clipping, variants, files, quarters, directories, experts, outside, unfreezing, fabric, precisions, company,
        whole_modules, traffic, refusals,
    )
}  # fmt: skip


if __name__ == "__main__":
    report(Path(sys.argv[1]), PARTS[sys.argv[2]](Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])))
