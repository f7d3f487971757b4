"""Optimizer states in 8 and 4 bits: a run resumes bit for bit, and no optimizer reads a state of another form."""

from pathlib import Path

import pytest
import torch

from lightning_lora import adapter_state_dict
from tests.checkpoint.packed_optimizers import NAMES, fit, packed_dtypes

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
pytest.importorskip("torchao", reason="torchao is not installed")
FORMS = {"bitsandbytes": torch.uint8, "AdamW8bit": "OptimState8bit", "AdamW4bit": "OptimState4bit"}


@pytest.mark.parametrize("name", NAMES)
def test_ten_steps_and_ten_more_are_twenty(tmp_path: Path, name: str) -> None:
    whole = fit(tmp_path, name, 20)
    fit(tmp_path, name, 10)
    resumed = fit(tmp_path, name, 20, tmp_path / "10.ckpt")
    package, kind = name.split()
    form = FORMS.get(package, FORMS.get(kind, "OptimStateFp8"))
    assert packed_dtypes(whole) == packed_dtypes(resumed) == {form}
    assert resumed.losses == whole.losses[10:]
    torch.testing.assert_close(adapter_state_dict(resumed), adapter_state_dict(whole), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("saved", "resumed"),
    [
        ("bitsandbytes AdamW8bit", "AdamW"),
        ("torchao AdamW8bit", "AdamW"),
        ("AdamW", "bitsandbytes AdamW8bit"),
        ("AdamW", "torchao AdamW8bit"),
        ("torchao AdamW4bit", "torchao AdamW8bit"),
        ("bitsandbytes AdamW8bit", "torchao AdamW8bit"),
    ],
)
def test_another_optimizer_does_not_read_the_state(tmp_path: Path, saved: str, resumed: str) -> None:
    fit(tmp_path, saved, 5)
    with pytest.raises(
        ValueError, match="keeps its state in another form. Resume with the optimizer that the file was"
    ):
        fit(tmp_path, resumed, 10, tmp_path / "5.ckpt")


def test_paged_states_are_those_of_the_optimizer_without_pages(tmp_path: Path) -> None:
    fit(tmp_path, "bitsandbytes PagedAdamW8bit", 10)
    resumed = fit(tmp_path, "bitsandbytes AdamW8bit", 20, tmp_path / "10.ckpt")
    assert resumed.losses == fit(tmp_path, "bitsandbytes AdamW8bit", 20).losses[10:]


def test_a_file_that_names_another_class_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, "torchao AdamW8bit", 5)
    content = torch.load(tmp_path / "5.ckpt", weights_only=True)
    for entry in content["optimizer_states"][0]["state"].values():
        for value in entry.values():
            if isinstance(value, dict):
                value["packed_form"] = "torch.nn.Parameter"
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="holds an optimizer state as torch.nn.Parameter, which the installed package"):
        fit(tmp_path, "torchao AdamW8bit", 10, tmp_path / "other.ckpt")
