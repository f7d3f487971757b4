"""One rank of Fabric runs under ``fsdp_lora``: many models, each against itself in this one process."""

import functools
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn

from lightning_lora import LoRAConfig, adapter_state_dict, inject, merge, named_adapter_parameters, remove
from lightning_lora.fabric import FSDPLoRAStrategy
from lightning_lora.ops.sharded import is_sharded, whole
from tests import models, zoo
from tests.distributed.launch import report


class VisionTransformer(nn.Module):
    """The shape of timm's ViT: a class token and positions beside blocks in an ``nn.Sequential``."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
            self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
            self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, 2, 8).permute(2, 0, 3, 1, 4)
            x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
            return x + self.mlp(self.norm2(x))

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 16, 4, 4)
        self.cls_token, self.pos_embed = nn.Parameter(torch.randn(1, 1, 16)), nn.Parameter(torch.randn(1, 17, 16))
        self.blocks = nn.Sequential(self.Block(), self.Block())
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class GPT(nn.Module):
    """The shape of LitGPT's GPT: ``transformer`` is an ``nn.ModuleDict``, its blocks sit under ``h``."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm_1, self.attn, self.proj = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.attn(self.norm_1(x)).chunk(3, -1)
            return x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(16, models.VOCAB, bias=False)
        blocks = nn.ModuleList(self.Block() for _ in range(2))
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(models.VOCAB, 16), "h": blocks, "ln_f": nn.LayerNorm(16)})

    def forward(self, ids: Tensor) -> Tensor:
        x = self.transformer["wte"](ids)
        for block in self.transformer["h"]:
            x = block(x)
        return self.lm_head(self.transformer["ln_f"](x))


class ReadsItsTable(GPT):
    """Ties by reading the embedding's weight, past its forward."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.transformer["wte"](ids)
        for block in self.transformer["h"]:
            x = block(x)
        return self.transformer["ln_f"](x) @ self.transformer["wte"].weight.t() + 0 * self.lm_head(x)


class TwoSided(nn.Module):
    """An adapted layer that only odd inputs reach, and one that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.odd, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.odd(y) if x[0, 0] > 0 else y


class Scalars(nn.Module):
    """Blocks of odd sizes with a scalar each, and one beside them."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down, self.gate = nn.Linear(5, 7), nn.Linear(7, 5), nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.gate * self.down(self.up(x).tanh())

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.scale = nn.Sequential(self.Block(), self.Block()), nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.blocks(x)


class Routed(nn.Module):
    """Blocks that reach one of two adapted layers, by the sign of their input, and never a third."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("even", "odd", "never")})

        def forward(self, x: Tensor) -> Tensor:
            return x + self.experts["odd" if x[0, 0] > 0 else "even"](x)[:, :1] * 1e-3

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(self.Block(), self.Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Outside(nn.Module):
    """An adapted model, a head tied to its embedding, and a frozen head, both outside of it."""

    def __init__(self, config: LoRAConfig) -> None:
        super().__init__()
        self.model = inject(models.llama(), config)
        self.tied = nn.Linear(32, models.VOCAB, bias=False)
        self.tied.weight = self.model.model.embed_tokens.weight
        self.frozen = models._seeded(lambda: nn.Linear(32, 3)).requires_grad_(False)

    def forward(self, batch: Tensor) -> Tensor:
        hidden = self.model.model(input_ids=batch).last_hidden_state
        return self.tied(hidden).square().mean() + self.frozen(hidden).square().mean()


def ids(rows: int = 4, columns: int = 6) -> Tensor:
    return models.token_ids(rows, columns, seed=5)


def lm_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(input_ids=batch, labels=batch).loss


def squares(model: nn.Module, batch: Tensor) -> Tensor:
    y = model(batch)
    return (y if isinstance(y, Tensor) else y.logits).float().square().mean()


def body_then_head(model: Any, batch: Tensor) -> Tensor:
    """Call the parts of a model, as a loss over chunks does."""
    return model.lm_head(model.model(input_ids=batch).last_hidden_state).square().mean()


@dataclass
class Case:
    build: Callable[[], nn.Module]
    loss: Callable[[Any, Tensor], Tensor] = lm_loss
    batch: Callable[[], Tensor] = ids
    lora: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


def seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: models._seeded(build)


def family(name: str) -> Callable[[], nn.Module]:
    return next(f.build for f in zoo.FAMILIES if f.name == name)


EVERYTHING = {"min_shard_numel": 0}
EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
CASES = {
    "llama": Case(models.llama),
    "tied llama": Case(lambda: models.llama(tied=True), options=EVERYTHING),
    "parts of llama": Case(models.llama, body_then_head, options=EVERYTHING),
    "parts of tied llama": Case(lambda: models.llama(tied=True), body_then_head, options=EVERYTHING),
    "gpt2": Case(models.gpt2, options=EVERYTHING),
    "gpt2 kept": Case(models.gpt2, options={**EVERYTHING, "reshard_after_forward": False}),
    "adapted embedding": Case(models.llama, lora={"target_modules": ["embed_tokens", "q_proj"]}, options=EVERYTHING),
    "token rows": Case(
        lambda: models.llama(tied=True), lora={"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}
    ),
    "dora": Case(models.llama, lora={"use_dora": True}),
    "dora in shards": Case(models.llama, lora={"use_dora": True}, options={"shard_adapters": True}),
    "pissa": Case(models.llama, lora={"init": "pissa"}),
    "pissa in shards": Case(models.llama, lora={"init": "pissa"}, options={"shard_adapters": True}),
    "lora_bias": Case(models.gpt2, lora={"lora_bias": True}),
    "biases": Case(models.gpt2, lora={"bias": "all"}),
    "biases in shards": Case(models.gpt2, lora={"bias": "all"}, options={"shard_adapters": True, **EVERYTHING}),
    "experts": Case(family("mixtral"), lora=EXPERTS),
    "experts in shards": Case(family("mixtral"), lora=EXPERTS, options={"shard_adapters": True}),
    "classifier": Case(models.bert_classifier, squares),
    "vision transformer": Case(seeded(VisionTransformer), squares, lambda: zoo.noise(4, 3, 16, 16)),
    "vision transformer, all of it": Case(
        seeded(VisionTransformer), squares, lambda: zoo.noise(4, 3, 16, 16), options=EVERYTHING
    ),
    "litgpt": Case(seeded(GPT), squares, options=EVERYTHING),
    "a table that is read": Case(seeded(ReadsItsTable), squares, options=EVERYTHING),
    "torch's encoder": Case(models.encoder, squares, options=EVERYTHING),
    "checkpointed torch's encoder": Case(models.encoder, squares, options={"activation_checkpointing": True}),
    "scalars": Case(seeded(Scalars), squares, lambda: zoo.noise(4, 5), options=EVERYTHING),
    "scalars in shards": Case(
        seeded(Scalars), squares, lambda: zoo.noise(4, 5), options={"shard_adapters": True, **EVERYTHING}
    ),
    "checkpointed gpt2": Case(models.gpt2, options={"activation_checkpointing": True}),
}
# parts of a quarter, and ranks that hold nothing of a tensor
IN_FOUR = (
    "tied llama", "dora in shards", "biases in shards", "experts in shards", "vision transformer, all of it", "scalars",
    "scalars in shards",
)  # fmt: skip


def make(case: Case) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = inject(case.build(), LoRAConfig(**{"r": 2, **case.lora})).eval()
    # B is zero at first, and A would have no gradient
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for _, parameter in named_adapter_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    # all parameters: what is frozen has to be dropped
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-4)


def trained(model: Any, optimizer: Any, step: Callable[[], Tensor], num_steps: int = 3) -> dict[str, Any]:
    """Return the loss and gradients of the first step, and the adapters after all of them."""
    found: dict[str, Any] = {}
    for index in range(num_steps):
        loss = step()
        if index == 0:
            named = dict(model.named_parameters())
            found["gradients"] = {n: whole(p.grad).clone() for n, p in named.items() if p.grad is not None}
            found["loss"] = loss.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
    found["adapters"] = {name: value.clone() for name, value in adapter_state_dict(model).items()}
    return found


def compared(case: Case, rank: int, num_ranks: int) -> dict[str, Any]:
    """Train one case in shards on this rank's rows, and on rank 0 also in this process on all rows."""
    batch = case.batch()
    model, optimizer = make(case)

    def alone() -> Tensor:
        losses = [case.loss(model, part) for part in batch.chunk(num_ranks)]
        loss = sum(losses) / num_ranks
        loss.backward()
        return loss

    expected = trained(model, optimizer, alone) if rank == 0 else None
    fabric = start(**case.options)
    sharded, sharded_optimizer = make(case)
    sharded, sharded_optimizer = fabric.setup(sharded, sharded_optimizer)
    inner = sharded.module

    def together() -> Tensor:
        with parts_allowed(sharded):
            loss = case.loss(sharded if case.loss is not body_then_head else inner, batch.chunk(num_ranks)[rank])
        fabric.backward(loss)
        return fabric.all_reduce(loss.detach())

    ours = trained(inner, sharded_optimizer, together)
    spread = sum(p.numel() for p in inner.parameters() if is_sharded(p))
    return {"expected": expected, "ours": ours, "spread": spread / sum(p.numel() for p in inner.parameters())}


@contextmanager
def parts_allowed(module: Any) -> Any:
    """Fabric refuses calls of a wrapped module's parts while it watches; the parts are FSDP's business here."""
    yield


def start(**options: Any) -> Fabric:
    fabric = Fabric(accelerator="cpu", devices=int(os.environ["WORLD_SIZE"]), strategy=FSDPLoRAStrategy(**options))
    fabric.launch()
    return fabric


def families(directory: Path, rank: int, num_ranks: int) -> dict[str, Any]:
    """Return, for every model of the zoo, the outputs and gradients in shards and, on rank 0, alone, on the same rows."""
    found: dict[str, Any] = {}
    for one in zoo.FAMILIES:
        config = LoRAConfig(r=2, exclude_modules=one.refused or None)

        def run(model: nn.Module, loss_of: Callable[[Tensor], None], one: Any = one) -> dict[str, Any]:
            output = one.output(model(**one.inputs()))
            loss_of(output.float().square().mean())
            gradients = {n: p.grad.clone() for n, p in named_adapter_parameters(model) if p.grad is not None}
            return {"output": output.detach(), "gradients": gradients}

        in_shards, expected = inject(one.build(), config), None
        models.fill_adapters(in_shards)
        if rank == 0:
            alone = inject(one.build(), config)
            models.fill_adapters(alone)
            expected = run(alone, lambda loss: loss.backward())
        fabric = start(min_shard_numel=2000)
        fabric.setup(in_shards)
        ours = run(in_shards, fabric.backward)
        spread = sum(p.numel() for p in in_shards.parameters() if is_sharded(p))
        found[one.name] = {
            "expected": expected,
            "ours": ours,
            "spread": spread / sum(p.numel() for p in in_shards.parameters()),
        }
    return found


def around(directory: Path, rank: int, num_ranks: int) -> dict[str, Any]:
    """Accumulation, clipping, absent gradients, saving and loading in Fabric."""
    found: dict[str, Any] = {}
    case = Case(models.llama)
    batch = case.batch()
    for shards in (False, True):
        fabric = start(shard_adapters=shards)
        model, optimizer = fabric.setup(*make(case))
        mine = batch.chunk(num_ranks)[rank]
        for _ in range(2):
            for micro in range(2):
                with fabric.no_backward_sync(model, enabled=micro == 0):
                    fabric.backward(lm_loss(model, mine) / 2)
            norm = fabric.clip_gradients(model, optimizer, max_norm=0.05)
            optimizer.step()
            optimizer.zero_grad()
        path = directory / f"fabric_{shards}.ckpt"
        fabric.save(path, {"model": model, "optimizer": optimizer, "step": 2})
        twin, twin_optimizer = fabric.setup(*make(case))
        state = {"model": twin, "optimizer": twin_optimizer, "step": 0}
        fabric.load(path, state)
        going_on, back = (
            trained(m.module, o, functools.partial(step, fabric, m, mine), 2)
            for m, o in ((model, optimizer), (twin, twin_optimizer))
        )
        found[f"shards={shards}"] = {
            "norm": whole(norm), "step": state["step"], "going_on": going_on, "back": back,
        }  # fmt: skip
        fabric.barrier()

    fabric = start(min_shard_numel=0)
    model, optimizer = fabric.setup(*make(case))
    mine = batch.chunk(num_ranks)[rank]
    with torch.inference_mode():  # as a generate in the user's code
        before = lm_loss(model, mine)
    found["inference_first"] = (before.clone(), step(fabric, model, mine).detach())
    optimizer.step()

    fabric = start()
    x = torch.full((2, 4), 1.0 if rank else -1.0)  # only rank 0 does not reach the odd layer
    model = inject(models._seeded(TwoSided), LoRAConfig(r=2, target_modules=["first", "odd", "never"]))
    models.fill_adapters(model)
    single = inject(models._seeded(TwoSided), LoRAConfig(r=2, target_modules=["first", "odd", "never"]))
    models.fill_adapters(single)
    for other in range(num_ranks):
        (single(torch.full((2, 4), 1.0 if other else -1.0)).square().sum() / num_ranks).backward()
    model = fabric.setup(model)
    fabric.backward(model(x).square().sum())
    found["absent"] = [
        {n: None if p.grad is None else p.grad for n, p in named_adapter_parameters(m)} for m in (model.module, single)
    ]
    return found


def unusual(directory: Path, rank: int, num_ranks: int) -> dict[str, Any]:
    """Several models, optimizers made apart, layers that some ranks lack, and what is left of sharded adapters."""
    found: dict[str, Any] = {}
    case, batch = Case(models.llama), ids()
    mine = batch.chunk(num_ranks)[rank]
    fabric = start()
    (one, optimizer), (two, _) = fabric.setup(*make(case)), fabric.setup(*make(case))
    fabric.backward(lm_loss(one, mine))  # the other has no gradients yet
    optimizer.step()
    found["untouched"] = all(parameter.grad is None for parameter in two.parameters())

    fabric = start(shard_adapters=True, **EVERYTHING)
    model, optimizer = make(case)
    expected = lm_loss(model, mine).detach()
    base = lm_loss(models.llama().eval(), mine).detach()
    model = fabric.setup(model)
    try:
        fabric.setup_optimizers(optimizer)
    except ValueError as error:
        found["apart"] = str(error)
    for name, take_out, loss in (
        ("removed", remove, base),
        ("merged", functools.partial(merge, remove=True), expected),
    ):
        plain = make(case)[0]
        fabric.setup(plain)
        lm_loss(plain, mine)
        take_out(plain)
        found[name] = (lm_loss(plain, mine).detach(), loss, [n for n, _ in plain.named_parameters() if ".lora_" in n])
    adapted, optimizer = fabric.setup(*anew(plain))
    fabric.backward(lm_loss(adapted, mine))
    optimizer.step()
    found["adapted again"] = {n: whole(p.detach()) for n, p in named_adapter_parameters(adapted.module)}

    sides = [torch.full((2, 8), 1.0 if other else -1.0) for other in range(num_ranks)]
    routed = LoRAConfig(r=2, init="pissa")  # an A and a B that both train from the start
    single = inject(models._seeded(Routed), routed)
    for x in sides:
        (single(x).square().sum() / num_ranks).backward()
    model = fabric.setup(inject(models._seeded(Routed), routed))
    fabric.backward(model(sides[rank]).square().sum())
    found["routed"] = [
        {n: None if p.grad is None else whole(p.grad) for n, p in named_adapter_parameters(m)}
        for m in (model.module, single)
    ]
    for shards in (False, True):
        model = Outside(LoRAConfig(r=2, modules_to_save=["embed_tokens"]))
        models.fill_adapters(model)
        fabric = start(shard_adapters=shards, **EVERYTHING)
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.model.parameters(), lr=0.1))
        model.module.frozen.requires_grad_(True)
        optimizer.add_param_group({"params": [*model.module.frozen.parameters()]})
        for _ in range(2):
            fabric.backward(model(mine))
            optimizer.step()
            optimizer.zero_grad()
        found[f"outside, shards={shards}"] = {
            n: whole(p.detach()).clone() for n, p in model.module.named_parameters() if p.requires_grad
        }
    return found


def anew(model: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Adapt a model whose base is in shards, with another rank."""
    inject(model, LoRAConfig(r=3))
    return model, torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=1.0)


def step(fabric: Fabric, model: Any, batch: Tensor) -> Tensor:
    loss = lm_loss(model, batch)
    fabric.backward(loss)
    return loss


def cases(directory: Path, rank: int, num_ranks: int) -> dict[str, Any]:
    names = CASES if num_ranks == 2 else IN_FOUR
    return {name: compared(CASES[name], rank, num_ranks) for name in names}


PARTS = {part.__name__: part for part in (around, unusual, cases, families)}


if __name__ == "__main__":
    num_ranks, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    report(Path(sys.argv[1]), PARTS[sys.argv[2]](Path(sys.argv[1]), rank, num_ranks))
