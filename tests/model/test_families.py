"""Every family of the zoo against PEFT: what is adapted, files both ways, merging, removing, one training step."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lightning_lora import LoRAConfig, inject, load_peft, merge, named_adapter_parameters, remove, save_peft, unmerge
from lightning_lora.model.state import named_lora_layers
from tests import models, zoo
from tests.zoo import Family


@pytest.fixture(params=zoo.FAMILIES, ids=lambda family: family.name)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


def ours(family: Family, *, without: tuple[str, ...] = ()) -> nn.Module:
    exclude = (*family.refused, *without) or None  # and a new head is adapted, as in PEFT without a task_type
    model = inject(family.build(), LoRAConfig(r=4, alpha=8, exclude_modules=exclude, modules_to_save=[]))
    models.fill_adapters(model)
    return model


def theirs(family: Family, targets: str | list[str] = "all-linear", *, without: tuple[str, ...] = ()) -> Any:
    model = family.build()
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=targets,
        exclude_modules=[*family.refused, *without] or None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )
    with warnings.catch_warnings():
        # PEFT gives fused experts ranks of their own, and does not find them among modules since they are parameters
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        adapted = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapted


def theirs_on_layers(family: Family) -> Any:
    """PEFT on layers alone, where its "all-linear" means more."""
    if not family.only_theirs:
        return theirs(family, without=family.read)
    layers = [name for name in named_lora_layers(ours(family)) if not _ends(name, family.only_ours)]
    return theirs(family, layers)


def their_names(model: nn.Module) -> set[str]:
    layers = (name for name, module in model.named_modules() if isinstance(module, LoraLayer))
    return {name.removeprefix("base_model.model.") for name in layers}


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    return any(name == ending or name.endswith(f".{ending}") for ending in endings)


def run(family: Family, model: nn.Module) -> Tensor:
    with torch.no_grad():
        return family.output(model(**family.inputs()))


def assert_close(actual: Tensor, expected: Tensor) -> None:
    # other order of float32 operations in the adapter's term: a few units in the last place of the largest outputs,
    # which small ones are differences of
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6 * max(1.0, expected.abs().max().item()))


def assert_same_bits(model: nn.Module, expected: dict[str, Tensor]) -> None:
    state = model.state_dict()
    assert state.keys() == expected.keys()
    assert [name for name, tensor in state.items() if not torch.equal(tensor, expected[name])] == []


def keys(directory: Path) -> set[str]:
    return set(safetensors.torch.load_file(directory / "adapter_model.safetensors"))


def test_all_linear_means_what_peft_means(family: Family) -> None:
    found, expected = set(named_lora_layers(ours(family))), their_names(theirs(family))
    expected = {name for name in expected if not name.startswith(tuple(f"{tower}." for tower in family.towers))}
    only_ours, only_theirs = found - expected, expected - found
    assert {name for name in found if _ends(name, family.only_ours)} == only_ours
    assert {name for name in expected if _ends(name, family.only_theirs)} == only_theirs
    assert bool(only_ours) == bool(family.only_ours)
    assert bool(only_theirs) == bool(family.only_theirs)


@pytest.mark.parametrize("family", [f for f in zoo.FAMILIES if f.refused], indirect=True, ids=lambda f: f.name)
def test_what_peft_refuses_is_left_out(family: Family) -> None:
    with pytest.raises(ValueError, match="is incompatible with Mamba-based models"):
        peft.get_peft_model(family.build(), peft.LoraConfig(target_modules="all-linear"))
    adapted = named_lora_layers(inject(family.build(), LoRAConfig(r=4)))
    assert [name for name in adapted if _ends(name, family.refused)] == []


def test_peft_reads_ours_and_writes_the_same_keys(family: Family, tmp_path: Path) -> None:
    model = ours(family, without=family.read)
    save_peft(model, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(family.build(), tmp_path / "ours").eval()  # a warning is an error here
    again.save_pretrained(tmp_path / "theirs", save_embedding_layers=False)
    assert keys(tmp_path / "ours") == keys(tmp_path / "theirs")
    expected = run(family, model)
    assert_close(run(family, again), expected)
    assert not torch.allclose(expected, run(family, family.build()), rtol=1e-3, atol=1e-3)


def test_we_read_pefts(family: Family, tmp_path: Path) -> None:
    reference = theirs_on_layers(family)
    reference.save_pretrained(tmp_path, save_embedding_layers=False)
    model = load_peft(family.build(), tmp_path)
    assert_close(run(family, model), run(family, reference))


@pytest.mark.parametrize("family", [f for f in zoo.FAMILIES if f.only_theirs], indirect=True, ids=lambda f: f.name)
def test_pefts_adapters_of_fused_experts_are_read_and_written(family: Family, tmp_path: Path) -> None:
    reference = theirs(family)
    reference.save_pretrained(tmp_path / "theirs")
    model = load_peft(family.build(), tmp_path / "theirs")
    expected = run(family, reference)
    assert_close(run(family, model), expected)
    merge(model)
    assert_close(run(family, model), expected)
    unmerge(model)
    save_peft(model, tmp_path / "ours")
    assert keys(tmp_path / "ours") == keys(tmp_path / "theirs")
    with warnings.catch_warnings():
        # PEFT looks for patterns of parameters among modules, when it reads its own directories too
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
        again = peft.PeftModel.from_pretrained(family.build(), tmp_path / "ours").eval()
    assert_close(run(family, again), expected)


def test_merging_keeps_outputs_and_leaves_no_trace(family: Family) -> None:
    model = ours(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = run(family, model)
    merge(model)
    assert_close(run(family, model), expected)
    unmerge(model)
    assert_same_bits(model, before)
    remove(model)
    assert_same_bits(model, family.build().state_dict())


def test_a_training_step_reaches_every_adapter_and_nothing_else(family: Family) -> None:
    model = ours(family).train()
    family.output(model(**family.inputs())).square().mean().backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    adapters = {name for name, _ in named_adapter_parameters(model)}
    unreached = {name for name in adapters if _ends(name.rpartition(".")[0], family.unreached)}
    assert reached == adapters - unreached
    assert bool(unreached) == bool(family.unreached)
