"""Against PEFT itself: starting values, logits, gradients, key sets, files in both directions, damaged files."""

import json
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

from lightning_lora import (
    LoRAConfig,
    adapter_checkpoint,
    convert,
    inject,
    load_adapter_state_dict,
    load_peft,
    merge,
    named_adapter_parameters,
    save_peft,
)
from tests import models

# other order of float32 operations in the adapter's term: a few units in the last place of the logits
CLOSE = {"rtol": 1e-5, "atol": 1e-6}

CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], dict[str, Any]]] = {
    "llama": (models.llama, {}, {"target_modules": "all-linear"}),
    "llama tied": (lambda: models.llama(tied=True), {}, {"target_modules": "all-linear"}),
    "qwen3": (models.qwen3, {"target_modules": ["q_proj", "down_proj"]}, {"target_modules": ["q_proj", "down_proj"]}),
    "gpt2": (
        models.gpt2,
        {"target_modules": ["c_attn", "c_proj"]},
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    ),
    "bert classifier": (models.bert_classifier, {}, {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    "embedding": (
        models.llama,
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ),
    "patterns": (
        models.llama,
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.\w+": 6}, "alpha_pattern": {"v_proj": 3}, "alpha": 8},
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.\w+": 6},
            "alpha_pattern": {"v_proj": 3},
        },
    ),
    "rslora": (models.llama, {"use_rslora": True, "alpha": 8}, {"target_modules": "all-linear", "use_rslora": True}),
    "bias of adapted layers": (
        models.gpt2,
        {"target_modules": ["c_attn"], "bias": "lora_only"},
        {"target_modules": ["c_attn"], "bias": "lora_only", "fan_in_fan_out": True},
    ),
    "all biases": (
        models.gpt2,
        {"target_modules": ["c_attn"], "bias": "all"},
        {"target_modules": ["c_attn"], "bias": "all", "fan_in_fan_out": True},
    ),
    "head trains whole": (
        models.llama,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
}


def ours(case: str, **settings: Any) -> nn.Module:
    build, config, _ = CASES[case]
    return inject(build(), LoRAConfig(**{"r": 4, "alpha": 8, **config, **settings})).eval()


def theirs(case: str) -> Any:
    build, _, config = CASES[case]
    return peft.get_peft_model(build(), peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **config})).eval()


def give_values(model: nn.Module, seed: int = 3) -> None:
    """Change everything that trains, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def saved_by_peft(build: Callable[[], nn.Module], directory: Path, **settings: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # PEFT speaks of tied weights and of the base embedding that it adds to the file
        wrapped = peft.get_peft_model(build(), peft.LoraConfig(r=4, lora_alpha=6, **settings)).eval()
        give_values(wrapped)
        wrapped.save_pretrained(directory)
    return wrapped


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_peft_reads_ours_without_a_warning_and_gives_equal_logits(case: str, tmp_path: Path) -> None:
    model = ours(case)
    give_values(model)
    save_peft(model, tmp_path)
    theirs_again = peft.PeftModel.from_pretrained(CASES[case][0](), tmp_path).eval()  # a warning is an error here
    ids = models.token_ids()
    torch.testing.assert_close(theirs_again(ids).logits, model(ids).logits, **CLOSE)


def test_we_read_pefts_and_give_equal_logits(case: str, tmp_path: Path) -> None:
    model = theirs(case)
    give_values(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it adds the base embedding to the file
        model.save_pretrained(tmp_path)
    again = load_peft(CASES[case][0](), tmp_path).eval()
    ids = models.token_ids()
    torch.testing.assert_close(again(ids).logits, model(ids).logits, **CLOSE)


def test_key_sets_are_pefts_own(case: str, tmp_path: Path) -> None:
    theirs(case).save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    save_peft(ours(case), tmp_path / "ours")
    keys = [
        set(safetensors.torch.load_file(tmp_path / who / "adapter_model.safetensors")) for who in ("ours", "theirs")
    ]
    assert keys[0] == keys[1]


def test_starting_values_are_pefts_bit_for_bit(case: str) -> None:
    torch.manual_seed(11)
    reference = {n.replace(".default", ""): p for n, p in theirs(case).named_parameters() if "lora_" in n}
    # models are built under a seed of their own, so that only the adapters draw from this one
    torch.manual_seed(11)
    model = ours(case, init_rng="peft")
    for name, parameter in named_adapter_parameters(model):
        layer, _, factor = name.rpartition(".")
        prefix = f"base_model.model.{layer}."
        key = prefix + factor + ".weight"
        key = key if key in reference else prefix + factor.replace("lora_", "lora_embedding_")
        assert torch.equal(parameter, reference[key]), name


def test_starting_values_on_a_bf16_base_are_pefts_too() -> None:
    torch.manual_seed(5)
    reference = peft.get_peft_model(
        models.llama(dtype=torch.bfloat16), peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    )
    torch.manual_seed(5)
    config = LoRAConfig(r=4, target_modules=["q_proj", "up_proj"], init_rng="peft")
    model = inject(models.llama(dtype=torch.bfloat16), config)
    values = [p for n, p in reference.named_parameters() if "lora_" in n]
    assert all(torch.equal(a, b) for a, (_, b) in zip(values, named_adapter_parameters(model), strict=True))
    assert values[0].dtype == torch.float32


def test_every_gradient_is_pefts(case: str, tmp_path: Path) -> None:
    model = ours(case)
    give_values(model)
    save_peft(model, tmp_path)
    reference = peft.PeftModel.from_pretrained(CASES[case][0](), tmp_path, is_trainable=True).eval()
    ids = models.token_ids()
    for one in (model, reference):
        one(ids).logits.square().mean().backward()
    expected = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None and "original_module" not in n}
    own = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert len(own) == len(expected)
    for name, gradient in own.items():
        stem = name.rpartition(".")
        layer, leaf = stem[0], stem[2]
        candidates = [n for n in expected if n.startswith(f"base_model.model.{layer}.") and _same_leaf(n, leaf)]
        assert len(candidates) == 1, (name, candidates)
        # gradients reach 1e-2 here; sums over 14 tokens and 32 channels differ in float32's last bits
        torch.testing.assert_close(gradient, expected[candidates[0]], rtol=1e-4, atol=1e-6)


def _same_leaf(theirs: str, leaf: str) -> bool:
    if leaf.startswith("lora_"):
        return f".{leaf}." in theirs or f".{leaf.replace('lora_', 'lora_embedding_')}." in theirs
    return theirs.endswith(f".{leaf}") and "lora_" not in theirs


def test_merged_weights_are_pefts_bit_for_bit(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = inject(models.llama(dtype=dtype), LoRAConfig(r=4, alpha=8))
        models.fill_adapters(model)
        save_peft(model, tmp_path)
        reference = peft.PeftModel.from_pretrained(models.llama(dtype=dtype), tmp_path).merge_and_unload()
        merge(model, remove=True)
        expected = reference.state_dict()
        assert model.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


class TestOtherFiles:
    """Forms that PEFT writes or reads besides the usual one."""

    @staticmethod
    def saved(directory: Path) -> nn.Module:
        model = inject(models.llama(), LoRAConfig(r=4))
        models.fill_adapters(model)
        save_peft(model, directory)
        return model

    @staticmethod
    def assert_read(directory: Path, model: nn.Module, **tolerance: Any) -> None:
        ids = models.token_ids()
        expected = model(ids).logits
        actual = load_peft(models.llama(), directory)(ids).logits
        torch.testing.assert_close(actual, expected, **(tolerance or {"rtol": 0, "atol": 0}))

    def test_legacy_bin(self, tmp_path: Path) -> None:
        model = self.saved(tmp_path)
        weights = tmp_path / "adapter_model.safetensors"
        torch.save(safetensors.torch.load_file(weights), tmp_path / "adapter_model.bin")
        weights.unlink()
        self.assert_read(tmp_path, model)

    def test_keys_with_the_adapters_name(self, tmp_path: Path) -> None:
        model = self.saved(tmp_path)
        weights = tmp_path / "adapter_model.safetensors"
        tensors = {
            key.replace(".weight", ".default.weight"): value
            for key, value in safetensors.torch.load_file(weights).items()
        }
        safetensors.torch.save_file(tensors, weights)
        self.assert_read(tmp_path, model)

    def test_keys_of_a_compiled_model(self, tmp_path: Path) -> None:
        compiled = torch.compile(models.llama(), backend="eager")
        wrapped = peft.get_peft_model(compiled, peft.LoraConfig(r=4, target_modules=["q_proj"]))
        give_values(wrapped)
        wrapped.save_pretrained(tmp_path)
        assert all("._orig_mod." in key for key in safetensors.torch.load_file(tmp_path / "adapter_model.safetensors"))
        model = load_peft(models.llama(), tmp_path)
        theirs = {name: value for name, value in wrapped.named_parameters() if ".lora_" in name}
        prefix = "base_model.model._orig_mod."
        for name, value in named_adapter_parameters(model):
            assert torch.equal(value, theirs[f"{prefix}{name}.default.weight"])

    def test_bf16_tensors_keep_their_values(self, tmp_path: Path) -> None:
        self.saved(tmp_path)
        weights = tmp_path / "adapter_model.safetensors"
        tensors = {key: value.bfloat16() for key, value in safetensors.torch.load_file(weights).items()}
        safetensors.torch.save_file(tensors, weights)
        model = load_peft(models.llama(), tmp_path)
        for name, parameter in named_adapter_parameters(model):
            assert torch.equal(parameter, tensors[f"base_model.model.{name}.weight"].float())

    def test_a_target_list_that_names_more_than_the_model_has(self, tmp_path: Path) -> None:
        model = self.saved(tmp_path)
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        config["target_modules"] += ["query_key_value", "c_attn"]
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        self.assert_read(tmp_path, model)

    def test_overlapping_rank_patterns_in_pefts_sorted_order(self, tmp_path: Path) -> None:
        patterns = {"layers.0.self_attn.q_proj": 6, "q_proj": 2}
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], rank_pattern=patterns)
        model = peft.get_peft_model(models.llama(), config)
        give_values(model)
        model.save_pretrained(tmp_path)
        again = load_peft(models.llama(), tmp_path)
        ids = models.token_ids()
        torch.testing.assert_close(again(ids).logits, model(ids).logits, **CLOSE)

    def test_saving_twice_gives_equal_bytes(self, tmp_path: Path) -> None:
        model = self.saved(tmp_path / "a")
        save_peft(load_peft(models.llama(), tmp_path / "a"), tmp_path / "b")
        save_peft(model, tmp_path / "c")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            assert len({(tmp_path / folder / name).read_bytes() for folder in "abc"}) == 1


OPTIONS: dict[str, dict[str, Any]] = {
    "one block": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "one block of a named list": {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
    "regular expression": {"target_modules": r"model\.layers\.0\..*(q|v)_proj"},
    "full names": {"target_modules": ["model.layers.1.mlp.up_proj", "model.layers.0.self_attn.k_proj"]},
    "excluded": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.1.*"},
    "overlapping alphas": {"target_modules": ["q_proj"], "alpha_pattern": {"layers.0.self_attn.q_proj": 3}},
    "rslora with ranks": {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "rank_pattern": {"up_proj": 2}},
    "norms train whole": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "a block trains whole": {"target_modules": ["q_proj"], "modules_to_save": ["layers.0.mlp"]},
    "embedding trains whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "head adapted": {"target_modules": ["lm_head", "q_proj"]},
    "dropout": {"target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_both_mean_the_same_through_files_in_both_directions(option: str, tmp_path: Path) -> None:
    dropout = 0.2 if option == "dropout" else 0.0
    wrapped = peft.get_peft_model(
        models.llama(), peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, **OPTIONS[option])
    ).eval()
    give_values(wrapped)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it adds the base embedding to the file
        wrapped.save_pretrained(tmp_path / "theirs")
    ids = models.token_ids()
    expected = wrapped(ids).logits
    model = load_peft(models.llama(), tmp_path / "theirs").eval()
    torch.testing.assert_close(model(ids).logits, expected, **CLOSE)
    save_peft(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(models.llama(), tmp_path / "ours").eval()  # a warning is an error here
    torch.testing.assert_close(again(ids).logits, expected, **CLOSE)
    assert again.peft_config["default"].lora_dropout == dropout


class Tokenizer:
    def save_pretrained(self, directory: Path) -> None:
        (directory / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize("given", [True, False])
def test_base_and_tokenizer_are_beside_the_adapter_and_nobody_is_asked(
    given: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket.socket, "connect", None)  # any use is an error
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    model = models.llama()
    model.config._name_or_path, model.config._commit_hash = "somebody/base", "0123abc"
    model.resize_token_embeddings(104)  # for which PEFT compares with the Hub, and puts the embeddings into the file
    if not given:
        model.tokenizer = Tokenizer()
    inject(model, LoRAConfig(r=4, target_modules=["embed_tokens", "q_proj"]))
    save_peft(model, tmp_path / "saved", tokenizer=Tokenizer() if given else None)
    assert (tmp_path / "saved" / "tokenizer.json").is_file()
    torch.save(adapter_checkpoint(model), tmp_path / "adapter.ckpt")
    convert(tmp_path / "adapter.ckpt", tmp_path / "converted")
    for name in ("saved", "converted"):
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == ("somebody/base", "0123abc")
        tensors = safetensors.torch.load_file(tmp_path / name / "adapter_model.safetensors")
        assert all(".lora_" in key for key in tensors)


def test_a_body_without_its_head_keeps_names_of_its_own(tmp_path: Path) -> None:
    body = models.llama().model
    model = inject(body, LoRAConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"])).eval()
    give_values(model)
    save_peft(model, tmp_path)
    again = peft.PeftModel.from_pretrained(models.llama().model, tmp_path).eval()
    ids = models.token_ids()
    torch.testing.assert_close(again(ids).last_hidden_state, model(ids).last_hidden_state, **CLOSE)


@pytest.mark.parametrize("targets", [["query"], ["query", "classifier"]], ids=str)
def test_peft_reads_a_classifier_whose_head_did_not_train_whole(targets: list[str], tmp_path: Path) -> None:
    model = inject(models.bert_classifier(), LoRAConfig(r=3, target_modules=targets, modules_to_save=[])).eval()
    give_values(model)
    save_peft(model, tmp_path)
    again = peft.PeftModel.from_pretrained(models.bert_classifier(), tmp_path).eval()  # a warning is an error here
    ids = models.token_ids()
    torch.testing.assert_close(again(ids).logits, model(ids).logits, **CLOSE)


def test_an_older_file_that_is_refused_for_its_attentions_scale_is_read_by_way_of_convert(tmp_path: Path) -> None:
    model = inject(models.encoder(), LoRAConfig(r=4, alpha=8, target_modules=["self_attn"]))
    give_values(model)
    content = adapter_checkpoint(model)
    adapter = content["lightning_lora"]["adapters"][0]
    state = content[adapter["state_key"]]
    for name in [name for name in adapter["layers"] if name.endswith(".out_proj")]:
        r, scaling = adapter["layers"][name]
        adapter["layers"][name] = (r, 2 * scaling)  # the same function, as such files hold it
        state[f"{name}.lora_B"] = state[f"{name}.lora_B"] / 2
    entries = adapter["peft"]["entries"]
    adapter["peft"]["entries"] = [(key, layout.removeprefix("half_"), names) for key, layout, names in entries]
    torch.save(content, tmp_path / "older.ckpt")
    with pytest.raises(ValueError, match=r"scales '.*out_proj' by 4, the model by 2: .* convert\(\) an older file"):
        load_adapter_state_dict(model, content)
    convert(tmp_path / "older.ckpt", tmp_path / "directory")
    again = load_peft(models.encoder(), tmp_path / "directory")
    assert torch.equal(again(models.token_ids()), model(models.token_ids()))


def test_the_biases_that_peft_writes_twice_beside_a_trained_head_are_read_once(tmp_path: Path) -> None:
    wrapped = peft.get_peft_model(
        models.bert_classifier(), peft.LoraConfig(r=4, target_modules=["query"], bias="all", task_type="SEQ_CLS")
    ).eval()
    give_values(wrapped)
    wrapped.save_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    assert {"bias", "modules_to_save.bias", "original_module.bias"} <= {k.partition("classifier.")[2] for k in tensors}
    ids = models.token_ids()
    model = load_peft(models.bert_classifier(), tmp_path).eval()
    torch.testing.assert_close(model(ids).logits, wrapped(ids).logits, **CLOSE)


def test_mica_leaves_the_base_alone_and_is_read(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="mica")
    wrapped = peft.get_peft_model(models.llama(), config).eval()
    give_values(wrapped)
    wrapped.save_pretrained(tmp_path)
    ids = models.token_ids()
    torch.testing.assert_close(load_peft(models.llama(), tmp_path)(ids).logits, wrapped(ids).logits, **CLOSE)


def test_load_peft_on_an_adapted_model_is_an_error_that_changes_nothing(tmp_path: Path) -> None:
    model = inject(models.llama(), LoRAConfig(r=4))
    models.fill_adapters(model)
    save_peft(model, tmp_path)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="already adapted"):
        load_peft(model, tmp_path)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_load_peft_on_a_bf16_base_keeps_float32_adapters_exactly(tmp_path: Path) -> None:
    model = inject(models.llama(), LoRAConfig(r=4))
    models.fill_adapters(model)
    save_peft(model, tmp_path)
    again = load_peft(models.llama(dtype=torch.bfloat16), tmp_path)
    expected = dict(named_adapter_parameters(model))
    assert all(torch.equal(p, expected[name]) for name, p in named_adapter_parameters(again))
