"""An injection is done whole or not at all: whatever fails, and wherever, the model is as it was and can be adapted."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject, remove
from tests import models

MODULE = importlib.import_module("lightning_lora.model.apply")  # the package has the function under this name


class Everything(nn.Module):
    """Layers of the kinds that an injection treats in a way of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.grouped = nn.Conv1d(16, 16, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm1d(16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
        self.out = nn.Linear(16, 20, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).transpose(1, 2)
        x = self.encoder(self.norm(self.grouped(self.conv(x))).transpose(1, 2))
        return torch.cat([self.out(x), self.head(x)], -1)


def everything() -> nn.Module:
    torch.manual_seed(0)
    model = Everything().to(torch.bfloat16).eval()
    model.head.requires_grad_(False)
    model.encoder.register_forward_hook(lambda *_: None)
    return model


RIGHT: dict[str, Any] = {
    "r": 2,
    "target_modules": ["conv", "linear1", "linear2", "self_attn"],
    "modules_to_save": ["head"],
    "bias": "all",
    "trainable_token_indices": {"embed": [1, 2]},
    "init_rng": "peft",
}


def whole_state(model: nn.Module) -> list[Any]:
    """Return all that an injection could change, tensors by their identity, their memory and their values."""
    found: list[Any] = [torch.get_rng_state().tolist()]
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            is_container = isinstance(value, (dict, set))
            found.append((name, key, id(value), list(value) if is_container else None))
            found.append([id(one) for one in value.values()] if isinstance(value, dict) else None)
        found.append((name, type(module), module.training, list(vars(module))))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        values = tensor.detach().float().tolist() if not tensor.is_meta else None
        found.append((name, id(tensor), tensor.dtype, tensor.requires_grad, tensor.data_ptr(), values))
    return found


def check_refused(model: nn.Module, config: LoRAConfig, error: type[BaseException], message: str) -> None:
    before = whole_state(model)
    with pytest.raises(error, match=message):
        inject(model, config)
    assert whole_state(model) == before


def check_adapts_as_a_fresh_one(model: nn.Module, build: Callable[[], nn.Module], **settings: Any) -> None:
    fresh = build()
    torch.manual_seed(1)
    expected = inject(fresh, LoRAConfig(**settings)).state_dict()
    torch.manual_seed(1)
    inject(model, LoRAConfig(**settings))
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    remove(model)
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in build().state_dict().items())


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "odd rank": ({"init": "orthogonal", "r": 3}, "init='orthogonal' needs matrices of even rank, and 'conv' has"),
    "odd rank of one": (
        {"init": "orthogonal", "target_modules": ["linear1"], "rank_pattern": {"1.linear1": 3}},
        "'encoder.layers.1.linear1' has r=3: give it another rank with rank_pattern",
    ),
    "orthogonal kernels": ({"init": "orthogonal"}, "'conv' has factors of 3 dimensions"),
    "token id": ({"trainable_token_indices": {"embed": [1, 20]}}, "20 is outside the table of 20 rows"),
    "token id twice": ({"trainable_token_indices": {"embed": [1, 1]}}, "an index is given twice"),
    "rank above a layer": ({"rank_pattern": {"1.linear1": 17}}, "r=17 is larger than 'encoder.layers.1.linear1'"),
    "rank above one of PiSSA": (
        {"init": "pissa", "target_modules": ["linear1"], "r": 17},
        "r=17 is larger than 'encoder.layers.0.linear1', a 16 -> 32 Linear",
    ),
    "rank and groups": ({"target_modules": ["grouped"], "r": 3}, "'grouped' cannot be adapted: r=3 is not a multiple"),
    "DoRA with groups": ({"target_modules": ["grouped"], "use_dora": True}, "cannot be adapted with use_dora=True"),
    "PiSSA on a convolution": ({"init": "pissa"}, "starts from the weights of linear layers, and 'conv' has none"),
    "a kind": ({"target_modules": ["norm"]}, "'norm' is a BatchNorm1d, which cannot be adapted"),
    "twice": ({"target_modules": ["embed"]}, "trainable_token_indices trains rows of the same weight"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_setting_is_refused_before_anything_is_changed(case: str) -> None:
    settings, message = WRONG[case]
    model = everything()
    check_refused(model, LoRAConfig(**{**RIGHT, **settings}), ValueError, message)
    check_adapts_as_a_fresh_one(model, everything, **RIGHT)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable_token_indices": [1]}, "the embedding is on the meta device; load the base first"),
        ({"init": "pissa"}, "is on the meta device"),
        ({"use_dora": True}, "is on the meta device: load the base first"),
    ],
    ids=str,
)
def test_a_base_on_meta_is_refused_before_anything_is_changed(settings: dict[str, Any], message: str) -> None:
    with torch.device("meta"):
        model = models.llama()
    check_refused(model, LoRAConfig(r=2, **settings), ValueError, message)
    inject(model, LoRAConfig(r=2))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_a_weight_that_no_decomposition_takes_is_named(init: str) -> None:
    model = models.llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    before = whole_state(model)[1:]
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.up_proj', which holds NaN or infinity"):
        inject(model, LoRAConfig(r=2, init=init))
    # NaN equals nothing: the last entries hold values
    after = whole_state(model)[1:]
    assert [entry for entry in after if "nan" not in str(entry)] == [e for e in before if "nan" not in str(e)]
    inject(model, LoRAConfig(r=2))


def test_a_decomposition_that_fails_undoes_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, svd = models.llama(), [], torch.linalg.svd

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 5:
            raise torch.linalg.LinAlgError("linalg.svd: the algorithm failed to converge")
        return svd(*args, **kwargs)

    monkeypatch.setattr(torch.linalg, "svd", failing)
    check_refused(model, LoRAConfig(r=2, init="pissa"), torch.linalg.LinAlgError, "failed to converge")
    monkeypatch.undo()
    check_adapts_as_a_fresh_one(model, models.llama, r=2, init="pissa")


STEPS = {
    "keep_wide": 1,
    "adapt_layer": 3,
    "initialize": 1,
    "tag_parts": 1,
    "fuse": 1,
    "train_rows": 1,
    "freeze_statistics": 1,
    "keep_off_fused_paths": 1,
}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", STEPS)
def test_an_error_at_any_step_undoes_the_others(
    step: str, after: bool, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls, function = everything(), [], getattr(MODULE, step)

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == STEPS[step] and not after:
            raise error("in the middle")
        result = function(*args, **kwargs)
        if len(calls) == STEPS[step]:
            raise error("in the middle")
        return result

    monkeypatch.setattr(MODULE, step, failing)
    check_refused(model, LoRAConfig(**RIGHT), error, "in the middle")
    assert len(calls) == STEPS[step]
    monkeypatch.undo()
    check_adapts_as_a_fresh_one(model, everything, **RIGHT)


def test_memory_that_runs_out_inside_a_step_undoes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls, zeros = everything(), [], torch.zeros

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:  # the second factor of the second layer
            raise torch.OutOfMemoryError("in the middle")
        return zeros(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros", failing)
    check_refused(model, LoRAConfig(**RIGHT), torch.OutOfMemoryError, "in the middle")
    monkeypatch.undo()
    check_adapts_as_a_fresh_one(model, everything, **RIGHT)
