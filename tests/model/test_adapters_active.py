"""Which named adapters act: chosen, checked, kept in recomputation, and undone."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_lora import (
    LoRAConfig,
    active,
    adapter_state_dict,
    adapters,
    add_adapter,
    disabled,
    inject,
    load_adapter_state_dict,
    merged,
    named_adapter_parameters,
    remove,
)
from tests import models
from tests.model.small import assert_same_state, portrait, shared
from tests.model.test_adapters import (
    IDS,
    NAMES,
    SORTED,
    alone,
    backward,
    configs,
    equal,
    gradients,
    net,
    with_adapters,
    within,
)

CLOSE = within(1e-12)


def only(base: nn.Module, model: nn.Module, name: str) -> nn.Module:
    """Return a model with one of the named adapters of another."""
    single = add_adapter(copy.deepcopy(base), name, adapters(model)[name])
    values = dict(named_adapter_parameters(model))
    for key, parameter in named_adapter_parameters(single):
        parameter.data.copy_(values[key])
    return single


def rows_of(name: str | None, names: list[str | None]) -> list[int]:
    return [row for row, other in enumerate(names) if other == name]


def test_parameters_are_named_after_layer_and_adapter() -> None:
    model = with_adapters(net(), configs())
    assert list(adapters(model)) == ["law", "medicine", "code"]
    names = [name for name, _ in named_adapter_parameters(model)]
    assert names[:4] == ["q_proj.lora.law.lora_A", "q_proj.lora.law.lora_B", *names[2:4]]
    assert names[2:4] == ["q_proj.lora.medicine.lora_A", "q_proj.lora.medicine.lora_B"]
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(names)


def test_an_adapter_starts_as_it_would_without_a_name() -> None:
    base, config = models.llama(), LoRAConfig(r=4)
    model = add_adapter(add_adapter(copy.deepcopy(base), "other"), "law", config)
    expected = dict(named_adapter_parameters(inject(base, config)))
    found = {k.replace(".lora.law", ""): p for k, p in named_adapter_parameters(model) if ".law." in k}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("names", [NAMES, SORTED], ids=str)
@pytest.mark.parametrize("exact", [False, True])
def test_dropout_of_a_mixture_is_that_of_each_adapter_alone(names: list[str | None], exact: bool) -> None:
    base, named = net(), configs(dropout=0.4, fuse=not exact)
    model = with_adapters(base, named)
    with active(model, names, exact=exact):
        outputs = [model(IDS), model(IDS)]
    backward(outputs[1])
    assert not torch.allclose(outputs[0], outputs[1])
    for name in named:
        single, rows = only(base, model, name), rows_of(name, names)
        CLOSE(outputs[0][rows], single(IDS[rows]))
        y = single(IDS[rows])
        CLOSE(outputs[1][rows], y)
        backward(y)
        for key, wanted in gradients(single, name).items():
            CLOSE(gradients(model, name)[key], wanted)


def test_seeds_of_an_adapter_do_not_touch_the_default_generator() -> None:
    model = with_adapters(net(), configs(dropout=0.4))
    before = torch.get_rng_state()
    with active(model, NAMES):
        model(IDS)
    assert torch.equal(torch.get_rng_state(), before)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.inner, self.use_reentrant = inner, use_reentrant

    def forward(self, ids: Tensor) -> Tensor:
        inner = self.inner
        x = inner.embed(ids).requires_grad_()
        y = checkpoint(inner.mlp, x, use_reentrant=self.use_reentrant)
        return inner.head(x + checkpoint(inner.o_proj, y, use_reentrant=self.use_reentrant))


class Unchecked(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, ids: Tensor) -> Tensor:
        inner = self.inner
        x = inner.embed(ids).requires_grad_()
        return inner.head(x + inner.o_proj(inner.mlp(x)))


@pytest.mark.parametrize("which", [NAMES, "code"], ids=str)
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_recomputes_what_acted(which, use_reentrant: bool, exact: bool) -> None:
    model = with_adapters(net(), configs(dropout=0.4, fuse=False))
    reference = copy.deepcopy(model)
    checked, plain = Checkpointed(model, use_reentrant), Unchecked(reference)
    for _ in range(2):
        with active(model, which, exact=exact):
            y = checked(IDS)
        with active(reference, which, exact=exact):
            expected = plain(IDS)
        equal(y, expected)
        with active(model, "law"):
            backward(y)  # outside of the block in which it was computed
        backward(expected)
    for (_, p), (_, q) in zip(named_adapter_parameters(model), named_adapter_parameters(reference), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if q.grad is not None:
            equal(p.grad, q.grad)


def test_the_choice_may_be_a_tensor_or_nested() -> None:
    model = with_adapters(net(), configs())
    with active(model, NAMES):
        expected = model(IDS)
        with active(model, "law"):
            law = model(IDS)
        CLOSE(model(IDS), expected)
    with active(model, torch.tensor([0, 1, -1, 0, 2, 1])):
        CLOSE(model(IDS), expected)
    CLOSE(law[[0, 3]], expected[[0, 3]])


def test_packed_segments_have_adapters_of_their_own() -> None:
    model = nn.ModuleDict({"mlp": net().mlp})  # each token by itself
    for name, r in {"law": 4, "code": 2}.items():
        add_adapter(model, name, LoRAConfig(r=r, adapter_dtype="float64"))
    models.fill_adapters(model)
    x = torch.randn(1, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for exact in (False, True):
        with active(model, ["law", None, "code", "law"], lengths=[2, 3, 0, 4], exact=exact):
            y = model["mlp"](x)
        for name, rows in {"law": [0, 1, 5, 6, 7, 8], None: [2, 3, 4]}.items():
            with active(model, name):
                CLOSE(y[:, rows], model["mlp"](x[:, rows]))


def test_disabled_and_none_give_the_base() -> None:
    base = net()
    model = with_adapters(base, configs())
    expected = base(IDS)
    with disabled(model), active(model, NAMES):
        equal(model(IDS), expected)
    with active(model, "law"), disabled(model):
        equal(model(IDS), expected)
    with active(model, None):
        equal(model(IDS), expected)


def test_removing_one_leaves_the_others_and_removing_all_leaves_the_base() -> None:
    base = models.llama()
    model = copy.deepcopy(base)
    before = portrait(model)
    for name, config in configs().items():
        add_adapter(model, name, config)
    with active(model, "medicine"):
        expected = model(IDS).logits
    remove(model, adapter="law")
    assert list(adapters(model)) == ["medicine", "code"]
    with active(model, "medicine"):
        equal(model(IDS).logits, expected)
    remove(model, adapter="code")
    equal(model(IDS).logits, expected)  # the only one acts by itself
    remove(model, adapter="medicine")
    assert_same_state(model, base.state_dict())
    assert portrait(model) == before


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_has_adapters_and_a_choice_of_its_own(make) -> None:
    model = with_adapters(models.llama(), configs(adapter_dtype="float32", dropout=0.1))
    other = make(model)
    with active(model, NAMES):
        expected = model(IDS).logits
    with active(other, NAMES), active(model, "law"):
        equal(other(IDS).logits, expected)
    remove(other)
    with active(model, "law"):
        assert model(IDS) is not None


def test_the_state_of_all_adapters_is_saved_and_loaded() -> None:
    model, other = (with_adapters(net(), configs()) for _ in range(2))
    models.fill_adapters(model, seed=1)
    load_adapter_state_dict(other, adapter_state_dict(model))
    with active(model, NAMES), active(other, NAMES):
        equal(other(IDS), model(IDS))
    other.load_state_dict(net().state_dict())  # a base checkpoint


LENGTHS = {"lengths": [1, 2]}


@pytest.mark.parametrize(
    ("which", "options", "message"),
    [
        ("x", {}, "no adapter 'x'"),
        (["law", "y"], {}, "no adapter 'y'"),
        (torch.tensor([0, 3]), {}, "no adapter 3"),
        (torch.tensor([0.5]), {}, "vector of integers"),
        ([], {}, "was given no names"),
        (NAMES, LENGTHS, "6 names and 2 lengths"),
        ("law", LENGTHS, "for all rows"),
    ],
    ids=str,
)
def test_what_cannot_act_is_an_error(which, options: dict, message: str) -> None:
    model = with_adapters(net(), configs())
    with pytest.raises(ValueError, match=message), active(model, which, **options):
        pass
    with pytest.raises(ValueError, match="without a name"), active(inject(net(), LoRAConfig(r=2)), "law"):
        pass


def test_a_batch_normalisation_that_mixes_rows_is_refused() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4, track_running_stats=False)]
    for norm in layers[1:]:
        model = nn.Sequential(layers[0], norm)
        add_adapter(add_adapter(model, "law", LoRAConfig(r=2)), "code", LoRAConfig(r=2))
        if norm.track_running_stats:  # frozen: it uses its running statistics
            with active(model, ["law", "code"]):
                model(torch.ones(2, 4))
        else:
            with pytest.raises(ValueError, match="takes its statistics from the batch"):
                active(model, ["law", "code"]).__enter__()
        remove(model)


def test_rows_that_do_not_fit_are_an_error() -> None:
    model = with_adapters(net(), configs())
    with active(model, ["law"] * 4), pytest.raises(ValueError, match="4 names: one is expected for each row"):
        model(IDS)
    with active(model, ["law", "code"], lengths=[3, 4]), pytest.raises(ValueError, match="7 tokens in all"):
        model(IDS)
    with pytest.raises(ValueError, match="3 adapters, law, medicine, code, and none was chosen"):
        model(IDS)


@pytest.mark.parametrize(
    ("name", "message"),
    [("a.b", "letters, digits"), ("", "letters, digits"), ("train", "attribute of every torch module")],
)
def test_names_that_cannot_be_folders_or_children_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_adapter(net(), name)


def test_what_adapters_would_share_is_refused() -> None:
    model = with_adapters(models.llama(), configs(adapter_dtype="float32"))
    for fields, message in (
        ({"modules_to_save": ["lm_head"]}, "would train modules_to_save"),
        ({"bias": "all"}, "would train bias"),
        ({"trainable_token_indices": [1]}, "would train trainable_token_indices"),
        ({"fuse": False}, "fuse=False of adapter 'new'"),
    ):
        with pytest.raises(ValueError, match=message):
            add_adapter(model, "new", LoRAConfig(r=2, **fields))
    with pytest.raises(ValueError, match="'law' with another config"):
        add_adapter(model, "law", LoRAConfig(r=3))
    with pytest.raises(ValueError, match="adapters with names"):
        inject(model, LoRAConfig())
    with pytest.raises(ValueError, match="an adapter without a name"):
        add_adapter(inject(net(), LoRAConfig(r=2)), "law")
    with pytest.raises(ValueError, match="no adapter 'x'"):
        remove(model, adapter="x")
    assert list(adapters(model)) == ["law", "medicine", "code"]


def test_attentions_of_torch_run_one_adapter_at_a_time() -> None:
    base = models.encoder().eval()
    named = {"law": LoRAConfig(r=2, init="gaussian", modules_to_save=[]), "code": LoRAConfig(r=4, modules_to_save=[])}
    model = with_adapters(base, named)
    ids = models.token_ids(rows=6, columns=5)
    for name, config in named.items():
        single = alone(base, config, model, name)
        with active(model, name):
            y = model(ids)
        equal(y, single(ids))
    with active(model, ["law", "code"] * 3), pytest.raises(ValueError, match="be of several adapters at once"):
        model(ids)


def test_a_layer_under_two_names_has_its_adapters_once() -> None:
    model = with_adapters(shared(), {"law": LoRAConfig(r=2), "code": LoRAConfig(r=4)})
    names = [name for name, _ in named_adapter_parameters(model)]
    assert [name for name in names if "law" in name] == [
        f"{n}.lora.law.lora_{f}" for n in ("first", "last") for f in "AB"
    ]
    x = torch.randn(2, 8)
    with active(model, ["law", "code"]):
        y = model(x)
    for row, name in enumerate(("law", "code")):
        with active(model, name):
            within(1e-6)(y[row], model(x[row : row + 1])[0])


def test_save_pretrained_writes_the_merged_adapter_alone(tmp_path) -> None:
    from transformers import LlamaForCausalLM

    model = with_adapters(models.llama(), {"law": LoRAConfig(r=2), "code": LoRAConfig(r=4)})
    ids = models.token_ids()
    with pytest.raises(ValueError, match="save_pretrained would write the adapters"):
        model.save_pretrained(tmp_path)
    with merged(model, adapter="law"):
        model.save_pretrained(tmp_path)
        expected = model(ids).logits
    within(1e-6)(LlamaForCausalLM.from_pretrained(tmp_path)(ids).logits, expected)


@pytest.mark.parametrize("which", [3, [0, 1], [True]])
def test_places_are_given_in_a_tensor(which: Any) -> None:
    model = models.llama()
    add_adapter(model, "law")
    with pytest.raises(TypeError, match=r"expects a name, a list of names, or an integer tensor"), active(model, which):
        pass
