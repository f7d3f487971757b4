"""Fixtures of all tests: quiet, two threads, nothing left behind in the process."""

import logging
import os
import random

import numpy as np
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # LightningCLI's own calls
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "RANK", "WORLD_SIZE")


@pytest.fixture(autouse=True)
def clean_process(monkeypatch: pytest.MonkeyPatch):
    """Seed every test alike, and undo what seed_everything, default dtypes and process groups leave behind."""
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)
    for (
        name
    ) in RENDEZVOUS:  # a run in this process sets them, and a process that a later test starts would inherit them
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    os.environ.pop("PL_GLOBAL_SEED", None)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True, scope="session")
def two_threads() -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))
