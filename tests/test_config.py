"""LoRAConfig: what it accepts, what it answers, how it is written down and read again."""

import dataclasses
import inspect
import json
import math
from typing import Any

import peft
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_lora import AdaLoRA, LoRACallback, LoRAConfig, inject, load_peft, parameter_groups, quantize
from tests import models

BAD_VALUES = [
    ({"r": 0}, ValueError, "r=0 must be at least 1"),
    ({"r": -4}, ValueError, "r=-4 must be at least 1"),
    ({"r": "8"}, TypeError, "r='8' must be an integer"),
    ({"r": 8.0}, TypeError, "r=8.0 must be an integer"),
    ({"r": True}, TypeError, "r=True must be an integer"),
    ({"r": None}, TypeError, "r=None must be an integer"),
    ({"alpha": math.nan}, ValueError, "alpha=nan must be a finite number above 0"),
    ({"alpha": math.inf}, ValueError, "alpha=inf must be a finite number"),
    ({"alpha": 0}, ValueError, "alpha=0 must be"),
    ({"alpha": -1.0}, ValueError, "alpha=-1.0 must be"),
    ({"alpha": "16"}, TypeError, "alpha='16' must be a number"),
    ({"alpha": True}, TypeError, "alpha=True must be a number"),
    ({"dropout": 1.0}, ValueError, r"dropout=1.0 must be a probability in \[0, 1\)"),
    ({"dropout": -0.1}, ValueError, "dropout=-0.1 must be"),
    ({"dropout": math.nan}, ValueError, "dropout=nan must be"),
    ({"dropout": "0.1"}, (TypeError, ValueError), "dropout='0.1' must be"),
    ({"dropout": None}, (TypeError, ValueError), "dropout=None must be"),
    ({"target_modules": None}, (TypeError, ValueError), "target_modules=None adapts nothing"),
    ({"target_modules": []}, ValueError, r"target_modules=\[\] adapts nothing"),
    ({"target_modules": ""}, ValueError, "target_modules='' adapts nothing"),
    ({"target_modules": [1]}, TypeError, "target_modules holds 1"),
    ({"target_modules": [""]}, TypeError, "target_modules holds ''"),
    ({"target_modules": 3}, TypeError, "target_modules"),
    ({"exclude_modules": 3}, TypeError, "exclude_modules"),
    ({"exclude_modules": [None]}, TypeError, "exclude_modules holds None"),
    ({"modules_to_save": "score"}, TypeError, r"modules_to_save='score' must be a list: \['score'\]"),
    ({"modules_to_save": 3}, TypeError, "modules_to_save"),
    ({"layers_to_transform": ["0"]}, TypeError, "layers_to_transform holds '0'"),
    ({"layers_to_transform": "0"}, TypeError, "layers_to_transform"),
    ({"layers_to_transform": 1.5}, TypeError, "layers_to_transform"),
    ({"layers_to_transform": True}, TypeError, "layers_to_transform"),
    ({"layers_to_transform": [0]}, ValueError, "narrow a list of target_modules; with the string 'all-linear'"),
    ({"target_modules": ".*q", "layers_to_transform": 0}, ValueError, "as a regular expression"),
    ({"target_modules": ["q"], "layers_pattern": "h"}, ValueError, "layers_pattern='h' says .*give both"),
    ({"layers_pattern": 3}, TypeError, "layers_pattern"),
    ({"bias": True}, ValueError, "bias=True must be one of 'none', 'all', 'lora_only'"),
    ({"bias": "lora"}, ValueError, "bias='lora' must be one of"),
    ({"init": "loftq"}, ValueError, "init='loftq' must be one of"),
    ({"init": True}, ValueError, "init=True must be one of"),
    ({"init_rng": "global"}, ValueError, "init_rng='global' must be one of 'name', 'peft'"),
    ({"init_seed": "7"}, TypeError, "init_seed"),
    ({"adapter_dtype": "fp32"}, ValueError, "adapter_dtype='fp32' must be one of 'float32'"),
    ({"rank_pattern": {"q": 0}}, ValueError, r"rank_pattern\['q'\]=0 must be at least 1"),
    ({"rank_pattern": {"q": "4"}}, TypeError, r"rank_pattern\['q'\]='4' must be an integer"),
    ({"rank_pattern": ["q"]}, TypeError, "rank_pattern"),
    ({"rank_pattern": {"q(": 4}}, ValueError, "rank_pattern"),
    ({"alpha_pattern": {"q": math.nan}}, ValueError, r"alpha_pattern\['q'\]=nan must be"),
    ({"alpha_pattern": {"q": None}}, TypeError, r"alpha_pattern\['q'\]=None must be a number"),
    ({"alpha_pattern": 16}, TypeError, "alpha_pattern"),
    ({"use_rslora": "yes"}, TypeError, "use_rslora"),
]


@pytest.mark.parametrize("maker", [LoRAConfig, LoRACallback])
@pytest.mark.parametrize(("values", "error", "message"), BAD_VALUES, ids=[str(row[0]) for row in BAD_VALUES])
def test_a_bad_value_is_refused_with_what_was_expected(maker, values, error, message) -> None:
    with pytest.raises(error, match=message):
        maker(**values)


@pytest.mark.parametrize("maker", [LoRAConfig, LoRACallback])
@pytest.mark.parametrize(
    ("theirs", "ours", "value"),
    [
        ("lora_alpha", "alpha", 16),
        ("lora_dropout", "dropout", 0.1),
        ("init_lora_weights", "init", True),
        ("autocast_adapter_dtype", "adapter_dtype", True),
    ],
)
def test_pefts_name_of_a_field_is_answered_with_ours(maker, theirs, ours, value) -> None:
    with pytest.raises(TypeError, match=rf"'{theirs}' is PEFT's name; here it is '{ours}'"):
        maker(**{theirs: value})


def test_the_answer_to_a_peft_name_suggests_a_value_that_works() -> None:
    with pytest.raises(TypeError, match="write ") as caught:
        LoRAConfig(init_lora_weights=True)
    suggestion = str(caught.value).rpartition("write ")[2]
    eval(f"LoRAConfig({suggestion})", {"LoRAConfig": LoRAConfig})


@pytest.mark.parametrize("maker", [LoRAConfig, LoRACallback])
@pytest.mark.parametrize("kind", [peft.LoraConfig, peft.AdaLoraConfig])
def test_every_field_of_pefts_config_is_ours_or_is_answered_with_what_to_do(maker, kind) -> None:
    ours = {field.name for field in dataclasses.fields(LoRAConfig)}
    for field in dataclasses.fields(kind):
        if field.name in ours:
            continue
        with pytest.raises(TypeError, match=rf"^'{field.name}' is PEFT's name[:;] .*(leave it out|write)"):
            maker(**{field.name: True})


@pytest.mark.parametrize("maker", [LoRAConfig, LoRACallback])
@pytest.mark.parametrize(
    ("theirs", "value", "answer"),
    [
        ("load_in_4bit", True, "bitsandbytes' name: write quantize='nf4' in LoRACallback"),
        ("load_in_8bit", True, "bitsandbytes' name: write quantize='int8' in LoRACallback"),
        ("bnb_4bit_quant_type", "nf4", "bitsandbytes' name: write quantize='nf4'"),
        ("bnb_4bit_use_double_quant", True, "bitsandbytes' name: write quantize='nf4-dq'"),
        ("llm_int8_skip_modules", ["score"], r"write quantize_exclude=\['score'\] in LoRACallback"),
        ("loraplus_lr_ratio", 16, r"PEFT's name: write AdamW\(parameter_groups\(self, lr, lora_plus_ratio=16\)\)"),
        ("lora_plus_lr_ratio", 4.0, r"LoRA\+ elsewhere: write AdamW\(parameter_groups\(self, lr, lora_plus_ratio=4.0"),
        ("loraplus_lr_embedding", 1e-6, r"write parameter_groups\(self, lr, embedding_lr=1e-06\)"),
        ("load_in_4bit", False, "bitsandbytes' name: leave it out"),
        ("bits", 4, "no field of LoRAConfig: write quantize='nf4', of 4 bits, or quantize='int8' in LoRACallback"),
        ("rank", 16, "no field of LoRAConfig; here it is 'r': write r=16"),
        ("lora_r", 16, "no field of LoRAConfig; here it is 'r': write r=16"),
        ("target_module", ["query"], r"here it is 'target_modules': write target_modules=\['query'\]"),
        ("adapter_name", "mine", r"write add_adapter\(model, 'mine', config\), or load_peft\(.*adapter='mine'\)"),
        ("target_r", True, r"PEFT's name: write LoRACallback\(adalora=AdaLoRA\(target_r=\.\.\., \.\.\.\)\)"),
        ("target_r", 8, r"PEFT's name: write LoRACallback\(adalora=AdaLoRA\(target_r=8, ...\)\)"),
        ("init_r", 12, r"PEFT's name: write LoRACallback\(adalora=AdaLoRA\(init_r=12, ...\)\)"),
        ("task_type", "CAUSAL_LM", "PEFT's name: leave it out: a new task head trains by itself"),
        ("eva_config", None, r"PEFT's name: leave it out: .*LoRACallback\(init_from=directory\)"),
    ],
)
def test_a_name_that_users_try_is_answered_with_what_to_write(maker, theirs, value, answer) -> None:
    with pytest.raises(TypeError, match=f"^'{theirs}' is .*{answer}"):
        maker(**{theirs: value})


def test_our_ratio_in_the_wrong_place_is_answered_with_the_right_one() -> None:
    with pytest.raises(TypeError, match=r"^'lora_plus_ratio' is no field of LoRAConfig: write AdamW\(parameter_groups"):
        LoRAConfig(lora_plus_ratio=16)
    with pytest.raises(
        TypeError, match=r"^'quantize' is no field of LoRAConfig: write quantize='nf4' in LoRACallback,"
    ):
        LoRAConfig(quantize="nf4")


def test_an_unknown_field_is_pythons_own_error() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'ranks'"):
        LoRAConfig(ranks=8)
    with pytest.raises(TypeError, match="unexpected keyword argument 'ranks'"):
        inject(models.llama(), LoRAConfig(), ranks=8)


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        (lambda m: inject(m, LoRAConfig(), load_in_4bit=True), "'load_in_4bit' is bitsandbytes' name: write quantize="),
        (
            lambda m: inject(m, LoRAConfig(), adapter_name="x"),
            r"inject has no .*: write add_adapter\(model, 'x', config",
        ),
        (lambda m: inject(m, r=2), r"'r' is a field of LoRAConfig: write LoRAConfig\(r=2\)"),
        (lambda m: inject(m, lora_alpha=2), r"'lora_alpha' is PEFT's name; .* write LoRAConfig\(alpha=2\)"),
        (lambda m: inject(m, exclude=["o_proj"]), r"write quantize_exclude=\['o_proj'\] for what is not quantised"),
        (lambda m: load_peft(m, "nowhere", adapter_name="x"), "load_peft has no 'adapter_name': write adapter='x'"),
        (lambda m: load_peft(m, "nowhere", is_trainable=True), "'is_trainable' is PEFT's name: leave it out"),
        (lambda m: load_peft(m, "nowhere", load_in_4bit=True), r"write quantize='nf4' in .* or load_peft\(model, d"),
        (lambda m: parameter_groups(m, 1e-3, loraplus_lr_ratio=16), r"'loraplus_lr_ratio' .*lora_plus_ratio=16\)"),
        (lambda m: parameter_groups(m, 1e-3, loraplus_weight_decay=0.1), r"'loraplus_weight_.*weight_decay=0.1\)"),
        (lambda m: AdaLoRA(lora_alpha=16), r"write LoRAConfig\(adalora=AdaLoRA\(\.\.\.\), alpha=16\)"),
        (lambda m: quantize(m, "nf4", quantize_exclude=["o_proj"]), r"quantize has no .*: write exclude=\['o_proj'\]"),
    ],
)
def test_functions_answer_such_names_too(call, answer) -> None:
    with pytest.raises(TypeError, match=answer):
        call(models.llama())


def test_a_rank_beside_adalora_is_refused_even_if_it_is_the_default() -> None:
    adalora = AdaLoRA(target_r=2, init_r=6)
    for make in (LoRAConfig, LoRACallback):
        with pytest.raises(ValueError, match=r"r=8 beside AdaLoRA\(init_r=6\).*Leave r out"):
            make(r=8, adalora=adalora)
        make(adalora=adalora)
        make(r=6, adalora=adalora)
    assert dataclasses.replace(LoRAConfig(), adalora=adalora).r == 6
    every_field = {field.name: field.default for field in dataclasses.fields(LoRAConfig)}  # as LightningCLI gives them
    assert LoRACallback(**{**every_field, "adalora": adalora}).config.r == 6


def test_callback_takes_every_field_and_knows_none_as_given_by_default() -> None:
    for field in dataclasses.fields(LoRAConfig):
        assert LoRACallback(**{field.name: field.default}).config == LoRAConfig()
    assert (
        not {field.name for field in dataclasses.fields(LoRAConfig)} & inspect.signature(LoRACallback).parameters.keys()
    )


def test_callback_builds_the_config_of_its_arguments() -> None:
    values = {"r": 4, "alpha": 3.0, "dropout": 0.1, "target_modules": ["q"], "rank_pattern": {"q": 2}, "bias": "all"}
    assert LoRACallback(**values).config == LoRAConfig(**values)
    assert LoRACallback(LoRAConfig(**values)).config == LoRAConfig(**values)


def test_callback_refuses_config_and_fields_together() -> None:
    with pytest.raises(ValueError, match="not both"):
        LoRACallback(LoRAConfig(r=4), r=2)
    with pytest.raises(TypeError, match="r=8"):
        LoRACallback(8)


def test_config_is_frozen_and_compares_by_value() -> None:
    config = LoRAConfig(target_modules=["q", "v"])
    assert config == LoRAConfig(target_modules=("q", "v"))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.r = 4


def test_config_copies_the_callers_containers() -> None:
    targets, ranks = ["q"], {"q": 2}
    config = LoRAConfig(target_modules=targets, rank_pattern=ranks)
    targets.append("v")
    ranks["v"] = 3
    assert config.target_modules == ["q"]
    assert config.rank_pattern == {"q": 2}


def test_a_set_of_targets_has_one_order() -> None:
    assert LoRAConfig(target_modules={"v", "k", "q"}).target_modules == ["k", "q", "v"]


def test_scaling_is_alpha_over_r_or_its_root() -> None:
    assert LoRAConfig().scaling(4, None) == 2.0
    assert LoRAConfig().scaling(4, 6) == 1.5
    assert LoRAConfig(use_rslora=True).scaling(4, 6) == 3.0


NAMES = st.lists(st.text("abc_.", min_size=1, max_size=8), min_size=1, max_size=3)


@given(
    r=st.integers(1, 64),
    alpha=st.none() | st.floats(0.1, 100),
    dropout=st.floats(0, 0.99),
    target_modules=NAMES,
    modules_to_save=st.none() | NAMES,
    rank_pattern=st.dictionaries(st.text("abc", min_size=1), st.integers(1, 9), max_size=2),
    layers_to_transform=st.none() | st.integers(0, 9) | st.lists(st.integers(0, 9), max_size=3),
    init_seed=st.none() | st.integers(0, 2**40),
)
def test_to_dict_survives_json_and_comes_back_equal(**values) -> None:
    config = LoRAConfig(**values)
    assert LoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_from_dict_names_the_field_of_a_newer_version() -> None:
    values = {**LoRAConfig().to_dict(), "use_quantum": True}
    with pytest.raises(ValueError, match=r"unknown LoRAConfig fields \['use_quantum'\].*[Uu]pgrade"):
        LoRAConfig.from_dict(values)


def test_from_dict_fills_in_what_an_older_version_did_not_write() -> None:
    assert LoRAConfig.from_dict({"r": 4}) == LoRAConfig(r=4)


@pytest.mark.parametrize("as_dict", [False, True])
def test_another_kind_of_peft_config_is_named_before_anything_else(as_dict: bool) -> None:
    theirs: Any = peft.VeraConfig(target_modules=["q_proj"])
    theirs = theirs.to_dict() if as_dict else theirs
    with pytest.raises(
        ValueError, match="^the (VeraConfig|dict) describes a 'VERA' adapter; only 'LORA' and 'ADALORA' are read$"
    ):
        LoRAConfig.from_peft(theirs)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([list(range(10_000)), 3], "every entry must be an integer from 0"),
        ({"embed_tokens": "x" * 10_000}, "must be a list of token ids"),
    ],
)
def test_long_values_are_shortened_before_the_reason(value: Any, reason: str) -> None:
    with pytest.raises(TypeError, match=reason) as raised:
        LoRAConfig(trainable_token_indices=value)
    assert len(str(raised.value)) < 400
