"""Every kind of layer and option against PEFT itself: start, training, files in both directions, merging."""

import copy
import functools
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from lightning_lora import (
    LoRAConfig,
    adapter_checkpoint,
    convert,
    inject,
    load_adapter_state_dict,
    load_peft,
    merge,
    named_adapter_parameters,
    remove,
    save_peft,
    unmerge,
)
from lightning_lora.layers import LoRALayer, register
from lightning_lora.model.matching import all_linear, left_out_towers
from lightning_lora.model.state import named_lora_layers
from tests import models, zoo

# other order of float32 operations in the adapter's term
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mha(x, x, x)[0])


class Convolution(nn.Module):
    def __init__(self, dimensions: int, **settings: Any) -> None:
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        self.first = kind(4, 8, 3, padding=1, stride=2)
        self.second = kind(8, 8, 3, **settings)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


def seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: models._seeded(build).eval()


def family(name: str) -> Callable[[], nn.Module]:
    return next(f.build for f in zoo.FAMILIES if f.name == name)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@dataclass
class Kind:
    build: Callable[[], nn.Module]
    x: Tensor | dict[str, Tensor]
    settings: dict[str, Any]
    obstacle: str | None = None  # to merging


EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
IDS = models.token_ids()
ROUTER = {"target_modules": [], "target_parameters": ["mlp.gate.weight"]}
KINDS: dict[str, Kind] = {
    "conv1d": Kind(seeded(lambda: Convolution(1)), noise(2, 4, 16), {"target_modules": ["first", "second"]}),
    "conv2d": Kind(seeded(lambda: Convolution(2)), noise(2, 4, 16, 16), {"target_modules": ["first", "second"]}),
    "conv3d": Kind(seeded(lambda: Convolution(3)), noise(2, 4, 12, 12, 12), {"target_modules": ["second"]}),
    "conv2d in groups": Kind(
        seeded(lambda: Convolution(2, groups=2)),
        noise(2, 4, 16, 16),
        {"target_modules": ["second"]},
        obstacle="mixes all input channels",
    ),
    "attention": Kind(seeded(Attention), noise(2, 5, 16), {"target_modules": ["mha", "head"]}),
    "experts": Kind(family("mixtral"), IDS, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "experts alone": Kind(family("qwen3_moe"), IDS, {"target_modules": [], "target_parameters": EXPERTS[1:]}),
    "transposed experts": Kind(family("gpt_oss"), IDS, {"target_modules": [], "target_parameters": EXPERTS}),
    "router": Kind(family("mixtral"), IDS, ROUTER),
    "scaled embedding": Kind(
        family("gemma3"), IDS, {"target_modules": ["embed_tokens", "q_proj"]}, obstacle="its weight is tied"
    ),
    "token rows": Kind(models.llama, IDS, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 17]}),
    "tied token rows": Kind(
        lambda: models.llama(tied=True), IDS, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 17]}
    ),
    "named token rows": Kind(
        models.llama, IDS, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5]}}
    ),
    "rows of a head": Kind(
        models.llama,
        IDS,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5], "lm_head": [5, 2]}},
    ),
    "rows of tied embeddings": Kind(
        family("t5"), zoo.ids_both(), {"target_modules": ["q"], "trainable_token_indices": [3, 17]}
    ),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def ours(kind: Kind, **settings: Any) -> nn.Module:
    return inject(kind.build(), LoRAConfig(**{"r": 4, "alpha": 8, **kind.settings, **settings})).eval()


def theirs(kind: Kind) -> Any:
    with quiet():
        return peft.get_peft_model(kind.build(), peft.LoraConfig(r=4, lora_alpha=8, **kind.settings)).eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what PEFT says about merging grouped convolutions and tied embeddings."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LoRA adapter added to ConvNd layer with groups", UserWarning)
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
        yield


def run(model: nn.Module, x: Tensor | dict[str, Tensor]) -> Tensor:
    y = model(**x) if isinstance(x, dict) else model(x)
    return y if isinstance(y, Tensor) else y.logits


def give_values(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def keys(directory: Path) -> set[str]:
    return set(safetensors.torch.load_file(directory / "adapter_model.safetensors"))


def test_the_adapted_model_starts_as_its_base_and_gradients_reach_all_of_the_adapter(kind: Kind) -> None:
    base, model = kind.build(), ours(kind)
    torch.testing.assert_close(run(model, kind.x), run(base, kind.x), rtol=1e-6, atol=1e-6)
    give_values(model)
    run(model, kind.x).square().mean().backward()
    adapters = dict(named_adapter_parameters(model))
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(adapters)


def test_ours_is_read_by_peft_and_pefts_by_us(kind: Kind, tmp_path: Path) -> None:
    model = ours(kind)
    give_values(model)
    save_peft(model, tmp_path / "ours")
    with quiet():
        again = peft.PeftModel.from_pretrained(kind.build(), tmp_path / "ours").eval()
    torch.testing.assert_close(run(again, kind.x), run(model, kind.x), **CLOSE)
    reference = theirs(kind)
    give_values(reference)
    reference.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    assert keys(tmp_path / "ours") == keys(tmp_path / "theirs")
    loaded = load_peft(kind.build(), tmp_path / "theirs").eval()
    torch.testing.assert_close(run(loaded, kind.x), run(reference, kind.x), **CLOSE)


def test_gradients_are_pefts(kind: Kind, tmp_path: Path) -> None:
    model = ours(kind)
    give_values(model)
    save_peft(model, tmp_path)
    with quiet():
        reference = peft.PeftModel.from_pretrained(kind.build(), tmp_path, is_trainable=True).eval()
    for one in (model, reference):
        run(one, kind.x).square().mean().backward()
    # A's and B's gradients are sets of equal numbers in another layout: their sums of squares are the same
    own, expected = (
        sorted(
            float(p.grad.double().square().sum())
            for name, p in one.named_parameters()
            # PEFT adds the update of this projection twice, once without a gradient
            if p.grad is not None and "out_proj" not in name
        )
        for one in (model, reference)
    )
    torch.testing.assert_close(torch.tensor(own), torch.tensor(expected), rtol=1e-4, atol=1e-9)


def test_an_attentions_projection_has_the_plain_scale_here_and_half_of_b_in_the_file(tmp_path: Path) -> None:
    kind = KINDS["attention"]
    model = inject(kind.build(), LoRAConfig(r=4, alpha=12, target_modules=["mha"])).eval()
    give_values(model)
    scalings = {name: layer.lora_scaling for name, layer in named_lora_layers(model).items()}
    assert scalings == {"mha": 3.0, "mha.out_proj": 3.0}
    save_peft(model, tmp_path / "ours")
    tensors = safetensors.torch.load_file(tmp_path / "ours" / "adapter_model.safetensors")
    B = tensors["base_model.model.mha.base_layer.out_proj.lora_B.weight"]
    assert torch.equal(B * 2, model.mha.out_proj.lora_B)  # which PEFT adds twice
    again = load_peft(kind.build(), tmp_path / "ours").eval()
    assert torch.equal(run(again, kind.x), run(model, kind.x))
    torch.save(adapter_checkpoint(model), tmp_path / "adapter.ckpt")
    convert(tmp_path / "adapter.ckpt", tmp_path / "converted")
    name = "adapter_model.safetensors"
    assert (tmp_path / "converted" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


@pytest.mark.parametrize("version", ["0.15.2", "0.21.2", "0.22.0", "1.0"])
def test_an_attention_of_a_peft_that_is_not_known_to_add_its_projection_twice_is_refused(
    version: str, tmp_path: Path
) -> None:
    kind = KINDS["attention"]
    save_peft(inject(kind.build(), LoRAConfig(r=2, target_modules=["mha"])), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_version": version}))
    if version < "0.22":
        load_peft(kind.build(), tmp_path)
        return
    with pytest.raises(ValueError, match=rf"peft_version='{version}' adapted an nn.MultiheadAttention.*upgrade"):
        load_peft(kind.build(), tmp_path)


def test_starting_values_are_pefts_bit_for_bit(kind: Kind, tmp_path: Path) -> None:
    torch.manual_seed(11)
    reference = theirs(kind)
    torch.manual_seed(11)
    model = ours(kind, init_rng="peft")
    reference.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    save_peft(model, tmp_path / "ours")
    expected, own = (
        safetensors.torch.load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours")
    )
    assert [name for name, value in own.items() if not torch.equal(value, expected[name])] == []


def test_merging_keeps_the_output_and_unmerging_and_removing_leave_no_trace(kind: Kind) -> None:
    base, model = kind.build(), ours(kind)
    give_values(model)
    before = copy.deepcopy(model.state_dict())
    expected = run(model, kind.x)
    if kind.obstacle is None:
        merge(model)
        torch.testing.assert_close(run(model, kind.x), expected, **CLOSE)
        unmerge(model)
    else:
        with pytest.raises(ValueError, match=kind.obstacle):
            merge(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    remove(model)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(run(model, kind.x), run(base, kind.x))


def test_a_checkpoint_loads_again_and_converts_to_what_save_peft_writes(kind: Kind, tmp_path: Path) -> None:
    model = ours(kind)
    give_values(model)
    torch.save(adapter_checkpoint(model), tmp_path / "adapter.ckpt")
    again = ours(kind)
    load_adapter_state_dict(again, torch.load(tmp_path / "adapter.ckpt", weights_only=True))
    assert torch.equal(run(again, kind.x), run(model, kind.x))
    save_peft(model, tmp_path / "saved")
    convert(tmp_path / "adapter.ckpt", tmp_path / "converted")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "converted" / name).read_bytes()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("name", ["attention", "transposed experts", "router"])
def test_biases_of_every_kind_go_both_ways(name: str, bias: str, tmp_path: Path) -> None:
    kind = KINDS[name]
    reference = theirs(Kind(kind.build, kind.x, {**kind.settings, "bias": bias}))
    give_values(reference)
    reference.save_pretrained(tmp_path / "theirs")
    expected = run(reference, kind.x)
    model = load_peft(kind.build(), tmp_path / "theirs").eval()
    torch.testing.assert_close(run(model, kind.x), expected, **CLOSE)
    save_peft(model, tmp_path / "ours")
    assert keys(tmp_path / "ours") == keys(tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(kind.build(), tmp_path / "ours").eval()  # a warning is an error here
    torch.testing.assert_close(run(again, kind.x), expected, **CLOSE)


def test_a_batch_normalisation_that_trains_whole_goes_both_ways(tmp_path: Path) -> None:
    build, x = family("conv_net"), noise(2, 3, 16, 16)
    settings = {"target_modules": ["head.0"], "modules_to_save": ["features.1"]}
    reference = peft.get_peft_model(build(), peft.LoraConfig(r=4, **settings))
    give_values(reference)
    reference.eval().base_model.model.features[1].train()
    reference(x)  # moves the statistics of that one
    reference.eval().save_pretrained(tmp_path / "theirs")
    model = load_peft(build(), tmp_path / "theirs").eval()
    torch.testing.assert_close(run(model, x), run(reference, x), **CLOSE)
    save_peft(model, tmp_path / "ours")
    assert keys(tmp_path / "ours") == keys(tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(build(), tmp_path / "ours").eval()
    torch.testing.assert_close(run(again, x), run(reference, x), **CLOSE)


def test_tied_biases_convert(tmp_path: Path) -> None:
    model = inject(family("bert")(), LoRAConfig(r=4, target_modules=["query"], bias="all"))
    give_values(model)
    torch.save(adapter_checkpoint(model), tmp_path / "adapter.ckpt")
    save_peft(model, tmp_path / "saved")
    convert(tmp_path / "adapter.ckpt", tmp_path / "converted")
    name = "adapter_model.safetensors"
    assert (tmp_path / "saved" / name).read_bytes() == (tmp_path / "converted" / name).read_bytes()


def test_buffers_that_no_state_dict_holds_are_in_no_file(tmp_path: Path) -> None:
    build = family("gemma3")  # whose embedding keeps its scale in such a buffer
    model = inject(build(), LoRAConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])).eval()
    give_values(model)
    save_peft(model, tmp_path)
    assert not any(key.endswith("embed_scale") for key in keys(tmp_path))
    torch.testing.assert_close(run(load_peft(build(), tmp_path), IDS), run(model, IDS), **CLOSE)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_never_add_up_a_dense_update(name: str, implementation: str) -> None:
    kind = KINDS["experts" if name == "mixtral" else "transposed experts"]
    model = ours(kind)
    model.config._experts_implementation = implementation
    give_values(model)
    experts = model.model.layers[0].mlp.experts
    dense = {tuple(experts._parameters[part].shape) for part in ("gate_up_proj", "down_proj")}
    made = _ShapesMade()
    with made:
        run(model, kind.x).sum().backward()
    # a gather of the base's own weights, and views of them, are the model's; sums and products are not
    assert {
        shape for op, shape in made.seen if op in ("add", "mul", "baddbmm", "bmm", "mm") and shape in dense
    } == set()


class _ShapesMade(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, tuple[int, ...]]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.seen.add((func.overloadpacket.__name__, tuple(result.shape)))
        return result


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("build", [models.llama, models.gpt2], ids=["linear", "Conv1D"])
def test_starts_are_pefts(init: str, build: Callable[[], nn.Module], tmp_path: Path) -> None:
    targets = ["q_proj", "down_proj"] if build is models.llama else ["c_attn", "c_proj"]
    if init == "olora" and build is models.gpt2:
        targets = ["attn.c_proj"]  # PEFT decomposes the stored weight, which is the transposed one: square alone
    transposed = build is models.gpt2
    torch.manual_seed(7)
    reference = peft.get_peft_model(
        build(),
        peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=init, fan_in_fan_out=transposed),
    )
    torch.manual_seed(7)
    model = inject(build(), LoRAConfig(r=4, alpha=6, target_modules=targets, init=init, init_rng="peft")).eval()
    if init == "olora" and transposed:
        return  # ours decomposes the layer's own [out, in] weight
    values = {n: p for n, p in reference.named_parameters() if ".lora_" in n}
    for name, parameter in named_adapter_parameters(model):
        layer, _, factor = name.rpartition(".")
        assert torch.equal(parameter, values[f"base_model.model.{layer}.{factor}.default.weight"]), name
    torch.testing.assert_close(run(model, IDS), run(build().eval(), IDS), **CLOSE)


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_start_from_the_base_is_written_for_the_original_base(init: str, use_rslora: bool, tmp_path: Path) -> None:
    config = LoRAConfig(
        r=4, target_modules=["q_proj", "up_proj"], init=init, use_rslora=use_rslora, rank_pattern={"up_proj": 2}
    )
    model = inject(models.llama(), config)
    give_values(model)
    expected = run(model, IDS)
    save_peft(model, tmp_path)
    again = peft.PeftModel.from_pretrained(models.llama(), tmp_path)  # a warning is an error here
    torch.testing.assert_close(run(again, IDS), expected, **CLOSE)
    torch.testing.assert_close(run(load_peft(models.llama(), tmp_path), IDS), expected, **CLOSE)
    merge(model)
    torch.testing.assert_close(run(model, IDS), expected, **CLOSE)
    remove(unmerge(model))
    assert torch.equal(run(model, IDS), run(models.llama(), IDS))


def test_a_start_from_the_base_trains_with_dropout_on_the_update_alone() -> None:
    model = inject(models.llama(), LoRAConfig(r=4, init="pissa", dropout=0.5)).train()
    torch.manual_seed(0)
    dropped = run(model, IDS)
    model.eval()
    torch.testing.assert_close(run(model, IDS), run(models.llama().eval(), IDS), **CLOSE)
    assert not torch.allclose(dropped, run(model, IDS), atol=1e-3)


def test_dilation_and_padding_modes_are_the_bases_and_files_of_them_are_refused(tmp_path: Path) -> None:
    for settings in ({"dilation": 2}, {"padding": 1, "padding_mode": "reflect"}, {"padding": "same", "dilation": 2}):
        build = functools.partial(Convolution, 2, **settings)
        model = inject(seeded(build)(), LoRAConfig(r=4, target_modules=["second"]))
        give_values(model)
        x = noise(2, 4, 16, 16)
        expected = run(model, x)
        merge(model)
        torch.testing.assert_close(run(model, x), expected, **CLOSE)
        unmerge(model)
        with pytest.raises(ValueError, match="PEFT convolves with lora_A of 'second' without"):
            save_peft(model, tmp_path)
        assert list(tmp_path.iterdir()) == []
        torch.save(adapter_checkpoint(model), tmp_path / "adapter.ckpt")
        with pytest.raises(ValueError, match="cannot be converted: PEFT convolves"):
            convert(tmp_path / "adapter.ckpt", tmp_path / "directory")
        (tmp_path / "adapter.ckpt").unlink()


def test_an_attention_of_other_widths_is_refused_with_the_reason() -> None:
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(16, 2, kdim=8)})
    with pytest.raises(ValueError, match="its keys and values have other widths"):
        inject(model, LoRAConfig(r=2, target_modules=["mha"]))


@pytest.mark.parametrize(
    ("build", "settings", "message"),
    [
        (family("mixtral"), {"target_parameters": ["experts.gate_proj"]}, "'experts.gate_proj' matches no parameter"),
        (models.llama, {"target_parameters": ["q_proj"]}, "it is a module, for target_modules"),
        (models.llama, {"target_parameters": ["norm.weight"]}, "can be matrices and 3-D stacks"),
        (models.llama, {"trainable_token_indices": [100]}, "100 is outside the table of 100 rows"),
        (models.llama, {"trainable_token_indices": {"embed": [1]}}, "names 0 embeddings or output heads"),
        (
            functools.partial(models.llama, tied=True),
            {"trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}},
            "other rows for 'lm_head' than for 'model.embed_tokens'",
        ),
        (models.llama, {"target_modules": ["embed_tokens"], "trainable_token_indices": [1]}, "rows of the same weight"),
        (seeded(lambda: Convolution(2, groups=8)), {"target_modules": ["second"]}, "not a multiple of its groups=8"),
        (seeded(Attention), {"target_modules": ["mha"], "init": "pissa"}, "starts from the weights of linear layers"),
        (models.llama, {"init": "orthogonal", "r": 3}, "even rank"),
    ],
)
def test_what_cannot_be_adapted_is_refused_and_changes_nothing(build, settings, message) -> None:
    model = build()
    with pytest.raises(ValueError, match=message):
        inject(model, LoRAConfig(**{"r": 4, "target_modules": ["q_proj"], **settings}))


def test_per_expert_adapters_of_older_models_are_read(tmp_path: Path) -> None:
    kind = KINDS["experts"]
    generator = torch.Generator().manual_seed(0)
    tensors, expected = {}, kind.build()
    for index, layer in enumerate(expected.model.layers):
        for expert in range(4):
            for part, rows, columns in (("w1", 64, 32), ("w3", 64, 32), ("w2", 32, 64)):
                A, B = (torch.randn(shape, generator=generator) * 0.1 for shape in ((2, columns), (rows, 2)))
                key = f"base_model.model.model.layers.{index}.block_sparse_moe.experts.{expert}.{part}"
                tensors |= {f"{key}.lora_A.weight": A, f"{key}.lora_B.weight": B}
                with torch.no_grad():
                    weight = layer.mlp.experts.down_proj if part == "w2" else layer.mlp.experts.gate_up_proj
                    at = slice(64, 128) if part == "w3" else slice(0, rows)
                    weight[expert, at] += 3.0 * B @ A  # dense, with alpha / r = 3
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["w1", "w2", "w3"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    model = load_peft(kind.build(), tmp_path)
    torch.testing.assert_close(run(model, IDS), run(expected, IDS), **CLOSE)


def test_a_resized_embedding_is_checked_and_its_new_rows_come_from_the_file(tmp_path: Path) -> None:
    def resized(rows: int, seed: int) -> nn.Module:
        model = models.llama()
        torch.manual_seed(seed)
        model.resize_token_embeddings(rows, mean_resizing=False)
        return model.eval()

    model = inject(resized(104, 1), LoRAConfig(r=4))
    give_values(model)
    save_peft(model, tmp_path / "ours")
    for base, message in ((models.llama(), "resize_token_embeddings"), (resized(104, 2), "last row")):
        with pytest.raises(ValueError, match=message):
            load_peft(base, tmp_path / "ours")
    assert torch.equal(run(load_peft(resized(104, 1), tmp_path / "ours"), IDS), run(model, IDS))

    wrapped = peft.get_peft_model(resized(104, 1), peft.LoraConfig(r=4, target_modules=["q_proj"])).eval()
    give_values(wrapped)
    wrapped.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    again = load_peft(resized(104, 2), tmp_path / "theirs")
    torch.testing.assert_close(run(again, IDS), run(wrapped, IDS), **CLOSE)
    with pytest.raises(ValueError, match=r"resize_token_embeddings\(104\)"):
        load_peft(models.llama(), tmp_path / "theirs")


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"target_modules": ["embed_tokens"]}, "104 -> 32, the model has 100 -> 32"),
        ({"target_modules": ["lm_head"]}, "32 -> 104, the model has 32 -> 100"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, r"\(104, 32\) for 'lm_head.weight'"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [101]}, "rows up to 101 of width 32"),
    ],
)
def test_an_adapter_of_another_vocabulary_says_how_to_resize(settings: Any, what: str, tmp_path: Path) -> None:
    model = models.llama()
    model.resize_token_embeddings(104, mean_resizing=False)
    save_peft(inject(model, LoRAConfig(r=4, **settings)), tmp_path)
    with pytest.raises(ValueError, match=what) as raised:
        load_peft(models.llama(), tmp_path)
    assert "call model.resize_token_embeddings(104) before the model is adapted" in str(raised.value)


def test_an_adapter_of_another_width_says_nothing_of_resizing(tmp_path: Path) -> None:
    save_peft(inject(nn.Sequential(nn.Linear(8, 9)), LoRAConfig(r=4)), tmp_path)
    with pytest.raises(ValueError, match=r"8 -> 9, the model has 8 -> 10: another base model\?$"):
        load_peft(nn.Sequential(nn.Linear(8, 10)), tmp_path)


@pytest.mark.parametrize("rows", [100, 104])
def test_another_base_is_not_called_a_resized_one(rows: int, tmp_path: Path) -> None:
    save_peft(inject(models.llama(), LoRAConfig(r=4)), tmp_path)
    torch.manual_seed(5)
    other = type(models.llama())(models.llama().config)  # of the same sizes, and of other weights throughout
    other.resize_token_embeddings(rows, mean_resizing=False)
    with pytest.raises(ValueError, match="the base tensor 'model.layers.0.self_attn.q_proj.weight' holds other values"):
        load_peft(other, tmp_path)


def test_a_directory_of_ours_names_the_base_that_it_is_not_for(tmp_path: Path) -> None:
    save_peft(inject(models.llama(), LoRAConfig(r=4)), tmp_path)
    other = models.llama()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    with pytest.raises(ValueError, match=r"another base model: the base tensor 'model.layers.1.mlp.up_proj.weight'"):
        load_peft(other, tmp_path)
    load_peft(other, tmp_path, check_base=False)


class Halved(nn.Module):
    """A layer of a user's own, of no kind that the package knows: half the product with a packed weight."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.packed = nn.Parameter(torch.randn(size * size))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x @ self.packed.view(self.size, self.size).T


class LoRAHalved(LoRALayer):
    base_name = "packed"

    @classmethod
    def features(cls, layer: nn.Module) -> tuple[int, int]:
        return layer.size, layer.size

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.lora_scaling * x @ self.lora_A.T @ self.lora_B.T if self.lora_active else y

    def merged(self) -> Tensor:
        return self.packed + 2 * self.lora_scaling * (self.lora_B @ self.lora_A).flatten()


def test_a_layer_of_a_users_own_is_adapted_by_registration() -> None:
    model = seeded(lambda: nn.Sequential(Halved(6)))()
    with pytest.raises(ValueError, match="is a Halved, which cannot be adapted"):
        inject(model, LoRAConfig(r=2, target_modules=["0"]))
    register(Halved, LoRAHalved)
    base = copy.deepcopy(model)
    inject(model, LoRAConfig(r=2, target_modules=["0"]))
    x = noise(3, 6)
    torch.testing.assert_close(run(model, x), run(base, x))
    give_values(model)
    expected = run(model, x)
    merge(model)
    torch.testing.assert_close(run(model, x), expected, **CLOSE)
    remove(unmerge(model))
    assert torch.equal(run(model, x), run(base, x))


def test_all_linear_means_the_language_model_of_a_multimodal_one_and_towers_can_be_named() -> None:
    from lightning_lora.model.summary import summary

    model = inject(family("llava")(), LoRAConfig(r=4))
    layers = named_lora_layers(model)
    assert layers
    assert all(name.startswith("model.language_model.") for name in layers)
    said = summary(model, "", model)
    assert "left out: model.vision_tower (12 linear layers), model.multi_modal_projector (2 linear layers)" in said
    named = inject(family("llava")(), LoRAConfig(r=4, target_modules=["multi_modal_projector.linear_1", "q_proj"]))
    assert "model.multi_modal_projector.linear_1" in named_lora_layers(named)
    assert "left out" not in summary(named, "", named)


@pytest.mark.parametrize(
    ("cls", "language_model", "left_out"),
    [
        ("Qwen2AudioForConditionalGeneration", "model.language_model", {"audio_tower", "multi_modal_projector"}),
        ("Qwen2_5_VLForConditionalGeneration", "model.language_model", {"visual"}),
        ("SmolVLMForConditionalGeneration", "model.text_model", {"vision_model", "connector"}),
        ("BlipForConditionalGeneration", "text_decoder", {"vision_model"}),
        ("GitForCausalLM", "git.encoder", {"image_encoder", "visual_projection"}),
        ("Phi4MultimodalForCausalLM", "model.layers", {"embed_tokens_extend"}),
        ("CLIPModel", "", set()),
    ],
)
def test_all_linear_leaves_out_towers_of_sight_and_sound(cls: str, language_model: str, left_out: set[str]) -> None:
    model_class = getattr(transformers, cls)
    config = model_class.config_class()
    for part in (
        config.get_text_config(),
        getattr(config, "vision_config", None),
        getattr(config, "audio_config", None),
    ):
        for field in ("num_hidden_layers", "depth", "encoder_layers"):
            if hasattr(part, field):
                setattr(part, field, 1)
    with torch.device("meta"):
        model = model_class(config)
    towers = left_out_towers(model)
    assert {name.rpartition(".")[2] for name in towers} == left_out
    linear = {
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not model.get_output_embeddings()
    }
    assert set(all_linear(model)) == {name for name in linear if name.startswith(language_model)}


CONFIGS = [
    {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1},
    {"r": 4, "target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    {"target_modules": [], "target_parameters": ["experts.down_proj"], "init_lora_weights": "gaussian"},
    {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2], "init_lora_weights": "pissa_niter_4"},
    {"target_modules": r".*q_proj", "modules_to_save": ["lm_head"], "bias": "lora_only"},
]


@pytest.mark.parametrize("values", CONFIGS, ids=str)
def test_configs_of_peft_become_ours_and_ours_pefts(values: dict[str, Any], tmp_path: Path) -> None:
    theirs = peft.LoraConfig(**values)
    ours = LoRAConfig.from_peft(theirs)
    again = peft.LoraConfig(**ours.to_peft())
    compared = {name for name in theirs.to_dict() if name in ours.to_peft()}
    assert len(compared) > 10
    mine, original = again.to_dict(), theirs.to_dict()
    assert {n: mine[n] or None for n in compared} == {n: original[n] or None for n in compared}
    assert LoRAConfig.from_peft(theirs.to_dict()) == ours
    theirs.save_pretrained(tmp_path)
    assert LoRAConfig.from_peft(tmp_path).r == ours.r


def test_twice_the_rank_is_said_to_peft_layer_by_layer() -> None:
    values = LoRAConfig(r=8, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 5}).to_peft()
    assert values["lora_alpha"] == 16
    assert values["alpha_pattern"] == {"v_proj": 5, "q_proj": 4}
    both = LoRAConfig(r=8, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 5}, target_modules=["q_proj"])
    assert both.to_peft()["alpha_pattern"] == {"q_proj": 5}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "only 'LORA'"),
        ({"target_modules": ["q_proj"], "use_qalora": True}, "use_qalora=True is not supported"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "loftq"}, "'loftq' is not supported"),
        ({"target_modules": None}, "PEFT's table of models"),
    ],
)
def test_a_peft_config_that_has_no_counterpart_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig.from_peft(values)


UNET_NAMES = {  # a layer, and what diffusers called its factors over time
    "peft": lambda layer, x: f"unet.{layer}.lora_{x}.weight",
    "diffusers": lambda layer, x: f"unet.{layer}.lora.{'down' if x == 'A' else 'up'}.weight",
    "processor": lambda layer, x: "unet.{}.processor.{}_lora.{}.weight".format(
        *layer.replace("to_out.0", "to_out").rsplit(".", 1), "down" if x == "A" else "up"
    ),
}


@pytest.mark.parametrize("names", UNET_NAMES)
@pytest.mark.parametrize("scales", ["none", "alphas", "recorded"])
def test_diffusers_layouts_are_read(names: str, scales: str, tmp_path: Path) -> None:
    unet = next(f for f in zoo.FAMILIES if f.name == "unet")
    attentions = ["to_q", "to_v", "to_out.0"]
    model = inject(unet.build(), LoRAConfig(r=4, alpha={"none": 4}.get(scales, 2), target_modules=attentions)).eval()
    give_values(model)
    tensors, metadata = {"text_encoder.a.lora_A.weight": torch.ones(2, 2)}, {}
    for layer, adapted in named_lora_layers(model).items():
        for x in "AB":
            tensors[UNET_NAMES[names](layer, x)] = getattr(adapted, f"lora_{x}").detach()
        if scales == "alphas":
            key = UNET_NAMES[names](layer, "A").removesuffix(".weight").removesuffix(".down").removesuffix(".lora_A")
            tensors[f"{key}.alpha"] = torch.tensor(2.0)
    if scales == "recorded":
        metadata = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 2})}
    safetensors.torch.save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors", metadata)
    again = load_peft(unet.build(), tmp_path, component="unet").eval()
    with torch.no_grad():
        expected, actual = (unet.output(m(**unet.inputs())) for m in (model, again))
    assert torch.equal(actual, expected)
    with pytest.raises(ValueError, match=r"holds \['text_encoder', 'unet'\]; choose"):
        load_peft(unet.build(), tmp_path)


@pytest.mark.parametrize(
    ("alpha", "metadata", "message"),
    [(torch.ones(2), "{}", r"alpha' is \(2,\), expected one number"), (torch.ones(()), "[1]", "is no JSON object")],
)
def test_damaged_files_of_diffusers_are_one_clear_error(
    alpha: Tensor, metadata: str, message: str, tmp_path: Path
) -> None:
    tensors = {"unet.mid_block.attn2.to_q.alpha": alpha}
    tensors |= {f"unet.mid_block.attn2.to_q.lora_{x}.weight": torch.ones(2, 2) for x in "AB"}
    path = tmp_path / "pytorch_lora_weights.safetensors"
    safetensors.torch.save_file(tensors, path, {"lora_adapter_metadata": metadata})
    with pytest.raises(ValueError, match=message):
        load_peft(family("unet")(), tmp_path)
