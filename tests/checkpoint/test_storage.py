"""Files behind URLs: checkpoints and PEFT directories are read and written there as on a local disk."""

import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import safetensors.torch
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, check_portable, combine, convert, inject, load_peft, save_peft
from lightning_lora.checkpoint.atomic_io import write_atomically
from lightning_lora.checkpoint.storage import RemotePath, local_directory, location, remove_files
from tests import models
from tests.runs import LanguageModule, loader, same_adapters, trainer


@pytest.fixture
def url() -> Iterator[str]:
    """Return the URL of a directory of this test's own, in memory."""
    name = uuid.uuid4().hex
    fs = fsspec.filesystem("memory")
    yield f"memory://{name}"
    if fs.exists(f"/{name}"):
        fs.rm(f"/{name}", recursive=True)


def adapted(fill: bool = True) -> nn.Module:
    model = inject(models.llama(), LoRAConfig(r=4))
    if fill:
        models.fill_adapters(model)
    return model


def files_in(url: str) -> set[str]:
    fs, path = fsspec.core.url_to_fs(url)
    return {name.removeprefix(f"{path}/") for name in fs.find(path)}


class Tokenizer:
    def save_pretrained(self, directory: Any) -> None:
        (Path(directory) / "sub").mkdir()
        (Path(directory) / "tokenizer.json").write_text("{}")
        (Path(directory) / "sub" / "more.json").write_text("[]")


def test_a_directory_behind_a_url_is_the_local_one(tmp_path: Path, url: str) -> None:
    model = adapted()
    for where in (tmp_path / "peft", f"{url}/peft"):
        save_peft(model, where, tokenizer=Tokenizer())
    written = {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "sub/more.json"}
    assert files_in(f"{url}/peft") == written
    for name in written:
        assert (location(f"{url}/peft") / name).read_bytes() == (tmp_path / "peft" / name).read_bytes()
    assert same_adapters(load_peft(models.llama(), f"{url}/peft"), model)
    assert LoRAConfig.from_peft(f"{url}/peft") == LoRAConfig.from_peft(tmp_path / "peft")


def test_every_function_takes_urls(url: str) -> None:
    model = adapted()
    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.save(f"{url}/a.ckpt", {"model": model})
    twin = adapted(fill=False)
    fabric.load(f"{url}/a.ckpt", {"model": twin})
    assert same_adapters(twin, model)
    convert(f"{url}/a.ckpt", f"{url}/peft", portable=True)
    assert check_portable(f"{url}/peft", "vllm") == []
    combine([f"{url}/peft", f"{url}/peft"], [0.25, 0.75], f"{url}/sum", r=4)
    ids = models.token_ids()
    expected = model(input_ids=ids).logits
    for name in ("peft", "sum"):
        # folding scales in and a decomposition round in float32
        torch.testing.assert_close(load_peft(models.llama(), f"{url}/{name}")(input_ids=ids).logits, expected)


def test_a_legacy_file_is_read(tmp_path: Path, url: str) -> None:
    model = adapted()
    save_peft(model, f"{url}/peft")
    fs, path = fsspec.core.url_to_fs(f"{url}/peft")
    tensors = safetensors.torch.load(fs.cat_file(f"{path}/adapter_model.safetensors"))
    torch.save(tensors, tmp_path / "adapter_model.bin")
    fs.put_file(str(tmp_path / "adapter_model.bin"), f"{path}/adapter_model.bin")
    fs.rm_file(f"{path}/adapter_model.safetensors")
    assert same_adapters(load_peft(models.llama(), f"{url}/peft"), model)


class TestRun:
    @pytest.mark.parametrize("kind", ["checkpoint", "directory"])
    @pytest.mark.parametrize("lazy", [False, True])
    def test_starts_from_a_url(self, tmp_path: Path, url: str, kind: str, lazy: bool) -> None:
        model = adapted()
        source = f"{url}/{kind}"
        if kind == "checkpoint":
            Fabric(accelerator="cpu", devices=1).save(source, {"model": model})
        else:
            save_peft(model, source)

        class Module(LanguageModule):
            def configure_optimizers(self) -> Any:
                return torch.optim.SGD(self.parameters(), lr=0.0)

        module = Module()
        for _ in range(2):  # and does not start over at the second fit
            trainer(tmp_path, LoRACallback(init_from=source)).fit(module, loader())
            assert same_adapters(module, model)

    def test_saves_and_resumes_and_keeps_directories_beside(self, tmp_path: Path, url: str) -> None:
        saving = ModelCheckpoint(
            url, save_top_k=1, monitor="step", mode="max", filename="{step}", every_n_train_steps=1
        )
        module = LanguageModule()
        trainer(tmp_path, LoRACallback(r=4, save_peft=True), saving).fit(module, loader())
        assert files_in(url) == {
            "step=4.ckpt",
            "step=4-peft/adapter_config.json",
            "step=4-peft/adapter_model.safetensors",
        }
        assert {Path(name).name for name in fsspec.filesystem("memory").ls(url, detail=False)} == {
            "step=4.ckpt",
            "step=4-peft",
        }
        assert same_adapters(load_peft(models.llama(), f"{url}/step=4-peft"), module)
        straight = LanguageModule()
        trainer(tmp_path, LoRACallback(r=4), max_epochs=2).fit(straight, loader())
        resumed = LanguageModule()
        trainer(tmp_path, LoRACallback(r=4), max_epochs=2).fit(resumed, loader(), ckpt_path=f"{url}/step=4.ckpt")
        assert resumed.losses == straight.losses[4:]
        assert same_adapters(LanguageModule.load_from_checkpoint(f"{url}/step=4.ckpt"), module)


class TestErrors:
    def test_name_the_url(self, url: str) -> None:
        (RemotePath(url) / "other.txt").write_bytes(b"")
        with pytest.raises(FileNotFoundError, match=rf"{url} is not an adapter directory.*other.txt"):
            load_peft(models.llama(), url)
        with pytest.raises(FileNotFoundError, match="no such directory"):
            load_peft(models.llama(), f"{url}/absent")
        with pytest.raises(FileNotFoundError):
            convert(f"{url}/absent.ckpt", f"{url}/out")
        with pytest.raises(ValueError, match=rf"{url}/other.txt cannot be read as a checkpoint"):
            convert(f"{url}/other.txt", f"{url}/out")
        with pytest.raises(FileNotFoundError, match="not an adapter directory"):
            check_portable(f"{url}/absent", "vllm")

    def test_code_in_a_file_is_never_run(self, url: str) -> None:
        class Bomb:
            def __reduce__(self) -> Any:
                return (print, ("boom",))

        with fsspec.open(f"{url}/bomb.ckpt", "wb") as file:
            torch.save({"x": Bomb()}, file)
        with pytest.raises(ValueError, match="never done"):
            convert(f"{url}/bomb.ckpt", f"{url}/out")

    def test_an_unknown_protocol_is_named(self) -> None:
        with pytest.raises(ValueError, match="nowhere"):
            load_peft(models.llama(), "nowhere://x/y")


def test_locations(tmp_path: Path, url: str) -> None:
    assert location(tmp_path) == tmp_path
    assert location(f"file://{tmp_path}/x") == tmp_path / "x"
    remote = location(f"{url}/a/") / "b.txt"
    assert (str(remote), remote.name, str(remote.parent)) == (f"{url}/a/b.txt", "b.txt", f"{url}/a")
    assert not remote.is_file()
    write_atomically(remote, memoryview(b"one"))
    write_atomically(remote, b"two")
    assert (remote.read_text(), remote.is_file(), remote.is_dir(), remote.parent.is_dir()) == ("two", True, False, True)
    assert list(remote.parent.iterdir()) == [remote]


@pytest.mark.parametrize("is_remote", [False, True])
def test_only_files_of_the_given_names_are_removed(tmp_path: Path, url: str, is_remote: bool) -> None:
    root = location(f"{url}/a") if is_remote else tmp_path / "a"
    with local_directory(root) as folder:
        for name in ("x", "mine", "deep/x", "deeper/x", "deeper/mine"):
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            (folder / name).write_text("")
    remove_files(root, ("x",))
    assert sorted(child.name for child in root.iterdir()) == ["deeper", "mine"]
    assert [child.name for child in (root / "deeper").iterdir()] == ["mine"]
    remove_files(root, ("mine",))
    assert not root.is_dir()
    remove_files(root, ("mine",))
