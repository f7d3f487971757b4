"""One rank of a function that is decorated with ``on_ranks``."""

import importlib
import sys
from pathlib import Path

from tests.distributed.ranks import run_body

if __name__ == "__main__":
    _, name, directory = sys.argv
    importlib.import_module(name.split(":")[0])
    run_body(name, Path(directory))
