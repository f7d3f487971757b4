"""Several named adapters on one base: what acts, and that adapters in one batch equal each one alone."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import (
    LoRAConfig,
    active,
    add_adapter,
    inject,
    named_adapter_parameters,
)
from tests import models

NAMES = ["law", "medicine", None, "law", "code", "medicine"]
WIDTH = 64  # of whole vectors: the elementwise kernels of torch round what is left over in another way
WIDE = {"adapter_dtype": "float64", "init": "gaussian"}


def configs(**more) -> dict[str, LoRAConfig]:
    """Adapters with other ranks, scales and targets."""
    return {
        "law": LoRAConfig(r=4, **{**WIDE, **more}),
        "medicine": LoRAConfig(r=8, alpha=4, target_modules=["q_proj", "v_proj", "up_proj"], **{**WIDE, **more}),
        "code": LoRAConfig(r=2, target_modules=["gate_proj", "up_proj", "down_proj", "o_proj"], **{**WIDE, **more}),
    }


class Net(nn.Module):
    """A model in float64 throughout, whose layers have the names that make them siblings and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16, bias=i == 1) for i in range(3))
        self.mlp = Mlp()
        self.o_proj = nn.Linear(16, 16)
        self.head = nn.Linear(16, 7)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        x = x + self.o_proj(torch.softmax(q @ k.mT, -1) @ v)
        return self.head(x + self.mlp(x))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(16, WIDTH, bias=False), nn.Linear(16, WIDTH, bias=False)
        self.down_proj, self.act_fn = nn.Linear(WIDTH, 16, bias=False), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().double()


def with_adapters(base: nn.Module, named: Mapping[str, LoRAConfig]) -> nn.Module:
    model = copy.deepcopy(base)
    for name, config in named.items():
        assert add_adapter(model, name, config) is model
    models.fill_adapters(model)
    return model


def alone(base: nn.Module, config: LoRAConfig, model: nn.Module, name: str, fuse: bool | None = None) -> nn.Module:
    """Return a model with one adapter without a name, which holds the values of one that has one."""
    single = inject(copy.deepcopy(base), config if fuse is None else dataclasses.replace(config, fuse=fuse))
    own = {key.replace(f".lora.{name}", ""): p for key, p in named_adapter_parameters(model) if f".lora.{name}." in key}
    values = dict(named_adapter_parameters(single))
    assert values.keys() == own.keys()
    for key, parameter in values.items():
        parameter.data.copy_(own[key])
    return single.train(model.training)


def run(model: nn.Module, ids: Tensor) -> Tensor:
    output = model(ids)
    return output if isinstance(output, Tensor) else output.logits


def gradients(model: nn.Module, name: str | None = None) -> dict[str, Tensor]:
    """Return the gradients of an adapter by the names that its parameters have without a name of its own."""
    own = "" if name is None else f".lora.{name}"
    return {k.replace(own, ""): p.grad for k, p in named_adapter_parameters(model) if own in k and p.grad is not None}


def backward(y: Tensor) -> None:
    weights = torch.linspace(-1, 1, y[0].numel(), dtype=y.dtype).view_as(y[0])
    (y * weights).sum().backward()


def compare_with_each_alone(
    base: nn.Module,
    named: Mapping[str, LoRAConfig],
    names: Sequence[str | None],
    ids: Tensor,
    close: Callable[[Tensor, Tensor], None],
    **options,
) -> nn.Module:
    """Check outputs and every gradient of a mixture against each adapter alone on its own rows."""
    model = with_adapters(base, named)
    with active(model, names, **options):
        y = run(model, ids)
        backward(y)
    for name in dict.fromkeys(names):
        rows = [row for row, other in enumerate(names) if other == name]
        if name is None:
            close(y[rows], run(base, ids[rows]))
            continue
        single = alone(base, named[name], model, name, fuse=False if options.get("exact") else None)
        expected = run(single, ids[rows])
        close(y[rows], expected)
        backward(expected)
        found, wanted = gradients(model, name), gradients(single)
        assert wanted
        assert found.keys() == wanted.keys()
        for key in wanted:
            close(found[key], wanted[key])
    for name in named.keys() - set(names):
        assert not gradients(model, name)
    return model


def within(tolerance: float) -> Callable[[Tensor, Tensor], None]:
    def check(found: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)

    return check


def equal(found: Tensor, expected: Tensor) -> None:
    assert torch.equal(found, expected), (found - expected).abs().max()


IDS = torch.randint(0, 50, (6, 5), generator=torch.Generator().manual_seed(1))
SORTED = ["law", "law", "medicine", "medicine", "code", None]


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("names", [NAMES, SORTED, ["law"] * 6, [None] * 5 + ["code"]], ids=str)
def test_adapters_in_one_batch_equal_each_alone(names: list[str | None], fuse: bool) -> None:
    compare_with_each_alone(net(), configs(fuse=fuse), names, IDS, within(1e-12))


@pytest.mark.parametrize("build", [models.llama, models.qwen3, net])
def test_adapters_in_one_batch_equal_each_alone_in_float32(build) -> None:
    named = configs(adapter_dtype="float32")
    compare_with_each_alone(build().float(), named, NAMES, IDS, within(1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("names", [NAMES, SORTED], ids=str)
@pytest.mark.parametrize("build", [models.llama, models.qwen3, net])
def test_exact_mixtures_equal_each_alone_bit_for_bit(build, names, dtype: torch.dtype) -> None:
    named = configs(adapter_dtype=str(dtype).removeprefix("torch."))
    compare_with_each_alone(build().to(dtype), named, names, IDS, equal, exact=True)
