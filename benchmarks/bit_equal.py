"""Show that a change keeps every strategy's losses and files to the bit: seeded runs of two checkouts, compared.

    python benchmarks/bit_equal.py --before ../before

runs the same small trainings with the package of ``--before`` and with this one, each strategy on two gloo ranks where
it takes several, and compares every loss, every tensor of the checkpoints, and every byte of the PEFT directories.
"""

import argparse
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
RUNS = {
    "auto": 1, "auto, DoRA": 1, "auto, biases and head": 1, "auto, experts": 1, "Fabric, auto": 1, "ddp": 2,
    "fsdp_lora": 2, "fsdp_lora, adapters in shards": 2, "Fabric, fsdp_lora": 2,
    "megatron_lora": 2, "megatron_lora, GPTModel": 2,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="another checkout of this repository")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    options = parser.parse_args()
    differing = []
    for name in options.only:
        with tempfile.TemporaryDirectory() as folder:  # one path for both, since files hold paths
            before, after = (results_of(name, one, Path(folder) / "run") for one in (options.before, HERE))
        different = sorted(key for key in before | after if before.get(key) != after.get(key))
        differing += different
        print(
            f"{name}: {len(before)} values, " + (f"DIFFERENT: {', '.join(different)}" if different else "equal"),
            flush=True,
        )
    sys.exit(bool(differing))


def results_of(name: str, checkout: Path, folder: Path) -> dict[str, str]:
    """Run one training with the package of a checkout; return its losses and the hashes of its files."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    ranks = []
    for rank in range(RUNS[name]):
        own = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": RUNS[name],
            "LOCAL_WORLD_SIZE": RUNS[name],
            "GROUP_RANK": 0,
        }
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "run", "OMP_NUM_THREADS": 1}
        if RUNS[name] == 1:
            own = {"OMP_NUM_THREADS": 1}
        environment = {**os.environ, **{key: str(value) for key, value in own.items()}, "PYTHONPATH": str(checkout)}
        command = [sys.executable, __file__, "--run", name, "--folder", str(folder)]
        ranks.append(
            subprocess.Popen(
                command, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    outputs = [rank.communicate()[0] for rank in ranks]
    for rank, output in zip(ranks, outputs, strict=True):
        if rank.returncode != 0:
            sys.exit(f"{name} with {checkout} failed:\n{output[-4000:]}")
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".json" and path.parent == folder:
            found |= json.loads(path.read_text())
        elif path.is_file() and path.suffix != ".ckpt" and "base" not in path.parts:
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def run(name: str, folder: Path) -> None:
    """Train a few steps on this rank and write what came out as ``rank<n>.json``."""
    warnings.simplefilter("ignore")
    import lightning as L
    import torch

    import lightning_lora

    L.seed_everything(0, verbose=False)
    rank = int(os.environ.get("RANK", 0))
    values = {"package": str(Path(lightning_lora.__file__).parent.name)}
    if name.startswith("Fabric"):
        values |= fabric_run(name.partition(", ")[2], folder)
    else:
        values |= trainer_run(name, folder)
    for path in sorted(folder.rglob("*.ckpt")) if rank == 0 else ():
        content = torch.load(path, weights_only=True)
        content.pop("pytorch-lightning_version", None)
        values |= {f"{path.name}{key}": value for key, value in leaves(content)}
    (folder / f"rank{rank}.json").write_text(json.dumps({f"rank {rank} {key}": value for key, value in values.items()}))


def leaves(value: Any, path: str = "") -> Any:
    """Yield every value inside a checkpoint with its path; tensors as a hash of their bytes."""
    import torch

    if isinstance(value, dict):
        for key, one in value.items():
            yield from leaves(one, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, one in enumerate(value):
            yield from leaves(one, f"{path}/{index}")
    elif isinstance(value, torch.Tensor):
        data = value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        yield path, f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()}"
    else:
        yield path, repr(value)


def config() -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=128, tie_word_embeddings=False, attention_dropout=0.0,
    )  # fmt: skip


def built(name: str) -> Any:
    """Return a seeded model of transformers."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen3ForCausalLM

    torch.manual_seed(1)
    if "experts" in name:
        own = {"num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 128, "num_key_value_heads": 2}
        return MixtralForCausalLM(
            MixtralConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, **own)
        )
    return Qwen3ForCausalLM(config())


def settings(name: str) -> dict[str, Any]:
    """Return the fields of LoRAConfig of a run."""
    if "DoRA" in name:
        return {"use_dora": True, "dropout": 0.1}
    if "experts" in name:
        return {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    if "biases" in name:
        return {
            "bias": "all",
            "modules_to_save": ["lm_head"],
            "target_modules": ["q_proj", "v_proj"],
            "use_rslora": True,
        }
    return {"dropout": 0.1}


def batches() -> Any:
    import torch

    ids = torch.randint(0, 128, (16, 12), generator=torch.Generator().manual_seed(2))
    return torch.utils.data.DataLoader(ids, batch_size=2)


def trainer_run(name: str, folder: Path) -> dict[str, str]:
    import lightning as L
    import torch
    from lightning.pytorch.callbacks import ModelCheckpoint

    from lightning_lora import FSDPLoRAStrategy, LoRACallback, gpt_model, save_peft

    is_gpt = "GPTModel" in name
    base = folder / "base"
    if is_gpt and int(os.environ["RANK"]) == 0:
        built(name).save_pretrained(base)

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = None if is_gpt else built(name)
            self.losses: list[str] = []

        def configure_model(self) -> None:
            if is_gpt and self.model is None:
                torch.distributed.barrier()
                self.model = gpt_model(base)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if is_gpt:
                positions = torch.arange(batch.shape[1])[None].expand_as(batch)
                loss = self.model(batch, positions, None, labels=batch).mean()
            else:
                loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
            self.losses.append(loss.item().hex())
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    from lightning_lora import MegatronLoRAStrategy

    strategy: Any = name.partition(",")[0]
    if name == "fsdp_lora, adapters in shards":
        strategy = FSDPLoRAStrategy(shard_adapters=True)
    if is_gpt:
        strategy = MegatronLoRAStrategy(tensor_parallel_size=2, base_weights=str(base))
    module = Module()
    trainer = L.Trainer(
        accelerator="cpu", devices=RUNS[name], strategy=strategy, max_epochs=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, accumulate_grad_batches=2, gradient_clip_val=0.5, default_root_dir=folder,
        callbacks=[LoRACallback(r=4, **settings(name)), ModelCheckpoint(folder, filename="run")],
    )  # fmt: skip
    trainer.fit(module, batches())
    save_peft(module, folder / "adapter")
    return {f"loss {index}": loss for index, loss in enumerate(module.losses)}


def fabric_run(strategy: str, folder: Path) -> dict[str, str]:
    import torch
    from lightning.fabric import Fabric

    from lightning_lora import LoRAConfig, inject, save_peft

    ranks = int(os.environ.get("WORLD_SIZE", 1))
    fabric = Fabric(accelerator="cpu", devices=ranks, strategy=strategy)
    fabric.launch()
    model = inject(built(""), LoRAConfig(r=4, dropout=0.1)).train()
    model, optimizer = fabric.setup(
        model, torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    )
    losses = {}
    for index, batch in enumerate(batches()):
        with fabric.no_backward_sync(model, enabled=ranks > 1 and index % 2 == 0):
            loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            fabric.backward(loss / 2)
        losses[f"loss {index}"] = loss.item().hex()
        if index % 2:
            fabric.clip_gradients(model, optimizer, max_norm=0.5)
            optimizer.step()
            optimizer.zero_grad()
    fabric.save(folder / "run.ckpt", {"model": model, "optimizer": optimizer})
    save_peft(model, folder / "adapter")
    return losses


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        run(sys.argv[2], Path(sys.argv[4]))
    else:
        main()
