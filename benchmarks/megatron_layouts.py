"""The four linear layers of one transformer block, of Megatron-core, with LoRA in each of the layouts compared.

Every factor of a layout says which part of the whole one a rank holds, so that all layouts start from the same whole
tensors and their gradients are compared with those of dense math.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject

LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
SCALING = 2.0


@dataclass(frozen=True)
class Shape:
    """Sizes of a block and of its input ``[sequence, batch, hidden]``; every number of heads has its own k and v."""

    hidden: int
    ffn: int
    heads: int
    sequence: int
    batch: int
    r: int

    @property
    def tokens(self) -> int:
        return self.sequence * self.batch

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Return in_features and out_features of each linear layer."""
        h, f = self.hidden, self.ffn
        return dict(zip(LINEARS, ((h, 3 * h), (h, h), (h, 2 * f), (f, h)), strict=True))


@dataclass(frozen=True)
class Factor:
    """One A or B: its key in :func:`whole_tensors`, and how ranks hold it (``dim=None``: whole, each of them)."""

    key: str
    parameter: nn.Parameter
    dim: int | None
    stripes: int = 1
    is_addend: bool = False  # each rank's gradient is a term of the true one


def part(whole: Tensor, dim: int | None, stripes: int = 1) -> Tensor:
    """Return this rank's part: along ``dim`` its share of each of ``stripes`` equal pieces (gate and up of fc1)."""
    if dim is None:
        return whole
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    return torch.cat([stripe.chunk(size, dim)[rank] for stripe in whole.chunk(stripes, dim)], dim)


def whole_tensors(shape: Shape, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Return the input, weights and factors, the same on every rank; B is not zero, so that A has a gradient."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device, generator=generator) / size[-1] ** 0.5

    tensors = {"x": normal(shape.sequence, shape.batch, shape.hidden)}
    for name, (inputs, outputs) in shape.sizes().items():
        tensors |= {f"{name}.weight": normal(outputs, inputs)}
        tensors |= {f"{name}.A": normal(shape.r, inputs), f"{name}.B": normal(outputs, shape.r)}
    return tensors


def block_math(x: Tensor, linear: Callable[[str, Tensor], Tensor], head: int) -> Tensor:
    """Run a block without norms and without mixing of tokens, which talk to no other rank."""
    q, k, v = linear("linear_qkv", x).unflatten(-1, (-1, 3, head)).unbind(-2)
    x = x + linear("linear_proj", (q * k.sigmoid() + v).flatten(-2))
    gate, up = linear("linear_fc1", x).chunk(2, -1)
    return x + linear("linear_fc2", F.silu(gate) * up)


def dense(shape: Shape, tensors: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return output and gradients, of ``sum(y**2) / 2``, of the block on one rank with ``W + scaling * B A``."""
    leaves = {k: t.clone().requires_grad_(not k.endswith("weight")) for k, t in tensors.items()}

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, leaves[f"{name}.weight"] + SCALING * leaves[f"{name}.B"] @ leaves[f"{name}.A"])

    y = block_math(leaves["x"], linear, shape.hidden // shape.heads)
    (y.square().sum() / 2).backward()
    return y.detach(), {k: t.grad for k, t in leaves.items() if t.grad is not None}


class Block(nn.Module):
    """The frozen base alone, or with adapters once :func:`build` has put them in."""

    def __init__(self, shape: Shape, sequence_parallel: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.config = TransformerConfig(
            num_layers=1, hidden_size=shape.hidden, ffn_hidden_size=shape.ffn, num_attention_heads=shape.heads,
            gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False, params_dtype=dtype,
            use_cpu_initialization=True, perform_initialization=False, sequence_parallel=sequence_parallel,
            tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        )  # fmt: skip
        self.head = shape.hidden // shape.heads
        self.factors: list[Factor] = []
        for name, (inputs, outputs) in shape.sizes().items():
            make = row if name in ("linear_proj", "linear_fc2") else column
            setattr(self, name, make(inputs, outputs, self.config).requires_grad_(False))

    def forward(self, x: Tensor) -> Tensor:
        return block_math(x, lambda name, x: getattr(self, name)(x)[0], self.head)


def column(inputs: int, outputs: int, config: Any, **options: Any) -> ColumnParallelLinear:
    return ColumnParallelLinear(
        inputs, outputs, config=config, bias=False, init_method=nn.init.normal_, skip_bias_add=True, **options
    )


def row(inputs: int, outputs: int, config: Any) -> RowParallelLinear:
    return RowParallelLinear(
        inputs, outputs, config=config, bias=False, init_method=nn.init.normal_, skip_bias_add=True,
        input_is_parallel=True,
    )  # fmt: skip


class Beside(nn.Module):
    """A base layer with its adapter beside it: what both give is added, behind the base's collectives."""

    def __init__(self, base: Any, r: int) -> None:
        super().__init__()
        self.base = base
        self.is_row = isinstance(base, RowParallelLinear)
        self.sequence_parallel = base.config.sequence_parallel
        whole_sequence = copy.copy(base.config)
        whole_sequence.sequence_parallel = False
        self.build(base.input_size, base.output_size, r, whole_sequence)

    def build(self, inputs: int, outputs: int, r: int, whole_sequence: Any) -> None:
        raise NotImplementedError

    def delta(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.base(x)[0] + SCALING * self.delta(x), None


class Sharded(Beside):
    """Layout of NeMo and Megatron-Bridge, local spec: no factor is whole, activations of hidden width are moved.

    Column: A is split over ranks by r, B by out_features. Row: A by in_features, B by out_features.
    """

    def build(self, inputs: int, outputs: int, r: int, whole_sequence: Any) -> None:
        if self.is_row:
            self.linear_in = row(inputs, r, whole_sequence)
        else:  # the gather of the sequence sums what it hands back, so A's layer need not
            options = {"gather_output": True, "disable_grad_reduce": self.sequence_parallel}
            self.linear_in = column(inputs, r, whole_sequence, **options)
        self.linear_out = column(r, outputs, whole_sequence, gather_output=self.is_row)

    def delta(self, x: Tensor) -> Tensor:
        if self.sequence_parallel and not self.is_row:
            x = gather_from_sequence_parallel_region(x)
        y = self.linear_out(self.linear_in(x)[0])[0]
        return scatter_to_sequence_parallel_region(y) if self.sequence_parallel and self.is_row else y

    def factors(self, name: str, stripes: int) -> list[Factor]:
        return [
            Factor(f"{name}.A", self.linear_in.weight, 1 if self.is_row else 0),
            Factor(f"{name}.B", self.linear_out.weight, 0, stripes),
        ]


class RankSize(Beside):
    """Layout of ms-swift: A of a column layer and B of a row layer are whole; what is moved is of width r.

    B of a column layer is given the gathered sequence, which spares the gather for its gradient that Megatron-core's
    own sequence-parallel layer makes.
    """

    def build(self, inputs: int, outputs: int, r: int, whole_sequence: Any) -> None:
        dtype = self.base.weight.dtype
        if self.is_row:
            self.linear_in = row(inputs, r, self.base.config)
            self.B = nn.Parameter(torch.empty(outputs, r, dtype=dtype))
        else:
            self.A = nn.Parameter(torch.empty(r, inputs, dtype=dtype))
            self.linear_out = column(r, outputs, whole_sequence, disable_grad_reduce=self.sequence_parallel)

    def delta(self, x: Tensor) -> Tensor:
        if self.is_row:
            return F.linear(self.linear_in(x)[0], self.B)
        h = F.linear(x, self.A)
        return self.linear_out(gather_from_sequence_parallel_region(h) if self.sequence_parallel else h)[0]

    def factors(self, name: str, stripes: int) -> list[Factor]:
        addend = self.sequence_parallel
        if self.is_row:
            return [
                Factor(f"{name}.A", self.linear_in.weight, 1),
                Factor(f"{name}.B", self.B, None, is_addend=addend),
            ]
        return [
            Factor(f"{name}.A", self.A, None, is_addend=addend),
            Factor(f"{name}.B", self.linear_out.weight, 0, stripes),
        ]


def beside(kind: type[Beside], block: Block, shape: Shape) -> None:
    for name in LINEARS:
        layer: Any = kind(getattr(block, name), shape.r)
        setattr(block, name, layer)
        block.factors += layer.factors(name, _stripes(name))


def ours(block: Block, shape: Shape, *, fused_pairs: bool = True) -> None:
    dtype = "float64" if block.config.params_dtype == torch.float64 else "float32"
    config = LoRAConfig(
        r=shape.r, alpha=SCALING * shape.r, target_modules=list(LINEARS), fused_pairs=fused_pairs, adapter_dtype=dtype
    )
    inject(block, config)
    for name in LINEARS:
        layer = getattr(block, name)
        is_row = isinstance(layer, RowParallelLinear)
        for tensor in layer.adapter_names:
            is_whole = tensor.startswith("lora_B") is is_row
            dim = None if is_whole else 1 if is_row else 0
            key = f"{name}.{tensor.removeprefix('lora_')}"
            block.factors.append(Factor(key, getattr(layer, tensor), dim, 1 if is_row else _stripes(name), is_whole))


def _stripes(name: str) -> int:
    return 2 if name == "linear_fc1" else 1


CONTENDERS: dict[str, Callable[[Block, Shape], None]] = {
    "base": lambda block, shape: None,
    "ours": ours,
    "ours, a pair per projection": lambda block, shape: ours(block, shape, fused_pairs=False),
    "NeMo / Megatron-Bridge layout": lambda block, shape: beside(Sharded, block, shape),
    "rank-size layout": lambda block, shape: beside(RankSize, block, shape),
}


def build(
    name: str, shape: Shape, sequence_parallel: bool, tensors: dict[str, Tensor], num_blocks: int = 1
) -> nn.Sequential:
    """Return blocks of one contender on this rank, with this rank's parts of the whole tensors."""
    x, blocks = tensors["x"], []
    for _ in range(num_blocks):
        block = Block(shape, sequence_parallel, x.dtype)
        weights = {linear: getattr(block, linear).weight for linear in LINEARS}
        CONTENDERS[name](block, shape)
        with torch.no_grad():
            for linear, weight in weights.items():
                whole = tensors[f"{linear}.weight"].cpu()
                weight.copy_(part(whole, 1 if linear in ("linear_proj", "linear_fc2") else 0, _stripes(linear)))
            for factor in block.factors:
                if factor.key in tensors:
                    factor.parameter.copy_(part(tensors[factor.key].cpu(), factor.dim, factor.stripes))
        blocks.append(block.to(x.device))
    return nn.Sequential(*blocks)
