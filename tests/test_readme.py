"""The Python blocks of README and docs run, in order, as one script each."""

import re
import warnings
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

README = Path(__file__).parent.parent / "README.md"


def test_python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 3
    monkeypatch.chdir(tmp_path)
    # a folder of the name that the blocks load is read in place of the Hub's model
    config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=256)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "HuggingFaceTB" / "SmolLM2-135M")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a loader with too few workers for Lightning's taste
        exec(compile("\n".join(blocks), str(README), "exec"), {"__name__": "readme"})
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_the_file_tree_names_what_exists() -> None:
    tree = re.search(r"```\nlightning_lora/\n(.*?)```", README.read_text(), re.DOTALL)
    assert tree is not None
    root = README.parent
    for name in re.findall(r"^  (\S+)", tree[1], re.MULTILINE):
        assert (root / "lightning_lora" / name).exists(), name


def test_the_migration_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = README.parent / "docs" / "from_peft.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(blocks) == 10
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks), str(page), "exec"), {"__name__": "from_peft"})  # a warning is an error here
    assert (tmp_path / "converted" / "adapter_config.json").exists()
