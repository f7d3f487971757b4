"""Options of ``megatron_lora``, and the Megatron-core that it needs, in one process."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lora import LoRACallback, MegatronLoRAStrategy
from lightning_lora import fabric as twins
from lightning_lora.megatron import core
from lightning_lora.strategies.shared import megatron
from tests import runs
from tests.distributed.split import Module
from tests.distributed.training import STEP_TOLERANCE


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pipeline_parallel_size": 2}, "has no option 'pipeline_parallel_size'; nearest: tensor_parallel_size"),
        ({"sequence_parallel": True}, "has no option 'sequence_parallel'"),
        ({"tensor_parallel_size": 0}, "must be 'auto' or a positive integer"),
        ({"tensor_paralel_size": 2}, "has no option 'tensor_paralel_size'; nearest: tensor_parallel_size"),
    ],
)
def test_options_that_are_not_served_are_refused_at_once(settings: dict[str, Any], message: str) -> None:
    for strategy in (MegatronLoRAStrategy, twins.MegatronLoRAStrategy):
        with pytest.raises((ValueError, TypeError), match=message):
            strategy(**settings)


def test_a_missing_or_other_megatron_core_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "SERVED", ((0, 99), (1, 0)))
    with pytest.raises(ImportError, match=r'found 0\..*pip install "megatron-core>=0.99,<1.0"'):
        MegatronLoRAStrategy()
    for name in [name for name in sys.modules if name == "megatron" or name.startswith("megatron.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "megatron.core", None)
    with pytest.raises(ImportError, match="'megatron_lora' needs megatron-core: pip install"):
        MegatronLoRAStrategy()


def test_auto_takes_the_smallest_number_of_ranks_that_divides_heads_and_ranks() -> None:
    cpu, module = torch.device("cpu"), Module()
    assert [megatron.choose_size("auto", ranks, module, cpu) for ranks in (1, 2, 4, 8)] == [1, 2, 2, 2]
    with pytest.raises(ValueError, match="divides both the 3 ranks and the model's 4 and 4 heads"):
        megatron.choose_size("auto", 3, module, cpu)
    with pytest.raises(ValueError, match="tensor_parallel_size=3 does not divide the 4 ranks"):
        megatron.choose_size(3, 4, module, cpu)


def test_auto_takes_more_ranks_where_half_a_device_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Module()  # as it is when the ranks are laid out: nothing is frozen yet
    base_bytes = sum(parameter.nbytes for parameter in module.parameters())

    def chosen(device_bytes: float) -> int:
        properties = type("Properties", (), {"total_memory": device_bytes})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
        return megatron.choose_size("auto", 8, module, torch.device("cuda"))

    assert chosen(base_bytes) == 2
    assert chosen(base_bytes * 0.99) == 4
    assert chosen(1) == 4  # four heads: no number of ranks is enough


def test_a_megatron_core_without_a_local_product_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.tensor_parallel.layers import RowParallelLinear

    monkeypatch.delattr(RowParallelLinear, "_forward_impl")
    with pytest.raises(ImportError, match=r"RowParallelLinear of this megatron-core has no method _forward_impl"):
        MegatronLoRAStrategy()


def test_one_process_is_a_run_like_any_other(tmp_path: Path) -> None:
    module, expected = runs.LanguageModule(), runs.LanguageModule()
    split = runs.trainer(tmp_path, LoRACallback(r=4), strategy="megatron_lora", use_distributed_sampler=False)
    split.fit(module, runs.loader())
    runs.trainer(tmp_path, LoRACallback(r=4)).fit(expected, runs.loader())
    torch.testing.assert_close(module.losses, expected.losses, **STEP_TOLERANCE)
