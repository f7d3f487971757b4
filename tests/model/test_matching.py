"""Which layers a config means, with what rank and scale: the same as PEFT's, run side by side."""

import warnings

import pytest
import torch
from torch import nn

from lightning_lora import LoRAConfig, inject
from lightning_lora.model.state import named_lora_layers, named_trained_whole
from tests import models, zoo

Found = dict[str, tuple[int, float]]


class Blocks(nn.Module):
    """Names that trip matchers: prefixes of each other, numbers in odd places, layers outside blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.q_proj = nn.Linear(8, 8)
        self.my_q_proj = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q_proj": nn.Linear(8, 8), "proj": nn.Linear(8, 8)}) for _ in range(12)
        )
        self.h = nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(8, 8)}) for _ in range(3))
        self.tower = nn.ModuleDict({"layer": nn.ModuleList([nn.ModuleDict({"h": self.h_like()}) for _ in range(2)])})

    @staticmethod
    def h_like() -> nn.ModuleList:
        return nn.ModuleList(nn.ModuleDict({"q_proj": nn.Linear(8, 8)}) for _ in range(2))

    def forward(self, x):
        return self.proj(x)


MODELS = {
    "llama": models.llama,
    "llama_tied": lambda: models.llama(tied=True),
    "gpt2": models.gpt2,
    "bert": models.bert_classifier,
    "blocks": Blocks,
    "encoder": models.encoder,
    "t5": next(family.build for family in zoo.FAMILIES if family.name == "t5"),
}

TABLE = [
    ("llama", {"target_modules": ["q_proj"]}),
    ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
    ("llama", {"target_modules": ["self_attn.q_proj"]}),
    ("llama", {"target_modules": ["0.self_attn.q_proj"]}),
    ("llama", {"target_modules": ["model.layers.1.mlp.up_proj"]}),
    ("llama", {"target_modules": ["lm_head"]}),
    ("llama", {"target_modules": ["embed_tokens"]}),
    ("llama", {"target_modules": r".*\.(q|v)_proj"}),
    ("llama", {"target_modules": r"model\.layers\.0\..*proj"}),
    ("llama", {"target_modules": r".*proj|lm_head"}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": "All-Linear"}),
    ("llama_tied", {"target_modules": "all-linear"}),
    ("gpt2", {"target_modules": "all-linear"}),
    ("bert", {"target_modules": "all-linear"}),
    ("blocks", {"target_modules": "all-linear"}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
    ("gpt2", {"target_modules": ["attn.c_proj"]}),
    ("bert", {"target_modules": ["query", "dense"]}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": ["q_proj"]}),
    ("llama", {"target_modules": "all-linear", "exclude_modules": r".*layers\.1\..*"}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["model.layers.0.self_attn.q_proj"]}),
    ("llama", {"target_modules": r".*proj", "exclude_modules": ["mlp.up_proj", "v_proj"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "modules_to_save": ["mlp"]}),
    ("llama", {"target_modules": r".*proj", "modules_to_save": ["layers.0.mlp"]}),
    ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["norm"]}),
    ("bert", {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
    ("bert", {"target_modules": ["query"], "modules_to_save": ["pooler.dense", "classifier"]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [0, 1]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": []}),
    ("llama", {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": 0}),
    ("llama", {"target_modules": ["q_proj", "model.layers.0.mlp.up_proj"], "layers_to_transform": [1]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["h", "layers"]}),
    ("blocks", {"target_modules": ["q_proj"]}),
    ("blocks", {"target_modules": ["proj"]}),
    ("blocks", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    ("blocks", {"target_modules": ["q_proj"], "layers_to_transform": [0, 1]}),
    ("blocks", {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "h"}),
    ("blocks", {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": ["h", "blocks"]}),
    ("blocks", {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": ["blocks", "h"]}),
    ("blocks", {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": []}),
    ("blocks", {"target_modules": ["1.q_proj"]}),
    ("blocks", {"target_modules": r"blocks\.1\..*"}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"layers.0.self_attn.q_proj": 2}}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2}}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {r".*\.1\..*": 2, "q_proj": 3}}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 3, r".*\.1\..*": 2}}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"(q|v)_proj": 3}}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj|v_proj": 3}}),
    ("llama", {"target_modules": ["q_proj"], "alpha_pattern": {"layers.1.self_attn.q_proj": 3}}),
    (
        "llama",
        {"target_modules": ["q_proj", "up_proj"], "alpha_pattern": {"mlp.up_proj": 5}, "rank_pattern": {"up_proj": 2}},
    ),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "rank_pattern": {"up_proj": 2}}),
    ("blocks", {"target_modules": ["q_proj", "my_q_proj"], "rank_pattern": {"q_proj": 2, "my_q_proj": 3}}),
    ("blocks", {"target_modules": ["q_proj", "my_q_proj"], "rank_pattern": {"my_q_proj": 3}}),
    ("blocks", {"target_modules": ["proj"], "rank_pattern": {"^proj": 3, r"1.proj": 2}}),
    ("blocks", {"target_modules": ["proj"], "rank_pattern": {r"blocks\.1\d\.proj": 2}}),
]
# these two differ from PEFT on purpose: a head trains whole unless modules_to_save=[] (there: only with a task_type)
OURS = {"bert": {"modules_to_save": []}}
RANKS = {"bert": 3}  # of 3 labels: above them "all-linear" would give the head another rank than PEFT


def found_by_peft(name: str, values: dict) -> tuple[Found, set[str]]:
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about tied weights and fan_in_fan_out
        wrapped = get_peft_model(MODELS[name](), LoraConfig(r=RANKS.get(name, 4), lora_alpha=8, **values))
    model = wrapped.base_model.model
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    found = {n: (m.r["default"], m.scaling["default"]) for n, m in layers.items()}
    whole = {n.replace(".modules_to_save.default", "") for n, p in model.named_parameters() if p.requires_grad}
    return found, {n for n in whole if "lora_" not in n}


def found_by_us(name: str, values: dict) -> tuple[Found, set[str]]:
    model = inject(MODELS[name](), LoRAConfig(r=RANKS.get(name, 4), alpha=8, **{**OURS.get(name, {}), **values}))
    found = {n: (layer.r, layer.lora_scaling) for n, layer in named_lora_layers(model).items()}
    return found, set(named_trained_whole(model))


@pytest.mark.parametrize(("name", "values"), TABLE, ids=[f"{name}-{values}" for name, values in TABLE])
def test_layers_ranks_scales_and_what_trains_whole_are_pefts(name, values) -> None:
    found, whole = found_by_us(name, values)
    expected, expected_whole = found_by_peft(name, values)
    assert found == expected
    assert whole == expected_whole


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("name", ["gpt2", "bert", "blocks", "encoder", "t5"])
def test_trained_biases_are_pefts(name, bias) -> None:
    targets = {"gpt2": "c_attn", "bert": "query", "blocks": "q_proj", "encoder": "linear1", "t5": "q"}[name]
    _, whole = found_by_us(name, {"target_modules": [targets], "bias": bias})
    _, expected = found_by_peft(name, {"target_modules": [targets], "bias": bias})
    assert whole == {key.replace(".base_layer.", ".") for key in expected}


def test_trained_parameters_are_adapters_and_heads_only() -> None:
    model = inject(models.bert_classifier(), LoRAConfig(r=4))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {"classifier.weight", "classifier.bias"} < trained
    assert all(name.endswith((".lora_A", ".lora_B")) for name in trained - {"classifier.weight", "classifier.bias"})


def test_a_new_head_trains_whole_as_in_peft_though_a_pattern_names_it() -> None:
    from peft import LoraConfig, get_peft_model

    model = inject(models.bert_classifier(), LoRAConfig(r=3, target_modules=["query", "classifier"]))
    config = LoraConfig(r=3, target_modules=["query", "classifier"], task_type="SEQ_CLS")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice about the pattern
        wrapped = get_peft_model(models.bert_classifier(), config)
    theirs = {n.removeprefix("base_model.model.") for n, p in wrapped.named_parameters() if p.requires_grad}
    whole = {name.replace("modules_to_save.default.", "") for name in theirs if "lora_" not in name}
    assert set(named_trained_whole(model)) == whole == {"classifier.weight", "classifier.bias"}
    assert "classifier" not in named_lora_layers(model)


def test_a_head_is_adapted_where_nothing_trains_whole() -> None:
    config = LoRAConfig(r=3, target_modules=["query", "classifier"], modules_to_save=[])
    model = inject(models.bert_classifier(), config)
    assert "classifier" in named_lora_layers(model)
    assert not model.classifier.weight.requires_grad


def test_an_empty_list_trains_no_head() -> None:
    model = inject(models.bert_classifier(), LoRAConfig(r=4, modules_to_save=[]))
    assert not model.classifier.weight.requires_grad


def test_alpha_is_twice_each_layers_own_rank_by_default() -> None:
    config = LoRAConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2})
    layers = named_lora_layers(inject(models.llama(), config))
    assert {layer.lora_scaling for layer in layers.values()} == {2.0}
    rslora = LoRAConfig(r=4, target_modules=["q_proj"], use_rslora=True)
    assert {layer.lora_scaling for layer in named_lora_layers(inject(models.llama(), rslora)).values()} == {4.0}


# errors, each of which leaves the model as it was


def fingerprint(model: nn.Module) -> tuple:
    """All that an injection could change, in a form that compares."""
    state = {name: (tensor.dtype, tensor.detach().clone().tolist()) for name, tensor in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    classes = {name: type(module) for name, module in model.named_modules()}
    hooks = {name: len(m._forward_hooks) + len(m._load_state_dict_pre_hooks) for name, m in model.named_modules()}
    attributes = {name: sorted(set(vars(m))) for name, m in model.named_modules()}
    training = {name: module.training for name, module in model.named_modules()}
    return state, flags, classes, hooks, attributes, training


def assert_refused(model: nn.Module, config: LoRAConfig, message: str) -> None:
    before = fingerprint(model)
    with pytest.raises(ValueError, match=message):
        inject(model, config)
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"target_modules": ["q_prj"]},
            r"target_modules entry 'q_prj' matches no module of LlamaForCausalLM; nearest: .*q_proj",
        ),
        ({"target_modules": ["q_proj", "v_prog"]}, r"'v_prog' matches no module .*nearest: .*v_proj"),
        ({"target_modules": ["proj"]}, "'proj' matches no module"),
        ({"target_modules": "q_proj"}, r"a string is a regular expression for the whole name: .*\['q_proj'\]"),
        ({"target_modules": r".*\.Q_proj"}, r"Q_proj.*matches no module"),
        ({"target_modules": "(q_proj"}, "is not a regular expression"),
        ({"target_modules": ["zzzz"]}, "'zzzz' matches no module .*there are: "),
        ({"exclude_modules": ["q_prj"]}, "exclude_modules entry 'q_prj' .*nearest: .*q_proj"),
        ({"exclude_modules": r".*_prj"}, "exclude_modules .*matches no module"),
        ({"exclude_modules": ".*"}, "leaves no layer of LlamaForCausalLM to adapt"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["self_attn"]}, "leaves no layer"),
        ({"modules_to_save": ["lm_haed"]}, "modules_to_save entry 'lm_haed' .*nearest: .*lm_head"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [2]}, "layers_to_transform entry 2 .*there are: 0, 1"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0, 7]},
            "layers_to_transform entry 7 .*there are: 0, 1",
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layer"},
            "layers_pattern='layer'.*none",
        ),
        (
            {"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 4}},
            "rank_pattern key 'v_proj' matches none of the adapted",
        ),
        (
            {"target_modules": ["q_proj"], "alpha_pattern": {"q_prj": 4}},
            "alpha_pattern key 'q_prj' .*nearest: .*q_proj",
        ),
        (
            {"target_modules": ["input_layernorm"]},
            "'model.layers.0.input_layernorm' is a LlamaRMSNorm, which cannot be adapted",
        ),
        ({"target_modules": r"model\.layers\.1.*"}, "'model.layers.1' is a LlamaDecoderLayer, which cannot be adapted"),
        ({"target_modules": ["self_attn"]}, "is a LlamaAttention, which cannot be adapted"),
        (
            {"target_modules": ["q_proj"], "r": 33},
            "r=33 is larger than 'model.layers.0.self_attn.q_proj', a 32 -> 32 Linear",
        ),
        ({"target_modules": ["k_proj"], "r": 17}, "r=17 is larger than .*32 -> 16 Linear.*rank_pattern"),
        (
            {"target_modules": ["q_proj"], "rank_pattern": {"1.self_attn.q_proj": 64}},
            "r=64 is larger than 'model.layers.1",
        ),
        ({"r": 65}, "r=65 is larger than"),
    ],
    ids=str,
)
def test_a_config_that_misses_is_refused_and_changes_nothing(values, message) -> None:
    assert_refused(models.llama(), LoRAConfig(**values), message)


def test_the_suggestion_for_a_rank_that_is_too_large_works() -> None:
    config = LoRAConfig(r=17, target_modules=["k_proj"], rank_pattern={"k_proj": 16})
    assert {layer.r for layer in named_lora_layers(inject(models.llama(), config)).values()} == {16}


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.BatchNorm1d(8), nn.GroupNorm(2, 8), nn.RMSNorm(8)])
def test_a_normalisation_layer_is_refused_by_name(norm) -> None:
    model = nn.Sequential(nn.Linear(8, 8), norm)
    assert_refused(
        model, LoRAConfig(r=2, target_modules=["0", "1"]), f"'1' is a {type(norm).__name__}, which cannot be adapted"
    )


def test_a_model_without_linear_layers_is_refused() -> None:
    assert_refused(nn.Sequential(nn.Conv2d(3, 3, 1)), LoRAConfig(), "leaves no layer of Sequential")


def test_a_config_of_peft_is_refused_with_the_way_to_take_it_over() -> None:
    from peft import LoraConfig

    with pytest.raises(TypeError, match=r"got LoraConfig: write LoRAConfig.from_peft\(config\)"):
        inject(models.llama(), LoraConfig(target_modules=["q_proj"]))


def test_a_model_that_peft_wrapped_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(models.llama(), LoraConfig(target_modules=["q_proj"]))
    assert_refused(wrapped, LoRAConfig(), "already wrapped by PEFT.*unload.*load_peft")
    assert_refused(wrapped.base_model.model, LoRAConfig(), "already wrapped by PEFT")


def test_a_forward_set_on_the_instance_is_refused() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = models.llama()
    add_hook_to_module(model.model.layers[0].self_attn.q_proj, ModelHook())
    assert_refused(model, LoRAConfig(), "'model.layers.0.self_attn.q_proj' has a forward of its own on the instance")
    remove_hook_from_module(model, recurse=True)
    inject(model, LoRAConfig())
    models.fill_adapters(model)
    ids = models.token_ids()
    adapted = inject(models.llama(), LoRAConfig())
    models.fill_adapters(adapted)
    assert torch.equal(model(ids).logits, adapted(ids).logits)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Embedding(9, 8, max_norm=1.0), "max_norm"),
        (nn.Embedding(9, 8, sparse=True), "sparse"),
    ],
)
def test_an_embedding_that_an_adapter_would_get_wrong_is_refused(layer, message) -> None:
    assert_refused(nn.Sequential(layer), LoRAConfig(r=2, target_modules=["0"]), message)


def test_part_of_an_adapted_model_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    inject(model[1], LoRAConfig(r=2))
    assert_refused(model, LoRAConfig(r=2), "'1' is already adapted, as part of another model")


def test_a_module_inside_an_adapted_model_is_refused() -> None:
    model = inject(nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8))), LoRAConfig(r=2))
    assert_refused(model[1], LoRAConfig(r=2), "already adapted")


def test_another_config_on_an_adapted_model_names_what_differs() -> None:
    model = inject(models.llama(), LoRAConfig(r=4))
    assert_refused(model, LoRAConfig(r=8), r"another config: r=8 \(there: 4\)\. Call remove")


def test_a_weight_that_nobody_can_see_is_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    lone = nn.Linear(8, 8)
    assert_refused(lone, LoRAConfig(r=2), "(leaves no layer|itself)")
