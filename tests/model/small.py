"""Small models to adapt, and what to compare of them before and after."""

import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, remove
from tests import models

IDS = models.token_ids()


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.norm(self.first(x)).tanh())


class Shared(nn.Module):
    """One layer under two names, as in ALBERT."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first
        self.last = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).tanh()).tanh())


def seeded(cls) -> nn.Module:
    torch.manual_seed(0)
    return cls()


def mlp() -> nn.Module:
    return seeded(Mlp)


def shared() -> nn.Module:
    return seeded(Shared)


BUILDERS = [models.llama, models.qwen3, models.gpt2, models.bert_classifier, models.encoder, mlp, shared]


CONFIGS = {models.gpt2: {"bias": "all"}, models.bert_classifier: {"bias": "lora_only"}, models.llama: {"dropout": 0.1}}


def config_for(build, **more) -> LoRAConfig:
    return LoRAConfig(r=4, **{**CONFIGS.get(build, {}), **more})


def run(model: nn.Module) -> Tensor:
    if isinstance(model, (Mlp, Shared)):
        return model(torch.linspace(-1, 1, 40).view(5, 8))
    output = model(IDS)
    return output if isinstance(output, Tensor) else output.logits


def train(model: nn.Module, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        run(model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def portrait(model: nn.Module) -> dict:
    """All that tells one module tree from another, without values."""
    return {
        name: (
            type(m),
            m.training,
            sorted(set(vars(m))),
            [n for n, p in m._parameters.items() if p is not None],
            [p.requires_grad for p in m._parameters.values() if p is not None],
            *(len(getattr(m, hooks)) for hooks in vars(m) if hooks.endswith("_hooks")),
        )
        for name, m in model.named_modules(remove_duplicate=False)
    }


def assert_same_state(model: nn.Module, expected: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


def assert_removes_to(model: nn.Module, base: nn.Module) -> None:
    model.load_state_dict(base.state_dict())  # the hook came along
    remove(model)
    assert_same_state(model, base.state_dict())
    assert {n: type(m) for n, m in model.named_modules()} == {n: type(m) for n, m in base.named_modules()}
