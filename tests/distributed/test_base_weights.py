"""Filling a base on the meta device from disk, in one process."""

from pathlib import Path

import pytest
import torch

from lightning_lora import LoRAConfig, inject
from lightning_lora.distributed.base_weights import materialize
from tests import models


def empty_llama() -> torch.nn.Module:
    with torch.device("meta"):
        return inject(models.llama(), LoRAConfig(r=2))


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_another_vocabulary_says_how_to_resize(tmp_path: Path, name: str):
    base = models.llama()
    base.resize_token_embeddings(104, mean_resizing=False)
    state = base.state_dict()
    kept = {other: value if other == name else value[:100] for other, value in state.items()}
    base.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(ValueError, match=r"\(104, 32\) for '.*', the model has \(100, 32\).*") as raised:
        materialize(empty_llama(), str(tmp_path), torch.device("cpu"))
    assert name in str(raised.value)
    assert "call model.resize_token_embeddings(104) before the model is adapted" in str(raised.value)


def test_another_size_of_a_layer_does_not(tmp_path: Path):
    base = models.llama()
    state = base.state_dict()
    state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(100, 32)
    base.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"the model has \(64, 32\)$"):
        materialize(empty_llama(), str(tmp_path), torch.device("cpu"))
