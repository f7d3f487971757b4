"""torchrun's agent, which starts the ranks again when one dies; it forks them, and so they need no imports."""

import sys
from pathlib import Path

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from tests.distributed.launched_script import train_all


def main(directory: str, strategies: str) -> None:
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=2,
        start_method="fork", run_id="test",
    )  # fmt: skip
    elastic_launch(config, train_all)(Path(directory), strategies, True)


if __name__ == "__main__":
    main(*sys.argv[1:])
