"""Portable adapters against PEFT's own logits, and against each layer's product of factors."""

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_lora import LoRAConfig, adapter_checkpoint, convert, inject, save_peft
from lightning_lora.peft.portable import make_portable
from tests import models, zoo

# other order of float32 operations in the adapter's term: a few units in the last place of the logits
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PATTERNS = {
    "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.\w+": 6},
    "alpha_pattern": {"v_proj": 3, r"layers\.0\..*": 5},
}


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(models.VOCAB, 8)
        self.conv = nn.Conv2d(3, 4, 3)
        self.line = nn.Conv1d(36, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        image = self.conv(self.embed(input_ids[:, :6]).view(2, 1, 6, 8).expand(2, 3, 6, 8))  # [2, 4, 4, 6]
        return self.head(self.line(image.permute(0, 1, 3, 2).reshape(2, 4 * 6, 4).repeat(1, 2, 1)[:, :36]).mT)


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, groups=2)
        self.head = nn.Linear(8, 5)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.conv(input_ids.float().unsqueeze(1).expand(-1, 4, -1) / 100).mT)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build().eval()


def mixtral() -> nn.Module:
    return next(family for family in zoo.FAMILIES if family.name == "mixtral").build()


ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "plain": (models.llama, {"target_modules": "all-linear"}),
    "rslora": (models.llama, {"target_modules": "all-linear", "use_rslora": True}),
    "patterns": (models.llama, {"target_modules": "all-linear", **PATTERNS}),
    "rslora and patterns": (models.llama, {"target_modules": "all-linear", "use_rslora": True, **PATTERNS}),
    "gpt2": (
        models.gpt2,
        {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "rank_pattern": {"c_attn": 3}},
    ),
    "embedding": (models.llama, {"target_modules": ["embed_tokens", "lm_head"], "rank_pattern": {"lm_head": 7}}),
    "convolutions": (
        lambda: seeded(Convolutions),
        {"target_modules": ["conv", "line", "head", "embed"], "rank_pattern": {"conv": 3, "line": 6, "embed": 5}},
    ),
    "experts": (mixtral, {**ATTENTION, "target_parameters": EXPERTS, "rank_pattern": {"q_proj": 6}}),
    "experts rslora": (
        mixtral,
        {
            "target_modules": ["q_proj"],
            "target_parameters": EXPERTS,
            "use_rslora": True,
            "rank_pattern": {r"experts\.\w+": 3},
        },
    ),
    "one expert parameter": (mixtral, {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]}),
}


def save(directory: Path, build: Callable[[], nn.Module], config: dict[str, Any], seed: int = 3) -> Tensor:
    """Write an adapter with random values as PEFT writes it; returns PEFT's output with the directory.

    Loaded again, since PEFT sorts the patterns when it writes them, which can change what the first match is.
    """
    with warnings.catch_warnings():
        # of patterns that match "module.parameter", which PEFT does use
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        model = peft.get_peft_model(build(), peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **config})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers` to `True`", UserWarning)
        model.save_pretrained(directory)
    return loaded(build, directory)


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out = model(input_ids=models.token_ids())
    return out if isinstance(out, Tensor) else out.logits


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = json.loads((directory / "adapter_config.json").read_text())
    return config, safetensors.torch.load_file(directory / "adapter_model.safetensors")


def write(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})


def loaded(build: Callable[[], nn.Module], directory: Path) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        return output(peft.PeftModel.from_pretrained(build(), str(directory)).eval())


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same_from_the_portable_adapter(case: str, tmp_path: Path) -> None:
    build, config = CASES[case]
    expected = save(tmp_path / "source", build, config)
    portable, tensors = make_portable(*read(tmp_path / "source"))
    write(tmp_path / "portable", portable, tensors)
    assert not torch.allclose(expected, output(build()), **CLOSE)
    torch.testing.assert_close(loaded(build, tmp_path / "portable"), expected, **CLOSE)


@pytest.mark.parametrize("case", CASES)
def test_the_result_has_one_rank_and_scale_one(case: str, tmp_path: Path) -> None:
    build, config = CASES[case]
    save(tmp_path, build, config)
    source, tensors = read(tmp_path)
    before = {key: value.clone() for key, value in tensors.items()}
    portable, result = make_portable(source, tensors)
    r = max([4, *config.get("rank_pattern", {}).values()])
    changed = {"r": r, "lora_alpha": r, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    assert portable == {**source, **changed}
    assert not any(key.endswith("base_layer.weight") for key in result)
    assert {v.shape[0] for k, v in result.items() if re.search(r"lora_(embedding_)?A", k)} <= {r, 4 * r}
    assert all(torch.equal(tensors[key], before[key]) for key in before)
    again, twice = make_portable(portable, result)
    assert again == portable
    assert all(torch.equal(twice[key], result[key]) for key in result)


def test_a_grouped_convolution_is_padded_group_by_group(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="groups > 1"):
        expected = save(
            tmp_path, lambda: seeded(Grouped), {"target_modules": ["conv", "head"], "rank_pattern": {"head": 6}}
        )
    write(tmp_path / "portable", *make_portable(*read(tmp_path)))
    with pytest.warns(UserWarning, match="groups > 1"):
        result = loaded(lambda: seeded(Grouped), tmp_path / "portable")
    torch.testing.assert_close(result, expected, **CLOSE)


def test_a_rank_that_the_groups_do_not_divide_is_refused() -> None:
    tensors = {
        "base_model.model.conv.lora_A.weight": torch.ones(4, 4, 3),
        "base_model.model.conv.lora_B.weight": torch.ones(8, 2, 1),
        "base_model.model.head.lora_A.weight": torch.ones(5, 8),
        "base_model.model.head.lora_B.weight": torch.ones(3, 5),
    }
    with pytest.raises(ValueError, match=r"'base_model.model.conv' is a convolution in 2 groups.*rank 5.*merge\(model"):
        make_portable({"r": 4, "lora_alpha": 4, "rank_pattern": {"head": 5}}, tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("alpha", "kept"), [(8, True), (3, False)])
def test_half_precision_is_kept_where_the_scale_is_exact_in_it(dtype: torch.dtype, alpha: int, kept: bool) -> None:
    A, B = (torch.randn(4, 4, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1))
    config = {"r": 4, "lora_alpha": alpha}
    _, result = make_portable(config, {"x.lora_A.weight": A, "x.lora_B.weight": B})
    assert result["x.lora_A.weight"].dtype == dtype
    assert result["x.lora_B.weight"].dtype == (dtype if kept else torch.float32)
    assert torch.equal(result["x.lora_B.weight"].float(), B.float() * (alpha / 4))


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"peft_type": "ADALORA"}, "ADALORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
    ],
)
def test_a_config_that_asks_for_more_than_factors_is_refused(config: dict[str, Any], found: str) -> None:
    tensors = {"x.lora_A.weight": torch.ones(2, 3), "x.lora_B.weight": torch.ones(3, 2)}
    with pytest.raises(ValueError, match=rf"{found}.*merge\(model, remove=True\)"):
        make_portable({"r": 2, "lora_alpha": 2, **config}, tensors)


@pytest.mark.parametrize(
    "name",
    [
        "x.lora_magnitude_vector",
        "x.base_layer.bias",
        "x.lora_B.bias",
        "head.weight",
        "x.token_adapter.trainable_tokens",
    ],
)
def test_a_tensor_that_is_no_factor_is_refused(name: str) -> None:
    tensors = {"x.lora_A.weight": torch.ones(2, 3), "x.lora_B.weight": torch.ones(3, 2), name: torch.ones(3)}
    with pytest.raises(ValueError, match=rf"{name}.*merge\(model, remove=True\)"):
        make_portable({"r": 2, "lora_alpha": 2}, tensors)


def test_tied_adapters_are_refused(tmp_path: Path) -> None:
    config = {"r": 2, "lora_alpha": 2, "ensure_weight_tying": True}
    tensors = {"x.lora_embedding_A": torch.ones(2, 9), "x.lora_embedding_B": torch.ones(3, 2)}
    with pytest.raises(ValueError, match=r"ensure_weight_tying.*merge\(model, remove=True\)"):
        make_portable(config, tensors)


@pytest.mark.parametrize(
    ("A", "B"), [((2, 3), (3, 4)), ((2, 3), None), ((2, 3, 1), (3, 2)), ((4, 3), (3, 2)), ((0, 3), (3, 0))]
)
def test_factors_that_do_not_fit_are_refused(A: tuple[int, ...], B: tuple[int, ...] | None) -> None:
    tensors = {"x.lora_A.weight": torch.ones(A)} | ({} if B is None else {"x.lora_B.weight": torch.ones(B)})
    with pytest.raises(ValueError, match=r"the factors of 'x' do not fit"):
        make_portable({"r": 2, "lora_alpha": 2}, tensors)


def test_an_adapter_without_factors_is_refused() -> None:
    with pytest.raises(ValueError, match="no lora_A and lora_B among its 1 tensors"):
        make_portable({}, {"x.base_layer.weight": torch.ones(2, 2)})


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_expert_parameters_of_different_ranks_or_alphas_are_refused(pattern: str, tmp_path: Path) -> None:
    config = {"target_modules": ["q_proj"], "target_parameters": EXPERTS, pattern: {"down_proj": 2}}
    save(tmp_path, mixtral, config)
    with pytest.raises(ValueError, match=r"experts.* stands for one of .*down_proj.*gate_up_proj.*different ranks"):
        make_portable(*read(tmp_path))


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_the_model_tells_which_expert_parameter_has_which_rank_and_alpha(pattern: str, tmp_path: Path) -> None:
    config = LoRAConfig(r=4, target_modules=["q_proj"], target_parameters=EXPERTS, **{pattern: {"down_proj": 2}})
    model = inject(mixtral(), config)
    models.fill_adapters(model)
    save_peft(model, tmp_path / "saved", portable=True)
    torch.save(adapter_checkpoint(model), tmp_path / "adapter.ckpt")
    convert(tmp_path / "adapter.ckpt", tmp_path / "converted", portable=True)
    for name in ("saved", "converted"):
        torch.testing.assert_close(loaded(mixtral, tmp_path / name), output(model), **CLOSE)


def test_expert_rows_that_are_no_multiple_of_the_rank_are_refused() -> None:
    tensors = {"x.experts.lora_A.weight": torch.ones(9, 4), "x.experts.lora_B.weight": torch.ones(5, 9)}
    with pytest.raises(ValueError, match="9 rows in lora_A, expected a multiple of its rank 4"):
        make_portable({"r": 4, "lora_alpha": 4, "target_parameters": ["experts.down_proj"]}, tensors)


LAYERS = ["model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.0.mlp.up", "model.layers.10.mlp.up", "head"]
KEYS = ["q_proj", r"layers\.0\..*", "up", "head", r"model\.layers\.1\.q_proj", "proj", r".*\.mlp\.up"]


@settings(max_examples=80, deadline=None)
@given(
    r=st.integers(1, 9),
    alpha=st.floats(0.1, 64),
    rslora=st.booleans(),
    ranks=st.dictionaries(st.sampled_from(KEYS), st.integers(1, 9)),
    alphas=st.dictionaries(st.sampled_from(KEYS), st.floats(-8, 64)),
)
def test_every_layers_product_is_kept(
    r: int, alpha: float, rslora: bool, ranks: dict[str, int], alphas: dict[str, float]
) -> None:
    generator = torch.Generator().manual_seed(r)
    tensors, expected = {}, {}
    for layer in LAYERS:
        rank = next((v for k, v in ranks.items() if re.match(rf"(.*\.)?({k})$", layer)), r)
        layer_alpha = next((v for k, v in alphas.items() if re.match(rf"(.*\.)?({k})$", layer)), alpha)
        A, B = torch.randn(rank, 6, generator=generator), torch.randn(5, rank, generator=generator)
        key = f"base_model.model.{layer}"
        tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
        expected[key] = layer_alpha / (rank**0.5 if rslora else rank) * (B.double() @ A.double())
    config = {"r": r, "lora_alpha": alpha, "use_rslora": rslora, "rank_pattern": ranks, "alpha_pattern": alphas}
    portable, result = make_portable(config, tensors)
    for key, delta in expected.items():
        A, B = result[f"{key}.lora_A.weight"], result[f"{key}.lora_B.weight"]
        assert A.shape[0] == B.shape[1] == portable["r"] == portable["lora_alpha"]
        # one rounding of B to float32
        torch.testing.assert_close(B.double() @ A.double(), delta, rtol=1e-5, atol=1e-5)
