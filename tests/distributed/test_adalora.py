"""AdaLoRA on 2 gloo ranks against one process: parameters, pruned ranks, replicas, resume, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric

from lightning_lora import (
    AdaLoRA,
    FSDPLoRAStrategy,
    LoRAConfig,
    MegatronLoRAStrategy,
    fabric,
    inject,
    named_adapter_parameters,
)
from lightning_lora.layers.adalora import AdaLoRALinear
from lightning_lora.model.state import named_lora_layers
from tests import models
from tests.distributed.counting import counted_collectives
from tests.distributed.ranks import on_ranks
from tests.distributed.training import (
    EXACT,
    SHARDED,
    STEP_TOLERANCE,
    Recorded,
    alone,
    error_of,
    fit,
    from_all_ranks,
    state,
)

ADALORA = {"adalora": AdaLoRA(init_r=4, target_r=2, tinit=1, tfinal=2), "r": 4}
# six steps, each of two batches, whose gradients are clipped
THREE_EPOCHS: dict[str, Any] = {
    "lora": ADALORA,
    "max_epochs": 3,
    "accumulate_grad_batches": 2,
    "gradient_clip_val": 0.05,
}


def zeros(module: Any) -> dict[str, list[bool]]:
    return {name: (layer.lora_E == 0).flatten().tolist() for name, layer in named_lora_layers(module).items()}


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return adapters and pruned ranks of three epochs on one process."""
    module = alone(directory=tmp_path_factory.mktemp("single"), **THREE_EPOCHS)
    assert any(map(any, zeros(module).values()))
    return {"adapters": state(module), "zeros": zeros(module)}


def strategy_of(name: str) -> Any:
    return FSDPLoRAStrategy(**SHARDED) if name == "fsdp_lora" else name


@pytest.mark.parametrize("name", ["ddp", "fsdp_lora"])
@on_ranks(2)
def test_ranks_prune_as_one_process_and_resume_exactly(tmp_path: Path, single: dict[str, Any], name: str) -> None:
    module = Recorded()
    fit(tmp_path / "one", module, strategy_of(name), **THREE_EPOCHS)
    torch.testing.assert_close(state(module), single["adapters"], **STEP_TOLERANCE)
    assert zeros(module) == single["zeros"]
    own = [parameter.detach().clone() for _, parameter in named_adapter_parameters(module)]
    torch.testing.assert_close(own, from_all_ranks(own)[0], **EXACT)
    again = Recorded()
    fit(tmp_path / "two", again, strategy_of(name), ckpt_path=tmp_path / "one" / "epoch=0.ckpt", **THREE_EPOCHS)
    torch.testing.assert_close(state(again), state(module), **EXACT)


@on_ranks(2)
def test_no_collective_is_added() -> None:
    counts = []
    for lora in ({"r": 4}, ADALORA):
        with counted_collectives() as traffic:
            fit(None, Recorded(), "ddp", lora=lora, logger=False)
        counts.append({name: len(sizes) for name, sizes in traffic.items()})
    assert counts[0] == counts[1]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
@on_ranks(2)
def straight(directory: Path) -> dict[str, Any]:
    """Train three epochs on two ranks, with a file of each."""
    module = Recorded()
    fit(directory, module, "ddp", **THREE_EPOCHS)
    return {"adapters": state(module), "zeros": zeros(module)}


def test_a_run_of_two_ranks_goes_on_on_one(directory: Path, straight: list[dict[str, Any]]) -> None:
    module = Recorded()
    fit(None, module, "auto", ckpt_path=directory / "epoch=0.ckpt", **THREE_EPOCHS)
    torch.testing.assert_close(state(module), straight[0]["adapters"], **STEP_TOLERANCE)
    assert zeros(module) == straight[0]["zeros"]


@on_ranks(2)
def test_tensor_parallelism_and_adapters_in_shards_are_refused_by_name() -> None:
    module = Recorded()
    message = error_of(fit, None, module, MegatronLoRAStrategy(tensor_parallel_size=2), lora=ADALORA)
    assert "AdaLoRA" in message
    assert "fsdp_lora" in message
    assert not any(isinstance(layer, AdaLoRALinear) for layer in module.modules())
    message = error_of(fit, None, module, FSDPLoRAStrategy(shard_adapters=True), lora=ADALORA)
    assert "AdaLoRA" in message
    assert "shard_adapters" in message
    assert not any(isinstance(layer, AdaLoRALinear) for layer in module.modules())


@on_ranks(2)
def test_fabric_refuses_them_too() -> None:
    for strategy in (fabric.MegatronLoRAStrategy(tensor_parallel_size=2), fabric.FSDPLoRAStrategy(shard_adapters=True)):
        run = Fabric(accelerator="cpu", devices=2, strategy=strategy)
        run.launch()
        model = inject(models.llama(), LoRAConfig(adalora=ADALORA["adalora"]))
        assert "AdaLoRA scores whole factors" in error_of(run.setup_module, model)
        assert type(model.model.layers[0].self_attn.q_proj).__bases__[0] is AdaLoRALinear
