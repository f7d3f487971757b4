"""Fixtures of tests on ranks."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that all tests of a file share, and all ranks."""
    return tmp_path_factory.mktemp("shared")
