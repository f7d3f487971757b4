"""A loop of one's own with Fabric, on two processes that never hold the whole base: ``Fabric(strategy="fsdp_lora")``.

The model is built without values, under ``fabric.init_module(empty_init=True)``; each process then reads its own slices
of the safetensors file. The checkpoint is the one that ``fsdp_trainer.py``, DDP or a single process read.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes share the cores; before torch is imported

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from quickstart import Definitions
from report import tidy_output
from smollm2 import smollm2, tiny_llama
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from lightning_lora import LoRAConfig, inject, save_peft
from lightning_lora.fabric import FSDPLoRAStrategy


def main() -> None:
    options = parse_options()
    tidy_output()
    base = tiny_llama() if options.tiny else smollm2()
    strategy = FSDPLoRAStrategy(base_weights=str(base))
    fabric = Fabric(accelerator=options.accelerator, devices=options.devices, strategy=strategy)
    fabric.launch()

    with fabric.init_module(empty_init=True):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    model = inject(model, LoRAConfig(r=8))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model, optimizer = fabric.setup(model, torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0, fused=True))

    data = Definitions(str(base))
    fabric.seed_everything(0, verbose=False)
    loader = fabric.setup_dataloaders(DataLoader(data.learned, 8, shuffle=True, collate_fn=data.collate))
    model.train()
    for step, batch in zip(range(2 * options.steps), loader, strict=False):
        accumulating = step % 2 == 0
        with fabric.no_backward_sync(model, enabled=accumulating):
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
            fabric.backward(loss / 2)
        if not accumulating:
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            mean = fabric.all_reduce(loss.detach())
            fabric.print(f"step {step // 2 + 1}: loss {mean:.2f}", flush=True)

    fabric.save(options.output / "adapter.ckpt", {"model": model, "optimizer": optimizer, "step": options.steps})
    save_peft(model, options.output / "peft")
    fabric.print(f"{options.output / 'adapter.ckpt'}: {(options.output / 'adapter.ckpt').stat().st_size / 1e6:.1f} MB")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=2, help="processes (2)")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps, of two batches each (8)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("outputs") / "fsdp")
    parser.add_argument("--tiny", action="store_true", help="random Llama of 2 layers: offline, in seconds")
    return parser.parse_args()


if __name__ == "__main__":
    main()
