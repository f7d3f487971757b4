"""The quickstart on two processes, each with its share of the frozen base: ``Trainer(strategy="fsdp_lora")``.

The LightningModule and the LightningDataModule are the quickstart's, unchanged. ``python examples/fsdp_trainer.py``
starts both processes, and so does ``torchrun --nproc-per-node=2 examples/fsdp_trainer.py``; on GPUs add
``--accelerator gpu``. With ``--strategy megatron_lora --devices 3`` the layers are split over the processes instead:
SmolLM2 has nine heads, which three processes divide. They see the same batches then, as one process would
(``--strategy auto --devices 1``), and have its losses.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two processes share the cores; before torch is imported

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from quickstart import Definitions, DefinitionWriter
from report import LossHistory, tidy_output
from smollm2 import smollm2, tiny_llama

from lightning_lora import LoRACallback, save_peft


def main() -> None:
    options = parse_options()
    tidy_output()
    L.seed_everything(0, verbose=False)
    base = tiny_llama() if options.tiny else smollm2()
    replicas = options.devices if options.strategy == "fsdp_lora" else 1
    data = Definitions(str(base), batch_size=16 // replicas)
    writer = DefinitionWriter(str(base), options.steps)
    losses = LossHistory()
    checkpoint = ModelCheckpoint(options.output / "checkpoints", "{step}", every_n_train_steps=options.steps)
    trainer = L.Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        strategy=options.strategy,  # or an object with options: FSDPLoRAStrategy(activation_checkpointing=True)
        callbacks=[LoRACallback(r=8), checkpoint, losses],
        use_distributed_sampler=replicas > 1,  # ranks that share a model draw the same order of data by themselves
        max_steps=options.steps,
        limit_val_batches=4,
        num_sanity_val_steps=0,
        logger=False,
        enable_model_summary=False,
        enable_progress_bar=options.progress,
    )
    [before] = trainer.validate(writer, data, verbose=False)
    trainer.fit(writer, data)
    [after] = trainer.validate(writer, data, verbose=False)
    save_peft(writer.model, options.output / "peft")  # on all processes: the first one writes
    if trainer.is_global_zero:
        size = Path(checkpoint.best_model_path).stat().st_size / 1e6
        print("Losses:", ", ".join(f"{loss:.6f}" for loss in losses.losses))
        print(f"Held-out perplexity {before['perplexity']:.1f} -> {after['perplexity']:.1f}")
        print(f"{checkpoint.best_model_path}: {size:.1f} MB, for any strategy and any number of processes")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--strategy", default="fsdp_lora", choices=("fsdp_lora", "megatron_lora", "auto"))
    parser.add_argument("--devices", type=int, default=2, help="processes (2)")
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps (16)")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("outputs") / "fsdp")
    parser.add_argument("--tiny", action="store_true", help="random Llama of 2 layers: offline, in seconds")
    parser.add_argument("--progress", action="store_true", help="show a progress bar")
    return parser.parse_args()


if __name__ == "__main__":
    main()
