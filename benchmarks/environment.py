"""What a figure depends on: versions, machine, protocol, and how busy the machine was."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import peers
import timing
import torch

import lightning_lora

HERE = Path(__file__).parent
PACKAGES = ("torch", "transformers", "lightning", "peft")


def commit() -> str:
    """Return the commit of the working tree, with a ``+`` where files differ from it."""
    try:
        name = _git("rev-parse", "--short=12", "HEAD")
        return name + ("+" if _git("status", "--porcelain", "--", "../lightning_lora", "*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*command: str) -> str:
    return subprocess.run(["git", *command], cwd=HERE, capture_output=True, text=True, check=True).stdout.strip()


def environment() -> dict[str, Any]:
    return {
        "versions": {"python": platform.python_version(), "lightning_lora": lightning_lora.__version__, **_versions()},
        "peers": peers.status(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "protocol": (
            f"CPU time of one thread; contenders in random order inside each round, seed 0; {timing.WARM_UP_ROUNDS} "
            "rounds of warm-up dropped; ratios within a round; median and quartiles; no garbage collection"
        ),
    }


def load() -> float:
    """Return how many processes wanted a core during the last minute."""
    return round(os.getloadavg()[0], 2)


def uptime_s() -> float | None:
    path = Path("/proc/uptime")
    return float(path.read_text().split()[0]) if path.exists() else None


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
