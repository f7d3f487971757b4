"""``save_peft=True`` on two ranks: the directory beside a file holds what the file holds."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from tests import models
from tests.distributed.launch import launch
from tests.runs import LanguageModule


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("peft_beside")
    return {"directory": directory, "ranks": launch("peft_beside_script.py", 2, directory)}


@pytest.mark.parametrize("name", ["ema", "whole", "sharded", "split"])
def test_a_directory_holds_what_its_file_holds(run: dict[str, Any], name: str) -> None:
    directory: Path = run["directory"] / name
    ids = models.token_ids()
    for epoch in (0, 1):
        saved = LanguageModule.load_from_checkpoint(directory / f"epoch={epoch}.ckpt").model
        read = peft.PeftModel.from_pretrained(models.llama(), directory / f"epoch={epoch}-peft")
        torch.testing.assert_close(read(input_ids=ids).logits, saved(input_ids=ids).logits, rtol=1e-5, atol=1e-6)


def test_what_peft_cannot_express_is_an_error_on_every_rank(run: dict[str, Any]) -> None:
    for rank in run["ranks"]:
        assert "PEFT convolves with lora_A of 'convolution' without the base's dilation=(2,)" in rank["refused"]
