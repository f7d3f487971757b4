"""Start a script in several processes, as torchrun starts ranks, and stop those that hang."""

import contextlib
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
RANK_VARIABLES = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
)  # fmt: skip


def run(
    script: str,
    variables: list[dict[str, str]],
    directory: Path,
    *arguments: str,
    timeout_s: float = 1800,
    idle_s: float = 300,
    fresh: bool = False,
    folder: Path = ROOT,
    module: str = "",
    environment: dict[str, str] | None = None,
) -> list[str]:
    """Run ``tests/distributed/<script>``, or one elsewhere, and return what each process wrote.

    Args:
        variables: of the environment of each process, which tell it its rank.
        directory: what they write is kept in it.
        folder: where they run.
        module: is imported before the processes are forked, once for all launches.
        environment: variables that all processes share.
    """
    # nor a seed that an earlier run in this process left
    strange = ("SLURM", "PL_GLOBAL_SEED", "PL_SEED_WORKERS")
    kept = {k: v for k, v in os.environ.items() if k not in RANK_VARIABLES and not k.startswith(strange)}
    kept |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONFAULTHANDLER": "1",  # a process that is aborted writes its stacks
    }
    outputs = [directory / f"output{rank}.txt" for rank in range(len(variables))]
    order = {
        "script": str(Path(__file__).parent / script),
        "arguments": arguments,
        "environments": [{**kept, **(environment or {}), **own} for own in variables],
        "outputs": list(map(str, outputs)),
        "fresh": fresh,
        "folder": str(folder),
        "module": module,
    }
    codes, hang = _obeyed(order, timeout_s, idle_s)
    assert not hang, f"{hang}:\n" + "\n".join(f"rank {r}: {o.read_text()[-4000:]}" for r, o in enumerate(outputs))
    # a rank that died of itself first: the others may only have been killed with it
    failed = sorted((rank for rank, code in enumerate(codes) if code != 0), key=lambda rank: codes[rank] < 0)
    assert not failed, f"ranks {failed} failed with {codes}:\n{outputs[failed[0]].read_text()[-4000:]}"
    return [output.read_text() for output in outputs]


def torchrun_variables(num_ranks: int) -> list[dict[str, str]]:
    """Return what torchrun tells each rank, in the order of ``RANK_VARIABLES``."""
    common = ["0", str(num_ranks), str(num_ranks), "127.0.0.1", str(free_port()), "test"]
    return [dict(zip(RANK_VARIABLES, [str(rank), str(rank), *common], strict=True)) for rank in range(num_ranks)]


def _obeyed(order: dict[str, Any], timeout_s: float, idle_s: float) -> tuple[list[int], str]:
    """Give the zygote an order; return the exit codes, and why ranks were killed, if they were."""
    zygote = _zygote()
    assert zygote.stdin is not None
    assert zygote.stdout is not None
    zygote.stdin.write(json.dumps(order) + "\n")
    zygote.stdin.flush()
    children = json.loads(zygote.stdout.readline())
    watch = Watch(children, order["outputs"], timeout_s, idle_s)
    watch.start()
    try:
        codes: list[int] = json.loads(zygote.stdout.readline())
    except BaseException:  # pytest's own time limit
        watch.kill(signal.SIGKILL)
        _zygote.cache_clear()
        raise
    finally:
        watch.done.set()
        watch.join()
    return codes, watch.hang


class Watch(threading.Thread):
    """Aborts ranks that hang, with the processes that they have started, and keeps why in ``hang``.

    Progress is a longer output, or processor time: of all together at least a hundredth of one core's, which ranks that
    wait for one another do not use.
    """

    def __init__(self, processes: list[int], outputs: list[str], timeout_s: float, idle_s: float) -> None:
        super().__init__(daemon=True)
        self.processes, self.outputs, self.timeout_s, self.idle_s = processes, outputs, timeout_s, idle_s
        self.done, self.hang = threading.Event(), ""

    def run(self) -> None:
        start = moved = time.monotonic()
        used_s, written = self._progress()
        while not self.done.wait(min(1.0, self.idle_s / 10)):
            now = time.monotonic()
            latest_s, length = self._progress()
            if latest_s - used_s > self.idle_s / 100 or length > written:
                moved, used_s, written = now, latest_s, length
            if now - start > self.timeout_s:
                return self._abort(f"the ranks have not ended after {self.timeout_s:g} s")
            if now - moved > self.idle_s:
                return self._abort(f"the ranks made no progress for {self.idle_s:g} s")

    def _progress(self) -> tuple[float, int]:
        """Return the processor time of all processes, in seconds, and the number of bytes that they have written."""
        used_s = sum(map(processor_time_s, self.family()))
        return used_s, sum(Path(output).stat().st_size for output in self.outputs if Path(output).exists())

    def _abort(self, hang: str) -> None:
        self.hang = hang
        self.kill(signal.SIGABRT)
        if not self.done.wait(10):
            self.kill(signal.SIGKILL)

    def kill(self, by: signal.Signals) -> None:
        for process in self.family():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, by)

    def family(self) -> list[int]:
        """Return the ranks and, behind them, all processes that they have started and that are alive."""
        family = [*self.processes]
        for process in family:  # which grows
            family += children_of(process)
        return family


def children_of(process: int) -> list[int]:
    with contextlib.suppress(OSError):  # it has ended
        lists = [path.read_text() for path in Path(f"/proc/{process}/task").glob("*/children")]
        return [int(number) for numbers in lists for number in numbers.split()]
    return []


def processor_time_s(process: int) -> float:
    """Return the processor time that a process and the children that it has waited for have used, in seconds."""
    try:
        # behind the name, which may hold spaces; the first of these fields is the third of the line
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


@functools.cache
def _zygote() -> "subprocess.Popen[str]":
    """Return the process that ranks are forked from; it ends with this one, whose end closes its input."""
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "zygote.py")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def free_port() -> int:
    """Return a port of this machine that nothing listens on.

    Systems hand out ports above these to whoever asks for any, other tests' ranks among them, before it is used.
    """
    while True:
        port = random.SystemRandom().randrange(15_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
