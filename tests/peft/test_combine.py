"""Combined adapters against float64 dense sums, dense truncated SVD, and PEFT loading the result."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from lightning_lora import LoRAConfig, inject, load_peft, save_peft
from lightning_lora.peft.combine import combine
from tests import models
from tests.peft.test_portable import (
    CASES,
    CLOSE,
    EXPERTS,
    Convolutions,
    loaded,
    mixtral,
    output,
    read,
    save,
    seeded,
    write,
)

Case = tuple[Callable[[], nn.Module], list[dict[str, Any]]]
SUMS: dict[str, Case] = {
    "same targets": (models.llama, [{"target_modules": ["q_proj", "v_proj"]}] * 3),
    "ranks and scales": (
        models.llama,
        [
            {"target_modules": ["q_proj", "v_proj"], "r": 3, "use_rslora": True, "rank_pattern": {"v_proj": 5}},
            {"target_modules": ["q_proj", "v_proj"], "r": 6, "alpha_pattern": {"q_proj": 3}},
        ],
    ),
    "other layers": (
        models.llama,
        [
            {"target_modules": ["q_proj"]},
            {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
            {"target_modules": ["lm_head"], "r": 2},
        ],
    ),
    "gpt2": (models.gpt2, [{"target_modules": ["c_attn"], "fan_in_fan_out": True, "r": r} for r in (2, 5)]),
    "embedding": (models.llama, [{"target_modules": ["embed_tokens", "q_proj"], "r": r} for r in (2, 5)]),
    "convolutions": (
        lambda: seeded(Convolutions),
        [{"target_modules": ["conv", "line", "head"], "r": 2}, {"target_modules": ["conv", "embed"], "r": 5}],
    ),
    "experts": (
        mixtral,
        [{"target_modules": ["q_proj"], "target_parameters": EXPERTS, "r": r} for r in (2, 3)],
    ),
    "experts in one only": (
        mixtral,
        [{"target_modules": ["q_proj"], "target_parameters": EXPERTS}, {"target_modules": ["v_proj"], "r": 2}],
    ),
}
WEIGHTS = [0.7, -1.3, 0.0]


def sources(case: str, directory: Path) -> list[Path]:
    build, configs = SUMS[case]
    paths = [directory / str(index) for index in range(len(configs))]
    for seed, (path, config) in enumerate(zip(paths, configs, strict=True)):
        save(path, build, config, seed)
    return paths


def deltas(build: Callable[[], nn.Module], directory: Path) -> dict[str, Tensor]:
    """Return what PEFT adds to each parameter of the base model, in float64."""
    base = {name: value.double() for name, value in build().double().state_dict().items()}
    model = peft.PeftModel.from_pretrained(build().double(), str(directory), autocast_adapter_dtype=False).double()
    merged = model.merge_and_unload().state_dict()
    assert merged.keys() == base.keys()
    return {name: merged[name] - value for name, value in base.items()}


def dense_sum(build: Callable[[], nn.Module], paths: Sequence[Path], weights: Sequence[float]) -> dict[str, Tensor]:
    parts = [deltas(build, path) for path in paths]
    return {
        name: sum((w * part[name] for w, part in zip(weights, parts, strict=True)), torch.zeros(1)) for name in parts[0]
    }


def check_deltas(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert any(value.abs().max() > 1e-2 for value in expected.values())
    for name, value in expected.items():
        # the factors are rounded to float32
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("case", SUMS)
def test_concatenation_is_the_weighted_sum(case: str, tmp_path: Path) -> None:
    build, paths = SUMS[case][0], sources(case, tmp_path)
    weights = WEIGHTS[: len(paths)]
    combine(paths, weights, tmp_path / "out")
    check_deltas(deltas(build, tmp_path / "out"), dense_sum(build, paths, weights))
    config, _ = read(tmp_path / "out")
    assert config["r"] == config["lora_alpha"]
    assert (config["use_rslora"], config["rank_pattern"], config["alpha_pattern"]) == (False, {}, {})


@pytest.mark.parametrize("case", SUMS)
def test_svd_at_full_rank_is_the_concatenation(case: str, tmp_path: Path) -> None:
    build, paths = SUMS[case][0], sources(case, tmp_path)
    combine(paths, None, tmp_path / "cat")
    r = read(tmp_path / "cat")[0]["r"]
    combine(paths, None, tmp_path / "svd", r=r)
    assert read(tmp_path / "svd")[0]["r"] == r
    check_deltas(deltas(build, tmp_path / "svd"), deltas(build, tmp_path / "cat"))


@pytest.mark.parametrize("case", SUMS)
def test_truncation_is_the_best_approximation_of_its_rank(case: str, tmp_path: Path) -> None:
    build, paths = SUMS[case][0], sources(case, tmp_path)
    weights = [0.7, -1.3, 0.4][: len(paths)]
    combine(paths, weights, tmp_path / "out", r=2)
    expected = {}
    for name, delta in dense_sum(build, paths, weights).items():
        matrix = delta if "experts" in name or delta.dim() < 3 else delta.flatten(1)
        if matrix.dim() > 1 and matrix.any():
            U, S, V = torch.linalg.svd(matrix, full_matrices=False)
            matrix = (U[..., :2] * S[..., None, :2]) @ V[..., :2, :]
        expected[name] = matrix.reshape(delta.shape)
    check_deltas(deltas(build, tmp_path / "out"), expected)
    assert read(tmp_path / "out")[0]["r"] == 2


@pytest.mark.parametrize("case", CASES)
def test_one_adapter_of_weight_one_computes_the_same(case: str, tmp_path: Path) -> None:
    build, config = CASES[case]
    expected = save(tmp_path / "source", build, config)
    combine([tmp_path / "source"], None, tmp_path / "out")
    torch.testing.assert_close(loaded(build, tmp_path / "out"), expected, **CLOSE)


def test_an_adapter_minus_itself_is_the_base_model(tmp_path: Path) -> None:
    save(tmp_path / "a", models.llama, {"target_modules": ["q_proj"]})
    combine([tmp_path / "a", tmp_path / "a"], [1, -1], tmp_path / "out")
    torch.testing.assert_close(loaded(models.llama, tmp_path / "out"), output(models.llama()), **CLOSE)


def test_the_output_may_be_one_of_the_inputs(tmp_path: Path) -> None:
    a = str(tmp_path)
    expected = dense_sum(models.llama, sources("same targets", tmp_path)[:2], [1, 1])
    combine([f"{a}/0", f"{a}/1"], None, f"{a}/0")
    check_deltas(deltas(models.llama, tmp_path / "0"), expected)


def test_the_targets_are_kept_where_all_agree_and_full_names_otherwise(tmp_path: Path) -> None:
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    save(a, models.llama, {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1})
    save(b, models.llama, {"target_modules": ["v_proj", "q_proj"], "lora_dropout": 0.1})
    save(c, models.llama, {"target_modules": ["o_proj"], "layers_to_transform": [1], "lora_dropout": 0.2})
    combine([a, b], None, tmp_path / "same")
    combine([a, c], None, tmp_path / "other")
    same, other = read(tmp_path / "same")[0], read(tmp_path / "other")[0]
    assert (set(same["target_modules"]), same["lora_dropout"]) == ({"q_proj", "v_proj"}, 0.1)
    full = [f"model.layers.{n}.self_attn.{x}_proj" for n, x in [(0, "q"), (0, "v"), (1, "o"), (1, "q"), (1, "v")]]
    assert (other["target_modules"], other["lora_dropout"], other["layers_to_transform"]) == (full, 0.0, None)


def test_old_files_of_torch_are_read(tmp_path: Path) -> None:
    expected = save(tmp_path / "a", models.llama, {"target_modules": ["q_proj"]})
    torch.save(read(tmp_path / "a")[1], tmp_path / "a" / "adapter_model.bin")
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    combine([tmp_path / "a"], None, tmp_path / "out")
    torch.testing.assert_close(loaded(models.llama, tmp_path / "out"), expected, **CLOSE)


def small(path: Path, shape: tuple[int, int, int] = (3, 2, 4), **config: Any) -> Path:
    """Write an adapter of one layer [out, r, in] that is named x."""
    out, r, width = shape
    tensors = {"base_model.model.x.lora_A.weight": torch.ones(r, width)}
    tensors["base_model.model.x.lora_B.weight"] = torch.ones(out, r)
    write(path, {"peft_type": "LORA", "r": r, "lora_alpha": r, "target_modules": ["x"], **config}, tensors)
    return path


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"base_model_name_or_path": "other"}, "differ in base_model_name_or_path: 'base' .*'other'"),
        ({"shape": (3, 2, 5)}, r"'base_model.model.x' differs: layer with A \[r, 4\].*A \[r, 5\]"),
        ({"shape": (5, 2, 4)}, r"'base_model.model.x' differs: .*B \[3, r\].*B \[5, r\]"),
        ({"layer_replication": [[0, 2]]}, "differ in layer_replication"),
        ({"use_dora": True}, "b: use_dora=True.*merge"),
        ({"modules_to_save": ["y"]}, "b: modules_to_save=.*merge"),
        ({"bias": "all"}, "b: bias='all'.*merge"),
    ],
)
def test_adapters_that_do_not_add_up_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    a = small(tmp_path / "a", base_model_name_or_path="base")
    b = small(tmp_path / "b", **{"base_model_name_or_path": "base", **config})
    with pytest.raises(ValueError, match=message):
        combine([a, b], None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_names_no_base_model_fits_any(tmp_path: Path) -> None:
    a, b = small(tmp_path / "a"), small(tmp_path / "b", base_model_name_or_path="base")
    combine([a, b], None, tmp_path / "out")
    assert read(tmp_path / "out")[0]["base_model_name_or_path"] == "base"


def test_adapters_of_other_bases_are_refused_and_the_sum_knows_its_base(tmp_path: Path) -> None:
    def changed() -> nn.Module:
        model = models.llama()
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        return model

    for name, build in (("first", models.llama), ("second", models.llama), ("third", changed)):
        save_peft(inject(build(), LoRAConfig(r=2)), tmp_path / name)
    with pytest.raises(ValueError, match=r"third was trained on another base model than .*first: .*up_proj.weight"):
        combine([tmp_path / "first", tmp_path / "third"], None, tmp_path / "sum")
    assert not (tmp_path / "sum").exists()
    combine([tmp_path / "first", tmp_path / "second"], None, tmp_path / "sum")
    load_peft(models.llama(), tmp_path / "sum")
    with pytest.raises(ValueError, match="another base model"):
        load_peft(changed(), tmp_path / "sum")


def test_keys_with_the_adapters_name_are_read(tmp_path: Path) -> None:
    save(tmp_path / "plain", models.llama, {"target_modules": ["q_proj", "embed_tokens"]}, 0)
    config, tensors = read(tmp_path / "plain")
    named = {
        re.sub(
            r"(lora_[AB])\.weight", r"\1.default.weight", re.sub(r"(lora_embedding_[AB])", r"\1.default", key)
        ): value
        for key, value in tensors.items()
    }
    assert not named.keys() & {key for key in tensors if ".lora_" in key}
    write(tmp_path / "named", config, named)
    for name in ("plain", "named"):
        combine([tmp_path / name], None, tmp_path / f"{name}-sum")
    assert (tmp_path / "plain-sum/adapter_model.safetensors").read_bytes() == (
        tmp_path / "named-sum/adapter_model.safetensors"
    ).read_bytes()


def test_experts_with_other_parameters_adapted_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a", mixtral, {"target_modules": ["q_proj"], "target_parameters": EXPERTS})
    save(tmp_path / "b", mixtral, {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]})
    with pytest.raises(ValueError, match=r"experts' differs: one of .*down_proj.*gate_up_proj for 4 experts"):
        combine([tmp_path / "a", tmp_path / "b"], None, tmp_path / "out")


def test_grouped_convolutions_are_refused(tmp_path: Path) -> None:
    tensors = {"conv.lora_A.weight": torch.ones(4, 4, 3), "conv.lora_B.weight": torch.ones(8, 2, 1)}
    write(tmp_path / "a", {"r": 4, "lora_alpha": 4, "target_modules": ["conv"]}, tensors)
    with pytest.raises(ValueError, match="convolution in 2 groups"):
        combine([tmp_path / "a"], None, tmp_path / "out")


@pytest.mark.parametrize(
    ("weights", "r", "message"),
    [
        ([1.0, 2.0], None, "2 weights for 1 directories"),
        ([float("nan")], None, "expected finite numbers"),
        ([float("inf")], None, "expected finite numbers"),
        (None, 3, "r=3: expected 1 to 2"),
        (None, 0, "r=0: expected 1 to 2"),
    ],
)
def test_weights_and_ranks_that_do_not_fit_are_refused(
    weights: list[float] | None, r: int | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        combine([small(tmp_path / "a")], weights, tmp_path / "out", r=r)


@pytest.mark.parametrize("directories", [[], "adapter"])
def test_no_list_of_directories_is_refused(directories: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a list of one or more adapter directories"):
        combine(directories, None, tmp_path / "out")


def test_damaged_factors_are_refused_when_truncating(tmp_path: Path) -> None:
    config, tensors = read(small(tmp_path / "a"))
    tensors["base_model.model.x.lora_A.weight"][0, 0] = float("nan")
    write(tmp_path / "b", config, tensors)
    with pytest.raises(ValueError, match=r"x.lora_A.weight' holds NaN or infinity"):
        combine([tmp_path / "b"], None, tmp_path / "out")
    with (
        pytest.warns(UserWarning, match="holds NaN or infinity"),
        pytest.raises(ValueError, match="not finite"),
    ):
        combine([tmp_path / "b"], None, tmp_path / "out", r=1, on_nonfinite="warn")


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    path = small(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="no adapter_config.json"):
        combine([tmp_path / "absent"], None, tmp_path / "out")
    (path / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"adapter_model.safetensors is damaged"):
        combine([path], None, tmp_path / "out")
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="neither adapter_model.safetensors nor adapter_model.bin"):
        combine([path], None, tmp_path / "out")
    for text, message in [("{", "is not JSON"), (json.dumps([1]), "expected a JSON object, found list")]:
        (path / "adapter_config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            combine([path], None, tmp_path / "out")
