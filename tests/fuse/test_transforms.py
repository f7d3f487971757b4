"""torch.func and traces over adapted layers: gradients of single samples, derivatives of every order, both modes."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from lightning_lora import LoRAConfig, inject, linear_cross_entropy, save_peft
from lightning_lora.model.state import named_lora_layers
from lightning_lora.ops.dropout import keep_mask
from tests import models, zoo

# float32 through two blocks, gradients of about 1
CLOSE = {"rtol": 1e-4, "atol": 1e-6}
IDS = models.token_ids(3, 6)

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # attention has no rule of its own
]


class Gated(nn.Module):
    """A gated MLP and a residual layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def convolutions(dimensions: int) -> Callable[[], nn.Module]:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    return lambda: nn.Sequential(kind(4, 8, 3, padding=1, stride=2), nn.ReLU(), kind(8, 4, 3, padding=1))


def mixtral() -> nn.Module:
    model = next(family.build for family in zoo.FAMILIES if family.name == "mixtral")()
    model.set_experts_implementation("batched_mm")  # the one whose shapes do not depend on the data
    return model


def attention() -> nn.Module:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mha(x, x, x, need_weights=False)[0])

    return Own()


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@dataclass
class Kind:
    build: Callable[[], nn.Module]
    x: Tensor
    options: dict[str, Any] = field(default_factory=dict)


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"]
KINDS = {
    "llama": Kind(models.llama, IDS),
    "bias and head": Kind(models.llama, IDS, {"bias": "lora_only", "modules_to_save": ["lm_head"]}),
    "gpt2": Kind(models.gpt2, IDS, {"target_modules": ["c_attn", "c_proj"]}),
    "dora": Kind(models.llama, IDS, {"use_dora": True}),
    "lora_bias": Kind(Gated, noise(3, 5, 6), {"lora_bias": True, "target_modules": ["gate", "up", "down"]}),
    "pissa": Kind(models.llama, IDS, {"init": "pissa"}),
    "gated": Kind(Gated, noise(3, 5, 6), {"target_modules": ["gate", "up", "down"]}),
    "embedding": Kind(models.llama, IDS, {"target_modules": ["embed_tokens", "q_proj"]}),
    "dora embedding": Kind(models.llama, IDS, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "token rows": Kind(models.llama, IDS, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]}),
    "conv1d": Kind(convolutions(1), noise(3, 4, 9), {"target_modules": ["0", "2"]}),
    "conv2d": Kind(convolutions(2), noise(3, 4, 9, 9), {"target_modules": ["0", "2"]}),
    "conv3d": Kind(convolutions(3), noise(3, 4, 5, 5, 5), {"target_modules": ["0", "2"]}),
    "dora conv2d": Kind(convolutions(2), noise(3, 4, 9, 9), {"target_modules": ["0", "2"], "use_dora": True}),
    "attention": Kind(attention, noise(3, 5, 8), {"target_modules": ["mha", "head"]}),
    "experts": Kind(mixtral, IDS, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
}


def adapted(kind: Kind, **options: Any) -> nn.Module:
    model = inject(models._seeded(kind.build).eval(), LoRAConfig(r=2, **{**kind.options, **options}))
    models.fill_adapters(model)
    return model


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    return (output if isinstance(output, Tensor) else output.logits).square().mean()


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


class Loss(nn.Module):
    def __init__(self, model: nn.Module, loss: Callable[..., Tensor] = loss_of) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x: Tensor) -> Tensor:
        return self.loss(self.model, x)


def per_sample(module: nn.Module, x: Tensor, **options: Any) -> dict[str, Tensor]:
    """Return the gradients of each sample by itself, as Opacus's functorch engine takes them."""
    return vmap(grad(lambda params, one: functional_call(module, params, (one[None],))), in_dims=(None, 0), **options)(
        trained(module), x
    )


def one_by_one(module: nn.Module, x: Tensor, before: Callable[[], Any] = lambda: None) -> dict[str, Tensor]:
    """Return the same by one backward for each sample."""
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    found = []
    for one in x:
        before()
        grads = torch.autograd.grad(module(one[None]), list(params.values()), allow_unused=True)
        found.append([torch.zeros_like(p) if g is None else g for p, g in zip(params.values(), grads, strict=True)])
    return {name: torch.stack(grads) for name, grads in zip(params, zip(*found, strict=True), strict=True)}


def assert_same(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert given.keys() == expected.keys()
    assert any(bool(value.abs().max() > 1e-4) for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(given[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", KINDS)
def test_gradients_of_single_samples_are_those_of_a_loop(name: str) -> None:
    module = Loss(adapted(KINDS[name]))
    expected = one_by_one(module, KINDS[name].x)
    assert_same(per_sample(module, KINDS[name].x), expected)
    assert_same(one_by_one(module, KINDS[name].x), expected)  # nothing of the transform is left


def test_gradients_of_single_samples_are_pefts(tmp_path: Path) -> None:
    model = adapted(KINDS["llama"])
    save_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(models.llama().eval(), tmp_path, is_trainable=True)
    given, expected = per_sample(Loss(model), IDS), per_sample(Loss(theirs), IDS)
    names = {
        name.replace("model.base_model.model.", "model.", 1).replace(".default.weight", ""): name for name in expected
    }
    assert_same(given, {name: expected[other] for name, other in names.items()})


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=str)
@pytest.mark.parametrize("name", ["gated", "conv2d"])
def test_dropout_under_vmap_is_one_mask_or_one_for_each_sample(name: str, options: dict[str, Any]) -> None:
    kind = KINDS[name]
    targets = {"gated": ["down"], "conv2d": ["2"]}[name]  # alone, so that a seed is drawn as often either way
    module = Loss(adapted(kind, dropout=0.5, target_modules=targets, **options)).train()
    expected = one_by_one(module, kind.x, before=lambda: torch.manual_seed(3))
    torch.manual_seed(3)
    assert_same(per_sample(module, kind.x, randomness="same"), expected)
    alike = kind.x[:1].expand_as(kind.x)
    different = per_sample(module, alike, randomness="different")
    a = next(value for key, value in different.items() if key.endswith("lora_A"))
    assert not torch.equal(a[0], a[1])
    assert not torch.equal(a[1], a[2])
    with pytest.raises(RuntimeError, match="randomness"):
        per_sample(module, kind.x)


def test_a_mask_for_each_sample_is_made_where_the_input_is() -> None:
    x = torch.ones(3, 4, device="meta")  # as on a GPU: seeds are drawn on CPU
    masks = vmap(lambda seed: keep_mask(seed, x, 0.5))(torch.arange(2))
    assert (masks.shape, masks.device.type) == ((2, 3, 4), "meta")


def test_llama_with_dropout_draws_for_each_sample() -> None:
    module = Loss(adapted(KINDS["llama"], dropout=0.5)).train()
    found = per_sample(module, IDS[:1].expand(3, -1), randomness="different")
    for value in found.values():
        assert not torch.equal(value[0], value[1])


@pytest.mark.parametrize("name", ["gated", "conv1d", "dora conv2d", "lora_bias"])
def test_derivatives_of_both_modes_and_orders_agree_with_dense_math(name: str) -> None:
    kind = KINDS[name]
    model = adapted(kind).double()
    x = kind.x[:1].double()
    params, base = trained(model), Loss(models._seeded(kind.build).double())

    def loss(params: dict[str, Tensor]) -> Tensor:
        return functional_call(Loss(model), {f"model.{key}": value for key, value in params.items()}, (x,))

    def dense(params: dict[str, Tensor]) -> Tensor:
        weights = {}
        for key, layer in named_lora_layers(model).items():
            own = {local.removeprefix(f"{key}."): value for local, value in params.items() if local.startswith(key)}
            B, A = own["lora_B"].flatten(1), own["lora_A"].flatten(1)
            total = layer.base_weight.flatten(1) + layer.lora_scaling * B @ A
            if "lora_magnitude" in own:
                total = own["lora_magnitude"].view(-1, 1) / total.detach().norm(dim=1, keepdim=True) * total
            weights[f"model.{key}.weight"] = total.view_as(layer.base_weight)
            if "lora_bias" in own:
                weights[f"model.{key}.bias"] = layer.bias + layer.lora_scaling * own["lora_bias"]
        return functional_call(base, weights, (x,))

    expected = grad(dense)(params)
    for mode in (grad, jacrev, jacfwd):
        assert_same(mode(loss)(params), expected)
    direction = {key: torch.ones_like(value) for key, value in params.items()}
    along = sum((value.sum() for value in expected.values()), torch.zeros(()))
    torch.testing.assert_close(jvp(loss, (params,), (direction,))[1], along.double())
    with forward_ad.dual_level():
        dual = {key: forward_ad.make_dual(value, direction[key]) for key, value in params.items()}
        torch.testing.assert_close(forward_ad.unpack_dual(loss(dual)).tangent, along.double())
    first = next(key for key in params if key.endswith("lora_A"))

    def of_one(f: Callable[[dict[str, Tensor]], Tensor]) -> Tensor:
        return hessian(lambda value: f({**params, first: value}))(params[first])

    torch.testing.assert_close(of_one(loss), of_one(dense))


def test_linear_cross_entropy_gives_gradients_of_single_samples() -> None:
    labels = torch.where(IDS % 3 == 0, -100, IDS)

    def loss(model: nn.Module, both: Tensor) -> Tensor:
        hidden = model.model(both[:, 0]).last_hidden_state
        return linear_cross_entropy(model, hidden, both[:, 1])

    module = Loss(adapted(KINDS["llama"]), loss)
    both = torch.stack([IDS, labels], dim=1)
    assert_same(per_sample(module, both), one_by_one(module, both))


@pytest.mark.parametrize("name", ["llama", "gated", "conv2d", "dora"])
def test_a_trace_with_gradients_gives_the_same_output_and_gradients(name: str) -> None:
    kind = KINDS[name]
    model = adapted(kind)
    if name in ("llama", "dora"):
        model = model.model.layers[0].mlp
        kind = Kind(kind.build, noise(3, 5, 32))
    params = [p for p in model.parameters() if p.requires_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and says so
        traced = torch.jit.trace(model, (kind.x,))
    output, expected = traced(kind.x), model(kind.x)
    torch.testing.assert_close(output, expected, **CLOSE)
    own = {name: p for name, p in traced.named_parameters() if p.requires_grad}
    assert len(own) == len(params)
    for given, wanted in zip(
        torch.autograd.grad(output.square().sum(), list(own.values())),
        torch.autograd.grad(expected.square().sum(), params),
        strict=True,
    ):
        torch.testing.assert_close(given, wanted, **CLOSE)


def test_gradients_of_single_samples_compile_in_one_graph() -> None:
    kind = KINDS["gated"]
    module = Loss(adapted(kind))

    def found(params: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        return vmap(grad(lambda p, one: functional_call(module, p, (one[None],))), in_dims=(None, 0))(params, x)

    torch._dynamo.reset()
    compiled = torch.compile(found, fullgraph=True, backend="aot_eager")
    assert_same(compiled(trained(module), kind.x), one_by_one(module, kind.x))
