"""The senders of ``docs/serving.md`` against a small server in another process, and against the files of ``save_peft``."""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import safetensors.torch
import torch
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, inject, save_peft
from tests import lora_server, models
from tests.peft.test_directory import give_values
from tests.runs import LanguageModule, loader, trainer
from tests.test_readme import ROOT, blocks

UNEQUAL: dict[str, Any] = {"r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """Return what the page defines."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(ROOT / "docs" / "serving.md"):
        if "def " in block:
            exec(compile(f"from lightning_lora import adapter_tensors\n{block}", "serving.md", "exec"), names)
    return names


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """Start the server for a tiny Llama and ranks up to 4; return its address."""
    linears = {name: m for name, m in models.llama().named_modules() if isinstance(m, nn.Linear)}
    (tmp_path / "sizes.json").write_text(json.dumps({n: [m.in_features, m.out_features] for n, m in linears.items()}))
    command = [sys.executable, lora_server.__file__, "4", str(tmp_path / "sizes.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
        server.terminate()


@pytest.fixture
def opened_by_name() -> Iterator[None]:
    """Share memory on CPU under a name, which another process can open, as it can CUDA's handles."""
    strategy = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    yield
    torch.multiprocessing.set_sharing_strategy(strategy)


def adapted(**settings: Any) -> nn.Module:
    model = inject(models.llama(), LoRAConfig(**{**UNEQUAL, **settings}))
    give_values(model)
    return model


def loaded(url: str) -> dict[str, dict[str, str]]:
    """Return the checksums that the server has, by adapter and tensor."""
    with urllib.request.urlopen(url) as answer:
        found: dict[str, dict[str, str]] = json.loads(answer.read())
        return found


def checksums(model: nn.Module, directory: Path) -> dict[str, str]:
    """Return those of the file that ``save_peft`` writes."""
    save_peft(model, directory, portable=True)
    tensors = safetensors.torch.load_file(directory / "adapter_model.safetensors")
    return {name: lora_server.sha256(value) for name, value in tensors.items()}


def test_vllm_gets_each_version_as_a_directory(page: dict[str, Any], url: str, tmp_path: Path) -> None:
    model, folder = adapted(), tmp_path / "adapters"
    for step in (1, 2):
        give_values(model, seed=step)
        page["send_to_vllm"](model, url, folder, step)
        assert loaded(url) == {f"policy-{step}": checksums(model, tmp_path / "file")}
        assert [path.name for path in folder.iterdir()] == [f"policy-{step}"]


@pytest.mark.usefixtures("opened_by_name")
def test_sglang_gets_each_version_as_tensors(page: dict[str, Any], url: str, tmp_path: Path) -> None:
    model, former = adapted(), None
    for step in (1, 2):
        give_values(model, seed=step)
        page["send_to_sglang"](model, url, step, former=former)
        assert loaded(url) == {f"policy-{step}": checksums(model, tmp_path / "file")}
        former = step


@pytest.mark.usefixtures("opened_by_name")
def test_the_server_refuses_what_does_not_fit(page: dict[str, Any], url: str, tmp_path: Path) -> None:
    """The checks above can fail: rank, layers, checksums, fields, names that are taken."""

    def refused(model: nn.Module, step: int = 1, **more: Any) -> str:
        with pytest.raises(urllib.error.HTTPError) as error:
            page["send_to_sglang"](model, url, step, **more)
        return str(json.loads(error.value.read())["error"])

    assert "rank 8 is above" in refused(adapted(r=8))
    assert "is no factor of a layer of the base" in refused(
        adapted(target_modules=["embed_tokens", "q_proj", "v_proj"])
    )
    assert "checksums" in refused(adapted(), serialize=lambda t: page["serialized"]({n: v + 1 for n, v in t.items()}))
    assert "upsert" in refused(adapted(), upsert=True)
    page["send_to_sglang"](adapted(), url, 2)
    assert "loaded already" in refused(adapted(), 2)
    assert list(loaded(url)) == ["policy-2"]
    with pytest.raises(urllib.error.HTTPError):
        page["send_to_vllm"](adapted(), url, tmp_path / "adapters", 2)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_run_sends_its_adapter_after_every_second_step(
    page: dict[str, Any], url: str, tmp_path: Path, accumulated: int
) -> None:
    sent: list[tuple[int, list[str]]] = []

    def send(module: pl.LightningModule, step: int) -> None:
        page["send_to_vllm"](module, url, tmp_path / "adapters", step)
        sent.append((step, list(loaded(url))))

    module = LanguageModule()
    run = trainer(
        tmp_path,
        LoRACallback(r=4),
        page["SendEvery"](send, every_n_steps=2),
        accumulate_grad_batches=accumulated,
        max_epochs=2,
    )
    run.fit(module, loader())
    steps = range(2, 8 // accumulated + 1, 2)
    assert sent == [(step, [f"policy-{step}"]) for step in steps]
    assert loaded(url)[f"policy-{steps[-1]}"] == checksums(module.model, tmp_path / "file")
