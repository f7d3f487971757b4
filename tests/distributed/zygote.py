"""A process that has imported what ranks need, which takes longer than most of them run, and forks them from itself.

It reads one line of JSON for each launch: ``{"script", "arguments", "environments", "outputs", "fresh", "folder",
"module"}``, imports the module, if one is named, and starts a process for each environment, which begins anew if it is
to be fresh. It answers with the processes' numbers, and with
their exit codes when all have ended.
"""

import atexit
import contextlib
import faulthandler
import importlib
import json
import os
import runpy
import sys
import traceback
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch

from lightning_lora.megatron.core import megatron_core

PRELOADED = (
    "lightning_lora",
    "torch.distributed.algorithms.ddp_comm_hooks",
    "transformers.models.llama.modeling_llama",
    "tests.zoo",
    "tests.distributed.gpt",  # and what it shares with others
)


def serve() -> None:
    # OMP_NUM_THREADS is 1. torch.set_num_threads(1) here would make a thread pool. Torch's autograd threads of a forked
    # rank, eight with Megatron-core on torch 2.14, then replace it all at once, and one that finds none aborts the rank.
    for name in PRELOADED:
        importlib.import_module(name)
    with warnings.catch_warnings(), contextlib.suppress(ImportError):  # tests that need it say what is missing
        warnings.simplefilter("ignore")
        megatron_core()
        importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    warm_up()
    for line in sys.stdin:
        order = json.loads(line)
        if order["module"]:
            with contextlib.suppress(Exception), contextlib.redirect_stdout(sys.stderr):  # the ranks fail on it, too
                importlib.import_module(order["module"])
        for finalizer in weakref.finalize._registry:  # torch.library's at the end would take longer than many ranks run
            finalizer.atexit = False
        children = [
            _fork(order, environment, output)
            for environment, output in zip(order["environments"], order["outputs"], strict=True)
        ]
        print(json.dumps(children), flush=True)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


def warm_up() -> None:
    """Do once what every rank would do first: read the code of the model that most of them adapt, and call it."""
    from lightning_lora import LoRAConfig, inject
    from tests import models

    with torch.random.fork_rng(), torch.no_grad():
        inject(models.llama(), LoRAConfig(r=2))(models.token_ids())


def _fork(order: dict[str, Any], environment: dict[str, str], output: str) -> int:
    child = os.fork()
    if child != 0:
        return child
    code = 1
    try:
        os.environ.clear()
        os.environ.update(environment)
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.close(0)  # orders are not for ranks
        os.chdir(order["folder"])
        faulthandler.enable(2)
        if order["fresh"]:
            os.execv(sys.executable, [sys.executable, order["script"], *order["arguments"]])
        sys.argv = [order["script"], *order["arguments"]]
        sys.path.insert(0, str(Path(order["script"]).parent))
        runpy.run_path(order["script"], run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
