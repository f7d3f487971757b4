"""Mixtures under torch.compile: the same numbers as without, and one graph for all mixtures."""

import copy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_lora import LoRAConfig, active, add_adapter, named_adapter_parameters
from tests import models
from tests.model.test_adapters import backward, configs, net, with_adapters, within
from tests.model.test_adapters_kinds import IDS as TOKENS
from tests.model.test_adapters_kinds import images

IDS = torch.randint(0, 50, (6, 5), generator=torch.Generator().manual_seed(1))
MIXTURES = [
    ["law", "medicine", None, "law", "code", "medicine"],
    ["code", "code", "law", "law", "law", None],
    ["medicine"] * 6,
]
COMPILES = pytest.mark.filterwarnings(
    "ignore:.*should not be instantiated:DeprecationWarning", "ignore:The .grad attribute of a Tensor:UserWarning"
)


@COMPILES
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_graph_serves_all_mixtures(dropout: float) -> None:
    torch._dynamo.reset()
    model = with_adapters(net(), configs(dropout=dropout))
    eager = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for names in MIXTURES:
        with active(model, names), active(eager, names):
            y, expected = compiled(IDS), eager(IDS)
        within(1e-10)(y, expected)
        backward(y)
        backward(expected)
    assert counter.frame_count == 1
    for (key, found), (_, wanted) in zip(named_adapter_parameters(model), named_adapter_parameters(eager), strict=True):
        assert key is not None
        within(1e-10)(found.grad, wanted.grad)


@COMPILES
@pytest.mark.parametrize(
    ("build", "fields"),
    [
        (models.llama, {"use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
        (models.llama, {"target_modules": ["embed_tokens", "up_proj"]}),
        (images, {"target_modules": ["first", "second"]}),
        (models.gpt2, {"target_modules": ["c_attn", "c_fc"]}),
    ],
    ids=["DoRA", "embedding", "convolution", "Conv1D"],
)
def test_kinds_that_run_by_rows_compile_to_one_graph(build, fields: dict) -> None:
    torch._dynamo.reset()
    model = build()
    for name, r in {"a": 2, "b": 4}.items():
        add_adapter(model, name, LoRAConfig(r=r, **fields))
    models.fill_adapters(model)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter)
    for names in (["a", "b", None, "a", "b", "b"], ["b", "b", "b", None, None, "a"]):
        with active(model, names):
            y, expected = (one(TOKENS) for one in (compiled, model))
            y, expected = (one if isinstance(one, torch.Tensor) else one.logits for one in (y, expected))
        within(1e-4)(y, expected)
    assert counter.frame_count == 1
