"""One rank that fills a base on the meta device from safetensors, and measures its own memory while it does."""

import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lightning_lora import FSDPLoRAStrategy, LoRAConfig, inject
from lightning_lora.model.gathered import gathered
from lightning_lora.ops.sharded import is_sharded
from tests.distributed.fsdp_models_script import GPT, start
from tests.distributed.launch import report
from tests.distributed.training import Recorded, fit


class OnMeta(Recorded):
    """Builds a model without values from the config in a directory."""

    def __init__(self, directory: str, early: bool) -> None:
        super().__init__()
        self.directory = directory
        self.model: Any = None
        if early:
            self.configure_model()

    def configure_model(self) -> None:
        if self.model is None:
            with torch.device("meta"):
                self.model = on_meta(AutoModelForCausalLM, Path(self.directory))


class Positions(nn.Module):
    """A buffer that no checkpoint holds, and, in a subclass, the code to compute it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.register_buffer("scale", torch.arange(4.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x * self.scale


class Computed(Positions):
    def reset_parameters(self) -> None:
        self.scale.copy_(torch.arange(4.0))


def on_meta(kind: Any, directory: Path, **settings: Any) -> nn.Module:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory, **settings)
    config._name_or_path = str(directory)
    model = kind.from_config(config)
    model.config._name_or_path = str(directory)
    return model


class Memory:
    """The most anonymous memory that this process held inside the block, in bytes, above what it began with."""

    def __enter__(self) -> "Memory":
        self._start = self._peak = self._now()
        self._done = False
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done = True
        self._thread.join()
        self.peak_bytes = self._peak - self._start

    def _watch(self) -> None:
        while not self._done:
            self._peak = max(self._peak, self._now())
            time.sleep(0.001)

    @staticmethod
    def _now() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def filled(model: nn.Module, **options: Any) -> dict[str, Any]:
    """Shard an adapted model whose base is on meta; return its base whole and how much of it this rank held."""
    inject(model, LoRAConfig(r=2))
    fabric = start(**options)
    fabric.setup(model)
    with gathered(model):
        state = {name: value.detach().clone() for name, value in model.state_dict(keep_vars=True).items()}
    spread = any(is_sharded(parameter) for parameter in model.parameters())
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    return {"state": {n: v for n, v in state.items() if ".lora_" not in n}, "buffers": buffers, "spread": spread}


def built(directory: Path, make: Any) -> nn.Module:
    with torch.device("meta"):
        return make(directory)


CASES: dict[str, Any] = {
    "llama": lambda d: on_meta(AutoModelForCausalLM, d),
    "tied": lambda d: on_meta(AutoModelForCausalLM, d),
    "gemma3": lambda d: on_meta(AutoModelForCausalLM, d),
    "experts": lambda d: on_meta(AutoModelForCausalLM, d),
    "body": lambda d: on_meta(AutoModelForSequenceClassification, d, num_labels=3),
    "gpt": lambda d: GPT(),
    "buffer": lambda d: Computed(),
}
BROKEN: dict[str, Any] = {
    "lacking": lambda d: on_meta(AutoModelForCausalLM, d),
    "of another shape": lambda d: on_meta(AutoModelForCausalLM, d),
    "truncated": lambda d: on_meta(AutoModelForCausalLM, d),
    "without a shard": lambda d: on_meta(AutoModelForCausalLM, d),
    "empty": lambda d: GPT(),
    "nowhere": lambda d: GPT(),
    "no code": lambda d: Positions(),
}


def cases(directory: Path) -> dict[str, Any]:
    """Every base that can be filled, whole again."""
    found: dict[str, Any] = {}
    for name, make in CASES.items():
        options = {"min_shard_numel": 0}
        if name in ("gpt", "buffer"):
            options["base_weights"] = str(directory / name)
        found[name] = filled(built(directory / name, make), **options)
    found["offloaded"] = filled(built(directory / "llama", CASES["llama"]), min_shard_numel=0, cpu_offload=True)
    return found


def refusals(directory: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, make in BROKEN.items():
        options = {} if name == "nowhere" else {"base_weights": str(directory / name)}
        try:
            filled(built(directory / name, make), **options)
        except (ValueError, FileNotFoundError) as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def gradients(directory: Path) -> dict[bool, Any]:
    """Return the first gradients of a model that was there early, and of one that is built when it is needed."""
    found: dict[bool, Any] = {}
    for early in (True, False):
        module = OnMeta(str(directory / "llama"), early)
        fit(None, module, FSDPLoRAStrategy(min_shard_numel=0), limit_train_batches=1)
        found[early] = module.gradients
    return found


def memory(directory: Path) -> dict[str, int]:
    model = built(directory / "large", lambda d: on_meta(AutoModelForCausalLM, d))
    inject(model, LoRAConfig(r=2))
    fabric = start()
    with Memory() as memory:
        fabric.setup(model)
    held = sum(p.to_local().nbytes if is_sharded(p) else p.nbytes for p in model.parameters())
    return {"peak": memory.peak_bytes, "held": held, "whole": sum(p.nbytes for p in model.parameters())}


PARTS = {part.__name__: part for part in (cases, refusals, gradients, memory)}


if __name__ == "__main__":
    report(Path(sys.argv[1]), PARTS[sys.argv[2]](Path(sys.argv[1])))
