"""Fixtures of tests on ranks."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that all tests of a file share, and all ranks."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def hf(directory: Path) -> Path:
    """Return where Hugging Face's weights are, of which GPTModels are built."""
    from tests.distributed import gpt  # and with it Megatron-core, which other files' tests do without

    gpt.hugging_face().save_pretrained(directory / "hf")
    return directory / "hf"
